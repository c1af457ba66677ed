"""Metrics of a SeqIO task on given answers: the oracle is `seqio.Evaluator` with the same answers."""

import itertools

import numpy as np
import pytest

from stepdistill_jax.data.vocabulary import EOS_ID, ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.metrics import TaskMetrics
from stepdistill_jax.tasks.registry import add_task

NUMBERS = itertools.count()
QUESTIONS = ["one", "two", "two", "three", "four"]
TARGETS = ["1", "2", "2", "3 drei", ""]
# one right, one without end of sequence, one with ids outside any vocabulary, one empty
ANSWERS = [[*b"4\x01"], [*b"zz"], [500, 3, EOS_ID], [*b"666"], [EOS_ID]]
SCORES = np.array([-0.5, -2.0, -0.25, -8.0, -0.125], np.float32)
TARGET_SCORES = np.array([-1.0, -3.0, -5.0, -0.5, 0.0], np.float32)


@pytest.fixture(scope="module")
def seqio():
    from stepdistill_jax.data.builder import tensorflow

    tensorflow()
    import seqio

    return seqio


@pytest.fixture
def added(seqio):
    """`added(metrics, postprocess=None, rows=None, **arguments)` registers a task and returns its name."""
    import tensorflow as tf

    names = []

    def add(metric_fns, postprocess_fn=None, rows=None, **arguments):
        def given(split, shuffle_files, seed=None):
            fields = (
                rows()
                if rows
                else {
                    "inputs": QUESTIONS,
                    "targets": TARGETS,
                    "id": list(range(len(TARGETS))),
                    "also": [["a", "b"]] * len(TARGETS),
                }
            )
            return tf.data.Dataset.from_tensor_slices(fields)

        feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
        name = f"answers_{next(NUMBERS)}"
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(given, splits=["train", "validation"]),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={"inputs": feature, "targets": feature},
            postprocess_fn=postprocess_fn,
            metric_fns=metric_fns,
            **arguments,
        )
        names.append(name)
        return name

    yield add
    for name in names:
        seqio.TaskRegistry.remove(name)


@pytest.fixture
def opened(tmp_path):
    """`opened(task)` returns its `TaskMetrics` on `validation`."""

    def open_(task):
        (part,) = load_task(task, split="validation", data_dir=tmp_path).parts
        return TaskMetrics.of(part, "validation")

    return open_


def by_evaluator(seqio, task):
    """Returns the results of `seqio.Evaluator` for the same answers and scores."""
    evaluator = seqio.Evaluator(
        task, seqio.EncDecFeatureConverter(pack=False), eval_split="validation"
    )
    longest = max(map(len, ANSWERS))
    padded = [ids + [0] * (longest - len(ids)) for ids in ANSWERS]
    metrics, _ = evaluator.evaluate(
        compute_metrics=True,
        predict_fn=lambda _: list(enumerate(padded)),
        score_fn=lambda _: list(enumerate(TARGET_SCORES)),
        predict_with_aux_fn=lambda _: (list(enumerate(padded)), {"scores": list(SCORES)}),
    )
    return metrics.result()[task]


def word_and_row(text, example=None, is_target=False):
    """Returns everything that SeqIO passes to a postprocessor."""
    return text, int(example["id"]), example["also"].tolist() if is_target else None


def hits(targets, predictions):
    same = [t[:2] == p[:2] for t, p in zip(targets, predictions, strict=True)]
    assert all(also == [b"a", b"b"] for _, _, also in targets)
    return {"hits": np.mean(same), "rows": len(targets)}


def letters(targets, predictions):
    import seqio

    total = sum(i * len(text) for text, i, _ in predictions)
    return {"letters": seqio.metrics.Scalar(total), "ends": np.float32(total / 7)}


def likelihood(targets, scores):
    return {
        "likelihood": np.mean(scores),
        "in_order": sum(i * s for (_, i, _), s in zip(targets, scores, strict=True)),
    }


def sure(targets, predictions, aux_values):
    return {"sure": np.exp(aux_values["scores"]).mean()}


