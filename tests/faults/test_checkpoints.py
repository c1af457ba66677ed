"""Checkpoints that are hurt: what is wrong is found, reported, quarantined, and never resumed from."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding

from stepdistill_jax.commands.main import main
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.model import load_model
from stepdistill_jax.runtime.checkpoints.manager import (
    Checkpoints,
    resolve_step,
    restore_params,
    saved_steps,
)
from stepdistill_jax.runtime.checkpoints.manifest import CheckpointError, defect

FLIPS = 200
ACCURACY = {1: 0.9, 2: 0.5, 3: 0.6}  # of the saved steps: 1 is the best, 3 the last


def params(step):
    return {"layer": {"w": jnp.arange(4096, dtype=jnp.float32) * step, "b": jnp.full(8, 0.5)}}


def rest(step):
    return {"step": jnp.int32(step), "rng": jax.random.key(step)}


def metrics(step):
    accuracy = ACCURACY.get(step, 0.1)
    return {"step": step, "validated": True, "label_accuracy": accuracy, "label_loss": 1.0}


def save(workdir, *steps):
    checkpoints = Checkpoints(workdir)
    for step in steps:
        checkpoints.save(step, params(step), rest(step), metrics(step))
    checkpoints.close()


def latest(workdir):
    """The step that a resume would start from."""
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest_step()
    checkpoints.close()
    return step


def abstract(tree):
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)


def files_of(folder):
    """Bytes of each file by its name below a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(files)}


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def largest(step_folder, below="params"):
    files = [p for p in (step_folder / below).rglob("*") if p.is_file()]
    return max(files, key=lambda p: (p.stat().st_size, p.name))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A workdir with the steps 1, 2 and 3; not to be hurt."""
    workdir = tmp_path_factory.mktemp("sound")
    save(workdir, 1, 2, 3)
    return workdir


@pytest.fixture
def workdir(sound, tmp_path):
    """A copy to hurt."""
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def test_any_flipped_bit_is_found_and_its_file_named(workdir, record_fault):
    """File after file, at random places of each; the manifest itself is one of them."""
    step = workdir / "checkpoints" / "3"
    files = sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)
    assert {p.name for p in files} >= {"manifest.json", "_METADATA", "commit_success.txt"}
    draw = random.Random(0)
    draw.shuffle(files)
    files.sort(key=lambda p: p.name != "manifest.json")
    missed = []
    for trial in range(FLIPS):
        path = files[trial % len(files)]
        place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flip(path, place, bit)
        if not (defect(step) or "").startswith(path.relative_to(step).as_posix()):
            missed.append((path, place, bit))
        flip(path, place, bit)
    record_fault(
        "one flipped bit in a checkpoint",
        tried=FLIPS,
        survived=FLIPS - len(missed),
        seen=f"in {len(files)} files, the manifest among them; each named",
    )
    assert not missed
    assert defect(step) is None


def flip_a_bit(step):
    flip(largest(step), 7, 3)
    return largest(step).name


def flip_in_the_optimizer(step):
    flip(largest(step, "state"), 20)
    return largest(step, "state").name


def remove_a_file(step):
    (gone := largest(step)).unlink()
    return f"{gone.name}: missing"


def truncate(step):
    path = largest(step)
    os.truncate(path, path.stat().st_size // 2)
    return f"{path.name}: "


def empty_the_manifest(step):
    (step / "manifest.json").write_bytes(b"")
    return "manifest.json: "


def lose_the_metadata(step):
    (step / "params" / "_METADATA").unlink()
    return "params/_METADATA: missing"


@pytest.mark.parametrize(
    "hurt",
    [
        flip_a_bit,
        flip_in_the_optimizer,
        remove_a_file,
        truncate,
        empty_the_manifest,
        lose_the_metadata,
    ],
)
def test_a_damaged_step_is_set_aside_and_the_one_before_it_taken(
    workdir, capfd, record_fault, hurt
):
    folder = workdir / "checkpoints"
    named = hurt(folder / "3")
    damaged = files_of(folder / "3")
    capfd.readouterr()
    found = latest(workdir)
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "renamed to" in x] or [""]
    record_fault(
        f"checkpoint: {hurt.__name__.replace('_', ' ')}",
        tried=1,
        survived=int(found == 2 and named in line),
        seen="quarantined, resumed from the step before",
    )
    assert found == 2
    assert line.startswith(f"warning: checkpoint {folder}/3: ")
    assert named in line and line.endswith("renamed to 3.damaged-1")
    assert files_of(folder / "3.damaged-1") == damaged  # renamed, nothing removed
    assert list(saved_steps(workdir)) == [1, 2]


def test_a_damaged_step_is_passed_over_until_one_is_good(workdir):
    folder = workdir / "checkpoints"
    for step in ("3", "2"):
        flip_a_bit(folder / step)
    assert latest(workdir) == 1
    assert {p.name for p in folder.iterdir()} >= {"1", "2.damaged-1", "3.damaged-1"}


@pytest.mark.parametrize("phantom", ["empty", "half"])
def test_a_folder_that_was_never_a_whole_step_is_no_step(workdir, capfd, record_fault, phantom):
    """Orbax alone takes an empty folder for the latest step."""
    folder = workdir / "checkpoints"
    if phantom == "empty":
        (folder / "9").mkdir()
    else:
        shutil.copytree(folder / "3" / "params", folder / "9" / "params")
    assert list(saved_steps(workdir)) == [1, 2, 3]
    assert resolve_step(workdir, "last") == 3
    found, said = latest(workdir), capfd.readouterr().err
    aside = (folder / "9.unfinished-1").is_dir() and not (folder / "9").exists()
    survived = found == 3 and aside and "9: no manifest.json" in said
    record_fault(f"checkpoint: a phantom folder ({phantom})", tried=1, survived=int(survived))
    assert survived, (found, said)


def test_no_good_step_is_an_error_also_the_second_time(workdir, record_fault):
    folder = workdir / "checkpoints"
    for step in ("1", "2", "3"):
        flip_a_bit(folder / step)
    before, refused = files_of(folder), []
    for _ in range(2):
        with contextlib.suppress(CheckpointError):
            Checkpoints(workdir).close()
            continue
        refused.append(True)
    record_fault(
        "checkpoint: every step damaged",
        tried=2,
        survived=len(refused),
        seen="exit 1 with the list",
    )
    with pytest.raises(CheckpointError, match=r"1\.damaged-1, 2\.damaged-1, 3\.damaged-1"):
        Checkpoints(workdir)
    assert len(refused) == 2
    assert len(files_of(folder)) == len(before)


def test_steps_of_a_workdir_without_manifests_are_not_started_over_in_silence(workdir):
    for path in workdir.rglob("manifest.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        Checkpoints(workdir)


def test_a_name_of_a_folder_that_was_set_aside_is_never_used_again(workdir):
    folder = workdir / "checkpoints"
    kept = []
    for number in (1, 2, 3):
        truncate(folder / "3")
        kept.append(files_of(folder / "3"))
        assert latest(workdir) == 2
        if number == 2:
            shutil.rmtree(folder / "3.damaged-1")  # by a user, who looked at it
        save(workdir, 3)
    assert files_of(folder / "3.damaged-2") == kept[1]
    assert files_of(folder / "3.damaged-3") == kept[2]
    assert not (folder / "3.damaged-1").exists()


KILLED = """
import os, signal, sys
from stepdistill_jax.runtime.checkpoints import manager
sys.path.insert(0, sys.argv[1])
import test_checkpoints as made
workdir, where, *steps = sys.argv[2:]
plain = getattr(manager, where)
def die(folder, *args):
    if where == "seal" and folder.name == steps[-1] or (folder / ".deleted").is_dir():
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(folder, *args)
setattr(manager, where, die)
made.save(workdir, *map(int, steps))
"""


def kill_in(where, workdir, *steps):
    """In the last step's `seal`, or in the `purge` that has something to remove."""
    folder = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, str(workdir), where, *map(str, steps)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_kill_between_save_and_seal_leaves_the_step_before(tmp_path, capfd):
    folder = tmp_path / "checkpoints"
    kill_in("seal", tmp_path, 4, 5)
    assert (folder / "5" / "params").is_dir()  # Orbax had finished it
    assert list(saved_steps(tmp_path)) == [4]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 4
    got, _ = checkpoints.restore(4, abstract(params(4)), abstract(rest(4)))
    np.testing.assert_array_equal(got["layer"]["w"], params(4)["layer"]["w"])
    checkpoints.close()
    assert (folder / "5.unfinished-1").is_dir()


