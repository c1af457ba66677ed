"""`--choices`: what is written, what goes on, what is refused, and how far probabilities are trusted."""

import json

import numpy as np
import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.example import Example
from stepdistill_jax.data.objectives import Objective
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.decoding.choices import ChoiceScorer
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import DecodeOptions, engines, evaluate, export, load_model, predict
from stepdistill_jax.inference.accuracy import AccuracyCounts, in_words
from stepdistill_jax.inference.allowed_answers import Allowed
from stepdistill_jax.inference.calibration import Calibration
from stepdistill_jax.inference.evaluate import evaluate_tokens
from stepdistill_jax.inference.model import device_mesh

LABELS = ["smooth", "trouble", "slow pace"]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Compiles in half the time; tests of layouts are elsewhere."""
    monkeypatch.setattr(engines, "device_mesh", lambda _: None)


@pytest.fixture(scope="module")
def rows(questions):
    """50 rows with two or three choices of their own; the gold label is mostly among them."""
    orders = (["smooth", "trouble"], ["trouble", "slow pace", "smooth"], ["fast", "no"])
    return [q | {"id": i, "choices": orders[i % 7 % 3]} for i, q in enumerate(questions[:50])]


def test_each_row_has_the_likeliest_of_its_choices_and_the_probability_of_all(
    model_dir, rows, write_rows, read_rows_of, tmp_path
):
    summary = predict(model_dir, write_rows(rows), tmp_path / "out.jsonl", choices="row")
    found = read_rows_of(tmp_path / "out.jsonl")
    model = load_model(model_dir)
    encode = model.vocabulary.encode
    scores = ChoiceScorer(model.config)(
        model.params,
        [[*encode("predict: " + row["input"])[:39], 1] for row in rows],
        [[[*encode(choice), 1] for choice in row["choices"]] for row in rows],
    )
    for row, asked, of_row in zip(found, rows, scores, strict=True):
        assert list(row) == ["id", "label", "score", "probability", "choices"]
        assert row["label"] == asked["choices"][of_row.argmax()]
        assert row["score"] == pytest.approx(float(of_row.max()), abs=1e-5)
        want = np.exp(of_row) / np.exp(of_row).sum()
        assert list(row["choices"]) == asked["choices"]
        np.testing.assert_allclose(list(row["choices"].values()), want, rtol=1e-4)
        assert row["probability"] == row["choices"][row["label"]]
    assert len({row["label"] for row in found}) > 1
    gold = [row["label"] in row["choices"] for row in rows]
    right = [row["label"] == asked["label"] for row, asked in zip(found, rows, strict=True)]
    assert summary["accuracy"] == np.mean(right)
    assert (summary["invalid_labels"], summary["unfinished"]) == (0, 0)
    assert summary["gold_not_a_choice"] == gold.count(False) > 0
    golden = [
        row["choices"][asked["label"]]
        for row, asked in zip(found, rows, strict=True)
        if asked["label"] in asked["choices"]
    ]
    assert summary["log_loss"] == pytest.approx(-np.log(golden).mean())


def test_a_file_of_labels_the_tasks_labels_and_a_list_are_the_same(
    model_dir, questions, write_rows, tmp_path
):
    source = write_rows(questions[:20])
    (tmp_path / "labels.txt").write_text("\ufeffsmooth\n\n  trouble \r\n", encoding="utf-8")
    (tmp_path / "labels.json").write_text('["smooth", "trouble"]')
    outputs = []
    for i, choices in enumerate(
        ["labels", ["smooth", "trouble"], tmp_path / "labels.txt", str(tmp_path / "labels.json")]
    ):
        predict(model_dir, source, tmp_path / f"{i}.jsonl", choices=choices)
        outputs.append((tmp_path / f"{i}.jsonl").read_bytes())
    assert len(set(outputs)) == 1 and outputs[0].count(b'{"smooth": ') == 20


def test_a_temperature_flattens_the_probabilities_and_leaves_label_and_score(
    model_dir, questions, write_rows, read_rows_of, tmp_path
):
    source = write_rows(questions[:20])
    predict(model_dir, source, tmp_path / "1.jsonl", choices=LABELS)
    predict(model_dir, source, tmp_path / "4.jsonl", choices=LABELS, choices_temperature=4.0)
    for sharp, flat in zip(
        read_rows_of(tmp_path / "1.jsonl"), read_rows_of(tmp_path / "4.jsonl"), strict=True
    ):
        assert (sharp["label"], sharp["score"]) == (flat["label"], flat["score"])
        want = np.array(list(sharp["choices"].values())) ** 0.25
        np.testing.assert_allclose(list(flat["choices"].values()), want / want.sum(), rtol=1e-4)


def test_a_stopped_run_goes_on_with_the_same_bytes_and_calibration(
    model_dir, rows, small_windows, write_rows, tmp_path
):
    source, out, whole = write_rows(rows), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    small_windows(20)
    want = predict(model_dir, source, whole, choices="row")
    windows = small_windows(20, stop_in=3)
    with pytest.raises(KeyboardInterrupt):
        predict(model_dir, source, out, choices="row")
    summary = predict(model_dir, source, out, choices="row")
    assert windows == [20, 20, 10, 10], "two windows were kept"
    assert out.read_bytes() == whole.read_bytes()
    for name in set(summary) - {"rows_per_second"}:
        assert summary[name] == want[name], name


@pytest.mark.slow
def test_one_device_begins_and_eight_go_on(
    model_dir, rows, small_windows, write_rows, read_rows_of, monkeypatch, tmp_path
):
    source, out, whole = write_rows(rows), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    want = predict(model_dir, source, whole, choices="row")
    windows = small_windows(20, stop_in=2)
    with pytest.raises(KeyboardInterrupt):
        predict(model_dir, source, out, choices="row")
    monkeypatch.setattr(engines, "device_mesh", device_mesh)
    got = predict(model_dir, source, out, choices="row", batch_size=16)
    assert windows == [20, 20, 20, 10]
    for row, wanted in zip(read_rows_of(out), read_rows_of(whole), strict=True):
        assert row["label"] == wanted["label"]
        assert row["score"] == pytest.approx(wanted["score"], abs=1e-5)
        assert row["choices"] == pytest.approx(wanted["choices"], abs=1e-5)
    assert got["accuracy"] == want["accuracy"]


@pytest.mark.parametrize(
    "other", [{"choices": None}, {"choices": LABELS[::-1]}, {"choices_temperature": 2.0}], ids=str
)
def test_other_choices_begin_anew(model_dir, questions, small_windows, write_rows, tmp_path, other):
    source, out = write_rows(questions[:40]), tmp_path / "out.jsonl"
    windows = small_windows(20, stop_in=2)
    with pytest.raises(KeyboardInterrupt):
        predict(model_dir, source, out, choices=LABELS)
    predict(model_dir, source, out, **{"choices": LABELS, **other})
    assert windows[2:] == [20, 20]


@pytest.mark.slow
def test_the_rationale_is_decoded_beside_the_choice(
    model_dir, questions, write_rows, read_rows_of, tmp_path
):
    source = write_rows(questions[:20])
    predict(model_dir, source, tmp_path / "a.jsonl", with_rationale=True)
    predict(model_dir, source, tmp_path / "b.jsonl", with_rationale=True, choices=LABELS)
    for row, want in zip(
        read_rows_of(tmp_path / "b.jsonl"), read_rows_of(tmp_path / "a.jsonl"), strict=True
    ):
        assert row["rationale"] == want["rationale"] and row["label"] in LABELS


BAD_ROWS = {
    "no choices": ({}, "the field 'choices' is missing or empty, but `choices=row` needs it"),
    "an empty list": ({"choices": []}, "the field 'choices' is missing or empty"),
    # neither letter is in the vocabulary
    "the same ids": ({"choices": ["中", "a", "文"]}, "the labels '中' and '文' have the same ids"),
    "too long": ({"choices": ["a", "smooth " * 30]}, "the label 'smooth smooth"),
}


@pytest.mark.parametrize("fields, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_with_bad_choices_is_named_and_can_be_skipped(
    model_dir, write_rows, read_rows_of, tmp_path, fields, message
):
    good = {"input": "with rain", "choices": ["a", "b", " a "]}
    source, out = write_rows([good, {"input": "q"} | fields, good]), tmp_path / "out.jsonl"
    with pytest.raises(InputError) as error:
        predict(model_dir, source, out, choices="row")
    assert f"{source}:2: " in str(error.value) and message in str(error.value)
    assert not out.exists()
    summary = predict(model_dir, source, out, choices="row", on_error="skip")
    assert (summary["rows"], summary["skipped"]) == (2, 1)
    assert [list(row["choices"]) for row in read_rows_of(out)] == [["a", "b"]] * 2
    (skipped,) = read_rows_of(tmp_path / "out.jsonl.skipped.jsonl")
    assert skipped["line"] == 2 and message in skipped["error"]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_file_without_any_choices_is_told_the_other_ways(
    model_dir, write_rows, tmp_path, capsys, on_error
):
    source = write_rows([{"input": "q"}, {"input": "r", "choices": []}])
    argv = ["predict", model_dir, source, tmp_path / "out.jsonl", "--choices", "row"]
    assert main([str(a) for a in (*argv, "--on-error", on_error)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"{source}: no row has choices, which --choices row needs; pass --choices labels or a file of"
        " labels, or leave --choices out"
    )
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "with_choices, message",
    [
        (0, "test.jsonl: no row has choices, which --choices row needs; pass"),
        (
            3,
            "test.jsonl:4: the field 'choices' is missing or empty, but --choices row needs it (pass",
        ),
    ],
    ids=["none", "some"],
)
def test_evaluate_has_no_rows_to_skip(
    workdir, rows, lay_out, tmp_path, capsys, with_choices, message
):
    rows = [row | {"id": f"{row['id']}"} for row in rows[:6]]
    for row in rows[with_choices:]:
        del row["choices"]
    data_dir = lay_out(tmp_path / "data", rows)
    argv = ["evaluate", workdir, "--task", "roads", "--data-dir", data_dir, "--choices", "row"]
    assert main([str(a) for a in argv]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert f"{message} --choices labels or a file of labels, or leave --choices out" in line


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", b"\n \n", "expected at least two labels, got 0"),
        ("a.txt", b"yes\n", "expected at least two labels, got 1"),
        ("a.txt", b"yes\nno\n\nyes \n", r"the label 'yes' is repeated \(labels 1 and 3\)"),
        ("a.txt", b"yes\n\xff\n", "not UTF-8"),
        ("a.txt", "中\n文\n".encode(), "the labels '中' and '文' have the same ids"),
        (
            "a.txt",
            b"yes\n" + b"no " * 30,
            r"has \d+ ids, but the model was trained to write at most",
        ),
        ("a.json", b'{"yes": 1}', "expected a JSON list of labels"),
        ("a.json", b'["yes", ["no"]]', "the field 'label 2' must be text"),
        ("a.json", b'["yes", " "]', "label 2 is blank"),
    ],
    ids=["empty", "one", "twice", "bytes", "same ids", "long", "object", "list in it", "blank"],
)
def test_a_bad_file_of_labels_is_refused(model_dir, write_rows, tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=message) as error:
        predict(
            model_dir,
            write_rows([{"input": "a"}]),
            tmp_path / "out.jsonl",
            choices=tmp_path / name,
        )
    assert str(tmp_path / name) in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"choices": "no_such_file"}, "no such file; pass `row` to use each row's own"),
        ({"choices": "row", "num_beams": 2}, "`num_beams`: with `choices`, all"),
        ({"choices": "row", "max_decode_len": 3}, "`max_decode_len`: with `choices`, nothing"),
        (
            {"choices": "labels", "choices_temperature": 0.0},
            "`choices_temperature` must be a number of at least 0.01 and",
        ),
        ({"choices": "labels", "choices_temperature": float("nan")}, "`choices_temperature`"),
        ({"choices_temperature": 2.0}, "an effect only with `choices`"),
        ({"choices": ["a"]}, "at least two labels"),
    ],
    ids=str,
)
def test_bad_options_are_refused(model_dir, write_rows, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        predict(model_dir, write_rows([{"input": "a"}]), tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists()


def allowed(template="{label}", labels=()):
    objective = Objective("label", "predict: {input}", template)
    return Allowed(
        "labels",
        labels=labels,
        objective=objective,
        vocabulary=load_vocabulary("bytes"),
        most_ids=9,
    )


def test_a_label_is_encoded_as_a_training_target_is():
    ids = [105 + 3, 115 + 3, 32 + 3, 97 + 3, 1]
    assert allowed("is {label}", ("a", "b")).ids(Example("1", "x"))[0] == tuple(ids)
    with pytest.raises(InputError, match="a label alone has no probability"):
        allowed("{rationale} {label}", ("a", "b"))
    with pytest.raises(InputError, match="the task has no closed set of labels"):
        allowed()


def test_ctranslate2_gives_the_same_choices(model_dir, rows, write_rows, read_rows_of, tmp_path):
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    export(model_dir, tmp_path / "converted", format="ctranslate2")
    source = write_rows(rows)
    want = predict(model_dir, source, tmp_path / "a.jsonl", choices="row")
    got = predict(tmp_path / "converted", source, tmp_path / "b.jsonl", choices="row", batch_size=3)
    for row, wanted in zip(
        read_rows_of(tmp_path / "b.jsonl"), read_rows_of(tmp_path / "a.jsonl"), strict=True
    ):
        assert row["label"] == wanted["label"]
        assert row["score"] == pytest.approx(wanted["score"], abs=1e-4)  # measured 1e-5
        assert row["choices"] == pytest.approx(wanted["choices"], abs=1e-4)
    assert got["accuracy"] == want["accuracy"]
    assert got["log_loss"] == pytest.approx(want["log_loss"], abs=1e-4)


@pytest.fixture
def data_dir(tmp_path, rows, lay_out):
    return lay_out(tmp_path / "data", [row | {"id": f"{row['id']}"} for row in rows])


def test_evaluate_names_a_temperature_that_lowers_the_log_loss(workdir, data_dir, tmp_path, capsys):
    command = ["evaluate", str(workdir), "--task", "roads", "--data-dir", str(data_dir), "--json"]
    assert main([*command, "--choices", "row"]) == 0
    line, last = capsys.readouterr().out.splitlines()[-2:]
    first = json.loads(last)
    best = first["best_temperature"]
    assert f"lowest at temperature {best:.4g}" in line and "calibration error 0." in line
    kept = workdir / "predictions" / "roads-test-3-choices.jsonl"
    assert len(kept.read_text().splitlines()) == 50
    tempered = evaluate(
        workdir, task="roads", data_dir=data_dir, choices="row", choices_temperature=best
    )
    assert tempered["log_loss"] < first["log_loss"]
    assert tempered["best_temperature"] == pytest.approx(best, rel=0.04)  # the grid's next value
    assert tempered["accuracy"] == first["accuracy"]


def test_evaluate_of_ids_scores_labels(model_dir):
    model = load_model(model_dir)
    encode = model.vocabulary.encode
    inputs = [[*encode(f"predict: with rain {i}"), 1] for i in range(18)]
    choices = [[*encode(label), 1] for label in LABELS]
    scores = np.array(ChoiceScorer(model.config)(model.params, inputs, [choices] * 18))
    right = scores.argmax(axis=1) == np.arange(18) % 3
    asked = (model_dir, inputs, LABELS * 6, "text_match", LABELS)
    result = evaluate_tokens(*asked, DecodeOptions(choices="labels"))
    assert result["rows"] == 18 and result["invalid_labels"] == 0 and result["log_loss"] > 0
    assert result["accuracy"] == pytest.approx(right.mean())
    with pytest.raises(InputError, match="`choices=row`: rows of a SeqIO task"):
        evaluate_tokens(*asked, DecodeOptions(choices="row"))


def test_the_calibration_error_of_a_worked_example():
    calibration = Calibration()
    assert calibration.summary() == {}
    calibration.add([0.6, 0.4], [True, False])  # bin (8/15, 9/15]: 0.6 and 0.58, one of two right
    calibration.add([0.42, 0.58], [True, False])
    calibration.add([0.1, 0.9], [False, True])  # sure and right
    calibration.add([1.0, 0.0], [False, False])  # sure, and the gold label is no choice
    result = calibration.summary()
    gaps = abs(1 - 0.6 - 0.58) + abs(1 - 0.9) + abs(0 - 1.0)
    assert result["expected_calibration_error"] == pytest.approx(gaps / 4)
    assert result["log_loss"] == pytest.approx(-np.log([0.6, 0.42, 0.9]).mean())
    assert result["gold_not_a_choice"] == 1


@pytest.mark.parametrize("true, applied", [(2.0, 1.0), (0.5, 1.0), (2.0, 3.0)])
def test_the_temperature_that_labels_were_drawn_at_is_found(true, applied):
    rng = np.random.default_rng(0)
    calibration = Calibration(applied)
    for scores in rng.normal(0, 2, (4000, 4)):
        drawn = rng.choice(4, p=np.exp(scores / true) / np.exp(scores / true).sum())
        shown = np.exp(scores / applied) / np.exp(scores / applied).sum()
        calibration.add([float(f"{p:.6g}") for p in shown], np.arange(4) == drawn)
    assert calibration.summary()["best_temperature"] == pytest.approx(true, rel=0.08)


def test_without_a_wrong_answer_no_temperature_is_fitted():
    counts = AccuracyCounts("text_match")
    counts.add("a", "a", (), {"a": 0.9, "b": 0.1})
    counts.add("b", "b", (), {"a": 0.3, "b": 0.7})
    counts.add("a", "c", (), {"a": 0.9, "b": 0.1})  # wrong, but it says nothing about a temperature
    found = counts.summary()
    assert (found["best_temperature"], found["gold_not_a_choice"]) == (1.0, 1)
    said = in_words({**found, "unfinished": 0, "rows_per_second": 1.0})
    assert (
        "no temperature can be fitted, since all answers to rows with an allowed gold label" in said
    )
    counts.add("a", "b", (), {"a": 0.6, "b": 0.4})
    assert counts.summary()["best_temperature"] != 1.0


def test_labels_of_one_value_share_the_gold_probability_and_a_zero_is_no_infinity():
    calibration = Calibration()
    calibration.add([0.5, 0.3, 0.2], [True, False, True])
    assert calibration.summary()["log_loss"] == pytest.approx(-np.log(0.7))
    calibration.add([1.0, 0.0], [False, True])
    assert 300 < calibration.summary()["log_loss"] < 400