def test_all_values_are_seqio_evaluators(seqio, added, opened):
    task = added([letters, likelihood, hits, sure], word_and_row)
    metrics = opened(task)
    assert metrics.reads_target_scores
    found = metrics.compute(ANSWERS, SCORES, TARGET_SCORES)
    expected = by_evaluator(seqio, task)
    expected["letters"] = expected["letters"].value
    assert found == pytest.approx(expected, rel=1e-6) and len(found) == 7
    assert found["likelihood"] == pytest.approx(-1.9) and found["in_order"] == pytest.approx(-14.5)
    assert metrics.compute(ANSWERS, SCORES, TARGET_SCORES) == found  # the second validation


def test_without_a_postprocessor_metrics_get_texts(seqio, added, opened):
    def equal(targets, predictions):
        assert targets == TARGETS
        return {"equal": np.mean([t == p for t, p in zip(targets, predictions, strict=True)])}

    task = added([equal])
    found = opened(task).compute(ANSWERS, SCORES)
    assert found == by_evaluator(seqio, task) == {"equal": 0.4}
    assert opened(task).reads_target_scores is False


def test_metric_objects_are_computed_as_seqio_evaluator_does(seqio, added, opened):
    import flax

    @flax.struct.dataclass
    class Tokens(seqio.metrics.CollectingMetric):
        model_output_type: seqio.metrics.ModelOutputType = seqio.metrics.ModelOutputType.PREDICTION

        def actual_compute(self, rows, features, target_field_name="targets", cached_targets=None):
            ids = np.asarray(self.values["model_output"])
            targets = [len(row[target_field_name]) for row in rows]
            values = {"tokens": int((ids > 0).sum()), "of_targets": sum(targets)}
            return values, {"targets": targets, "output": ids}

    task = added([], metric_objs=[Tokens.empty()])
    found = opened(task).compute(ANSWERS, SCORES)
    assert found == by_evaluator(seqio, task)
    assert found == {"tokens": 11, "of_targets": 14}


def test_a_dry_run_takes_the_targets_for_answers(added, opened):
    seen = []

    def equal(targets, predictions):
        seen.append(predictions)
        return {"equal": float(targets == predictions)}

    def scored(targets, scores):
        seen.append(list(scores))
        return {"scored": 1}

    assert opened(added([equal, scored])).try_out() == ["equal", "scored"]
    assert seen == [TARGETS, [-2, -2, -2, -7, -1]]


def raises(targets, predictions):
    raise KeyError("f1")


def no_dict(targets, predictions):
    return 0.5


def no_number(targets, predictions):
    return {"f1": "half"}


def many(targets, predictions):
    return {"f1": np.zeros(2)}


def twice(targets, predictions):
    return {"rows": 1}


@pytest.mark.parametrize(
    "metric, message",
    [
        (raises, r"metric raises, or the task's postprocess_fn, failed: KeyError: 'f1' at .*:\d+$"),
        (no_dict, r"metric no_dict returned a float; expected a dict of numbers"),
        (no_number, r"metric no_number returned \{'f1': 'half'\}; expected a dict of numbers"),
        (many, r"metric many returned \{'f1': array\(\[0., 0.\]\)\}"),
        (twice, r"metric twice: another metric also returns a value 'rows'"),
    ],
)
def test_a_broken_metric_is_named(added, opened, metric, message):
    def rows(targets, predictions):
        return {"rows": len(targets)}

    task = added([rows, metric])
    with pytest.raises(InputError, match=f"task '{task}', split 'validation': {message}") as error:
        opened(task).try_out()
    assert "\n" not in str(error.value)


def test_a_metric_with_other_arguments_is_refused(added, opened):
    with pytest.raises(InputError, match=r"must have positional arguments matching .* Got: \('a',"):
        opened(added([lambda a, b: {}]))


def test_a_text_among_the_values_is_left_out_and_said_once(seqio, added, opened, capsys):
    def shown(targets, predictions):
        return {"f1": 0.5, "sample": seqio.metrics.Text(predictions[0])}

    metrics = opened(added([shown]))
    assert metrics.compute(ANSWERS, SCORES) == metrics.compute(ANSWERS, SCORES) == {"f1": 0.5}
    assert capsys.readouterr().err.count("'sample' is a Text, so it is left out") == 1


