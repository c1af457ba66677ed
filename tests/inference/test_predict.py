"""`predict` on a tiny untrained model: what it writes, when it goes on, and what it refuses."""

import csv
import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import load_model, predict
from stepdistill_jax.models.sharding import Layout

# `inference.predict` is the function
predict_module = importlib.import_module("stepdistill_jax.inference.predict")


@pytest.fixture(scope="module")
def answers(model_dir, questions, tmp_path_factory):
    """(summary, rows, bytes) of a whole run."""
    folder = tmp_path_factory.mktemp("whole")
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(q) + "\n" for q in questions))
    summary = predict(model_dir, source, folder / "out.jsonl", batch_size=32)
    written = (folder / "out.jsonl").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    return summary, [json.loads(line) for line in written.splitlines()], written


def test_rows_come_in_input_order_with_id_label_and_score(questions, answers, model_dir):
    _, rows, _ = answers
    assert [list(row) for row in rows] == [["id", "label", "score"]] * len(questions)
    assert [row["id"] for row in rows] == [
        q.get("id", str(number)) for number, q in enumerate(questions, 1)
    ]
    model = load_model(model_dir)
    ids = [
        [*model.vocabulary.encode("predict: " + q["input"])[:39], 1] for q in questions[:50]
    ]  # 40 is the model's input length
    one_by_one = LabelDecoder(model.config, max_decode_len=8, batch_size=1)(model.params, ids)
    for row, answer, score in zip(rows[:50], one_by_one.ids, one_by_one.scores, strict=True):
        assert row["label"] == model.vocabulary.decode(answer)
        assert row["score"] == pytest.approx(float(score), abs=1.1e-5)
        assert row["score"] == round(row["score"], 6) <= 0


def test_the_summary_counts_what_the_rows_show(questions, answers, model_dir):
    summary, rows, _ = answers
    assert summary["rows"] == len(rows) == 300
    right = [row["label"] == q["label"] for row, q in zip(rows, questions, strict=True)]
    assert summary["accuracy"] == np.mean(right)
    assert summary["majority_baseline"] == 0.5
    valid = ("smooth", "trouble")
    assert summary["invalid_labels"] == sum(row["label"] not in valid for row in rows) > 0
    assert 0 < summary["unfinished"] < 300
    vocabulary = load_model(model_dir).vocabulary
    long = [len(vocabulary.encode("predict: " + q["input"])) + 1 > 40 for q in questions]
    assert summary["cut_inputs"] == sum(long) > 0
    assert summary["rows_per_second"] > 0 and summary["skipped"] == 0


def test_accuracy_is_absent_where_no_row_has_a_label(model_dir, write_rows, tmp_path):
    source = write_rows([{"input": "with rain"}, {"input": "with sun"}])
    summary = predict(model_dir, source, tmp_path / "out.jsonl")
    assert "accuracy" not in summary and "majority_baseline" not in summary
    assert summary["rows"] == 2