def test_a_kill_before_the_first_seal_starts_over(tmp_path, capfd):
    """Nothing had been saved to its end, so nothing is lost."""
    kill_in("seal", tmp_path, 1)
    for _ in range(2):
        assert latest(tmp_path) is None
    assert "1.unfinished-1" in capfd.readouterr().err
    save(tmp_path, 1)
    assert latest(tmp_path) == 1


def test_a_kill_while_an_old_step_is_removed_damages_nothing(workdir, capfd):
    """Of 1 (the best), 2 and 3, saving 4 lets go of 2."""
    folder = workdir / "checkpoints"
    kill_in("purge", workdir, 4, 5)
    assert (folder / ".deleted" / "2").is_dir()
    assert list(saved_steps(workdir)) == [1, 3, 4]
    assert latest(workdir) == 4
    assert sorted(p.name for p in folder.iterdir()) == ["1", "3", "4"]
    assert "renamed to" not in capfd.readouterr().err


def test_new_metrics_come_in_one_rename_and_leave_the_arrays_alone(workdir, monkeypatch):
    folder = workdir / "checkpoints"
    arrays = files_of(folder / "3" / "params")
    checkpoints = Checkpoints(workdir)
    better = metrics(3) | {"label_accuracy": 0.95}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no more"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no more")))
        checkpoints.set_metrics(3, better)
    assert defect(folder / "3") is None and saved_steps(workdir)[3] == metrics(3)
    checkpoints.set_metrics(3, better)
    checkpoints.close()
    assert defect(folder / "3") is None and saved_steps(workdir)[3] == better
    assert files_of(folder / "3" / "params") == arrays
    assert list(saved_steps(workdir)) == [2, 3]  # 1 is no longer the best


