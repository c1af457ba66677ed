"""A task of SeqIO's own kind with its metrics, trained: `seqio.Evaluator` on the exported model is the oracle."""

import json

import numpy as np
import pytest

from stepdistill_jax.commands.checkpoints import look
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import evaluate, export
from stepdistill_jax.runtime.checkpoints.manager import resolve_step, saved_steps
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.run import assemble

SETTINGS = {
    "batch_size": 8,
    "input_length": 48,
    "target_length": 16,
    "train_steps": 3,
    "eval_every": 1,
    "checkpoint_every": 1,
    "learning_rate": 3e-2,
    "dropout_rate": 0.0,
}
ROWS = 9
OF_ROUND = [0.25, 0.75, 0.5]  # what `turn` says of steps 1 to 3


def words(i):
    return ["left", "right", "up", "down"][i % 4]


@pytest.fixture(scope="module")
def seqio():
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    return seqio


@pytest.fixture(scope="module")
def add(seqio):
    """`add(name, metric_fns, postprocess_fn=None, splits=...)` registers a task as SeqIO's README does."""
    import tensorflow as tf

    def dataset_fn(split, shuffle_files, seed=None):
        start, count = (100, ROWS) if split == "validation" else (0, 24)
        numbers = range(start, start + count)
        return tf.data.Dataset.from_tensor_slices(
            {
                "question": [f"turn {i} {'so' * (i % 5)}" for i in numbers],
                "answer": [words(i) for i in numbers],
                "also_right": [[words(i), words(i + 1)] for i in numbers],
                "number": list(numbers),
            }
        )

    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    rekey = seqio.preprocessors.rekey
    keys = {
        "inputs": "question",
        "targets": "answer",
        "also_right": "also_right",
        "number": "number",
    }

    def added(name, metric_fns, postprocess_fn=None, splits=("train", "validation")):
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(dataset_fn, splits=splits),
            preprocessors=[
                lambda dataset: rekey(dataset, keys),
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos,
            ],
            output_features={"inputs": feature, "targets": feature},
            postprocess_fn=postprocess_fn,
            metric_fns=metric_fns,
        )
        return name

    return added


def all_right(text, example=None, is_target=False):
    """The gold answers are fields of the row, of which the model's target is only one."""
    number = int(example["number"])
    return (number, [x.decode() for x in example["also_right"]]) if is_target else (number, text)


def matches(targets, predictions):
    assert [i for i, _ in targets] == [i for i, _ in predictions]
    right = [text in answers for (_, answers), (_, text) in zip(targets, predictions, strict=True)]
    return {"match": 100 * np.mean(right), "rows": len(right)}


def letters(targets, predictions):
    import seqio

    overlap = [
        len(set(text) & set("".join(answers))) / (1 + len(text))
        for (_, answers), (_, text) in zip(targets, predictions, strict=True)
    ]
    weighed = sum(number * (1 + sum(map(ord, text))) for number, text in predictions)
    return {"overlap": seqio.metrics.Scalar(np.mean(overlap)), "weighed": weighed}


def likelihood(targets, scores):
    return {
        "likelihood": np.mean(scores),
        "of_rows": sum(number * score for (number, _), score in zip(targets, scores, strict=True)),
    }


@pytest.fixture(scope="module")
def trained(add, tmp_path_factory):
    """(task, workdir, folder of the data) of a run of three steps, each validated."""
    task, folder = (
        add("quiz", [matches, letters, likelihood], all_right),
        tmp_path_factory.mktemp("q"),
    )
    train(TrainConfig(task=task, **SETTINGS), workdir=folder / "run", data_dir=folder)
    return task, folder / "run", folder


