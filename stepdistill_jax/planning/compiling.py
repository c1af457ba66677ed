"""Compiles the training step on abstract arrays, and reads its memory and costs."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stepdistill_jax.batches.packing import empty_group
from stepdistill_jax.data.objectives import resolve, share_encoding
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.flops import recomputed_flops, train_flops
from stepdistill_jax.models.lora import split
from stepdistill_jax.models.sharding import batch_sharding, batch_shards
from stepdistill_jax.planning.collectives import Collective, by_dtype, by_kind, collectives
from stepdistill_jax.planning.hlo import Module
from stepdistill_jax.planning.roofline import Bound, bound
from stepdistill_jax.planning.workload import Workload
from stepdistill_jax.runtime.chips import chip_of
from stepdistill_jax.training.attention_choice import untried_attention
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.state import TrainState, abstract_state
from stepdistill_jax.training.step import in_mesh, jit_train_step

# Number of FLOPs that cost as much as sending one byte. According to the data sheets, a TPU v5e computes 197e12
# FLOPs and sends 200e9 bytes a second, and an H100 computes 989e12 FLOPs and sends 450e9 bytes over NVLink.
FLOPS_PER_BYTE = 1000
# The machine code of virtual devices never runs, and its optimisation would change no result of this module.
# Without a GPU, XLA cannot time kernels, so matmuls go to cuBLAS, which is as fast as the kernel that timing
# would choose.
OPTIONS: dict[str, Any] = {
    "cpu": {"xla_backend_optimization_level": 0},
    "gpu": {"xla_gpu_autotune_level": 0},
}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The memory, FLOPs and traffic of a compiled step. All numbers of bytes are for one device.

    Attributes:
        layout: size of each mesh axis.
        groups: (row count, input length, target length) of each group of the batch, as in `StepRows`.
        filled_rows: number of rows that contain tokens.
        state: bytes of `params` and of `optimizer`.
        arguments: bytes of state and batch.
        gradients: bytes of the trained parameters' float32 gradients, a part of `temp`.
        temp: bytes of the compiler's buffers.
        total: peak bytes, the sum of `arguments`, `temp` and the results that do not reuse an argument's memory.
        operations: the collectives, sorted from the most to the fewest sent bytes.
        unknown_loops: number of loops of unknown length that contain collectives. One iteration is assumed for each.
        model_flops: FLOPs of the forward and backward pass, over all devices.
        recomputed_flops: FLOPs that the backward pass repeats, over all devices.
        bound: lower bound of the step's time; None for virtual devices.
    """

    layout: dict[str, int]
    remat_policy: str
    num_microbatches: int
    groups: tuple[tuple[int, int, int], ...]
    filled_rows: int
    state: dict[str, int]
    arguments: int
    gradients: int
    temp: int
    total: int
    operations: tuple[Collective, ...]
    unknown_loops: int
    model_flops: float
    recomputed_flops: float
    bound: Bound | None
    compile_seconds: float

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.layout.values())

    @property
    def flops_per_device(self) -> float:
        """FLOPs of a step on one device, including recomputation."""
        return (self.model_flops + self.recomputed_flops) / self.devices

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in a step."""
        return sum(c.wire_bytes for c in self.operations)

    @property
    def cost(self) -> float:
        """Cost that ranks layouts and policies: FLOPs on one device, plus 1000 for each byte sent."""
        return self.flops_per_device + FLOPS_PER_BYTE * self.wire_bytes

    def to_json(self) -> dict[str, Any]:
        """Returns a dict that JSON can represent. Sizes are bytes on one device."""
        return {
            "layout": self.layout,
            "remat_policy": self.remat_policy,
            "num_microbatches": self.num_microbatches,
            "groups": [list(group) for group in self.groups],
            "filled_rows": self.filled_rows,
            "per_device": {
                **self.state,
                "arguments": self.arguments,
                "gradients": self.gradients,
                "activations": max(0, self.temp - self.gradients),
                "temp": self.temp,
                "total": self.total,
            },
            "collectives": by_kind(list(self.operations)),
            "collectives_by_dtype": by_dtype(list(self.operations)),
            "wire_bytes": round(self.wire_bytes),
            "unknown_loops": self.unknown_loops,
            "flops": {
                "step": self.model_flops,
                "recomputed": self.recomputed_flops,
                "per_device": self.flops_per_device,
            },
            "cost": self.cost,
            "bound": self._bound(),
            "compile_seconds": round(self.compile_seconds, 2),
        }

    def _bound(self) -> dict[str, Any] | None:
        if self.bound is None:
            return None
        rows, seconds = sum(rows for rows, *_ in self.groups), self.bound.seconds
        needed = self.model_flops / self.devices
        # MFU: the model's FLOPs per second, without recomputation, as a share of the bfloat16 peak
        return {
            **self.bound.to_json(),
            "links_ms": 1e3 * self.wire_bytes / self.bound.chip.link,
            "rows_per_second": rows / seconds,
            "rows_per_second_per_device": rows / seconds / self.devices,
            "mfu": needed / seconds / self.bound.chip.bfloat16,
        }


def abstract_batch(
    groups: Sequence[tuple[int, int, int]], mesh: Mesh, **features: bool
) -> tuple[dict, ...]:
    """Returns the groups of a batch as abstract arrays, with rows sharded over the mesh.

    `features` are the options of `empty_group`.
    """
    sharding = batch_sharding(mesh)
    return tuple(
        {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for name, x in empty_group(*group, **features).items()
        }
        for group in groups
    )


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that a tree of sharded abstract arrays takes on one device."""
    # random keys are left out, since they are only a few bytes
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def state_bytes(state: TrainState) -> dict[str, int]:
    """Returns the bytes of `params` and `optimizer` on one device."""
    return {
        "params": bytes_per_device(state.params),
        "optimizer": bytes_per_device(state.opt_state),
    }


