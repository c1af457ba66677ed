"""Computes a lower bound of the time to decode a batch of labels."""

import dataclasses
import os
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepdistill_jax.decoding.greedy import (
    bucket_length,
    greedy_decode,
    jit_over_rows,
    rows_at_once,
)
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.options import QUANTIZATIONS
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.encoder_decoder import abstract_params
from stepdistill_jax.models.sharding import Layout, batch_sharding, make_mesh, param_shardings
from stepdistill_jax.planning.candidates import named_layout
from stepdistill_jax.planning.collectives import by_dtype, collectives
from stepdistill_jax.planning.compiling import bound_on, bytes_per_device, compile_for
from stepdistill_jax.planning.devices import memory_of, topology_devices, usable_share
from stepdistill_jax.planning.hlo import Module
from stepdistill_jax.planning.workload import model_of, prepared
from stepdistill_jax.runtime.checks import one_of, whole
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.run import max_decode_len
from stepdistill_jax.training.step import in_mesh

ASSUMED_TOKENS = 8  # assumed number of tokens of a label, including its end of sequence


def plan_decode(
    config: TrainConfig,
    *,
    topology: str | None,
    layout: str | Layout | None = None,
    rows: int | None = None,
    quantization: str | None = None,
    hbm: int | None = None,
    data_dir: os.PathLike | str | None = None,
) -> dict[str, Any]:
    """Compiles the greedy decoder of a validation run for a topology, and returns the cost of decoding a batch.

    The cost assumes that no row ends early: each decodes as many tokens as the entry `tokens` says.

    Args:
        config: its `dtype` is the type of the activations.
        topology: as for `plan`, but required.
        layout: a name or a `Layout`, as for `plan`; None means the config's layout.
        rows: number of rows to decode at once, over all devices. None means 64 for each shard of the batch. On
            GPUs, the number is raised to 8 for each shard if it is smaller.
        quantization: `int8` for int8 weight matrices; None for the config's `dtype`.
        hbm: as for `plan`.

    Returns:
        A dict with these entries:

        `devices`, `device_kind`, `hbm`, `limit`, `assumptions`: as for `plan`.
        `layout`: sizes of the mesh axes.
        `rows`: number of rows in the batch.
        `input_length`, `tokens`: number of input tokens (including padding) and of decoded tokens in each row.
        `per_device`: bytes of `params`, `arguments`, `temp` and `total`.
        `fits`: whether the total is within the limit.
        `collectives_by_dtype`, `wire_bytes`: the data that devices exchange.
        `bound`: as for `plan`, for one batch. Its entries `token_ms` and `kernels_per_token` are the time and the
            number of kernels that one more token adds.

    Raises:
        InputError: the decoder does not fit into memory, or an argument is not allowed.
    """
    if topology is None:
        raise InputError(
            "`decode`: set `topology`, such as cuda:8; a program that is compiled for CPUs does not show the"
            " time on other devices"
        )
    if rows is not None:
        whole("rows", rows, 1)
    if quantization is not None:
        one_of("quantization", quantization, QUANTIZATIONS)
    began, devices = time.perf_counter(), topology_devices(topology)
    assumptions: list[str] = []
    data = prepared(config, data_dir)
    # as in a validation: adapters are merged, and attention uses plain operations
    model = dataclasses.replace(
        model_of(config, data, assumptions),
        lora=None,
        quantized=quantization is not None,
        attention="xla",
        scan_layers=True,
    )
    mesh = make_mesh(named_layout(layout or config.layout, model, len(devices)), devices)
    if data is not None:
        tokens = max_decode_len(data, config)
    elif (tokens := config.max_decode_len or 0) == 0:
        tokens = ASSUMED_TOKENS
        assumptions.append(f"labels of {tokens} tokens, since `max_decode_len` is not set")
    count, length = rows_at_once(rows, mesh), bucket_length(config.input_length)
    assumptions.append(
        f"each batch has at least one input of `input_length` tokens, so all rows are padded to {length}"
    )
    lowered, params = _lower(model, mesh, count, length, tokens)
    try:
        compiled = compile_for(lowered, mesh, triton=model.quantized)
    except MemoryError as error:
        raise InputError(f"the decoder does not fit: {error}") from None
    log(f"compiled in {time.perf_counter() - began:.1f} s")
    memory, hlo = compiled.memory_analysis(), Module(compiled.as_text())
    assert memory is not None  # both compilers provide it
    kind = devices[0].device_kind
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    total = arguments + temp + memory.output_size_in_bytes
    size = memory_of(kind, hbm)
    limit = size * usable_share(devices[0])
    operations, _ = collectives(hlo, mesh.size, unknown_trips=tokens)
    found = bound_on(hlo, mesh, tokens)
    assert found is not None  # the chips of a topology are known
    # one more token: the difference of the two bounds is the time of a token, without the encoder
    longer = bound_on(hlo, mesh, tokens + 1)
    assert longer is not None
    wire_bytes = sum(c.wire_bytes for c in operations)
    return {
        "devices": len(devices),
        "device_kind": kind,
        "hbm": size,
        "limit": round(limit),
        "assumptions": assumptions,
        "layout": dict(mesh.shape),
        "rows": count,
        "input_length": length,
        "tokens": tokens,
        "per_device": {"params": params, "arguments": arguments, "temp": temp, "total": total},
        "fits": total <= limit,
        "collectives_by_dtype": by_dtype(operations),
        "wire_bytes": round(wire_bytes),
        "bound": {
            **found.to_json(),
            "links_ms": 1e3 * wire_bytes / found.chip.link,
            "token_ms": 1e3 * (longer.seconds - found.seconds),
            "kernels_per_token": longer.kernels - found.kernels,
            "rows_per_second": count / found.seconds,
            "rows_per_second_per_device": count / found.seconds / len(devices),
        },
    }


def _lower(
    model: ModelConfig, mesh: jax.sharding.Mesh, rows: int, length: int, tokens: int
) -> tuple[jax.stages.Lowered, int]:
    """Returns the lowered decoder for a batch, and the bytes of its parameters on one device."""
    boxed = abstract_params(model)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(nn.meta.unbox, boxed),
        param_shardings(mesh, boxed, model),
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))
    decode = jit_over_rows(
        lambda params, ids: greedy_decode(params, model, ids, max_decode_len=tokens),
        mesh,
        model.dtype,
    )
    return in_mesh(decode.lower, mesh)(params, ids), bytes_per_device(params)