@pytest.fixture(scope="module")
def expected(seqio, trained):
    """(values, scores of the targets) of `seqio.Evaluator` with transformers' T5 on the exported model."""
    import torch
    import transformers

    task, workdir, folder = trained
    export(workdir, folder / "model", step=3)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder / "model").eval()
    most = json.loads((folder / "model" / "stepdistill.json").read_text())["max_decode_len"]

    def each(dataset):
        for number, row in dataset.as_numpy_iterator():
            inputs = torch.tensor(row["encoder_input_tokens"][None].astype(np.int64))
            given = {"input_ids": inputs, "attention_mask": (inputs > 0).long()}
            yield int(number), given, torch.tensor(row["decoder_target_tokens"].astype(np.int64))

    @torch.no_grad()
    def predict_fn(dataset):
        found = []
        for number, given, _ in each(dataset):
            ids = model.generate(**given, max_new_tokens=most, do_sample=False, num_beams=1)
            found.append((number, np.pad(ids[0, 1:].numpy(), (0, most + 1 - ids.shape[1]))))
        return found

    @torch.no_grad()
    def score_fn(dataset):
        found = []
        for number, given, targets in each(dataset):
            log_probs = model(**given, labels=targets[None]).logits[0].log_softmax(-1)
            of_targets = log_probs.gather(-1, targets[:, None])[:, 0]
            found.append((number, float((of_targets * (targets > 0)).sum())))
        return found

    converter = seqio.EncDecFeatureConverter(pack=False)
    evaluator = seqio.Evaluator(task, converter, eval_split="validation")
    values, outputs = evaluator.evaluate(
        compute_metrics=True, predict_fn=predict_fn, score_fn=score_fn
    )
    values = values.result()[task]
    values["overlap"] = values["overlap"].value
    return values, outputs[task][seqio.metrics.ModelOutputType.SCORE]


@pytest.mark.slow
def test_evaluate_gives_seqio_evaluators_values(trained, expected):
    task, workdir, folder = trained
    result = evaluate(workdir, task=task, split="validation", step=3, data_dir=folder)
    assert result["metrics"] == pytest.approx(expected[0], rel=1e-4)
    assert result["metrics"]["rows"] == result["rows"] == ROWS
    assert len(set(result["metrics"])) == 6


@pytest.mark.slow
def test_validation_gives_seqio_evaluators_values(trained, expected):
    lines = [json.loads(x) for x in (trained[1] / "metrics.jsonl").read_text().splitlines()]
    found = [x for x in lines if x["step"] == 3 and "eval/validation/label_accuracy" in x]
    values = {name: found[0][f"eval/validation/{name}"] for name in expected[0]}
    assert values == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.slow
def test_answers_are_kept_next_to_the_numbers(trained, expected, read_rows_of):
    task, workdir, folder = trained
    evaluate(workdir, task=task, split="validation", step=3, data_dir=folder)
    kept = read_rows_of(workdir / "predictions" / f"{task}-validation-3.jsonl")
    validated = read_rows_of(workdir / "predictions" / f"{task}-validation-last.jsonl")
    assert [row["id"] for row in kept] == [str(i) for i in range(1, ROWS + 1)]
    assert [row["target"] for row in kept] == [words(100 + i) for i in range(ROWS)]
    assert len({row["label"] for row in kept}) > 1  # answers that differ, or nothing is compared
    assert [row["target_score"] for row in kept] == pytest.approx(expected[1], rel=1e-4)
    assert {row["step"] for row in validated} == {3}
    for row, of_validation in zip(kept, validated, strict=True):
        assert (row["label"], row["target"]) == (of_validation["label"], of_validation["target"])
        assert row["score"] == pytest.approx(of_validation["score"], abs=1e-4)
    best = read_rows_of(workdir / "predictions" / f"{task}-validation-best.jsonl")
    assert {row["step"] for row in best} == {resolve_step(workdir, "best")}


@pytest.mark.slow
def test_metrics_get_the_answers_that_choices_allow(trained, read_rows_of):
    task, workdir, folder = trained
    choices = ["left", "right", "up", "down"]
    asked = {"task": task, "split": "validation", "step": 3, "data_dir": folder}
    result = evaluate(workdir, **asked, choices=choices)
    kept = read_rows_of(workdir / "predictions" / f"{task}-validation-3-choices.jsonl")
    right = [row["label"] in (words(100 + i), words(101 + i)) for i, row in enumerate(kept)]
    assert result["metrics"]["match"] == pytest.approx(100 * np.mean(right))
    assert 0 < sum(right) < ROWS and {row["label"] for row in kept} <= set(choices)


@pytest.fixture(scope="module")
def turns(add):
    """A task whose metrics go up and down whatever is trained; `turns.start()` before each run."""

    class Turns:
        def start(self):
            self.values = iter([0.0, *OF_ROUND])  # the first is the dry run's

        def metric(self, targets, predictions):
            value = next(self.values)
            return {"turn": value, "loss_of_turn": value}

    found = Turns()
    add("turns", [found.metric])
    add("turns_of_train", [found.metric], splits=["train"])
    return found


