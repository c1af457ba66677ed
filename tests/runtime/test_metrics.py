import json
import math
import os

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.metrics import MetricsWriter, curves, read_flagged, read_metrics


def write(workdir, start_step, steps):
    writer = MetricsWriter(workdir, start_step=start_step)
    for step in steps:
        writer.write(step, {"loss": step / 2})
    writer.close()


def test_a_resume_cuts_the_lines_of_the_lost_life(tmp_path):
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 4, range(5, 7))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_half_a_line_left_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, 0, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, 2, [3])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


UNREADABLE = {
    "half a line": b'{"step": 3, "lo',
    "another tool's": b"epoch,loss",
    "not UTF-8": b'{"step": 3, "note": "\xff"}',
    "zeros": b"\0" * 40,
    "a list": b"[3]",
    "without a step": b'{"loss": 1.5}',
    "a step that is text": b'{"step": "3"}',
}


@pytest.mark.parametrize("bad", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("name", ["metrics.jsonl", "flagged_batches.jsonl"])
def test_an_unreadable_line_in_the_middle_is_kept_and_reported(tmp_path, capsys, name, bad):
    path = tmp_path / name
    lines = [b'{"step": %d, "loss": 0.5, "reason": "spike"}' % step for step in range(1, 7)]
    path.write_bytes(b"\n".join([*lines[:2], bad, *lines[2:], b'{"step": 7, "lo']))
    read = read_metrics if name == "metrics.jsonl" else read_flagged
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert f"warning: {path}:3: " in capsys.readouterr().err
    write(tmp_path, 5, [])
    assert path.read_bytes().splitlines() == [*lines[:2], bad, *lines[2:5]]
    (said,) = capsys.readouterr().err.splitlines()
    assert f"warning: {path}:3: " in said


def test_several_unreadable_lines_are_one_warning(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\n{"step": 1}\n\xff\n\xff\n{"step": 2}\n')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    (said,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl:1: not UTF-8" in said and "and 2 more lines" in said


def test_a_pipe_instead_of_metrics_is_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="is a pipe or device"):
        read_metrics(tmp_path)


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format of the file)

    write(tmp_path, 0, [1, 2])
    (events,) = tmp_path.glob("events.out.tfevents.*")
    data, values = events.read_bytes(), []
    while data:  # TFRecord: length (8), its checksum (4), payload, checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        values += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    assert values == [(1, "loss", 0.5), (2, "loss", 1.0)]


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        read_metrics(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, start_step=0, active=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_curves_are_columns_with_an_entry_for_each_step(tmp_path):
    """Training and validation of a step are two lines and one entry; what is missing is NaN."""
    writer = MetricsWriter(tmp_path, start_step=0)
    writer.write(1, {"loss": 4.0, "skipped_steps": 0})
    writer.write(2, {"loss": math.nan, "skipped_steps": 1})
    writer.write(2, {"eval/validation/label_accuracy": 0.25})
    writer.write(3, {"loss": 1.0, "skipped_steps": 1})
    writer.close()
    found = curves(tmp_path)
    assert {name: column.tolist() for name, column in found.items()} == {
        "step": [1, 2, 3],
        "loss": [4.0, pytest.approx(math.nan, nan_ok=True), 1.0],
        "skipped_steps": [0, 1, 1],
        "eval/validation/label_accuracy": pytest.approx([math.nan, 0.25, math.nan], nan_ok=True),
    }
    assert found["step"].dtype == "int64" and found["skipped_steps"].dtype == "float64"
