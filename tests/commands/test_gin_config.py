import ast
import dataclasses
import pathlib
import sys

import gin
import hypothesis
import optax
import pytest
from hypothesis import strategies as st

from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.data.objectives import Objective, label_only
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig
from stepdistill_jax.training.learning_rate import LearningRate

MINIMAL = """\
include "train.gin"
include "models/t5_v1_1.gin"
include "objectives/step_by_step.gin"
include "optimizers/adamw.gin"

TASK = "mine"
TRAIN_STEPS = 10
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a config into the current folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "mine.gin") -> str:
        pathlib.Path(name).write_text(text)
        return name

    return write


def refusal(*args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        load_config(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def weights(config) -> list[float]:
    return [objective.weight for objective in config.objectives]


# --set and its kin


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("BATCH_SIZE=32", "batch_size", 32),
        ("LEARNING_RATE=1e-3", "learning_rate", 1e-3),
        ("PACK=False", "pack", False),
        ("DROPOUT_BROADCAST=True", "dropout_broadcast", True),
        ("ATTENTION=xla", "attention", "xla"),
        ("INIT_FROM=None", "init_from", None),
        ("INIT_FROM=models/t5-v1_1-base", "init_from", "models/t5-v1_1-base"),
        ("TASK=my_task", "task", "my_task"),
        ("TASK='my task'", "task", "my task"),
        ("TASK_MODULE=my.tasks", "task_module", "my.tasks"),
        (" SEED = 3 ", "seed", 3),
        ("LAYOUT=@Layout()", "layout", Layout()),
        ("TASK=%DTYPE", "task", "float32"),
        ("train.dropout_rate=0.2", "dropout_rate", 0.2),
        ("train.batch_size=7", "batch_size", 7),
        ("train.grace_secs=5", "grace_secs", 5),
        ("train.remat_policy=none", "remat_policy", "elementwise"),
        ("train.token_weights={'label': 'w'}", "token_weights", {"label": "w"}),
    ],
)
def test_set_rebinds_macros_and_every_parameter_in_use(override, field, value):
    config, _ = load_config("demo_step_by_step", [override])
    assert getattr(config, field) == value
    assert type(getattr(config, field)) is type(value)


@hypothesis.given(st.text(min_size=1), st.integers(1, 10**9))
def test_set_takes_any_python_literal(task, steps):
    config, _ = load_config("demo_step_by_step", [f"TASK={task!r}", f"TRAIN_STEPS={steps}"])
    assert (config.task, config.train_steps) == (task, steps)


def test_set_reaches_the_optimizer_and_the_weights():
    config, _ = load_config(
        "demo_step_by_step", ["optimizer.warmup_steps=7", "step_by_step.rationale_weight=5"]
    )
    assert config.optimizer.warmup_steps == 7
    assert weights(config) == [1.0, 5]


@pytest.mark.parametrize(
    ("override", "names"),
    [("label_only", ["label"]), ("copy_control", ["label", "copy"]), ("@label_only()", ["label"])],
)
def test_set_objectives_takes_an_arm_by_its_bare_name(override, names):
    config, text = load_config("demo_step_by_step", [f"OBJECTIVES={override}"])
    assert [o.name for o in config.objectives] == names
    assert "step_by_step" not in text


def test_an_arm_by_its_bare_name_keeps_the_weights_that_the_config_binds():
    config, _ = load_config("demo_step_by_step", ["OBJECTIVES=step_by_step"])
    assert weights(config) == [1.0, 3.0]


def test_the_last_set_of_a_name_wins():
    assert load_config("demo_step_by_step", ["SEED=1", "SEED=2"])[0].seed == 2


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("BATCH_SIEZ=3", ["BATCH_SIEZ", "did you mean 'BATCH_SIZE'"]),
        ("batch_size=3", ["did you mean 'BATCH_SIZE'"]),
        ("FOO=3", ["demo_step_by_step.gin", "has no setting FOO", "TRAIN_STEPS"]),
        ("MODEL_DIR=x", ["--workdir"]),
        ("MIXTURE_OR_TASK_NAME=x", ["here it is TASK"]),
        (
            "label_only.label_weight=3",
            ["has no effect, since this config does not use label_only.label_weight"],
        ),
        ("optimizer.warmup=3", ["no parameter 'warmup'", "did you mean 'warmup_steps'"]),
        ("optimiser.b1=1", ["'optimiser'", "did you mean 'optimizer'"]),
        ("OBJECTIVES=lable_only", ["--set OBJECTIVES=", "did you mean 'label_only'"]),
        ("OBJECTIVES=@copy_contrl()", ["'copy_contrl'", "did you mean 'copy_control'"]),
        ("BATCH_SIZE=x", ["--set BATCH_SIZE=x", "'x'"]),
        (
            "BATCH_SIZE=0",
            ["--set BATCH_SIZE=0", "BATCH_SIZE must be a whole number of at least 1, not 0"],
        ),
        ("TRAIN_STEPS=10k", ["'10k'"]),
        ("PACK=no", ["True or False"]),
        ("TASK=[1,", ["neither a Python literal nor a word without quotes"]),
        ("TASK='x", ["neither a Python literal nor a word without quotes"]),
        ("TASK=%FO", ["%FO is not bound"]),
        ("TASK=@", ["--set TASK=@"]),
        ("BATCH_SIZE", ["expected NAME=VALUE"]),
        ("BATCH_SIZE=", ["expected a value"]),
        ("=3", ["expected NAME=VALUE"]),
        ("two words=3", ["expected NAME=VALUE"]),
        (
            "step_by_step.rationale_weight=-1",
            [
                "--set step_by_step.rationale_weight=-1",
                "weight must be a number of at least 0, not -1",
            ],
        ),
        ("optimizer.name=adam", ["did you mean 'adamw'"]),
        (
            "optimizer.name=3",
            ["--set optimizer.name=3: optimizer.name must be one of adamw, adafactor, not 3"],
        ),
        (
            "optimizer.b1=high",
            [
                "--set optimizer.b1=high",
                "optimizer.b1 must be a number of at least 0 and below 1, not 'high'",
            ],
        ),
        (
            "optimizer.warmup_steps=1.5",
            ["optimizer.warmup_steps must be a whole number of at least 0, not 1.5"],
        ),
        (
            "train.dropout_rate=True",
            ["train.dropout_rate must be a number of at least 0 and below 1, not True"],
        ),
        (
            "step_by_step.rationale_weight=all",
            [
                "--set step_by_step.rationale_weight=all",
                "weight must be a number of at least 0, not 'all'",
            ],
        ),
        ("TASK=5", ["--set TASK=5: TASK must be text, not 5"]),
        ("TASK=%SEED", ["SEED must be text, not 0"]),
        (
            "ATTENTION=flash",
            ["--set ATTENTION=flash", "ATTENTION must be one of auto, xla, pallas, not"],
        ),
        ("train.remat_policy=ful", ["--set train.remat_policy=ful", "elementwise, minimal, full"]),
    ],
)
def test_a_bad_set_is_one_line_that_names_it(override, parts):
    message = refusal("demo_step_by_step", [override])
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "culprit"),
    [
        (["OBJECTIVES=label_only", "step_by_step.rationale_weight=7"], "rationale_weight=7"),
        (["train.batch_size=7", "BATCH_SIZE=3"], "BATCH_SIZE=3"),
    ],
)
def test_a_set_without_effect_is_refused(overrides, culprit):
    message = refusal("demo_step_by_step", overrides)
    assert culprit in message
    assert "no effect" in message


def test_flags_as_t5x_users_type_them(write):
    write(MINIMAL)
    write("BATCH_SIZE = 16\nSEED = 4\n", "more.gin")
    config, _ = load_config(None, [], ["mine.gin", "more.gin"], ["SEED=5", "TASK='cqa'"])
    assert (config.batch_size, config.seed, config.task) == (16, 5, "cqa")
    assert "--gin.SEED=-1" in refusal("mine.gin", gin_bindings=["SEED=-1"])


def test_a_gin_part_can_be_laid_over_a_shipped_config():
    config, _ = load_config("demo_step_by_step", gin_files=["layouts/fsdp.gin"])
    assert config.layout == Layout(data=1, fsdp=-1, tensor=1)


# parts


def loaded_in_any_order(first: str, second: str, as_flags: bool, write):
    """The one config, or one line for each order, of two parts over the demo."""
    found = []
    for parts in ((first, second), (second, first)):
        config, files = "demo_step_by_step", parts
        if not as_flags:
            lines = "".join(f'include "{name}"\n' for name in ("demo_step_by_step.gin", *parts))
            config, files = write(lines + "SEED = 1\n"), ()
        try:
            found.append(load_config(config, gin_files=files)[0])
        except InputError as error:
            found.append(str(error))
    if isinstance(found[0], str):
        return found
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("as_flags", [True, False], ids=["--gin_file", "include"])
@pytest.mark.parametrize(
    ("first", "second", "values"),
    [
        ("memory/remat_full", "models/umt5", {"remat_policy": "full", "model_family": "umt5"}),
        ("models/umt5", "memory/bfloat16", {"dropout_rate": 0.0, "dtype": "bfloat16"}),
        ("optimizers/lora", "memory/bfloat16_moment", {"learning_rate": 5e-4}),
        ("layouts/fsdp", "paper/base", {"layout": Layout(fsdp=-1), "model_size": "base"}),
        ("paper/exact", "paper/xl", {"eval_every": 250, "max_decode_len": 63, "model_size": "xl"}),
        (
            "paper/exact",
            "objectives/label_only",
            {"objectives": label_only(input_template="{input}"), "checkpoint_every": 250},
        ),
        (
            "layouts/hybrid",
            "paper/xl",
            {"layout": Layout(fsdp=-1, dcn_data=-1), "model_size": "xl"},
        ),
    ],
)
def test_two_parts_give_the_same_in_any_order(write, first, second, values, as_flags):
    config = loaded_in_any_order(f"{first}.gin", f"{second}.gin", as_flags, write)
    assert {name: getattr(config, name) for name in values} == values
    if second == "memory/bfloat16_moment":
        assert (config.optimizer.mu_dtype, config.optimizer.warmup_steps) == ("bfloat16", 0)


@pytest.mark.parametrize("as_flags", [True, False], ids=["--gin_file", "include"])
@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        ("memory/remat_full", "memory/remat_minimal", "train.remat_policy"),
        ("layouts/data", "layouts/fsdp", "LAYOUT"),
        ("paper/base", "paper/xl", "BATCH_SIZE"),
        ("objectives/label_only", "objectives/copy_control", "OBJECTIVES"),
        ("optimizers/lora", "optimizers/adafactor", "train.optimizer"),
    ],
)
def test_two_parts_that_bind_one_thing_are_both_named_in_any_order(
    write, first, second, key, as_flags
):
    for message in loaded_in_any_order(f"{first}.gin", f"{second}.gin", as_flags, write):
        assert f"{first}.gin:" in message
        assert f"{second}.gin:" in message
        assert key in message


def test_what_two_parts_bind_may_be_bound_over_both(write):
    parts = ["memory/remat_full.gin", "memory/remat_minimal.gin"]
    config, _ = load_config("demo_step_by_step", ["train.remat_policy=full"], parts)
    assert config.remat_policy == "full"
    own = MINIMAL + 'train.remat_policy = "minimal"\n' + "".join(f"include '{p}'\n" for p in parts)
    assert load_config(write(own))[0].remat_policy == "minimal"


def test_a_part_says_its_thing_whole():
    """The demo warms up for 100 steps and weighs its rationales 3."""
    config, _ = load_config("demo_step_by_step", gin_files=["optimizers/adamw.gin"])
    assert config.optimizer == OptimizerConfig()
    config, _ = load_config("demo_step_by_step", gin_files=["objectives/step_by_step.gin"])
    assert weights(config) == [0.5, 0.5]


def test_a_file_goes_before_what_it_includes_wherever_the_include_stands(write):
    assert load_config(write("SEED = 4\n" + MINIMAL))[0].seed == 4
    write("SEED = 5\n", "part.gin")
    assert load_config(write("SEED = 4\n" + MINIMAL + 'include "part.gin"\n'))[0].seed == 4


def test_a_macro_that_no_file_binds_has_the_default_of_its_field(write):
    config, text = load_config(write(MINIMAL))
    default = TrainConfig(task="mine", train_steps=10)
    assert config == default
    assert f"BATCH_SIZE = {default.batch_size}\n" in text


# files


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("BATCH_SIEZ = 3", ["mine.gin:8", "BATCH_SIEZ", "did you mean 'BATCH_SIZE'"]),
        ("TRAIN_STEPS = 11", ["mine.gin:8", "TRAIN_STEPS is already bound in mine.gin:7"]),
        ("SEED = three", ["mine.gin:8", "three", "quotes"]),
        ("SEED = ", ["mine.gin:8"]),
        ("SEED 3", ["mine.gin:8"]),
        ("SEED = (1,", ["mine.gin:"]),
        ("SEED = 'x", ["mine.gin:8"]),
        ("SEED = $3", ["mine.gin:8"]),
        ("SEED = 'x'", ["mine.gin:8", "SEED", "'x'"]),
        ("SEED = %SEDE", ["mine.gin:8", "%SEDE is not bound", "SEED"]),
        ("trian.seed = 3", ["mine.gin:8", "'trian'", "did you mean 'train'"]),
        ("train.sed = 3", ["mine.gin:8", "'sed'", "did you mean 'seed'"]),
        ("OBJECTIVES = @step_by_stp()", ["mine.gin:8", "did you mean 'step_by_step'"]),
        ("label_only.label_weight = 3.0", ["mine.gin:8", "nothing uses label_only.label_weight"]),
        ('include "modles/t5_v1_1.gin"', ["mine.gin:8", "modles/t5_v1_1.gin"]),
        ('include "mine.gin"', ["mine.gin:8", "includes itself"]),
        ("import no_such_module", ["mine.gin:8", "no_such_module"]),
    ],
)
def test_a_bad_line_of_a_file_is_named_with_its_number(write, line, parts):
    message = refusal(write(MINIMAL + line + "\n"))
    for part in parts:
        assert part in message


def test_gin_itself_accepts_the_mistyped_macro_that_we_refuse():
    gin.clear_config()
    gin.parse_config("BATCH_SIEZ = 3")
    gin.clear_config()


def test_an_error_in_an_included_file_names_that_file(write):
    write("\n\nSEED = \n", "part.gin")
    assert refusal(write(MINIMAL + 'include "part.gin"\n')).startswith("part.gin:3:")


@pytest.mark.parametrize("name", ["TASK", "TRAIN_STEPS", "OBJECTIVES", "LEARNING_RATE"])
def test_what_has_no_default_must_be_bound(write, name):
    config = write('include "train.gin"\n' + f"SEED = 1\n{name} = %gin.REQUIRED\n")
    others = {
        "TASK": "x",
        "TRAIN_STEPS": 1,
        "OBJECTIVES": "label_only",
        "LEARNING_RATE": 0.1,
    }
    others = [f"{k}={v}" for k, v in others.items() if k != name]
    message = refusal(config, others)
    assert "mine.gin" in message
    assert f"--set {name}=" in message


def test_a_missing_config_names_the_nearest_shipped_one():
    assert "did you mean 'demo_step_by_step'" in refusal("demo_step_by_stp")
    assert "expected a config" in refusal(None)


def test_a_folder_is_no_config(tmp_path):
    assert "got a folder" in refusal(str(tmp_path))


def test_a_binary_file_is_no_config(tmp_path):
    (tmp_path / "x.gin").write_bytes(b"\xff\xfe\x00")
    assert "x.gin" in refusal(str(tmp_path / "x.gin"))


def test_a_config_without_train_says_how_to_begin(write):
    assert 'include "train.gin"' in refusal(write("TASK = 'x'\n"))


def test_a_config_may_build_on_a_shipped_experiment(write):
    config, _ = load_config(
        write('include "cqa_base_step_by_step.gin"\nOBJECTIVES = @label_only()\nSEED = 9\n')
    )
    assert (config.task, config.seed, weights(config)) == ("cqa", 9, [1.0])


def test_objectives_of_ones_own(write):
    config, text = load_config(
        write(
            MINIMAL
            + """