@pytest.mark.parametrize(
    "name, step",
    [
        pytest.param("turn", 2, marks=pytest.mark.slow),
        pytest.param("loss_of_turn", 1, marks=pytest.mark.slow),
        pytest.param("loss/label", 3, marks=pytest.mark.slow),
    ],
)
def test_best_metric_chooses_the_step(turns, tmp_path, name, step):
    """Losses fall from step to step: by label accuracy, of which none is right, the last is best."""
    turns.start()
    config = TrainConfig(task="turns", best_metric=name, **SETTINGS | {"learning_rate": 1e-4})
    summary = train(config, workdir=tmp_path / "run", data_dir=tmp_path)
    assert summary["best_step"] == resolve_step(tmp_path / "run", "best") == step
    assert look(str(tmp_path / "run"), verify=False)["best"] == step
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    kept = (tmp_path / "run" / "predictions" / "turns-validation-best.jsonl").read_text()
    assert json.loads(kept.splitlines()[0])["step"] == step


@pytest.mark.slow
def test_a_best_metric_that_no_validation_gives_is_refused_before_the_first_step(turns, tmp_path):
    turns.start()
    config = TrainConfig(task="turns", best_metric="tern", **SETTINGS)
    with pytest.raises(
        InputError, match=r"`best_metric`: .* has no metric 'tern'; it has"
    ) as error:
        train(config, workdir=tmp_path / "run", data_dir=tmp_path)
    for name in ("label_accuracy", "loss/label", "loss_of_turn", "did you mean 'turn'"):
        assert name in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_best_metric_without_a_validation_split_is_refused(turns, tmp_path):
    config = TrainConfig(task="turns_of_train", best_metric="turn", **SETTINGS)
    with pytest.raises(InputError, match="`best_metric`: turns_of_train has no validation split"):
        train(config, workdir=tmp_path / "run", data_dir=tmp_path)


def broken(targets, predictions):
    return {"f1": predictions[0] / 2}


def like_ours(targets, predictions):
    return {"label_accuracy": 1.0}


@pytest.mark.parametrize(
    "metric, message",
    [
        (broken, r"metric broken, .* failed: TypeError"),
        (
            like_ours,
            r"its metric 'label_accuracy' has the same name as a metric that every validation",
        ),
    ],
)
def test_a_bad_metric_ends_a_run_before_its_first_step(add, tmp_path, metric, message):
    add(metric.__name__, [metric])
    config = TrainConfig(task=metric.__name__, **SETTINGS)
    with pytest.raises(InputError, match=message):
        train(config, workdir=tmp_path / "run", data_dir=tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mixture_has_the_metrics_of_each_task(seqio, add, tmp_path):
    """Every number that BEST_METRIC may name is in its validation."""

    def left(targets, predictions):
        return {"left": targets.count("left"), "loss_of_all": len(predictions)}

    def right(targets, predictions):
        return {"right": targets.count("right")}

    mixture = [(add("lefts", [left]), 1.0), (add("rights", [right]), 3.0)]
    seqio.MixtureRegistry.add("both_sides", mixture)
    config = {"task": "both_sides", "task_objectives": "single", **SETTINGS, "train_steps": 1}
    with pytest.raises(InputError, match="has no metric 'left'; it has") as error:
        assemble(TrainConfig(**config, best_metric="left"), tmp_path / "run", tmp_path)
    names = str(error.value).partition("it has ")[2].partition(";")[0].split(", ")
    assert {"lefts/left", "rights/right", "lefts/loss/label", "rights/label_accuracy"} < set(names)
    best = TrainConfig(**config, best_metric="lefts/loss_of_all")
    found = train(best, workdir=tmp_path / "run", data_dir=tmp_path)
    assert {f"eval/validation/{name}" for name in names} <= found.keys()
    assert found["eval/validation/lefts/left"] == sum(words(100 + i) == "left" for i in range(ROWS))
    (saved,) = saved_steps(tmp_path / "run").values()
    assert saved["rank"] == [-ROWS, -found["eval/validation/loss/label"]]
    result = evaluate(tmp_path / "run", task="both_sides", split="validation", data_dir=tmp_path)
    each = {name: of_task["metrics"] for name, of_task in result["tasks"].items()}
    assert each["rights"] == {"right": found["eval/validation/rights/right"]}
    assert each["lefts"]["loss_of_all"] == ROWS
    kept = tmp_path / "run" / "predictions"
    assert (kept / "lefts-validation-1.jsonl").is_file()
    rows = [json.loads(x) for x in (kept / "both_sides-validation-best.jsonl").open()]
    assert [(row["task"], row["id"]) for row in rows] == [
        (name, str(i)) for name in ("lefts", "rights") for i in range(1, ROWS + 1)
    ]
