"""What a bar shows: lines in a log file, a bar on a terminal."""

import io
import re
import types

import pytest

from stepdistill_jax.runtime import progress as module
from stepdistill_jax.runtime.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """The time that rates are measured by; stands still until a test moves it."""
    clock = types.SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(module, "time", clock)
    return clock


def work(clock, *, steps, each, done=0, total=10):
    """`steps` steps of `each` seconds, and after every second one a validation of 1 s."""
    with progress(total, "train", done=done) as bar:
        for step in range(done + 1, done + steps + 1):
            clock.now += each
            bar.update(1, loss=10.0 - step)
            if step % 2 == 0:
                clock.now += 1
                bar.update(0, accuracy=step / 10)


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


def test_the_last_line_has_the_last_validation(clock, capsys):
    work(clock, steps=10, each=0.1)
    assert lines_of(capsys) == ["train: 10/10  2.0/s  ETA 0:00:00  loss 0  accuracy 1"]


def test_steps_of_more_than_a_second_show_their_seconds(clock, capsys):
    work(clock, steps=8, each=12.0, done=2)
    first, *_, last = lines_of(capsys)
    assert first == "train: 3/10  12.0 s each  ETA 0:01:24  loss 7"
    # 8 steps of 12 s, and the three validations of 1 s between them
    assert last == "train: 10/10  12.4 s each  ETA 0:00:00  loss 0  accuracy 1"


@pytest.mark.parametrize("steps, done", [(0, 10), (0, 0), (4, 0)], ids=["finished", "none", "some"])
def test_a_last_line_is_for_work_that_this_life_ended(clock, capsys, steps, done):
    work(clock, steps=steps, each=0.1, done=done)
    assert lines_of(capsys) == []


def test_work_that_fails_has_no_last_line(clock, capsys):
    with pytest.raises(OSError), progress(1, "write") as bar:
        bar.update(1)
        raise OSError
    assert lines_of(capsys) == []


def test_a_terminal_shows_the_same_at_the_end(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr", screen)
    work(clock, steps=10, each=12.0)
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).split("\r")[-1]
    for part in ("train", "10/10", "12.5 s each", "loss 0", "accuracy 1"):
        assert part in shown