OBJECTIVES = [@label/Objective(), @hint/Objective()]
label/Objective.name = "label"
label/Objective.input_template = "predict: {input}"
label/Objective.target_template = "{label}"
hint/Objective:
    name = "hint"
    input_template = "hint: {input}"
    target_template = "{rationale}"
    weight = 0.25
"""
        )
    )
    assert config.objectives == (
        Objective("label", "predict: {input}", "{label}", 1.0),
        Objective("hint", "hint: {input}", "{rationale}", 0.25),
    )
    assert type(config.objectives[0]) is Objective
    assert load_config(write(text, "again.gin"))[0] == config


def test_a_users_module_may_register_a_configurable(write, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)  # it lies where its user stands
    (tmp_path / "my_objectives_for_gin.py").write_text(
        "import gin\nfrom stepdistill_jax.data.objectives import Objective\n"
        "@gin.configurable\n"
        "def my_arm(weight=1.0):\n"
        "    return (Objective('label', 'q: {input}', '{label}', weight),)\n"
    )
    config, text = load_config(
        write(
            "import my_objectives_for_gin\n"
            + MINIMAL
            + "OBJECTIVES = @my_arm()\nmy_arm.weight = 2.0\n"
        )
    )
    assert weights(config) == [2.0]
    assert load_config(write(text, "again.gin"))[0] == config


def test_a_module_may_be_imported_by_an_included_file(write, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rate_for_gin.py").write_text(
        "import gin\n\n@gin.configurable\ndef my_rate(x):\n    return x / 2\n"
    )
    write("from my_rate_for_gin import my_rate\n", "part.gin")
    lines = 'include "part.gin"\nLEARNING_RATE = @my_rate()\nmy_rate.x = 0.5\n'
    assert load_config(write(MINIMAL + lines))[0].learning_rate == 0.25


# optimizers and schedules

OWN = """\
import gin
import optax

