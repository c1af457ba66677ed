"""Two processes seal a checkpoint and look through it before a resume: each reads a part, once."""

import json
import pathlib
import signal

import pytest

from stepdistill_jax.runtime.checkpoints.manager import saved_steps
from stepdistill_jax.runtime.checkpoints.manifest import defect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(start, workdir, *, save, kill=None):
    """Exit codes, and what each process said, of two processes."""
    given = {"workdir": str(workdir), "save": save, "kill": kill}
    codes, errors = start("seal_run.py", given, count=2).finish()
    if kill is None:
        assert codes == [0, 0], errors
    found = [workdir / f"said_{i}.json" for i in range(2)]
    said = [json.loads(path.read_text()) for path in found if path.exists()]
    for path in found:
        path.unlink(missing_ok=True)
    return codes, said


def arrays_of(step):
    return {
        path: path.stat().st_size
        for path in step.rglob("*")
        if path.is_file() and not path.name.startswith("manifest.json")
    }


def test_each_process_reads_its_part_and_a_flip_in_either_is_found(tmp_path, start):
    _, said = run(start, tmp_path, save=True)
    steps = [tmp_path / "checkpoints" / number for number in ("1", "2")]
    files = {str(path): size for step in steps for path, size in arrays_of(step).items()}
    names = [[name for name, _ in process["read"]] for process in said]
    assert sorted(names[0] + names[1]) == sorted(files)  # each once
    assert all(defect(step) is None for step in steps)
    parts = [sum(files[name] for name in own) for own in names]
    largest = max(files.values())
    assert abs(parts[0] - parts[1]) <= 2 * largest  # of two steps
    assert min(parts) > 0

    _, before = run(start, tmp_path, save=False)
    newest = {str(path) for path in arrays_of(steps[1])}
    assert [process["latest"] for process in before] == [2, 2]
    for process, other in zip(before, reversed(before), strict=True):
        own = {name for name, _ in process["read"]}
        assert own and own <= newest and not own & {name for name, _ in other["read"]}
    for process in before:
        damaged, _ = max(process["read"], key=lambda entry: entry[1])  # of its part
        flip(damaged)
        _, after = run(start, tmp_path, save=False)
        assert [process["latest"] for process in after] == [1, 1]
        (aside,) = (tmp_path / "checkpoints").glob("2.damaged-*")
        aside.rename(steps[1])
        flip(damaged)
        assert defect(steps[1]) is None


def flip(path):
    """One bit."""
    data = bytearray(pathlib.Path(path).read_bytes())
    data[len(data) // 2] ^= 1
    pathlib.Path(path).write_bytes(data)


@pytest.mark.parametrize("who", [0, 1])
def test_a_kill_between_save_and_seal_leaves_the_step_unsealed(tmp_path, start, who):
    codes, said = run(start, tmp_path, save=True, kill=who)
    assert codes[who] == -signal.SIGKILL and codes[1 - who] != 0 and not said
    assert (tmp_path / "checkpoints" / "2" / "params").is_dir()  # Orbax had finished it
    assert list(saved_steps(tmp_path)) == [1]
    _, said = run(start, tmp_path, save=False)
    assert [process["latest"] for process in said] == [1, 1]
    assert (tmp_path / "checkpoints" / "2.unfinished-1").is_dir()