def test_a_reader_refuses_a_damaged_step_and_changes_nothing(workdir):
    flip_a_bit(workdir / "checkpoints" / "1")
    before = files_of(workdir)
    named = r"checkpoints/1: damaged \(params/.*: its bytes have changed.*\); `step=3` is good$"
    with pytest.raises(InputError, match=named):
        load_model(workdir, "best")
    with pytest.raises(InputError, match=named):
        resolve_step(workdir, 1, read="params")
    assert resolve_step(workdir, "last", read="params") == 3
    truncate(workdir / "checkpoints" / "1")  # this one is seen without reading
    with pytest.raises(InputError, match="`step=3` is good"):
        resolve_step(workdir, "best")
    for step in ("2", "3"):
        flip_a_bit(workdir / "checkpoints" / step)
    with pytest.raises(InputError, match="no other step is good"):
        resolve_step(workdir, "best", read="params")
    assert files_of(workdir).keys() == before.keys()


def test_the_best_is_not_chosen_where_a_steps_metrics_are_lost(workdir):
    empty_the_manifest(workdir / "checkpoints" / "2")  # it might have been better than any
    with pytest.raises(InputError, match=r"/2: damaged \(manifest\.json: .*`step=3` is good"):
        resolve_step(workdir, "best")
    assert resolve_step(workdir, "last") == 3


def test_an_older_step_is_read_before_it_is_restored(workdir):
    """Opening reads the newest one as a whole, of the others names and sizes."""
    flip_a_bit(workdir / "checkpoints" / "1")
    checkpoints = Checkpoints(workdir)
    assert list(saved_steps(workdir)) == [1, 2, 3]
    checkpoints.restore(2, abstract(params(2)), abstract(rest(2)))
    with pytest.raises(CheckpointError, match=r"checkpoints/1: damaged \(params/"):
        checkpoints.restore(1, abstract(params(1)), abstract(rest(1)))
    checkpoints.close()


TX = optax.adamw(1e-3)


def other_dtype():
    tree = params(1)
    tree["layer"]["w"] = tree["layer"]["w"].astype(jnp.bfloat16)
    return tree, TX, r"params: .*layer/w: expected bfloat16\[4096\], got float32\[4096\]\)"


