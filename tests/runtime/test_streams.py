"""One output, one writer: two runs never append to the same file."""

import importlib
import os

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import predict
from stepdistill_jax.runtime import locks
from stepdistill_jax.runtime import streams as output_module

# `inference.predict` is the function
predict_module = importlib.import_module("stepdistill_jax.inference.predict")


def test_a_second_run_on_an_output_is_refused_and_the_first_one_ends_well(
    model_dir, questions, write_rows, tmp_path, monkeypatch
):
    source, out, whole = write_rows(questions[:90]), tmp_path / "out.jsonl", tmp_path / "w.jsonl"
    predict(model_dir, source, whole)
    decode_window, refused = predict_module.decode_window, []

    def meets_another(*args):
        monkeypatch.setattr(predict_module, "decode_window", decode_window)
        with pytest.raises(InputError, match=r"out\.jsonl\.partial: another run is writing it"):
            predict(model_dir, source, out)
        refused.append(True)
        return decode_window(*args)

    monkeypatch.setattr(predict_module, "decode_window", meets_another)
    predict(model_dir, source, out)
    assert refused and out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "w.jsonl"]


def test_an_output_that_another_run_finishes_meanwhile_is_not_written_to(tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    lock = locks._lock

    def late(file, *how):  # the other run ends between our open and our lock
        monkeypatch.setattr(locks, "_lock", lock)
        os.replace(tmp_path / "out.jsonl.partial", out)
        out.write_text("the other's\n")
        return lock(file, *how)

    monkeypatch.setattr(locks, "_lock", late)
    ours = output_module.ResumableFile(out, {"input": "digest"})
    ours.append([{"id": "1"}])
    assert out.read_text() == "the other's\n"
    ours.finish()
    assert out.read_text() == '{"id": "1"}\n'


def test_rows_are_on_disk_before_the_output_gets_its_name(
    model_dir, questions, write_rows, tmp_path, order_on_disk, monkeypatch
):
    source, out = write_rows(questions[:5]), tmp_path / "out.jsonl"
    append, appended = output_module.ResumableFile.append, []

    def then_buffered(self, rows, **counts):  # what is written after the last window counts, too
        append(self, rows, **counts)
        appended.append(len(order_on_disk))

    monkeypatch.setattr(output_module.ResumableFile, "append", then_buffered)
    predict(model_dir, source, out)
    assert order_on_disk[appended[-1] :] == ["fsync out.jsonl.partial", "rename out.jsonl"]
