import json

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.training.writers import MetricsWriter, read_metrics


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
