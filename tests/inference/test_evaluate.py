"""`evaluate` reads SPLIT.jsonl of a prepared dataset and says what the answers are worth."""

import dataclasses
import json
import shutil

import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import write_model_files
from stepdistill_jax.inference import evaluate, load_model, predict
from stepdistill_jax.inference.accuracy import AccuracyCounts, in_words
from stepdistill_jax.inference.evaluate import evaluate_tokens
from stepdistill_jax.inference.rationale_quality import RationaleCounts


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, questions, lay_out):
    rows = [{"id": str(i), **q} for i, q in enumerate(questions[:70])]
    for row in rows[:20]:
        row |= {"rationale": "with sun , smooth pace", "llm_label": "smooth"}
    return lay_out(tmp_path_factory.mktemp("data"), rows, labels=("smooth", "trouble"))


def test_it_says_what_predict_says_and_keeps_the_answers(
    workdir, model_dir, data_dir, tmp_path, read_rows_of
):
    result = evaluate(workdir, task="roads", data_dir=data_dir, output=tmp_path / "r.json")
    source = data_dir / "roads" / "test.jsonl"
    want = predict(model_dir, source, tmp_path / "out.jsonl", task="roads", data_dir=data_dir)
    for name in set(want) - {"rows_per_second"}:
        assert result[name] == want[name]
    assert (result["task"], result["split"], result["step"]) == ("roads", "test", 3)
    assert json.loads((tmp_path / "r.json").read_text()) == result
    kept = workdir / "predictions" / "roads-test-3.jsonl"
    assert kept.read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_control_c_says_what_is_kept_only_if_it_is(
    workdir, model_dir, data_dir, small_windows, tmp_path, capsys
):
    model = shutil.copytree(workdir, tmp_path / "run")
    for path, kept in ((model, "predictions/roads-test-3.jsonl.partial"), (model_dir, "")):
        small_windows(40, stop_in=2)
        argv = ["evaluate", path, "--task", "roads", "--data-dir", data_dir]
        assert main([str(a) for a in argv]) == 130
        *_, line = capsys.readouterr().err.splitlines()
        told = (
            f": 40 finished rows are kept in {path / kept}; run the same command again to continue"
        )
        assert line == "stepdistill: interrupted" + (told if kept else "")


def test_answers_of_int8_weights_are_kept_apart(workdir, data_dir):
    evaluate(workdir, task="roads", data_dir=data_dir)
    kept = workdir / "predictions" / "roads-test-3.jsonl"
    before = kept.read_bytes()
    result = evaluate(workdir, task="roads", data_dir=data_dir, quantization="int8")
    assert (result["rows"], result["step"]) == (70, 3)
    assert kept.with_name("roads-test-3-int8.jsonl").read_bytes() != before == kept.read_bytes()


def test_rationales_are_decoded_and_measured(workdir, data_dir, tmp_path, read_rows_of, capsys):
    argv = ["evaluate", workdir, "--task", "roads", "--data-dir", data_dir, "--with-rationale"]
    assert main([str(a) for a in (*argv, "--output", tmp_path / "r.json", "--json")]) == 0
    *said, line = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result == json.loads((tmp_path / "r.json").read_text())
    answers = read_rows_of(workdir / "predictions" / "roads-test-3-rationale.jsonl")
    counted = RationaleCounts("text_match", ("smooth", "trouble"))
    examples = open_prepared("roads", data_dir).examples("test")
    for example, answer in zip(examples, answers, strict=True):
        counted.add(example, answer["label"], answer["rationale"])
    unfinished = result["rationale"].pop("unfinished")
    assert result["rationale"] == counted.summary()
    assert result["rationale"]["references"] == 20 and result["rationale"]["chrf"] > 0
    assert result["rationale"]["teacher"]["consistent"] == 20
    assert 0 < unfinished < 70  # `predict` counts them
    assert "unfinished_rationales" not in result
    assert f"unfinished {unfinished}" in said[1] and said[1].startswith("rationales: ROUGE-L 0.")
    assert said[2].startswith("label and rationale: consistent ")
    assert (
        said[3]
        == "the teacher's own: consistent 20 (100.0%)  inconsistent 0 (0.0%)  names no label 0 (0.0%)"
    )


def test_rationales_of_a_model_without_that_objective_are_refused(
    model_dir, data_dir, tmp_path, tiny_config, task_info, spiece
):
    own = shutil.copytree(model_dir, tmp_path / "own")
    info = dataclasses.replace(task_info, objectives=task_info.objectives[:1])
    write_model_files(own, tiny_config, load_vocabulary(spiece), info)
    with pytest.raises(
        InputError, match=r"`with_rationale`: .* has no objective named 'rationale'"
    ):
        evaluate(own, task="roads", data_dir=data_dir, with_rationale=True)


def test_a_model_directory_stays_as_it_is(model_dir, data_dir):
    before = sorted(p.name for p in model_dir.iterdir())
    result = evaluate(model_dir, task="roads", split="test", data_dir=data_dir)
    assert result["rows"] == 70 and result["step"] is None
    assert sorted(p.name for p in model_dir.iterdir()) == before