@gin.configurable
def clipped_lion_for_gin(learning_rate, b1=0.9, clip=1.0):
    return optax.chain(optax.clip_by_global_norm(clip), optax.lion(learning_rate, b1=b1))

@gin.configurable
def needy_for_gin(learning_rate=gin.REQUIRED):
    return optax.sgd(learning_rate)
"""


@pytest.fixture
def module(write, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(OWN, "my_rules_for_gin.py")
    return "import my_rules_for_gin\n" + MINIMAL


def test_the_optimizer_may_be_a_function_of_a_users_module(write, module):
    """Function and arguments reach the run by name; the text reads back to the same."""
    config, text = load_config(
        write(
            module
            + "train.optimizer = @clipped_lion_for_gin()\n"
            + "clipped_lion_for_gin.learning_rate = @cosine()\ncosine.warmup_steps = 3\n"
            + "clipped_lion_for_gin.b1 = 0.8\n"
        ),
        ["clipped_lion_for_gin.clip=2.0", "LEARNING_RATE=0.01"],
    )
    own = config.optimizer
    assert own.name == "my_rules_for_gin.clipped_lion_for_gin"
    rate = LearningRate("cosine", warmup_steps=3)
    assert own.arguments == {"learning_rate": rate, "b1": 0.8, "clip": 2.0}
    again, same = load_config(write(text, "again.gin"))
    assert (again, same) == (config, text)
    assert "cosine.end_value = 0.0" in text
    assert "import my_rules_for_gin" in text
    assert "optimizer.b1" not in text  # ours is not asked


def test_the_optimizer_may_be_one_of_optax_by_its_name():
    """No module is needed for it, also from the command line and out of a deeper folder of optax."""
    overrides = ["train.optimizer=@optax.lion()", "optax.lion.learning_rate=@a/constant()"]
    config, _ = load_config("paper_cqa", [*overrides, "a/constant.warmup_steps=7"])
    assert config.optimizer.function is optax.lion
    assert config.optimizer.arguments == {"learning_rate": LearningRate("constant", 7)}
    overrides = ["train.optimizer=@optax.contrib.muon()", "optax.contrib.muon.learning_rate=0.1"]
    config, _ = load_config("paper_cqa", overrides)
    assert config.optimizer.name == "optax.contrib.muon"


def test_the_optimizer_may_stand_behind_a_macro_and_in_a_scope(write, module):
    config, _ = load_config(
        write(
            module
            + "RULE = @own/clipped_lion_for_gin()\ntrain.optimizer = %RULE\n"
            + "own/clipped_lion_for_gin.learning_rate = %LEARNING_RATE\n"
        )
    )
    assert config.optimizer.arguments == {"learning_rate": 5e-5}


def test_the_scope_of_the_optimizer_is_that_of_its_arguments(write, module):
    """As everywhere in gin: the warm-up that `config.gin` shows is the run's."""
    config, text = load_config(
        write(
            module
            + "train.optimizer = @own/clipped_lion_for_gin()\n"
            + "clipped_lion_for_gin.learning_rate = @cosine()\nown/cosine.warmup_steps = 50\n"
        )
    )
    assert config.optimizer.arguments == {"learning_rate": LearningRate("cosine", 50)}
    assert "own/cosine.warmup_steps = 50" in text