def other_shape():
    tree = params(1)
    tree["layer"]["b"] = jnp.zeros((2, 8))
    return tree, TX, r"params: .*layer/b: expected float32\[2, 8\], got float32\[8\]\)"


def other_name():
    tree = {"layer": {"w": params(1)["layer"]["w"], "bias": jnp.zeros(8)}}
    return (
        tree,
        TX,
        r"params: .*layer/b: expected no such leaf, got float32\[8\], and 1 more",
    )


def other_optimizer():
    return (
        params(1),
        optax.sgd(1e-3, momentum=0.9),
        r"state: .*opt_state/0/count: expected no such leaf, got int32\[\],",
    )


@pytest.mark.parametrize("other", [other_dtype, other_shape, other_name, other_optimizer])
def test_a_checkpoint_of_another_tree_is_refused_and_the_leaf_named(tmp_path, record_fault, other):
    checkpoints = Checkpoints(tmp_path)
    state = {"opt_state": TX.init(params(1))}
    checkpoints.save(1, params(1), state, metrics(1))
    checkpoints.wait()
    tree, tx, named = other()
    wanted = abstract(tree)
    moments = {"opt_state": jax.eval_shape(tx.init, params(1))}
    try:
        checkpoints.restore(1, wanted, moments)
        said = ""
    except InputError as error:
        said = str(error)
    survived = re.search(named, said) is not None
    record_fault(
        f"a restore into {other.__name__.replace('other', 'another').replace('_', ' ')}",
        tried=1,
        survived=int(survived),
        seen="refused, the leaf named",
    )
    assert survived, said
    got, _ = checkpoints.restore(1, abstract(params(1)), abstract(state))
    np.testing.assert_array_equal(got["layer"]["w"], params(1)["layer"]["w"])
    checkpoints.close()
    if "params" in named:
        with pytest.raises(InputError, match="does not fit the model"):
            restore_params(tmp_path, 1, wanted)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def noise(step):
    """About 2 MB that do not compress."""
    return {"w": jnp.asarray(np.random.default_rng(step).standard_normal(500_000), jnp.float32)}


# the threads in which Orbax writes report their errors, too
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_told_at_the_next_save_and_costs_no_good_step(small_disk, record_fault):
    workdir, filler = small_disk / "run", small_disk / "filler"
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, noise(1), rest(1), metrics(1))
    checkpoints.wait()
    filler.write_bytes(b"x" * 1_500_000)
    checkpoints.save(2, noise(2), rest(2), metrics(2))
    told = r"checkpoints/2: was not saved \(.*No space left on device.*\); step 1 is saved"
    with pytest.raises(CheckpointError, match=told):
        checkpoints.save(3, noise(3), rest(3), metrics(3))
    checkpoints.close()  # what was told is not told again
    intact = defect(workdir / "checkpoints" / "1") is None and list(saved_steps(workdir)) == [1]
    filler.unlink()
    again = Checkpoints(workdir)
    newest = again.latest_step()
    again.save(2, noise(2), rest(2), metrics(2))
    again.close()
    survived = intact and newest == 1 and list(saved_steps(workdir)) == [1, 2]
    record_fault(
        "a full disk (tmpfs) during a save",
        tried=1,
        survived=int(survived),
        seen="told at the next save with the path, the step before intact",
    )
    assert survived, (intact, newest, saved_steps(workdir))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_that_failed_does_not_stop_the_next_one(small_disk):
    checkpoints, filler = Checkpoints(small_disk / "run"), small_disk / "filler"
    filler.write_bytes(b"x" * 3_000_000)
    checkpoints.save(1, noise(1), rest(1), metrics(1))
    with pytest.raises(CheckpointError, match="no step is saved yet"):
        checkpoints.wait()
    filler.unlink()
    checkpoints.save(2, params(2), rest(2), metrics(2))
    checkpoints.close()
    assert list(saved_steps(small_disk / "run")) == [2]