def lower_step(
    config: TrainConfig, model: ModelConfig, groups: Sequence[tuple[int, int, int]], mesh: Mesh
) -> tuple[jax.stages.Lowered, TrainState]:
    """Lowers `training.step.train_step` for the given shapes.

    Args:
        groups: (row count, input length, target length) of each group of the batch.

    Returns:
        The lowered step.
        The abstract state that the step takes.

    Raises:
        InputError: a sharded dimension is not a multiple of the size of its mesh axis.
    """
    tx = make_optimizer(config)
    state = abstract_state(model, tx, mesh)
    step = jit_train_step(
        state,
        mesh,
        model=EncoderDecoder(model),
        tx=tx,
        objective_weights=tuple(o.weight for o in resolve(config.objectives)),
        num_microbatches=config.num_microbatches,
        extra_loss=config.extra_loss,
    )
    shared = config.pack and share_encoding(resolve(config.objectives))
    batch = abstract_batch(groups, mesh, shared=shared, pairs=config.pairs)
    return in_mesh(step.__wrapped__.lower, mesh)(state, batch), state


def compile_for(
    lowered: jax.stages.Lowered, mesh: Mesh, *, triton: bool = False
) -> jax.stages.Compiled:
    """Compiles a program for the devices of a mesh, which need not exist.

    Args:
        triton: whether a GPU computes matmuls with Triton, which reads int8 weights without a converted copy.

    Raises:
        MemoryError: the program does not fit into memory.
    """
    try:
        options = dict(OPTIONS.get(platform := mesh.devices.flat[0].platform, {}))
        if platform == "gpu":
            options["xla_gpu_enable_triton_gemm"] = triton
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(" ".join(str(error).split())[:400]) from None


def bound_on(hlo: Module, mesh: Mesh, unknown_trips: int | None = None) -> Bound | None:
    """Returns a lower bound on the time of a module on the mesh's chips, or None for an unknown kind of chip.

    Args:
        unknown_trips: see `planning.runs.runs`.
    """
    device = mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    if chip is None:
        return None
    return bound(hlo, chip, on_tpu=device.platform == "tpu", unknown_trips=unknown_trips)


def compile_step(
    config: TrainConfig, work: Workload, mesh: Mesh, remat_policy: str
) -> CompiledStep:
    """Compiles the step for one candidate.

    Args:
        config: its layout and remat policy are ignored.
        mesh: mesh of virtual devices, or of a topology's devices.
        remat_policy: `elementwise`, `minimal` or `full`.

    Raises:
        InputError: a sharded dimension is not a multiple of the size of its mesh axis.
        MemoryError: the step does not fit into memory.
    """
    began = time.perf_counter()
    # each device needs the same number of rows in each microbatch
    rows = work.rows_of(batch_shards(mesh) * config.num_microbatches)
    groups = rows.groups
    model = dataclasses.replace(work.model, remat_policy=remat_policy)
    lengths = [(inputs, targets) for _, inputs, targets in groups]
    model, _ = untried_attention(model, mesh, lengths)
    lowered, state = lower_step(config, model, groups, mesh)
    compiled = compile_for(lowered, mesh)
    memory, hlo = compiled.memory_analysis(), Module(compiled.as_text())
    assert memory is not None  # all three backends report it
    operations, unknown = collectives(hlo, mesh.size)
    shapes = [
        {"rows": rows, "input_length": inputs, "target_length": targets}
        for rows, inputs, targets in groups
    ]
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # The step donates its state, so most results reuse the memory of an argument. `alias` is the size of these
    # results.
    return CompiledStep(
        layout=dict(mesh.shape),
        remat_policy=remat_policy,
        num_microbatches=config.num_microbatches,
        groups=groups,
        filled_rows=rows.filled,
        state=state_bytes(state),
        arguments=arguments,
        gradients=bytes_per_device(split(state.params)[0]),
        temp=temp,
        total=arguments + temp + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        operations=tuple(operations),
        unknown_loops=unknown,
        model_flops=sum(train_flops(model, **shape) for shape in shapes),
        recomputed_flops=sum(recomputed_flops(model, **shape) for shape in shapes),
        bound=bound_on(hlo, mesh),
        compile_seconds=time.perf_counter() - began,
    )
