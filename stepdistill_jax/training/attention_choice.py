"""Which attention a run takes: the chip's kernel is tried before the first compile of a step."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.attention import attention
from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.fused_attention import reason_against
from stepdistill_jax.runtime.on_processes import on_process_0
from stepdistill_jax.runtime.progress import log

ROWS = 2
# largest |kernel - plain| / |plain| over an output or a gradient: far above bfloat16's rounding, far
# below what a wrong mask or bias gives
TOLERANCE = 0.05


def settle_attention(model: T5Config, mesh: Mesh, lengths: Sequence[tuple[int, int]]) -> T5Config:
    """Returns the model with "auto" replaced by what it comes to on the mesh, and says what that is.

    Args:
        model: its `attention` is one of `config.ATTENTIONS`.
        mesh: of the run.
        lengths: (input, target) tokens of the rows.

    Raises:
        InputError: "pallas" where there is no kernel for the platform or the shapes.
    """
    if model.attention == "xla":
        return model
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        if model.attention == "auto":
            return dataclasses.replace(model, attention="xla")
        _say("attention: the TPU's kernel, interpreted on a CPU; slow, for tests")
        return model
    heads = model.num_heads // mesh.shape["tensor"]
    problem = _reason(device.platform, model, heads, lengths)
    if model.attention == "pallas":
        if problem is not None:
            raise InputError(f"`attention`: pallas has no kernel here: {problem}; use auto or xla")
        _say(f"attention: one kernel (pallas) on {device.device_kind}")
        return model
    # process 0 decides: all must compile the same program
    problem = problem or on_process_0(lambda: _difference(model, heads, lengths))
    if problem is None:
        _say(f"attention: one kernel (pallas), equal to plain operations on {device.device_kind}")
        return dataclasses.replace(model, attention="pallas")
    _say(f"warning: attention by plain operations (xla), since its kernel fails: {problem}")
    return dataclasses.replace(model, attention="xla")


def _say(line: str) -> None:
    if jax.process_index() == 0:
        log(line)


def _calls(lengths: Sequence[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    """Returns the (queries, keys, whether it is causal) of each kind of attention in a step."""
    kinds = [((i, i, False), (t, t, True), (t, i, False)) for i, t in lengths]
    return [*dict.fromkeys(itertools.chain.from_iterable(kinds))]


def _reason(
    platform: str, model: T5Config, heads: int, lengths: Sequence[tuple[int, int]]
) -> str | None:
    for queries, keys, _ in _calls(lengths):
        reason = reason_against(platform, queries, keys, heads, model.head_dim, model.dtype)
        if reason is not None:
            return reason
    return None


def _difference(model: T5Config, heads: int, lengths: Sequence[tuple[int, int]]) -> str | None:
    """Returns how the kernel differs from plain operations on this process's first device, or None."""
    for call in _calls(lengths):
        arrays, options = _example(model, heads, *call)
        by = {
            name: jax.jit(functools.partial(_value_and_gradients, implementation=name, **options))
            for name in ("pallas", "xla")
        }
        try:
            found = by["pallas"](*arrays)
            jax.block_until_ready(found)
        except Exception as error:  # a compiler's or a driver's own; whatever it is, XLA goes on
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for one, other in zip(found, by["xla"](*arrays), strict=True):
            one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
            distance = np.linalg.norm(one - other) / np.linalg.norm(other)
            if not distance < TOLERANCE:  # NaN, too
                return f"it differs by {distance:.2g} of the norm at {call[0]} x {call[1]} tokens"
    return None


def _example(
    model: T5Config, heads: int, queries: int, keys: int, causal: bool
) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Returns arrays of a packed batch, and the options of `attention`."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / 2, model.dtype)

    def segments(length: int) -> jax.Array:  # two examples, and a tenth of padding
        place = np.arange(length) / length
        return jnp.asarray(np.select([place < 0.4, place < 0.9], [1, 2]), jnp.int32)[None]

    sizes = heads, model.head_dim
    arrays = (
        normal(ROWS, queries, *sizes),
        normal(ROWS, keys, *sizes),
        normal(ROWS, keys, *sizes),
        normal(1, heads, queries, keys).astype(jnp.float32),
        normal(ROWS, queries, *sizes),
    )
    return arrays, {
        "query_segments": segments(queries),
        "key_segments": segments(keys),
        "causal": causal,
        "dropout_rate": model.dropout_rate,
        "dropout_broadcast": model.dropout_broadcast,
    }


def _value_and_gradients(q, k, v, bias, slope, **options):
    def call(q, k, v, bias):
        rng = jax.random.key(0)
        mixed = attention(q, k, v, relative_bias=bias, dropout_rng=rng, **options)
        # what padding gets has no meaning
        return jnp.where(options["query_segments"][..., None, None] > 0, mixed, 0)

    value, backward = jax.vjp(call, q, k, v, bias)
    return value, *backward(slope)