@pytest.mark.parametrize("batch_size", [1, 64])
def test_labels_do_not_depend_on_batch_size_or_order(
    model_dir, questions, answers, write_rows, read_rows_of, tmp_path, batch_size
):
    order = np.random.default_rng(batch_size).permutation(60)
    source = write_rows([questions[i] | {"id": int(i)} for i in order])
    predict(model_dir, source, tmp_path / "out.jsonl", batch_size=batch_size)
    rows = read_rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == order.tolist()
    for row in rows:
        want = answers[1][row["id"]]
        assert row["label"] == want["label"]
        assert row["score"] == pytest.approx(want["score"], abs=1e-5)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    model_dir, questions, small_windows, write_rows, tmp_path, capsys
):
    source, out, whole = write_rows(questions), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    small_windows(40)
    want_summary = predict(model_dir, source, whole, batch_size=32)
    windows = small_windows(40, stop_in=4)
    partial = tmp_path / "out.jsonl.partial"
    kept = f"^120 finished rows are kept in {partial}; run the same command again to continue$"
    with pytest.raises(KeyboardInterrupt, match=kept):
        predict(model_dir, source, out, batch_size=32)
    assert not out.exists()
    assert partial.read_bytes() == whole.read_bytes()[: partial.stat().st_size]
    with open(partial, "ab") as f:
        f.write(b'{"id": "half a row')  # what a crash in the middle of a write leaves
    summary = predict(model_dir, source, out, batch_size=32)
    assert windows == [40] * 4 + [40] * 4 + [20], "three windows were done, and not decoded again"
    assert out.read_bytes() == whole.read_bytes()
    assert "120 rows that are done" in capsys.readouterr().err
    for name in set(summary) - {"rows_per_second"}:
        assert summary[name] == want_summary[name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_a_killed_process_costs_its_last_window_only(
    model_dir, questions, small_windows, write_rows, tmp_path, capsys
):
    source, out, whole = write_rows(questions), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    code = """
import importlib, os, signal, sys
module = importlib.import_module("stepdistill_jax.inference.predict")
module.WINDOW_ROWS, module.WINDOW_BATCHES = 40, 0
decode_window, windows = module.decode_window, []
def killed(*args):
    windows.append(1)
    if len(windows) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_window(*args)
module.decode_window = killed
module.predict(*sys.argv[1:])
"""
    command = [sys.executable, "-c", code, str(model_dir), str(source), str(out)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert not out.exists()
    small_windows(40)
    predict(model_dir, source, out)
    assert "160 rows that are done" in capsys.readouterr().err
    predict(model_dir, source, whole)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "options", [{"batch_size": 24}, {"layout": Layout(fsdp=4, tensor=2)}], ids=["batch", "layout"]
)
def test_a_stopped_run_goes_on_in_other_batches_and_on_other_devices(
    model_dir, questions, answers, small_windows, write_rows, read_rows_of, tmp_path, options
):
    source, out = write_rows(questions[:90]), tmp_path / "out.jsonl"
    windows = small_windows(40, stop_in=2)
    with pytest.raises(KeyboardInterrupt):
        predict(model_dir, source, out)
    predict(model_dir, source, out, **options)
    assert windows[2:] == [40, 10]
    for row, want in zip(read_rows_of(out), answers[1][:90], strict=True):
        assert row["score"] == pytest.approx(want["score"], abs=1.1e-5)
        assert row | {"score": 0} == want | {"score": 0}


@pytest.mark.parametrize("change", ["input", "option", "model"])
def test_a_partial_output_of_something_else_is_not_continued(
    model_dir, workdir, questions, small_windows, write_rows, tmp_path, change
):
    source, out = write_rows(questions[:90]), tmp_path / "out.jsonl"
    windows = small_windows(40, stop_in=2)
    with pytest.raises(KeyboardInterrupt):
        predict(model_dir, source, out)
    options = {}
    if change == "input":
        write_rows(questions[1:91])
    if change == "option":
        options["prefix"] = "explain: "
    if change == "model":
        model_dir, options["step"] = workdir, 5
    predict(model_dir, source, out, **options)
    assert windows[2:] == [40, 40, 10]
    assert not (tmp_path / "out.jsonl.partial").exists()


CHANGED_FILES = [
    ("model_dir", "config.json", {"layer_norm_epsilon": 1e-3}),
    ("model_dir", "stepdistill.json", {"input_length": 30}),
    ("workdir", "config.json", {"layer_norm_epsilon": 1e-3}),
]


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    CHANGED_FILES,
    ids=[f"{k}-{next(iter(c))}" for k, _, c in CHANGED_FILES],
)
def test_rows_of_a_model_whose_files_changed_are_not_continued(
    request, questions, small_windows, write_rows, tmp_path, kind, name, change
):
    source, out = write_rows(questions[:60]), tmp_path / "out.jsonl"
    shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    windows = small_windows(40, stop_in=2)
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "model", source, out)
    rows = (tmp_path / "out.jsonl.partial").read_bytes()
    file = tmp_path / "model" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    predict(tmp_path / "model", source, out)
    assert windows[2:] == [40, 20]
    assert (tmp_path / "out.jsonl.partial.old").read_bytes() == rows
    assert out.read_bytes()[: len(rows)] != rows