@pytest.mark.parametrize("schedule", ["constant", "rsqrt", "linear", "cosine"])
def test_our_optimizer_takes_a_schedule_by_name_or_as_a_reference(schedule):
    warm = ["optimizer.warmup_steps=5"]
    named, _ = load_config("paper_cqa", [f"optimizer.schedule={schedule}", *warm])
    assert named.optimizer.rate == LearningRate(schedule, 5)
    given, text = load_config(
        "paper_cqa", [f"optimizer.schedule=@{schedule}()", f"{schedule}.warmup_steps=5"]
    )
    assert given.optimizer.rate == LearningRate(schedule, 5)
    assert f"optimizer.schedule = @{schedule}()" in text


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ("train.optimizer = @clipped_lion_for_gin()", ["mine.gin:9: train.optimizer: ", "my_rules_for_gin.clipped_lion_for_gin: missing a required argument: 'learning_rate'"]),
        ("train.optimizer = @needy_for_gin()", ["mine.gin:9", "needy_for_gin.learning_rate has no default; bind it"]),
        ("train.optimizer = @optax.lio()", ["mine.gin:9", "did you mean 'optax.lion'"]),
        ("train.optimizer = @lion()", ["mine.gin:9", "did you mean 'optax.lion'"]),
        ("train.optimizer = @optax.squared_error()", ["unknown configurable 'optax.squared_error'"]),
        ("train.optimizer = @optax.lion", ["mine.gin:9: train.optimizer must be an `OptimizerConfig`, or @name() of a function"]),
        ("train.optimizer = @cosine()", ["mine.gin:9: train.optimizer must be an `OptimizerConfig`, or @name()"]),
        ("train.optimizer = @optax.lion()\noptax.lion.learning_rate = @optax.sgd\n", ["mine.gin:10: optax.lion.learning_rate must be plain"]),
        ("train.optimizer = @clipped_lion_for_gin()\nclipped_lion_for_gin.learning_rate = @cosine\n", ["mine.gin:10: clipped_lion_for_gin.learning_rate must be plain"]),
        ("train.optimizer = @optax.lion()\noptax.lion.learning_rate = @optax.lion()\n", ["refers to itself"]),
        ("train.optimizer = @optax.lion()\noptax.lion.b7 = 1\n", ["'b7'"]),
        ("optimizer.schedule = 'cosin'", ["mine.gin:9: optimizer.schedule must be one of", "did you mean 'cosine'"]),
        ("optimizer.schedule = @cosin()", ["mine.gin:9", "did you mean 'cosine'"]),
        ("optimizer.schedule = @cosine()\ncosine.warmup_steps = -1", ["mine.gin:10: cosine.warmup_steps must be a whole number of at least 0, not -1"]),
        ("optimizer.schedule = @cosine()\noptimizer.warmup_steps = 4", ["mine.gin:10: optimizer.warmup_steps: @cosine() does not use it; set cosine.warmup_steps"]),
        ("optimizer.schedule = @constant()\nconstant.end_value = 4", ["mine.gin:10", "constant has no parameter 'end_value'"]),
        ("train.optimizer = @optax.sgd()\noptimizer.clip_norm = 2.0", ["mine.gin:10: nothing uses optimizer.clip_norm"]),
    ],
)  # fmt: skip
def test_a_bad_optimizer_or_schedule_is_one_line_that_names_it(write, module, lines, parts):
    message = refusal(write(module + lines + "\n"))
    for part in parts:
        assert part in message


