"""Mixtures of a user's SeqIO tasks: the objective of each task, and how rows are drawn."""

import json
import textwrap

import numpy as np
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.evaluate import evaluate
from stepdistill_jax.runtime.metrics import read_metrics
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.task_data import shares_in_words
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.loop import train

# as in SeqIO's documentation: TaskRegistry.add twice, then MixtureRegistry.add
MODULE = """
    import functools, seqio, tensorflow as tf

    FEATURES = {
        name: seqio.Feature(seqio.ByteVocabulary(), add_eos=True) for name in ("inputs", "targets")
    }
    COLOURS = ["blue", "green", "red"]

    def rows(split, shuffle_files, part):
        numbers = range(40) if split == "train" else range(40, 52)
        texts = {
            "id": [f"{split} {i}" for i in numbers],
            "question": [f"colour {i % 3} of {i}" for i in numbers],
            "label": [COLOURS[i % 3] for i in numbers],
            "rationale": [f"because it is {i % 3}" for i in numbers],
        }
        dataset = tf.data.Dataset.from_tensor_slices(texts)
        return dataset if part == "label" else dataset.filter(lambda row: row["id"] != "train 7")

    @seqio.map_over_dataset
    def to_pair(row, prefix, target):
        return {
            "inputs": tf.strings.join([prefix, row["question"]]),
            "targets": row[target],
            **({"id": row["id"]} if WITH_IDS else {}),
        }

    WITH_IDS = IDS
    for part, prefix in (("label", "predict: "), ("rationale", "explain: ")):
        seqio.TaskRegistry.add(
            f"NAME_{part}",
            source=seqio.FunctionDataSource(
                functools.partial(rows, part=part), splits=["train", "validation"]
            ),
            preprocessors=[
                functools.partial(to_pair, prefix=prefix, target=part),
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=FEATURES,
        )
    seqio.MixtureRegistry.add("NAME", ["NAME_label", "NAME_rationale"], default_rate=1.0)
    seqio.MixtureRegistry.add("NAME_rates", [("NAME_label", 1), ("NAME_rationale", 3)])
    seqio.MixtureRegistry.add("NAME_zero", [("NAME_label", 1), ("NAME_rationale", 0)])
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Writes the module; `modules(with_ids)` returns its name, which is also the mixture's."""
    folder = tmp_path_factory.mktemp("modules")

    def written(with_ids=True):
        name = f"own_mixture_{'with' if with_ids else 'without'}_ids"
        text = textwrap.dedent(MODULE).replace("NAME", name).replace("= IDS", f"= {with_ids}")
        (folder / f"{name}.py").write_text(text)
        return name

    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(folder))
        yield written


def objectives_of(name):
    return {f"{name}_label": "label", f"{name}_rationale": "rationale"}


def load(name, folder, mixture="", **options):
    options = {"split": "train", "task_objectives": objectives_of(name)} | options
    return load_task(name + mixture, task_module=name, data_dir=folder, **options)


def test_tasks_with_ids_and_equal_rates_give_the_batches_of_one_dataset(modules, tmp_path):
    """The oracle is the same rows through `add_task`, where an example is one row."""
    from stepdistill_jax.tasks.registry import add_task

    name = modules()
    data = load(name, tmp_path)

    def rows(split):
        for i in range(40):
            label = ["blue", "green", "red"][i % 3]
            rationale = "" if i == 7 else f"because it is {i % 3}"
            yield {"input": f"colour {i % 3} of {i}", "label": label, "rationale": rationale}

    add_task("own_mixture_as_one", source=rows, splits=["train"])
    one = load_task("own_mixture_as_one", split="train", data_dir=tmp_path)
    assert [o.name for o in data.objectives] == ["label", "rationale"]
    assert [o.weight for o in data.objectives] == [0.5, 0.5]
    for pack in (True, False):
        ours, theirs = (Batches(d, 8, 64, 48, seed=3, pack=pack) for d in (data, one))
        for step in range(12):
            for group, other in zip(ours(step), theirs(step), strict=True):
                assert group.keys() == other.keys()
                for feature in group:
                    np.testing.assert_array_equal(group[feature], other[feature])
    (line,) = shares_in_words(data.shares())
    paired = f"{name}_label: {name}_label and {name}_rationale paired by id; 100.0% of the examples"
    assert line.startswith(paired)


