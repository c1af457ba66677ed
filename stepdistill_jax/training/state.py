"""What a step changes, born where it lives: no process ever holds the whole of it."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.encoder_decoder import abstract_params, init_params
from stepdistill_jax.models.lora import combine, split
from stepdistill_jax.models.sharding import param_shardings, replicated


class TrainState(struct.PyTreeNode):
    """Attributes are saved in checkpoints.

    Attributes:
        step: scalar int32, updates done; the data position, too.
        params: float32 tree of `models.encoder_decoder`, all of it.
        opt_state: of the optax transformation, for what is trained (`models.lora.split`): the
            adapters alone where there are any.
        rng: typed key; dropout of step k uses fold_in(rng, k).
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


def create_state(params: Any, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Step 0 with the given parameters."""
    return _first_state(params, tx, jax.random.key(seed))


def _first_state(params: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    # a key of its own: init has used fold 0 of the seed
    rng = jax.random.fold_in(key, 1)
    opt_state = tx.init(split(params)[0])
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, rng=rng)


def _moment_sharding(mesh: Mesh, moment, param, sharding: NamedSharding) -> NamedSharding:
    """A moment of the parameter's shape is cut like it; a factored one (Adafactor) loses one axis."""
    if moment.shape == param.shape:
        return sharding
    spec = list(sharding.spec) + [None] * (param.ndim - len(sharding.spec))
    for axis in reversed(range(param.ndim)):
        if moment.shape == param.shape[:axis] + param.shape[axis + 1 :]:
            return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return replicated(mesh)


def _opt_shardings(mesh: Mesh, opt_state: Any, params: Any, shardings: Any) -> Any:
    """Shardings of any transformation's state: a leaf whose path ends with a parameter's is its moment.

    Not `optax.tree_map_params`, which calls `init` on a placeholder: a function of the user's may
    want arrays there, and trees with masked nodes have another structure than the parameters.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    placed = zip(leaves, jax.tree.leaves(shardings), strict=True)
    known = {path: (param, sharding) for (path, param), sharding in placed}
    depth = max(map(len, known))

    def place(path: tuple, moment: Any) -> NamedSharding:
        for length in range(min(depth, len(path)), 0, -1):
            if found := known.get(path[-length:]):
                return _moment_sharding(mesh, moment, *found)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def abstract_state(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as shapes with shardings: what jit, checkpoints and weight loading aim at."""
    boxed = abstract_params(config)
    shardings = param_shardings(mesh, boxed, config)
    params = jax.eval_shape(nn.meta.unbox, boxed)  # a bare unbox fails on abstract values in a mesh
    state = jax.eval_shape(functools.partial(create_state, tx=tx, seed=0), params)
    trained, cut = split(params)[0], split(shardings)[0]
    opt_shardings = _opt_shardings(mesh, state.opt_state, trained, cut)
    placed = state.replace(
        step=replicated(mesh), params=shardings, opt_state=opt_shardings, rng=replicated(mesh)
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )


def shardings_of(abstract: Any) -> Any:
    """Shardings of a tree of abstract arrays."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def hashable(abstract: Any) -> tuple[tuple, Any]:
    """The leaves of a tree of abstract arrays and what is around them: a key for what is compiled."""
    leaves, tree = jax.tree.flatten(abstract)
    return tuple(leaves), tree


def _key_data(seed: int) -> np.ndarray:
    """An argument, not a constant of the program: runs that differ in seed compile once."""
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.random.key_data(jax.random.key(seed)))


def init_state(
    config: ModelConfig, tx: optax.GradientTransformation, abstract: TrainState, *, seed: int
) -> TrainState:
    """A random state, each part made on the device that keeps it."""
    return _jit_init(config, tx, *hashable(abstract))(_key_data(seed))


@functools.lru_cache(maxsize=4)
def _jit_init(config: ModelConfig, tx: optax.GradientTransformation, leaves: tuple, tree: Any):
    def init(key_data) -> TrainState:
        key = jax.random.wrap_key_data(key_data)
        params = init_params(config, jax.random.fold_in(key, 0))
        return _first_state(params, tx, key)

    return jax.jit(init, out_shardings=shardings_of(jax.tree.unflatten(tree, leaves)))


def drawn(
    part: Callable[[Any], Any], config: ModelConfig, abstract: TrainState, *, seed: int
) -> Any:
    """The part of the parameters that `init_state` would draw, placed.

    XLA drops the rest of `init_params`, since nothing asks for it.

    Args:
        part: takes that part out of a parameter tree.
        config: of the model.
        abstract: of the model's state.
        seed: of the run.
    """

    def init() -> Any:
        return part(init_params(config, jax.random.fold_in(jax.random.key(seed), 0)))

    return jax.jit(init, out_shardings=shardings_of(part(abstract.params)))()


def with_new_adapters(base: Any, config: ModelConfig, abstract: TrainState, *, seed: int) -> Any:
    """Placed plain weights with the adapters that `init_state` would draw beside them."""
    return combine(drawn(lambda params: split(params)[0], config, abstract, seed=seed), base)


def state_from_params(
    params: Any, tx: optax.GradientTransformation, abstract: TrainState, *, seed: int
) -> TrainState:
    """Step 0 around given parameters, on devices: copies of them, placed as in `abstract`."""
    create = functools.partial(create_state, tx=tx, seed=seed)
    return jax.jit(create, out_shardings=shardings_of(abstract))(params)
