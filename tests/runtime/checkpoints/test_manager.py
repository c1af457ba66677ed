import contextlib
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stepdistill_jax.commands.main import main
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.runtime.checkpoints.manager import (
    Checkpoints,
    rank,
    resolve_step,
    restore_params,
    saved_steps,
)
from stepdistill_jax.runtime.checkpoints.manifest import defect, seal


def tree(step):
    return {
        "w": jnp.arange(64, dtype=jnp.float32).reshape(8, 8) + step,
        "b": jnp.full(8, step * 1.5),
    }


def rest(step):
    return {"step": jnp.int32(step), "rng": jax.random.key(step)}


def validated(step, accuracy, loss=1.0):
    return {"step": step, "validated": True, "label_accuracy": accuracy, "label_loss": loss}


def unvalidated(step):
    return {"step": step, "validated": False}


def save_all(workdir, metrics):
    checkpoints = Checkpoints(workdir)
    for m in metrics:
        checkpoints.save(m["step"], tree(m["step"]), rest(m["step"]), m)
    checkpoints.close()


def abstract(value, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), value)


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    """A validation that only worsens: the best is the oldest, and the newest are not deleted."""
    save_all(tmp_path, [validated(s, 1.0 - s / 10) for s in range(1, 6)])
    assert list(saved_steps(tmp_path)) == [1, 4, 5]
    assert resolve_step(tmp_path, "best") == 1
    assert resolve_step(tmp_path, "last") == 5
    assert resolve_step(tmp_path, "4") == 4


def test_steps_without_a_validation_are_not_kept_for_ever(tmp_path):
    save_all(tmp_path, [validated(1, 0.5), *map(unvalidated, range(2, 7))])
    assert list(saved_steps(tmp_path)) == [1, 5, 6]
    assert resolve_step(tmp_path, "best") == 1


@pytest.mark.parametrize(
    "better,worse",
    [
        (validated(9, 0.9, 2.0), validated(1, 0.8, 0.1)),
        (validated(9, 0.9, 1.0), validated(1, 0.9, 1.1)),
        (validated(1, 0.9, 1.0), validated(9, 0.9, 1.0)),
        (validated(9, 0.0, 9.0), unvalidated(1)),
        (validated(9, 0.1, 2.0) | {"rank": [-3, -2.0]}, validated(1, 0.8, 0.1) | {"rank": [-4, 0]}),
        (validated(9, 0.1, 2.0) | {"rank": [-math.inf, -9.0]}, unvalidated(1)),
        (unvalidated(9), unvalidated(1)),
    ],
    ids=[
        *("accuracy", "loss", "earlier", "any_validation", "rank", "a_validation_without_number"),
        "later_without_a_validation",
    ],
)
def test_the_better_step_is_chosen_by(better, worse):
    assert rank(better) > rank(worse)


def test_a_step_restores_bitwise_on_another_mesh(tmp_path):
    sharded = NamedSharding(make_mesh(Layout(fsdp=8)), PartitionSpec("fsdp"))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, jax.device_put(tree(3), sharded), rest(3), unvalidated(3))
    checkpoints.close()
    one = NamedSharding(make_mesh(Layout(), jax.devices()[:1]), PartitionSpec())
    params, others = Checkpoints(tmp_path).restore(
        3, abstract(tree(0), one), abstract(rest(0), one)
    )
    np.testing.assert_array_equal(params["w"], tree(3)["w"])
    assert int(others["step"]) == 3
    np.testing.assert_array_equal(
        jax.random.key_data(others["rng"]), jax.random.key_data(jax.random.key(3))
    )
    again = restore_params(tmp_path, 3, abstract(tree(0), sharded))
    np.testing.assert_array_equal(again["b"], tree(3)["b"])
    assert again["w"].sharding.shard_shape((8, 8)) == (1, 8)


@pytest.mark.parametrize("step", ["newest", "7", 7])
def test_an_unknown_step_lists_those_that_are_there(tmp_path, step):
    save_all(tmp_path, [validated(2, 0.5)])
    with pytest.raises(InputError, match="one of 2"):
        resolve_step(tmp_path, step)


@pytest.fixture
def renamed(tmp_path):
    """The steps 2 and 5, the folder of the latter renamed to 6."""
    save_all(tmp_path, [validated(2, 0.5), validated(5, 0.9)])
    (tmp_path / "checkpoints" / "5").rename(tmp_path / "checkpoints" / "6")
    return tmp_path


@pytest.mark.parametrize("step", ["6", "last", "best"])
@pytest.mark.parametrize("read", [None, "params"])
def test_a_folder_with_another_number_is_no_step_to_read(renamed, step, read):
    with pytest.raises(
        InputError, match=r"6: damaged \(manifest.json: belongs to step 5; rename the folder"
    ):
        resolve_step(renamed, step, read=read)
    assert list(saved_steps(renamed)) == [2]
    assert resolve_step(renamed, "2", read=read) == 2


def test_a_resume_quarantines_a_folder_with_another_number(renamed, capfd):
    folder = renamed / "checkpoints"
    saved = (folder / "6" / "manifest.json").read_bytes()
    with contextlib.closing(Checkpoints(renamed)) as checkpoints:
        assert checkpoints.latest_step() == 2
    assert (folder / "6.damaged-1" / "manifest.json").read_bytes() == saved
    assert (
        f"warning: checkpoint {folder}/6: manifest.json: belongs to step 5"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize("verify", [[], ["--verify"]], ids=["sealed", "verified"])
def test_the_command_finds_a_folder_with_another_number(renamed, capsys, verify):
    assert main(["checkpoints", str(renamed), *verify, "--json"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["damaged"], result["best"], result["last"]) == ([6], 2, 2)


def test_a_pipe_instead_of_a_manifest_is_damage_and_not_waited_for(renamed):
    step = renamed / "checkpoints" / "2"
    (step / "manifest.json").unlink()
    os.mkfifo(step / "manifest.json")
    with pytest.raises(InputError, match=r"2: damaged \(manifest.json: is a pipe or device"):
        resolve_step(renamed, "2")


def test_a_pipe_instead_of_an_empty_file_is_damage_and_not_waited_for(tmp_path):
    step = tmp_path / "7"
    step.mkdir()
    (step / "empty").touch()
    seal(step, unvalidated(7))
    assert defect(step) is None
    (step / "empty").unlink()
    os.mkfifo(step / "empty")
    assert defect(step) == "empty: missing"


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        resolve_step(tmp_path, "best")


# Orbax leaves the coroutines of the other arrays behind when one does not fit
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_all(tmp_path, [validated(2, 0.5)])
    sharding = NamedSharding(make_mesh(Layout(), jax.devices()[:1]), PartitionSpec())
    for other in ({"w": jnp.zeros((16, 8)), "b": jnp.zeros(8)}, {"w": jnp.zeros((8, 8))}):
        with pytest.raises(InputError, match="does not fit the model"):
            restore_params(tmp_path, 2, abstract(other, sharding))