@pytest.mark.parametrize(
    ("with_ids", "mixture"), [(True, "_rates"), (False, "_rates"), (False, "")]
)
def test_other_rows_are_drawn_by_their_rates(modules, tmp_path, with_ids, mixture):
    name = modules(with_ids)
    data = load(name, tmp_path, mixture)
    share = 0.75 if mixture else 0.5
    assert [part.name for part in data.parts] == [f"{name}_label", f"{name}_rationale"]
    batches = Batches(data, 200, 64, 48, seed=0)
    drawn = np.concatenate([batches.examples(step).stores for step in range(20)])
    assert abs(np.mean(drawn == 1) - share) < 0.03
    for group in batches(0):
        ids, tasks = group["decoder_objective_ids"], group["decoder_task_ids"]
        np.testing.assert_array_equal(
            ids, tasks
        )  # the first task gives labels, the other rationales
    rows = {(s["task"], s["objective"]): s["rows"] for s in data.shares()}
    expected = {(f"{name}_label", "label"): 1 - share, (f"{name}_rationale", "rationale"): share}
    assert rows == pytest.approx(expected)
    why = "the rates of its mixture differ" if mixture else "have no feature 'id'"
    assert [why in line for line in shares_in_words(data.shares())] == [True, True]


def test_a_mixture_trains_as_one_objective_only_if_the_user_says_so(modules, tmp_path):
    name = modules()
    with pytest.raises(InputError) as caught:
        load(name, tmp_path, task_objectives=None)
    text = str(caught.value)
    assert f'TASK_OBJECTIVES = {{"{name}_label": "label", "{name}_rationale": "rationale"}}' in text
    assert 'TASK_OBJECTIVES = "single"' in text and "\n" not in text
    data = load(name, tmp_path, task_objectives="single")
    assert [o.name for o in data.objectives] == ["label"]
    assert [part.name for part in data.parts] == [f"{name}_label", f"{name}_rationale"]
    (group,) = Batches(data, 4, 64, 48, seed=0)(0)
    assert set(np.unique(group["decoder_objective_ids"])) == {0, 1}


