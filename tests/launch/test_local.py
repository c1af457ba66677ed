"""`local.sh`: several real processes, and what becomes of them when one fails or a signal comes."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
RANK = "rank = int(os.environ['JAX_PROCESS_ID'])\n"


def child(body: str) -> list[str]:
    """A command that knows its `rank`."""
    return [sys.executable, "-IS", "-c", f"import os, signal, subprocess, sys, time\n{RANK}{body}"]


# leaves with 75 on SIGTERM, and counts how often it came
POLITE = """
count = 0
def stop(*_):
    global count
    count += 1
signal.signal(signal.SIGTERM, stop)
open(f"ready{rank}", "w").close()
while not count:
    time.sleep(0.01)
time.sleep(0.3)
print("signals:", count, file=sys.stderr)
sys.exit(75)
"""

STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(f"pids{rank}.partial", "w") as file:
    file.write(f"{os.getpid()} {grandchild.pid}")
os.rename(f"pids{rank}.partial", f"pids{rank}")
if rank == 1 and FAILS:
    sys.exit(3)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def pids(folder, processes=2) -> list[int]:
    files = [folder / f"pids{k}" for k in range(processes)]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files))
    return [int(pid) for f in files for pid in f.read_text().split()]


@pytest.fixture
def started(tmp_path):
    """Starts `local.sh`; whatever a failing test leaves behind is ended."""
    running = []

    def started(*args):
        command = ["bash", str(LAUNCH / "local.sh"), *args]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield started
    for process in running:
        process.kill()
    left = [int(p) for f in tmp_path.glob("pids?") for p in f.read_text().split()]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_each_start_has_a_token_of_its_own(launch, tmp_path):
    show = child("open(f'token{rank}', 'a').write(os.environ['STEPDISTILL_JOB_TOKEN'] + '\\n')")
    for own in ({}, {}, {"STEPDISTILL_JOB_TOKEN": "the user's"}):
        launch("local.sh", "-n", 2, "--", *show, **own)
    first, second = ((tmp_path / f"token{rank}").read_text().splitlines() for rank in range(2))
    assert first == second
    assert len(first[0]) == len(first[1]) == 32 and first[0] != first[1]
    assert first[2] == "the user's"


def test_environment_of_each_process(launch, tmp_path):
    names = ("JAX_PLATFORMS", "XLA_FLAGS", "EXPECT_DEVICES", "JAX_NUM_PROCESSES",
             "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")  # fmt: skip
    show = child(f"open(f'env{{rank}}', 'w').write('|'.join(os.environ[n] for n in {names}))")
    launch("local.sh", "-n", 3, "-d", 4, "--", *show, XLA_FLAGS="--xla_cpu_foo=1")
    seen = [(tmp_path / f"env{k}").read_text().split("|") for k in range(3)]
    flags = "--xla_cpu_foo=1 --xla_force_host_platform_device_count=4"
    assert [line[:-1] for line in seen] == [["cpu", flags, "12", "3", str(k)] for k in range(3)]
    (address,) = {line[-1] for line in seen}
    assert address.startswith("127.0.0.1:")


def test_arguments_arrive_as_they_were_typed(launch, hard):
    done = launch("local.sh", "-n", 1, "--", *child("print(sys.argv[1:])"), *hard)
    assert done.stdout == f"{hard}\n"


def test_standard_output_is_that_of_process_0_and_every_other_line_says_whose_it_is(launch):
    talk = "print('out', rank); print('err', rank, file=sys.stderr); print('{}', end='')"
    done = launch("local.sh", "-n", 2, "--", *child(talk))
    assert done.stdout == "out 0\n{}"
    assert sorted(done.stderr.splitlines()) == ["[0] err 0", "[1] err 1", "[1] out 1", "[1] {}"]


def test_output_that_nobody_reads_any_more_stops_nothing(tmp_path):
    talk = child(
        "[print('line', i, file=sys.stderr) for i in range(20000)]\nopen(f'end{rank}', 'w')"
    )
    command = f'bash {LAUNCH / "local.sh"} -n 2 -- "$@" 2>&1 >/dev/null | head -n 1'
    subprocess.run(["bash", "-c", command, "bash", *talk], cwd=tmp_path, timeout=30, check=True)
    wait_for(lambda: all((tmp_path / f"end{k}").exists() for k in range(2)))


def test_a_command_that_is_not_there(launch):
    done = launch("local.sh", "-n", 2, "--", "no-such-program", code=2)
    assert done.stderr.endswith("cannot start 'no-such-program': No such file or directory\n")


def test_one_that_fails_ends_the_others_and_what_they_started(started, tmp_path):
    begin = time.monotonic()
    run = started("-n", "2", "--grace", "0.5", "--", *child(STUBBORN.replace("FAILS", "1")))
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 3
    assert errors == "launch: process 1 failed with exit status 3; ended the others\n"
    assert time.monotonic() - begin < 10
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_failure_of_all_is_that_of_all(launch):
    done = launch("local.sh", "-n", 3, "--", *child("sys.exit(2)"), code=2)
    assert done.stderr == "launch: process 0, 1, 2 failed with exit status 2\n"


@pytest.mark.parametrize("restarts", [0, 2])
def test_sigabrt_is_explained_and_started_again(restarts, launch, tmp_path):
    """As JAX ends a process whose peer is gone: the peer was killed, or aborted itself."""
    body = "open(f'starts{rank}', 'a').write('x')\nif rank: os.abort()\ntime.sleep(60)"
    done = launch(
        "local.sh", "-n", 2, "--grace", 0.2, "--max-restarts", restarts, "--", *child(body),
        code=134,
    )  # fmt: skip
    assert [len((tmp_path / f"starts{k}").read_text()) for k in range(2)] == 2 * [restarts + 1]
    *again, last = done.stderr.splitlines()
    reason = (
        "launch: a peer process was lost: process 1 ended first, by SIGABRT (JAX does that when"
        " another process died or hangs: see that process's last lines); "
    )
    left = range(restarts, 0, -1)
    assert again == [f"{reason}starting again, {n} left" for n in left]
    assert last == f"{reason}start the same command again to resume"


def test_a_restart_that_succeeds_is_a_success(launch, tmp_path):
    body = "if rank and not os.path.exists('once'):\n  open('once', 'w').close()\n  os.abort()"
    done = launch("local.sh", "-n", 2, "--", *child(body + "\nprint('done', rank)"))
    assert done.stdout.splitlines()[-1] == "done 0"
    assert "starting again, 2 left" in done.stderr


def test_the_first_cause_is_named_not_its_consequence(launch):
    """Process 1 is killed; process 0, whose peer it was, aborts or fails before we hear of it."""
    body = """