def test_a_former_output_stays_until_the_new_one_is_whole(
    model_dir, questions, write_rows, tmp_path, monkeypatch
):
    source, out = write_rows(questions[:5]), tmp_path / "out.jsonl"
    former = '{"id": "1", "label": "former", "score": -1.0}\n'
    out.write_text(former)

    def fails(*_):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "decode_window", fails)
        with pytest.raises(RuntimeError):
            predict(model_dir, source, out)
    assert out.read_text() == former
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    predict(model_dir, source, out)
    assert len(out.read_text().splitlines()) == 5


BAD_LINES = {  # all kinds: tests/bad_inputs/data
    "broken JSON": (b'{"input": "a"', "broken JSON"),
    "no input": (b'{"question": "a"}', "no field 'input' (found: question); rename 'question' to"),
    "label is a list": (b'{"input": "a", "label": ["b"]}', "the field 'label' must be text"),
}


@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line_before_anything_is_decoded(
    model_dir, tmp_path, line, message
):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"input": "with rain"}\n\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        predict(tmp_path / "no such model", source, out)  # the rows are checked first
    assert f"{source}:3: " in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        (
            "q.jsonl",
            '{"id": 1, "question": "a"}',
            "rows need the field input, and may have the fields id",
        ),
        (
            "q.csv",
            "wet?\ndry?\n",
            "its first line names the columns, and one of them must be 'input'",
        ),
    ],
)
def test_a_row_without_an_input_says_what_to_do(tmp_path, name, text, hint):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"no field 'input' .found: .*; .*{hint}"):
        predict(tmp_path / "no such model", tmp_path / name, tmp_path / "out.jsonl")


def test_skip_stops_where_no_row_is_good(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(line + b"\n" for line, _ in BAD_LINES.values()))
    with pytest.raises(InputError, match=r"in\.jsonl:1: broken JSON.*; none of its 3 rows can be"):
        predict(tmp_path / "no such model", source, out, on_error="skip")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_skip_leaves_bad_rows_out_and_counts_them(
    model_dir, tmp_path, read_rows_of, capsys, answers
):
    source = tmp_path / "in.jsonl"
    good = [b'{"input": "with rain", "id": "a"}', b'{"input": "with sun"}', b'{"input": ""}']
    bad = [line for line, _ in BAD_LINES.values()]
    source.write_bytes(b"\n".join([good[0], *bad, good[1], good[2]]))
    summary = predict(model_dir, source, tmp_path / "out.jsonl", on_error="skip")
    assert (summary["rows"], summary["skipped"]) == (3, len(bad))
    rows = read_rows_of(tmp_path / "out.jsonl")
    numbers = [str(len(bad) + 2), str(len(bad) + 3)]
    assert [row["id"] for row in rows] == ["a", *numbers], "a bad row keeps its number"
    log = capsys.readouterr().err
    assert all(f"{source}:{number}: " in log for number in range(2, len(bad) + 2))


@pytest.mark.parametrize(("ending", "between"), [(".csv", ","), (".tsv", "\t")])
def test_a_table_is_read_by_its_name_and_a_stopped_run_goes_on(
    model_dir, questions, small_windows, write_rows, tmp_path, monkeypatch, ending, between
):
    rows = [{"id": f"q{i}", "input": q["input"]} for i, q in enumerate(questions[:5])]
    table, out, want = tmp_path / f"in{ending}", tmp_path / "out.jsonl", tmp_path / "want.jsonl"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "input"], delimiter=between)
        writer.writeheader()
        writer.writerows(rows)
    small_windows(2)
    predict(model_dir, write_rows(rows), want)
    decode_window, calls = predict_module.decode_window, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode_window(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict_module, "decode_window", stops)
        predict(model_dir, table, out)
    predict(model_dir, table, out)
    assert out.read_bytes() == want.read_bytes()