def test_a_source_that_changed_after_it_was_tokenised_cannot_be_measured(added, opened):
    inputs = ["a", "b"]
    metrics = opened(added([no_number], rows=lambda: {"inputs": inputs, "targets": ["c", "d"]}))
    inputs[1] = "e"
    with pytest.raises(InputError, match="its source no longer gives the rows that were tokenised"):
        metrics.try_out()


def test_a_task_without_metrics_has_none(added, opened):
    assert opened(added([])) is None


def test_paired_tasks_are_measured_on_the_rows_that_have_a_label(seqio, added, tmp_path):
    """The task of rationales has a different order, and one row without a label."""
    seen = []

    def equal(targets, predictions):
        seen.append(targets)
        return {"equal": float(targets == predictions)}

    def labels():
        return {"inputs": ["p", "q", "r"], "targets": ["a", "b", "c"], "id": [1, 2, 3]}

    def reasons():
        return {"inputs": ["r", "x", "p"], "targets": ["i", "j", "k"], "id": [3, 9, 1]}

    names = [added([equal], rows=labels), added([equal], rows=reasons)]
    mixture = f"mixture_of_{names[0]}"
    seqio.MixtureRegistry.add(mixture, names, default_rate=1.0)
    (part,) = load_task(
        mixture,
        split="validation",
        task_objectives=dict(zip(names, ("label", "rationale"), strict=True)),
        data_dir=tmp_path,
    ).parts
    assert part.store.num_examples == 4
    assert TaskMetrics.of(part, "validation").try_out() == ["equal"]
    assert seen == [["a", "b", "c"]]


# --- add_task(metric=function)


def colours(split):
    for i, colour in enumerate(["red", "blue", "red"]):
        row = {"input": f"thing {i}", "label": colour, "rationale": f"since {i}"}
        yield row | {"llm_label": "green"}


def red_recall(targets, predictions):
    red = [p == "red" for t, p in zip(targets, predictions, strict=True) if t == "red"]
    return {"red_recall": np.mean(red)}


@pytest.fixture(scope="module")
def colour_task(seqio):
    add_task("colour_task", source=colours, splits=["train", "validation"], metric=red_recall)
    return "colour_task"


@pytest.mark.parametrize("objectives", ["step_by_step", "single_task", "label_only_llm"])
def test_a_function_given_to_add_task_gets_labels(colour_task, tmp_path, objectives):
    """They are gold labels, also if the objectives write a rationale first, or the teacher's label."""
    data = load_task(colour_task, split="validation", objectives=objectives, data_dir=tmp_path)
    (part,) = data.parts
    assert part.metric == "text_match"
    label = "because it is so the answer is {}" if objectives == "single_task" else "{}"
    ids = [[*ByteVocabulary().encode(label.format(x)), EOS_ID] for x in ("red", "blue", "pink")]
    metrics = TaskMetrics.of(part, "validation")
    assert metrics.compute(ids, np.zeros(3)) == {"red_recall": 0.5}
    assert metrics.try_out() == ["red_recall"]


def test_it_is_the_metric_of_the_registered_label_task(seqio, colour_task):
    assert seqio.TaskRegistry.get("colour_task_label").metric_fns == [red_recall]
    assert seqio.TaskRegistry.get("colour_task_rationale").metric_fns == []


@pytest.mark.parametrize(
    "metric, message",
    [
        ([red_recall], "metric: expected a name .text_match, value_match. or a function, got list"),
        ("f1", "metric: unknown name 'f1'"),
        (lambda gold, mine: {}, r"positional arguments matching .* Got: \('gold', 'mine'\)"),
    ],
)
def test_another_metric_is_refused_and_nothing_stays_registered(seqio, metric, message):
    with pytest.raises(InputError, match=message):
        add_task("never", source=colours, splits=["train"], metric=metric)
    assert not [n for n in seqio.TaskRegistry.names() if n.startswith("never")]
