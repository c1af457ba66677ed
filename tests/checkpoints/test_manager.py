import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stepdistill_jax.checkpoints.manager import (
    Checkpoints,
    rank,
    resolve_step,
    restore_params,
    saved_steps,
)
from stepdistill_jax.errors import InputError
from stepdistill_jax.sharding import Layout, make_mesh


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
    ],
    ids=["accuracy", "loss", "earlier", "any_validation"],
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