@pytest.mark.parametrize("change", ["grows", "shrinks", "is another", "is removed"])
def test_an_input_that_changes_while_it_is_read_gives_no_output(
    model_dir, questions, small_windows, write_rows, tmp_path, monkeypatch, change
):
    # long rows: a reader must not have the whole file in its buffer
    rows = [q | {"unread": "x" * 10_000} for q in questions[:90]]
    source, out = write_rows(rows), tmp_path / "out.jsonl"
    windows = small_windows(40)
    decode_window = predict_module.decode_window

    def changes(*args):
        monkeypatch.setattr(predict_module, "decode_window", decode_window)
        if change == "grows":
            with open(source, "a") as f:
                f.write('{"input": "one more"}\n')
        if change == "shrinks":
            os.truncate(source, 400_000)
        if change == "is another":
            write_rows([*rows[:-1], {"input": "other"}])
        if change == "is removed":
            source.unlink()
        return decode_window(*args)

    monkeypatch.setattr(predict_module, "decode_window", changes)
    with pytest.raises(
        InputError, match=r"in\.jsonl: the file changed while it was read \(it had 90 good rows"
    ):
        predict(model_dir, source, out)
    assert windows == [40], "it is noticed before the next window"
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [] if change == "is removed" else left == ["in.jsonl"]


def test_a_model_directory_has_no_steps_to_choose_from(model_dir, write_rows, tmp_path):
    source, out = write_rows([{"input": "a"}]), tmp_path / "out.jsonl"
    for step in (5, "5", "bset"):
        with pytest.raises(InputError, match=rf"`step` {step}: .* is a model directory"):
            predict(model_dir, source, out, step=step)
    assert not out.exists()
    for step in ("best", "last"):
        predict(model_dir, source, out, step=step)