@pytest.mark.parametrize(
    ("mixture", "options", "message"),
    [
        ("_zero", {}, r"the rate of \w+_rationale is 0; set a rate above 0, or leave"),
        ("", {"task_objectives": {"NAME_labl": "label"}}, r"no task '\w+_labl' .*did you mean"),
        (
            "",
            {"task_objectives": {"NAME_label": "label", "NAME_rationale": "reason"}},
            r"there is no objective 'reason' \(`objectives` has label, rationale\)",
        ),
        (
            "",
            {"task_objectives": {"NAME_label": "label", "NAME_rationale": "label"}},
            r"no task has the objective rationale, which `objectives` lists \(the tasks have label\)",
        ),
        (
            "",
            {"objectives": "label_only"},
            r"there is no objective 'rationale' \(`objectives` has label\)",
        ),
    ],
)
def test_what_a_mixture_is_refused_for(modules, tmp_path, mixture, options, message):
    name = modules()
    options = json.loads(json.dumps(options).replace("NAME", name))
    with pytest.raises(InputError, match=message) as caught:
        load(name, tmp_path, mixture, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_mixture_of_plain_tasks_trains_and_is_evaluated(modules, tmp_path):
    """If one task gives an objective, its loss is that of the objective."""
    name = modules()
    config = TrainConfig(
        task=f"{name}_rates",
        task_module=name,
        objectives=step_by_step(1.0, 3.0),
        task_objectives=objectives_of(name),
        batch_size=16,
        input_length=64,
        target_length=48,
        train_steps=2,
        eval_every=2,
        checkpoint_every=2,
        learning_rate=1e-3,
        dropout_rate=0.0,
    )
    workdir = tmp_path / "run"
    last = train(config, workdir=workdir, data_dir=tmp_path / "data")
    lines = read_metrics(workdir)
    step = next(line for line in lines if line["step"] == 1 and "loss" in line)
    label, rationale = step["loss/label"], step["loss/rationale"]
    assert step["loss"] == pytest.approx(label + 3 * rationale, rel=1e-6)
    assert step[f"loss/{name}_label/label"] == pytest.approx(label, rel=1e-6)
    assert step[f"loss/{name}_rationale/rationale"] == pytest.approx(rationale, rel=1e-6)
    assert f"loss/{name}_label/rationale" not in step
    found = {k.removeprefix("eval/validation/"): v for k, v in last.items() if "eval/" in k}
    assert found[f"{name}_label/label_accuracy"] == found["label_accuracy"]
    assert found[f"{name}_rationale/loss/rationale"] == pytest.approx(found["loss/rationale"])
    assert f"{name}_rationale/label_accuracy" not in found
    result = evaluate(workdir, task=f"{name}_rates", split="validation", data_dir=tmp_path / "data")
    assert result["task"] == f"{name}_rates" and result["rows"] == 12
    assert result["accuracy"] == found["label_accuracy"]


def rows_of(split, explained=True):
    """Returns ten examples; only the first six of train have a rationale."""
    for i in range(10):
        rationale = f"it is {i % 2}" if explained and split == "train" and i < 6 else ""
        yield {"input": f"row {i}", "label": "ab"[i % 2], "rationale": rationale}


@pytest.fixture(scope="module")
def tagged():
    """Registers the mixture `tagged_rates` of an `add_task` dataset's tasks, with rates 1 and 3."""
    import seqio

    from stepdistill_jax.tasks.registry import add_task

    add_task("tagged", source=rows_of, splits=["train", "validation"])
    seqio.MixtureRegistry.add("tagged_rates", [("tagged_label", 1), ("tagged_rationale", 3)])
    seqio.MixtureRegistry.add("tagged_reasons", ["tagged_rationale"], default_rate=1.0)
    return "tagged_rates"


def test_shares_count_the_examples_that_have_a_target(tagged, tmp_path):
    """Three rationales for each label, though four of ten examples have none."""
    data = load_task(tagged, split="train", data_dir=tmp_path)
    rows = {share["objective"]: share["rows"] for share in data.shares()}
    assert rows == pytest.approx({"label": 0.25, "rationale": 0.75})
    groups = [Batches(data, 100, 64, 64, seed=0, pack=False)(step) for step in range(10)]
    drawn = [int((group["decoder_loss_weights"][:, 0] > 0).sum()) for g in groups for group in g]
    assert abs(sum(drawn[1::2]) / sum(drawn) - 0.75) < 0.05


def test_a_task_without_targets_in_validation_is_left_out_there(tagged, tmp_path):
    data = load_task(tagged, split="validation", data_dir=tmp_path)
    assert [part.name for part in data.parts] == ["tagged_label"]
    assert Batches(data, 4, 64, 64, seed=0, shuffle=False).num_examples == 10


@pytest.mark.parametrize("task", ["tagged", "tagged_label"])
def test_objectives_for_a_task_that_has_its_own_are_refused(tagged, tmp_path, task):
    with pytest.raises(
        InputError,
        match=rf"`task_objectives`: this is only for mixtures of tasks without objectives, and {task} is not such a mixture; leave `task_objectives` out",
    ):
        load_task(task, split="train", data_dir=tmp_path, task_objectives="single")
    with pytest.raises(
        InputError, match="tagged_label already has the objective label of dataset tagged; leave"
    ):
        given = {"tagged_label": "rationale"}
        load_task(tagged, split="train", data_dir=tmp_path, task_objectives=given)


def test_the_tasks_that_answers_are_compared_on(tagged, modules, tmp_path):
    """They belong to the evaluated mixture, not to the one that the model was trained on."""
    import seqio

    from stepdistill_jax.tasks.mixtures import label_tasks

    name, objectives = modules(), ["label", "rationale"]
    load(name, tmp_path)
    mixed = f"{name}_and_tagged"
    seqio.MixtureRegistry.add(mixed, [name, tagged], default_rate=1.0)
    get, given = seqio.MixtureRegistry.get, objectives_of(name)
    assert label_tasks(get(mixed), objectives, given) == [f"{name}_label", "tagged"]
    assert label_tasks(get(tagged), objectives, given) == ["tagged"]
    assert label_tasks(get(tagged), ["answer"], None) == ["tagged"]  # all of its tasks are there
    own = [f"{name}_label", f"{name}_rationale"]
    assert label_tasks(get(name), objectives, None) == own
    with pytest.raises(InputError, match="none of its tasks has the objective label"):
        label_tasks(get("tagged_reasons"), objectives, None)