def test_the_command_lists_what_there_is(workdir, capsys):
    assert main(["checkpoints", str(workdir)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:3] == ["step", "state", "MB"]
    assert lines[1][:2] == ["1", "sealed"] and lines[1][3:] == ["0.9000", "1.0000", "best"]
    assert lines[3][:2] == ["3", "sealed"] and lines[3][-1] == "last"
    assert main(["checkpoints", str(workdir), "--verify"]) == 0
    assert capsys.readouterr().out.count("good") == 3


def test_the_command_finds_damage_and_only_reads(workdir, capsys):
    folder = workdir / "checkpoints"
    flip_a_bit(folder / "3")
    (folder / "9").mkdir()
    (folder / "7.damaged-1").mkdir()
    before = files_of(workdir)
    assert main(["checkpoints", str(workdir)]) == 0  # sizes are as they were
    capsys.readouterr()
    assert main(["checkpoints", str(workdir), "--verify", "--json"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["1", "good"],
        ["2", "good"],
        ["3", "damaged"],
    ]
    found = json.loads(last)
    assert [(c["step"], c["state"]) for c in found["checkpoints"]] == [
        (1, "good"),
        (2, "good"),
        (3, "damaged"),
        (9, "unsealed"),
        (7, "quarantined"),
    ]
    assert (found["best"], found["last"], found["damaged"]) == (1, 2, [3])
    assert found["checkpoints"][0]["metrics"] == metrics(1)
    assert found["checkpoints"][0]["bytes"] == sum(map(len, files_of(folder / "1").values())) - len(
        (folder / "1" / "manifest.json").read_bytes()
    )
    assert files_of(workdir) == before


def test_the_command_wants_a_workdir(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 2
    assert f"{tmp_path}: not a workdir" in capsys.readouterr().err


def test_a_live_run_is_listed_while_it_saves_and_removes(tmp_path):
    """Steps come and go between two looks at the folder."""
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 9):
        checkpoints.save(step, params(step), rest(step), metrics(step))
        assert main(["checkpoints", str(tmp_path), "--verify"]) == 0
    checkpoints.close()


TRAIN = """
import json, os, signal, sys
from stepdistill_jax.runtime.checkpoints import manager
from stepdistill_jax.commands import main
from stepdistill_jax.training import TrainConfig, train
settings, workdir, data_dir, kill_at = json.loads(sys.argv[1]), *sys.argv[2:]
seal = manager.seal
def die(folder, metrics, channel):
    if folder.name == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder, metrics, channel)
manager.seal = die
main._run = lambda argv: train(TrainConfig(**settings), workdir=workdir, data_dir=data_dir) and 0
sys.exit(main.main([]))
"""
SETTINGS = {
    "task": "delivery",
    "batch_size": 8,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 6,
    "eval_every": 3,
    "checkpoint_every": 2,
    "learning_rate": 1e-3,
}


def train(workdir, data_dir, kill_at=0):
    return subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(SETTINGS), workdir, data_dir, str(kill_at)],
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]},
    )


@pytest.mark.slow  # five processes
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_goes_on_before_the_unsealed_step_and_ends_as_the_undisturbed_one(
    tmp_path, delivery_data_dir
):
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert train(undisturbed, delivery_data_dir).returncode == 0
    assert train(run, delivery_data_dir, kill_at=4).returncode == -signal.SIGKILL
    assert list(saved_steps(run)) == [3]
    resumed = train(run, delivery_data_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert "renamed to 4.unfinished-1" in resumed.stderr
    assert "from step 3" in resumed.stderr
    assert saved_steps(run) == saved_steps(undisturbed)
    flip_a_bit(run / "checkpoints" / "6")
    again = train(run, delivery_data_dir)
    assert again.returncode == 0, again.stderr
    assert "renamed to 6.damaged-1" in again.stderr
    for item in ("params", "state"):
        one, other = (load_item(w, item) for w in (undisturbed, run))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    for step in saved_steps(run):
        truncate(run / "checkpoints" / str(step))
    failed = train(run, delivery_data_dir)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("stepdistill: failed: ") and "no good checkpoint" in last
    assert "Traceback" not in failed.stderr


def load_item(workdir, item):
    """Arrays of step 6, keys as their numbers."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(workdir / "checkpoints" / "6" / item)

    def numbers(x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(numbers, tree)
