"""Every experiment and every gin part: it loads, it says what it is, and its model can be built."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepdistill_jax.commands.configurables import defaults
from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.commands.gin_statements import Reader
from stepdistill_jax.commands.shipped import (
    OLD_NAMES,
    find_config,
    shipped_configs,
    shipped_folder,
)
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, abstract_params, init_params
from stepdistill_jax.models.families import model_config
from stepdistill_jax.models.sharding import LAYOUTS, make_mesh
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.training.config import OptimizerConfig

CONFIGS = shipped_configs()
GIN = shipped_folder("gin")
PARTS = sorted(path.relative_to(GIN).as_posix() for path in GIN.rglob("*.gin"))
MAIN = "train.gin"
T5_VOCABULARY = 32128

# parameters of T5 v1.1 base with an untied head (transformers' google/t5-v1_1-base: 247,577,856)
BASE_PARAMETERS = 247_577_856


# what a config leaves to its user
NEEDED = {"finetune": ["TASK=mine", "INIT_FROM=models/t5"]}


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nn.meta.unbox(tree)))


def with_part(part: str, folder: pathlib.Path) -> str:
    """A config of train.gin, one part of each kind, and the given part last."""
    objectives = "step_by_step" if part.startswith("losses/") else "label_only"
    kinds = ("models/t5_v1_1.gin", f"objectives/{objectives}.gin", "optimizers/adamw.gin")
    includes = [MAIN, *(k for k in kinds if k.split("/")[0] != part.split("/")[0])]
    includes += [part] * (part != MAIN)
    text = "".join(f'include "{name}"\n' for name in includes)
    path = folder / "config_of_a_part.gin"
    path.write_text(text + 'TASK = "delivery"\nTRAIN_STEPS = 20\n')
    return str(path)


def test_the_configs_of_the_documentation_are_there():
    arms = ("label_only", "step_by_step", "copy_control")
    expected = {f"demo_{arm}" for arm in arms} | {"cqa_cpu_tiny", "svamp_cpu_tiny"}
    expected |= {"cqa_base_label_only", "paper_cqa", "paper_svamp"}
    assert expected <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_loads_and_its_model_can_be_built(name):
    config, _ = load_config(name, NEEDED.get(name, ()))
    model = model_config(
        config.model_family,
        config.model_size,
        vocab_size=T5_VOCABULARY,
        dtype=config.dtype,
        dropout_rate=config.dropout_rate,
        remat_policy=config.remat_policy,
    )
    parameters = count(abstract_params(model))
    assert parameters == BASE_PARAMETERS if config.model_size == "base" else parameters > 0
    make_mesh(config.layout)


# Parameters of the official directories (google/t5-v1_1-*, t5-*, google/mt5-*, byt5-*, umt5-*), by
# their sizes: vocabulary x width, layers, and the head where it is one of its own
PUBLISHED = {
    ("t5_v1_0", "small"): 60_506_624,
    ("t5_v1_0", "base"): 222_903_552,
    ("t5_v1_0", "large"): 737_668_096,
    ("t5_v1_0", "xl"): 2_851_598_336,
    ("t5_v1_0", "xxl"): 11_307_321_344,
    ("t5_v1_1", "small"): 76_961_152,
    ("t5_v1_1", "base"): BASE_PARAMETERS,
    ("t5_v1_1", "large"): 783_150_080,
    ("t5_v1_1", "xl"): 2_849_757_184,
    ("t5_v1_1", "xxl"): 11_135_332_352,
    ("mt5", "small"): 300_176_768,
    ("byt5", "small"): 299_637_760,
    ("byt5", "base"): 581_653_248,
    ("umt5", "small"): 306_601_984,
    # KerasHub's presets t5gemma_s_s_ul2 and t5gemma_b_b_ul2; the others as transformers counts them
    ("t5gemma", "small"): 312_517_632,
    ("t5gemma", "base"): 591_490_560,
    ("t5gemma", "large"): 1_241_761_792,
    ("t5gemma", "ml"): 2_200_345_344,
    ("t5gemma", "xl"): 3_766_980_608,
    ("t5gemma", "2b-2b"): 5_596_853_760,
    ("t5gemma", "9b-2b"): 12_292_375_296,
    ("t5gemma", "9b-9b"): 20_333_401_088,
}
VOCABULARIES = {"mt5": 250_112, "byt5": 384, "umt5": 256_384, "t5gemma": 256_000}


@pytest.mark.parametrize(("family", "size"), PUBLISHED, ids=str)
def test_a_published_size_has_the_published_number_of_parameters(family, size):
    vocab_size = VOCABULARIES.get(family, T5_VOCABULARY)
    assert (
        count(abstract_params(model_config(family, size, vocab_size=vocab_size)))
        == (PUBLISHED[family, size])
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_it_is_for(name):
    text = CONFIGS[name].read_text()
    header = re.match(r"(#.*\n)+", text)[0]
    for word in ("Run:", "Expected:", "Cost:", "Differs from", "Required:", "Commonly overridden:"):
        assert word in header
    assert f"stepdistill train {name} " in header
    for other in re.findall(r"configs/(\w+)\.gin", header):
        assert other in CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_includes_and_then_literals(name):
    lines = [line for line in CONFIGS[name].read_text().splitlines() if line and line[0] != "#"]
    includes = [line for line in lines if line.startswith("include ")]
    assert includes[0] == 'include "train.gin"'
    assert lines[: len(includes)] == includes
    value = "(%gin.REQUIRED|[^@%]+)"
    assert all(re.fullmatch(rf"[\w.]+ = {value}", line) for line in lines[len(includes) :])


def test_finetuning_has_the_settings_of_the_paper_and_names_all_that_it_needs():
    config, _ = load_config("finetune", NEEDED["finetune"])
    paper, _ = load_config("paper_cqa", ["TASK=mine", "INIT_FROM=models/t5", "MODEL_SIZE=tiny"])
    assert config == paper
    with pytest.raises(InputError) as caught:
        load_config("finetune")
    assert str(caught.value).endswith(
        "finetune.gin: TASK and INIT_FROM have no default; bind them there, or pass --set TASK=VALUE"
        " --set INIT_FROM=VALUE"
    )


@pytest.mark.parametrize("part", PARTS)
def test_a_part_loads_and_includes_no_part(part, tmp_path):
    text = (GIN / part).read_text()
    assert "include" not in [line.split(" ")[0] for line in text.splitlines()]
    assert text.startswith("#")
    config, _ = load_config(with_part(part, tmp_path))
    assert config.task == "delivery"


@pytest.mark.parametrize("value", ["9b-2b", "'9b-2b'"])
def test_a_size_of_two_sides_is_a_bare_word_too(value, tmp_path):
    path = with_part("models/t5gemma.gin", tmp_path)
    assert load_config(path, [f"MODEL_SIZE={value}"])[0].model_size == "9b-2b"


def test_the_parts_do_what_their_names_say(tmp_path):
    def load(part):
        return load_config(with_part(part, tmp_path))[0]

    for arm, names in {
        "label_only": ["label"],
        "step_by_step": ["label", "rationale"],
        "copy_control": ["label", "copy"],
    }.items():
        assert [o.name for o in load(f"objectives/{arm}.gin").objectives] == names
    assert load("optimizers/adafactor.gin").optimizer.name == "adafactor"
    for name, layout in LAYOUTS.items():
        assert load(f"layouts/{name}.gin").layout == layout


PAPERS = ("cqa_base_label_only", "paper_anli", "paper_cqa", "paper_esnli", "paper_svamp")


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_configs_have_the_papers_settings(name):
    """Hsieh et al. 2023, section 4 and appendix A.1."""
    config, _ = load_config(name)
    assert config.batch_size == 64
    assert config.train_steps == 10_000
    assert (config.input_length, config.target_length) == (1024, 256)
    assert config.model_size == "base"
    assert config.init_from
    assert config.dtype == "float32"
    assert config.learning_rate == 5e-5
    assert config.data_fraction == 1.0
    assert config.optimizer == OptimizerConfig(
        name="adamw",
        schedule="linear",
        warmup_steps=0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    weights = [o.weight for o in config.objectives]
    assert weights == ([1.0] if name.endswith("label_only") else [0.5, 0.5])


def test_the_arms_of_the_demo_differ_in_their_objectives_alone():
    arms = [load_config(f"demo_{arm}")[0] for arm in ("label_only", "step_by_step", "copy_control")]
    plain = [config.to_json() for config in arms]
    for fields in plain:
        del fields["objectives"]
    assert plain[0] == plain[1] == plain[2]
    assert all(config.objectives[0] == arms[0].objectives[0] for config in arms)
    # the control's second objective is worth what the rationale is
    assert arms[1].objectives[1].weight == arms[2].objectives[1].weight


@pytest.mark.parametrize("part", PARTS)
def test_defaults_stand_in_the_dataclasses_alone(part):
    """A part binds what it is about; what it leaves open is not said a second time."""
    chosen = {"train.model_family", "optimizer.name"}  # one of several, of which one is the default
    for key, b in Reader().bindings(GIN / part).items():
        name, _, parameter = key.rpartition(".")
        if name and key not in chosen and not b.calls:
            assert b.value != defaults(name)[parameter]
    if part == MAIN:
        assert all(b.calls for b in Reader().bindings(GIN / part).values())


@pytest.mark.parametrize("form", ["{}", "{}.gin", "configs/{}.gin"])
@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_an_old_name_finds_the_config_that_took_its_place(form, old, new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(form.format(old)) == CONFIGS[new]
    assert old not in CONFIGS


@pytest.mark.parametrize("form", ["{}", "{}.gin", "configs/{}.gin"])
def test_a_shipped_config_is_found_by_name_from_any_folder(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, path in CONFIGS.items():
        assert find_config(form.format(name)) == path


def test_a_file_at_hand_goes_before_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "demo_step_by_step.gin"
    mine.write_text(f'include "{MAIN}"\n')
    assert find_config("demo_step_by_step.gin").resolve() == mine.resolve()


@pytest.mark.parametrize("name", ["other/demo_step_by_step.gin", "demo_step_by_step.yaml"])
def test_a_path_that_is_not_there_is_not_taken_for_a_shipped_config(name):
    with pytest.raises(InputError, match="no such config file"):
        find_config(name)


@pytest.mark.parametrize("form", ["optimizers/{}", "gin/optimizers/{}"])
def test_a_part_that_is_not_there_names_those_that_are(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"adam\.gin: no such config file or shipped part; "
    ) as caught:
        find_config(form.format("adam.gin"))
    beside = [part for part in PARTS if part.startswith("optimizers/")]
    assert "optimizers has " + ", ".join(part.partition("/")[2] for part in beside) in str(
        caught.value
    )
    assert "did you mean 'adamw.gin'?" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in PARTS if part.startswith("optimizers/")])
def test_an_optimizer_learns_in_20_steps(part, tmp_path):
    """The part's own rate, from the first step on, on one batch that repeats."""
    from stepdistill_jax.training.optimizer import make_optimizer

    config, _ = load_config(with_part(part, tmp_path), ["optimizer.warmup_steps=0"])
    model = T5Config(
        vocab_size=128,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dropout_rate=0.0,
    )
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(2, 100, (4, 16)), jnp.int32)
    targets = jnp.asarray(rng.integers(2, 100, (4, 16)), jnp.int32)
    batch = {
        "encoder_input_tokens": ids,
        "encoder_segment_ids": jnp.ones_like(ids),
        "decoder_input_tokens": jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_segment_ids": jnp.ones_like(targets),
    }
    tx = make_optimizer(config)
    params = init_params(model, jax.random.key(0))

    @jax.jit
    def step(params, opt_state):
        def loss_of(params):
            logits = EncoderDecoder(model).apply({"params": params}, batch)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = jax.jit(tx.init)(params), []
    for _ in range(20):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 1e-3, losses