# state and the operative text


def test_loads_do_not_leak_into_each_other():
    first, _ = load_config("demo_step_by_step", ["SEED=7", "optimizer.b1=0.5"])
    second, _ = load_config("demo_step_by_step")
    assert (first.seed, second.seed) == (7, 0)
    assert (first.optimizer.b1, second.optimizer.b1) == (0.5, 0.9)
    refusal("demo_step_by_step", ["BATCH_SIZE=0"])
    assert gin.config_str() == ""


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["OBJECTIVES=label_only"],
        ["LAYOUT=@Layout()", "TASK='it''s'", "SEED=3"],
        ["optimizer.clip_norm=1e999"],
    ],
)
def test_the_operative_text_reads_back_to_the_same_run(write, overrides):
    config, text = load_config("demo_step_by_step", overrides)
    again, text_again = load_config(write(text))
    assert again == config
    assert text_again == text


def test_the_operative_text_says_every_field_of_the_run():
    config, text = load_config("demo_step_by_step")
    bound = dict(line.split(" = ", 1) for line in text.splitlines() if line)
    for field in dataclasses.fields(config):
        assert f"train.{field.name}" in bound
    for field in dataclasses.fields(config.optimizer):
        value = getattr(config.optimizer, field.name)
        assert ast.literal_eval(bound[f"optimizer.{field.name}"]) == value
    assert bound["step_by_step.rationale_weight"] == "3.0"
