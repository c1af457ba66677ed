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
    # after the first step: 9 steps of 0.1 s, and the four validations of 1 s between them
    assert lines_of(capsys) == ["train: 10/10  1.8/s  ETA 0:00:00  loss 0  accuracy 1"]


def test_steps_of_more_than_a_second_show_their_seconds(clock, capsys):
    work(clock, steps=8, each=12.0, done=2)
    first, second, *_, last = lines_of(capsys)
    assert first == "train: 3/10  loss 7"
    assert second == "train: 4/10  12.0 s each  ETA 0:01:12  loss 6"
    # 7 steps of 12 s, and the three validations of 1 s between them
    assert last == "train: 10/10  12.4 s each  ETA 0:00:00  loss 0  accuracy 1"


def updated_after(clock, *seconds, total):
    """Updates a bar by one unit after each number of seconds."""
    with progress(total, "train") as bar:
        for each in seconds:
            clock.now += each
            bar.update()


def test_the_time_until_the_first_update_is_not_in_the_rate(clock, capsys):
    updated_after(clock, 32.3, *[0.1] * 999, total=1000)
    first, *between, last = lines_of(capsys)
    assert first == "train: 1/1000"
    assert "10.0/s  ETA 0:01:" in between[0]
    assert last == "train: 1000/1000  10.0/s  ETA 0:00:00"


def test_the_rate_follows_the_present_speed_and_ends_with_the_mean(clock, capsys):
    updated_after(clock, *[0.5] * 201, *[2.0] * 100, *[0.5] * 100, total=401)
    *lines, last = lines_of(capsys)
    assert any("  2.0/s  " in line for line in lines[:9])
    assert any("  2.0 s each  ETA 0:03:2" in line for line in lines)
    assert last == "train: 401/401  1.1/s  ETA 0:00:00"  # 400 units in 350 s


def test_a_single_update_and_one_of_no_time_have_no_bad_rate(clock, capsys):
    updated_after(clock, 20.0, total=1)
    updated_after(clock, 20.0, 0.0, total=2)
    one, _, two = lines_of(capsys)
    assert one == "train: 1/1"
    assert two.startswith("train: 2/2  ") and two.endswith("/s  ETA 0:00:00")


def test_work_of_unknown_length_has_a_rate_and_no_remaining_time(clock, capsys):
    updated_after(clock, *[12.0] * 3, total=None)
    assert lines_of(capsys) == ["train: 1", "train: 2  12.0 s each", "train: 3  12.0 s each"]


@pytest.mark.parametrize("steps, done", [(0, 10), (0, 0), (4, 0)], ids=["finished", "none", "some"])
def test_a_last_line_is_for_work_that_this_life_ended(clock, capsys, steps, done):
    work(clock, steps=steps, each=0.1, done=done)
    assert lines_of(capsys) == []


def test_work_that_fails_has_no_last_line(clock, capsys):
    with pytest.raises(OSError), progress(1, "write") as bar:
        bar.update(1)
        raise OSError
    assert lines_of(capsys) == []


def terminal(monkeypatch):
    """Makes standard error a terminal, and returns it. (Pytest sets it again after a fixture.)"""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.stderr", screen)
    return screen


def shown_last(screen):
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).split("\r")[-1]


def test_a_terminal_shows_the_same_at_the_end(clock, monkeypatch):
    screen = terminal(monkeypatch)
    work(clock, steps=10, each=12.0)
    for part in ("train", "10/10", "12.4 s each", "ETA 0:00:00", "loss 0", "accuracy 1"):
        assert part in shown_last(screen)


def test_a_terminal_shows_a_rate_from_the_second_update_on(clock, monkeypatch):
    screen = terminal(monkeypatch)
    updated_after(clock, 32.0, total=5)
    assert "1/5" in shown_last(screen)
    assert "each" not in shown_last(screen) and "ETA" not in shown_last(screen)
    updated_after(clock, 32.0, 2.0, total=5)
    assert "2.0 s each ETA 0:00:06" in shown_last(screen)
