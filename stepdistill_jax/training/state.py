"""Creates the state that a training step updates. Each device gets only its own shards."""

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
    """Everything that a checkpoint saves.

    Attributes:
        step: number of steps so far, skipped updates included; also the position in the data; scalar int32.
        params: float32 parameters of `models.encoder_decoder`.
        opt_state: optimizer state of the trained parameters (`models.lora.split`).
        rng: typed random key of dropout.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


def create_state(params: Any, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state at step 0 with the given parameters."""
    return _first_state(params, tx, jax.random.key(seed))


def _first_state(params: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    # a separate key, since init uses fold 0 of the seed
    rng = jax.random.fold_in(key, 1)
    opt_state = tx.init(split(params)[0])
    return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, rng=rng)


def _moment_sharding(mesh: Mesh, moment, param, sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of a parameter's moment.

    A factored moment has one axis less than the parameter, and its sharding leaves the same axis out.
    """
    if moment.shape == param.shape:
        return sharding
    # Adafactor keeps the means over rows and over columns: [512, 1024] sharded as (fsdp, tensor) has moments
    # [512], sharded as (fsdp), and [1024], sharded as (tensor). Other shapes are copied to all devices.
    spec = list(sharding.spec) + [None] * (param.ndim - len(sharding.spec))
    for axis in reversed(range(param.ndim)):
        if moment.shape == param.shape[:axis] + param.shape[axis + 1 :]:
            return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return replicated(mesh)


def _opt_shardings(mesh: Mesh, opt_state: Any, params: Any, shardings: Any) -> Any:
    """Returns the shardings of an optimizer state.

    A leaf whose path ends with a parameter's path is a moment of that parameter, and `_moment_sharding` gives its
    sharding. All other leaves are replicated.
    """
    # `optax.tree_map_params` calls `init` on a placeholder, so it fails for some users' transformations
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    placed = zip(leaves, jax.tree.leaves(shardings), strict=True)
    known = {path: (param, sharding) for (path, param), sharding in placed}
    depth = max(map(len, known))

    def place(path: tuple, moment: Any) -> NamedSharding:
        # the longest ending first: of 1/0/mu/decoder/layers/mlp/wo/kernel the last five are a parameter's path
        for length in range(min(depth, len(path)), 0, -1):
            if found := known.get(path[-length:]):
                return _moment_sharding(mesh, moment, *found)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def abstract_state(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the shapes and shardings of the state, for jit, checkpoints and loading weights."""
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
    """Returns the shardings of a tree of abstract arrays."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def hashable(abstract: Any) -> tuple[tuple, Any]:
    """Returns the leaves and structure of a tree of abstract arrays, as a cache key for compiled programs."""
    leaves, tree = jax.tree.flatten(abstract)
    return tuple(leaves), tree


def _key_data(seed: int) -> np.ndarray:
    """Returns the data of the seed's random key.

    Programs take this data as an argument, so all seeds share one compiled program.
    """
    with jax.ensure_compile_time_eval():
        return np.asarray(jax.random.key_data(jax.random.key(seed)))


def init_state(
    config: ModelConfig, tx: optax.GradientTransformation, abstract: TrainState, *, seed: int
) -> TrainState:
    """Returns a random state. Each device computes only the shards that it keeps."""
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
    """Returns `part(params)` for the parameters that `init_state` would draw, and computes only this part."""

    def init() -> Any:
        return part(init_params(config, jax.random.fold_in(jax.random.key(seed), 0)))

    return jax.jit(init, out_shardings=shardings_of(part(abstract.params)))()


def with_new_adapters(base: Any, config: ModelConfig, abstract: TrainState, *, seed: int) -> Any:
    """Returns the weights `base` with the adapters that `init_state` would draw from `seed`."""
    return combine(drawn(lambda params: split(params)[0], config, abstract, seed=seed), base)


def state_from_params(
    params: Any, tx: optax.GradientTransformation, abstract: TrainState, *, seed: int
) -> TrainState:
    """Returns the state at step 0 with copies of the given parameters, placed on devices as in `abstract`."""
    create = functools.partial(create_state, tx=tx, seed=seed)
    return jax.jit(create, out_shardings=shardings_of(abstract))(params)
