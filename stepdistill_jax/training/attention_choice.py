"""Chooses how a run computes attention, and tests the attention kernel before the first step is compiled."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.attention import attention
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.fused_attention import reason_against
from stepdistill_jax.runtime.on_processes import on_process_0
from stepdistill_jax.runtime.progress import log

ROWS = 2
# Largest allowed |kernel - plain| / |plain| of an output or a gradient: ten times the error of interpreted
# kernels, and far below the error of a wrong mask or bias, or of float32 multiplied as bfloat16.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}


class _Call(NamedTuple):
    """The lengths (in tokens) and options of one attention call."""

    queries: int
    keys: int
    causal: bool
    bias: bool


def settle_attention(
    model: ModelConfig, mesh: Mesh, lengths: Sequence[tuple[int, int]]
) -> ModelConfig:
    """Returns the model's configuration with `attention` set to "xla" or "pallas".

    "auto" becomes "pallas" if the kernel works on the mesh's devices, otherwise "xla".

    Args:
        lengths: pairs (input length, target length) of the rows, in tokens.

    Raises:
        InputError: `attention` is "pallas", but no kernel can be used.
    """
    settled, problem = untried_attention(model, mesh, lengths)
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        if settled.attention == "pallas":
            _say("attention: the TPU's kernel, interpreted on a CPU; slow, for tests")
        return settled
    if model.attention == "auto" and problem is None:
        # process 0 decides, since all processes must compile the same program
        problem = on_process_0(lambda: _failure(model, mesh.shape["tensor"], lengths))
    if problem is not None:
        _say(f"warning: attention uses plain operations (xla): {problem}")
        return dataclasses.replace(model, attention="xla")
    if settled.attention == "pallas":
        equal = ", equal to plain operations" * (model.attention == "auto")
        _say(f"attention: one kernel (pallas){equal} on {device.device_kind}")
    return settled


def untried_attention(
    model: ModelConfig, mesh: Mesh, lengths: Sequence[tuple[int, int]]
) -> tuple[ModelConfig, str | None]:
    """Chooses the attention like `settle_attention`, but assumes that the kernel works and logs nothing.

    The mesh's devices need not exist on this machine.

    Returns:
        The model's configuration with the choice.
        Why no kernel can be used, or None.

    Raises:
        InputError: as for `settle_attention`.
    """
    device = mesh.devices.flat[0]
    if model.attention == "xla" or (model.attention == "auto" and device.platform == "cpu"):
        return dataclasses.replace(model, attention="xla"), None
    side, problem = model.decoder, _beyond_kernels(model)
    if problem is None:
        heads = side.num_heads // mesh.shape["tensor"]
        problems = (
            reason_against(
                device, c.queries, c.keys, heads, side.head_dim, model.dtype, bias=c.bias
            )
            for c in _calls(lengths)
        )
        problem = next((p for p in problems if p is not None), None)
    if problem is None:
        return dataclasses.replace(model, attention="pallas"), None
    if model.attention == "pallas":
        raise InputError(f"`attention`: pallas cannot be used here: {problem}; use auto or xla")
    return dataclasses.replace(model, attention="xla"), problem


def _beyond_kernels(model: ModelConfig) -> str | None:
    """Returns a message with the model's features that no kernel supports, or None if there are none."""
    sides = (model.encoder, model.decoder)
    beyond = {
        "soft caps of scores": any(side.score_softcap is not None for side in sides),
        "shared heads of keys and values": any(s.num_kv_heads < s.num_heads for s in sides),
        "windows": any(any(side.windows or ()) for side in sides),
        "a scale of scores": any(side.score_scale != 1 for side in sides),
    }
    found = [what for what, wanted in beyond.items() if wanted]
    return f"no kernel supports {', '.join(found)}" if found else None


def _say(line: str) -> None:
    if jax.process_index() == 0:
        log(line)


def _calls(lengths: Sequence[tuple[int, int]]) -> list[_Call]:
    """Returns three calls for each pair of lengths: encoder, decoder and cross-attention."""
    return [
        call
        for inputs, targets in dict.fromkeys(lengths)
        for call in (
            _Call(inputs, inputs, causal=False, bias=True),
            _Call(targets, targets, causal=True, bias=True),
            _Call(targets, inputs, causal=False, bias=False),
        )
    ]


def _failure(model: ModelConfig, tensor: int, lengths: Sequence[tuple[int, int]]) -> str | None:
    """Returns how the kernel fails or differs from plain operations on this process's first device, or None."""
    heads = model.decoder.num_heads // tensor
    try:
        distances = {call: _distance(model, heads, call) for call in _calls(lengths)}
    except Exception as error:  # compilers and drivers raise many types; each is a reason for XLA
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    worst = max(distances, key=lambda call: np.nan_to_num(distances[call], nan=np.inf))
    if distances[worst] < TOLERANCES[model.dtype]:
        return None
    where = f"{worst.queries} x {worst.keys} tokens"
    return f"the kernel has a relative error of {distances[worst]:.2g} for {where}"


def _distance(model: ModelConfig, heads: int, call: _Call) -> float:
    """Returns the largest |kernel - plain| / |plain| of the output and the gradients, for random packed rows."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: str = model.dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) / 2, dtype)

    # two examples and a tenth of padding: [1, length], for example 1 1 1 1 2 2 2 2 2 0
    def segments(length: int) -> jax.Array:
        place = np.arange(length) / length
        return jnp.asarray(np.select([place < 0.4, place < 0.9], [1, 2]), jnp.int32)[None]

    queries, keys = ((ROWS, n, heads, model.decoder.head_dim) for n in (call.queries, call.keys))
    arrays = [normal(*queries), normal(*keys), normal(*keys)]
    if call.bias:
        arrays.append(normal(1, heads, call.queries, call.keys, dtype="float32"))
    options: dict[str, Any] = {
        "query_segments": segments(call.queries),
        "key_segments": segments(call.keys),
        "causal": call.causal,
        "dropout_rate": model.dropout_rate,
        "dropout_broadcast": model.dropout_broadcast,
    }
    slope = normal(*queries)
    kernel, plain = (
        jax.jit(functools.partial(_value_and_gradients, implementation=name, **options))(
            slope, *arrays
        )
        for name in ("pallas", "xla")
    )

    def distance(one: jax.Array, other: jax.Array) -> float:
        one, other = (x.astype(jnp.float32) for x in (one, other))
        return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))

    # np.max returns NaN if any distance is NaN; Python's max may not
    return float(np.max([distance(*pair) for pair in zip(kernel, plain, strict=True)]))


def _value_and_gradients(slope, q, k, v, bias=None, **options):
    def call(q, k, v, bias):
        rng = jax.random.key(0)
        mixed = attention(q, k, v, relative_bias=bias, dropout_rng=rng, **options)
        # at padding, the kernel returns 0 and plain operations return a meaningless mean
        return jnp.where(options["query_segments"][..., None, None] > 0, mixed, 0)

    value, backward = jax.vjp(call, q, k, v, bias)
    return value, *(gradient for gradient in backward(slope) if gradient is not None)