def test_unknown_names_and_impossible_outputs_are_refused(workdir, data_dir, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for options, message in (
        ({"task": "raods"}, "roads"),
        ({"task": "roads", "split": "tset"}, "test"),
        ({"task": "roads", "step": 4}, "4"),
        ({"task": "roads", "output": tmp_path}, "`output` .* got a folder"),
        ({"task": "roads", "output": file / "r.json"}, "`output` .*r.json: cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(workdir, data_dir=data_dir, **options)


def test_rows_that_changed_after_the_training_give_a_warning(workdir, data_dir, tmp_path, capsys):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    file = copy / "stepdistill.json"
    info, dataset = json.loads(file.read_text()), open_prepared("roads", data_dir)
    for fingerprint, warned in ((dataset.fingerprint, False), ("0" * 64, True)):
        info["provenance"]["dataset"] = fingerprint
        file.write_text(json.dumps(info))
        evaluate(copy, task="roads", data_dir=data_dir)
        assert ("roads was prepared again from other rows" in capsys.readouterr().err) == warned


def test_a_workdir_that_has_lost_its_checkpoints_is_named(workdir, data_dir, tmp_path):
    lost = shutil.copytree(workdir, tmp_path / "lost", ignore=shutil.ignore_patterns("checkpoints"))
    (lost / "run.json").touch()
    with pytest.raises(InputError, match="lost: this workdir has no folder checkpoints"):
        evaluate(lost, task="roads", data_dir=data_dir)


def test_a_model_directory_has_no_steps_to_evaluate(model_dir, data_dir):
    with pytest.raises(InputError, match=r"`step` 5: .* is a model directory"):
        evaluate(model_dir, task="roads", data_dir=data_dir, step="5")


def counted(pairs, metric="text_match", labels=(), choices=()):
    counts = AccuracyCounts(metric, labels)
    for prediction, label in pairs:
        counts.add(prediction, label, choices)
    return counts.summary()


def test_the_counts_of_a_worked_example():
    pairs = [("a", "a"), ("b", "a"), ("c", "a"), ("b", "b"), ("b", "")]
    assert counted(pairs, labels=("a", "b")) == {
        "rows": 5,
        "accuracy": 0.5,
        "majority_baseline": 0.75,
        "rows_with_label": 4,
        "invalid_labels": 1,
        "collapsed": False,
    }


def test_equations_are_compared_and_checked_by_value():
    pairs = [("10.0", "( 8 + 2 )"), ("no idea", "4"), ("( 2 + 2 )", "( 1 + 3 )")]
    result = counted(pairs, "value_match")
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["invalid_labels"] == 1


def test_nothing_is_invalid_where_nothing_says_what_is_valid():
    assert counted([("x", "y")])["invalid_labels"] is None
    assert counted([("x", "y")], choices=("y",))["invalid_labels"] == 1


def test_a_collapsed_model_is_said_in_words():
    result = {**counted([("a", "a"), ("a", "b")]), "unfinished": 0, "rows_per_second": 1.0}
    assert result["collapsed"]
    assert "all 2 answers are the same: the model does not" in in_words(result)
    result = {**counted([("a", ""), ("a", "")]), "unfinished": 0, "rows_per_second": 1.0}
    assert "the same: unless this label is right for all rows" in in_words(result)
    assert "no accuracy: no row of this split has a gold label" in in_words(
        result | {"split": "test"}
    )
    result = {**counted([("a", "a"), ("a", "a")]), "unfinished": 0, "rows_per_second": 1.0}
    assert "the same" not in in_words(result)
    result = {**counted([("a", "a"), ("b", "b")]), "unfinished": 1, "rows_per_second": 1.0}
    assert "the same" not in in_words(result)
    assert "unfinished 1 (50.0%)" in in_words(result)


def test_tokens_are_evaluated_like_the_texts_that_they_were_made_of(model_dir, data_dir):
    rows = [json.loads(line) for line in (data_dir / "roads" / "test.jsonl").open()]
    vocabulary = load_model(model_dir).vocabulary
    result = evaluate_tokens(
        model_dir,
        [[*vocabulary.encode("predict: " + row["input"]), 1] for row in rows],
        [row["label"] for row in rows],
        metric="text_match",
        allowed=("smooth", "trouble"),
    )
    want = evaluate(model_dir, task="roads", data_dir=data_dir)
    for name in set(result) - {"rows_per_second"}:
        assert result[name] == want[name], name


def test_a_result_replaces_an_earlier_one_and_no_other_file(workdir, data_dir, tmp_path):
    path = tmp_path / "r.json"
    for text in ('{"task": "mine"}', "notes"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"r\.json: exists and was not written by `evaluate`"):
            evaluate(workdir, task="roads", data_dir=data_dir, output=path)
        assert path.read_text() == text
    path.unlink()
    for _ in range(2):
        evaluate(workdir, task="roads", data_dir=data_dir, output=path)
    assert json.loads(path.read_text())["task"] == "roads"