if rank == 1:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(1) if rank == 0 else os.abort()
"""
    done = launch("local.sh", "-n", 3, "--max-restarts", 0, "--", *child(body), code=134)
    assert "a peer process was lost: process 1 ended first, by SIGKILL;" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_reaches_every_process_once(number, processes, started, tmp_path):
    run = started("-n", str(processes), "--", *child(POLITE))
    wait_for(lambda: all((tmp_path / f"ready{k}").exists() for k in range(processes)))
    run.send_signal(number)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == 75, errors
    *heard, last = errors.splitlines()
    assert sorted(heard) == [f"[{k}] signals: 1" for k in range(processes)]
    assert last == "launch: stopped; the same command resumes"


def test_all_that_stop_by_themselves_are_75(launch):
    """Only one process got the signal; they agree and stop together. Not started again."""
    done = launch("local.sh", "-n", 2, "--", *child("sys.exit(75)"), code=75)
    assert done.stderr.count("launch: ") == 1


@pytest.mark.parametrize(("how", "code"), [("SIGTERM", 143), ("SIGABRT", 134)])
def test_one_that_dies_of_the_signal_was_not_saved_and_is_not_started_again(
    how, code, started, tmp_path
):
    body = """
if HOW == "SIGABRT":
    signal.signal(signal.SIGTERM, lambda *_: os.abort())
with open(f"pids{rank}", "w") as file:
    file.write(str(os.getpid()))
time.sleep(60)
"""
    run = started("-n", "2", "--", *child(f"HOW = {how!r}" + body))
    pids(tmp_path)
    run.terminate()
    _, errors = run.communicate(timeout=20)
    assert run.returncode == code
    assert errors.endswith(f"ended by {how} after the signal, without a save\n")


def test_nothing_is_left_of_a_success_either(launch, tmp_path):
    body = """
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(f"pids{rank}", "w") as file:
    file.write(str(left.pid))
"""
    launch("local.sh", "-n", 2, "--", *child(body))
    running = pids(tmp_path)
    wait_for(lambda: not any(alive(pid) for pid in running))


def test_a_second_signal_ends_what_ignores_the_first(started, tmp_path):
    run = started("-n", "2", "--", *child(STUBBORN.replace("FAILS", "0")))
    running = pids(tmp_path)
    run.terminate()
    time.sleep(0.3)
    assert run.poll() is None and all(alive(pid) for pid in running)
    run.terminate()
    assert run.wait(timeout=20) == 137
    assert not any(alive(pid) for pid in running)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells children of their parent's end"
)
def test_a_killed_launcher_leaves_no_orphans(started, tmp_path):
    body = "open(f'pids{rank}', 'w').write(str(os.getpid()))\n" + POLITE
    run = started("-n", "2", "--", *child(body))
    running = pids(tmp_path)
    wait_for(lambda: all((tmp_path / f"ready{k}").exists() for k in range(2)))
    run.kill()
    wait_for(lambda: not any(alive(pid) for pid in running))