def test_an_empty_file_gives_an_empty_output(model_dir, write_rows, tmp_path):
    summary = predict(model_dir, write_rows([]), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert summary["rows"] == 0 and "accuracy" not in summary


def test_row_choices_say_what_is_valid(
    model_dir, questions, write_rows, read_rows_of, tmp_path, answers
):
    # the untrained model's answers may be blank, and a choice may not
    answered = next(i for i, row in enumerate(answers[1]) if row["label"].strip())
    question = questions[answered]["input"]
    rows = [{"input": question, "choices": ["yes", "no"]}, {"input": question}]
    predict(model_dir, write_rows(rows), tmp_path / "first.jsonl")
    label = read_rows_of(tmp_path / "first.jsonl")[0]["label"]
    rows[0]["choices"].append(label)
    summary = predict(model_dir, write_rows(rows), tmp_path / "out.jsonl")
    assert summary["invalid_labels"] == 1, "the second row's label is none of the task's"


def test_the_rationale_is_decoded_beside_the_same_label(
    model_dir, questions, answers, write_rows, read_rows_of, tmp_path
):
    source, out = write_rows(questions[:40]), tmp_path / "out.jsonl"
    summary = predict(model_dir, source, out, batch_size=32, with_rationale=True)
    rows = read_rows_of(out)
    model = load_model(model_dir)
    ids = [[*model.vocabulary.encode("explain: " + q["input"])[:39], 1] for q in questions[:40]]
    want = LabelDecoder(model.config, max_decode_len=24, batch_size=40)(model.params, ids)
    for row, former, rationale in zip(rows, answers[1][:40], want.ids, strict=True):
        assert list(row) == ["id", "label", "score", "rationale"]
        assert row["label"] == former["label"]
        assert row["score"] == pytest.approx(former["score"], abs=1e-5)
        assert row["rationale"] == model.vocabulary.decode(rationale)
    assert summary["unfinished_rationales"] == int((~want.finished).sum())
    assert 0 < summary["unfinished_rationales"] < 40


def test_asking_for_the_rationale_of_a_label_model_is_refused(model_dir, task_info):
    model = load_model(model_dir)
    info = dataclasses.replace(task_info, objectives=task_info.objectives[:1])
    model = dataclasses.replace(model, task_info=info)
    with pytest.raises(InputError, match=r"no objective named 'rationale'.*it has label"):
        predict_module.prompting_for(model, with_rationale=True)


def test_a_bare_directory_is_asked_with_the_papers_prefix(
    model_dir, questions, answers, write_rows, read_rows_of, tmp_path
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model_dir.iterdir():
        if path.name != "stepdistill.json":
            (bare / path.name).symlink_to(path)
    # short inputs: a bare directory does not say where to cut
    short = [i for i in range(300) if len(questions[i]["input"].split()) < 8]
    source = write_rows([questions[i] for i in short])
    predict(bare, source, tmp_path / "out.jsonl", max_decode_len=8)
    labels = [row["label"] for row in read_rows_of(tmp_path / "out.jsonl")]
    assert labels == [answers[1][i]["label"] for i in short]
    predict(bare, source, tmp_path / "other.jsonl", max_decode_len=8, prefix="with ")
    assert [r["label"] for r in read_rows_of(tmp_path / "other.jsonl")] != labels


@pytest.mark.slow
def test_a_longer_limit_finishes_more_rows(model_dir, questions, write_rows, tmp_path):
    source = write_rows(questions[:50])
    short = predict(model_dir, source, tmp_path / "a.jsonl", max_decode_len=2)
    long = predict(model_dir, source, tmp_path / "b.jsonl", max_decode_len=12)
    assert short["unfinished"] > long["unfinished"]


def test_a_workdir_is_asked_at_its_best_step_unless_told(
    workdir, model_dir, questions, answers, write_rows, tmp_path
):
    source = write_rows(questions)
    predict(workdir, source, tmp_path / "best.jsonl", batch_size=32)
    assert (tmp_path / "best.jsonl").read_bytes() == answers[2]
    predict(workdir, source, tmp_path / "last.jsonl", batch_size=32, step="last")
    assert (tmp_path / "last.jsonl").read_bytes() != answers[2]
    with pytest.raises(InputError, match="7"):
        predict(workdir, source, tmp_path / "none.jsonl", step=7)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "`batch_size`"),
        ({"max_decode_len": -1}, "`max_decode_len`"),
        ({"on_error": "ignore"}, "`on_error`"),
        ({"task": "no_such_task"}, "no_such_task"),
    ],
    ids=str,
)
def test_bad_options_are_refused(model_dir, write_rows, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        predict(
            model_dir,
            write_rows([{"input": "a"}]),
            tmp_path / "out.jsonl",
            data_dir=tmp_path,
            **options,
        )
    assert not (tmp_path / "out.jsonl").exists()


def test_missing_files_and_impossible_outputs_are_refused(model_dir, write_rows, tmp_path):
    source = write_rows([{"input": "a"}])
    for arguments, message in (
        ((model_dir, tmp_path / "none.jsonl", tmp_path / "o"), "none.jsonl: no such file"),
        ((tmp_path / "none", source, tmp_path / "o"), "none: no such folder"),
        ((model_dir, source, source), "it is the input"),
        ((model_dir, source, tmp_path), "got a folder"),
        ((model_dir, tmp_path, tmp_path / "o"), "got a folder"),
        ((model_dir, source, source / "o"), "cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            predict(*arguments)


def test_damaged_weights_do_not_write_nan(model_dir, tiny_params, write_rows, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model_dir.iterdir():
        (broken / path.name).symlink_to(path)
    (broken / "model.safetensors").unlink()
    from stepdistill_jax.formats.hf import save_params

    params = {**tiny_params, "logits_dense": {"kernel": np.full((32, 128), np.nan, np.float32)}}
    save_params(broken, params, load_model(model_dir).config)
    with pytest.raises(InputError, match="NaN"):
        predict(broken, write_rows([{"input": "a"}]), tmp_path / "out.jsonl")


def test_predict_imports_no_tensorflow_torch_or_transformers_and_export_no_tensorflow(
    model_dir, workdir, write_rows, tmp_path
):
    code = """
import json, sys
from stepdistill_jax.inference import export, predict
for path in sys.argv[1:3]:
    predict(path, sys.argv[3], sys.argv[4])
builders = ("tensorflow", "tensorflow_text", "seqio", "tensorflow_datasets", "gin")
found = [m for m in (*builders, "torch", "transformers") if m in sys.modules]
export(sys.argv[2], sys.argv[5])
print(json.dumps([*found, *(m for m in builders if m in sys.modules)]))
"""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(model_dir),
            str(workdir),
            str(write_rows([{"input": "a"}])),
            str(tmp_path / "out.jsonl"),
            str(tmp_path / "exported"),
        ],
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []
