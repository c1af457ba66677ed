"""Compiles the step with each layout and remat policy that a config may use."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import REMAT_POLICIES, ModelConfig
from stepdistill_jax.models.sharding import Layout, batch_shards, make_mesh
from stepdistill_jax.planning.compiling import compile_step, state_bytes
from stepdistill_jax.planning.workload import Workload
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.state import abstract_state

TENSOR_PARTS = (2, 4, 8, 16, 32)
# A layout is not compiled if it needs more than this factor times the FLOPs of the first layout that fits. The
# additional FLOPs are spent on empty rows. `train` warns if more than half of all rows are empty.
WASTE = 2


@dataclasses.dataclass(frozen=True)
class Target:
    """The work and the devices for which candidates are compiled.

    Attributes:
        limit: bytes that a step may take on each device.
    """

    work: Workload
    devices: list[Any]
    limit: float


def layouts_for(model: ModelConfig, devices: int) -> dict[str, Layout]:
    """Returns {name: layout} for all layouts whose axis sizes divide the model's dimensions."""

    # `models.sharding` shards the width over fsdp, and vocabulary, whole key/value heads and mlp over tensor
    def divides(fsdp: int, tensor: int) -> bool:
        sides = (model.encoder, model.decoder)
        by_tensor = [model.vocab_size, *(n for s in sides for n in (s.num_kv_heads, s.mlp_dim))]
        return all(side.emb_dim % fsdp == 0 for side in sides) and all(
            size % tensor == 0 for size in by_tensor
        )

    found = {"data": Layout(data=devices)}
    if devices > 1 and divides(devices, 1):
        found["fsdp"] = Layout(fsdp=devices)
    for tensor in TENSOR_PARTS:
        fsdp = devices // tensor
        if devices % tensor == 0 and fsdp > 1 and divides(fsdp, tensor):
            found[f"fsdp_tensor {fsdp}x{tensor}"] = Layout(fsdp=fsdp, tensor=tensor)
    if devices > 1 and divides(1, devices):
        found["tensor"] = Layout(tensor=devices)
    return found


def named_layout(layout: str | Layout, model: ModelConfig, devices: int) -> str | Layout:
    """Returns the `Layout` for a name from `layouts_for`, such as `fsdp_tensor 32x8`.

    A `Layout`, or a single word that `layouts_for` does not know, is returned unchanged.

    Raises:
        InputError: the sizes in the name do not suit this model or this number of devices.
    """
    if not isinstance(layout, str):
        return layout
    named = layouts_for(model, devices)
    if " " in layout and layout not in named:
        raise InputError(
            f"`layout` {layout}: not possible on {devices} devices with this model; use one of {', '.join(named)}"
        )
    return named.get(layout, layout)


def by_work(config: TrainConfig, target: Target) -> dict[str, Layout]:
    """Returns {name: layout}, sorted by the FLOPs of a step, the fewest first."""

    def flops(item: tuple[str, Layout]) -> float:
        return target.work.step_flops(row_multiple(config, target, item[1]))

    return dict(sorted(layouts_for(target.work.model, len(target.devices)).items(), key=flops))


def row_multiple(config: TrainConfig, target: Target, layout: str | Layout) -> int:
    """Returns the number of batch shards times the number of microbatches.

    The row counts of a batch must be multiples of this product.
    """
    return batch_shards(make_mesh(layout, target.devices)) * config.num_microbatches


def candidates(config: TrainConfig, target: Target) -> Iterator[dict[str, Any]]:
    """Compiles the layouts of `by_work`, each under one to three remat policies.

    Yields:
        Candidates as returned by `compiled`. For a layout that was not compiled, `error` is the reason, and `fits`
        is False if parameters and optimizer alone do not fit, or None if the layout takes more than twice the
        FLOPs of the first layout that fits.
    """
    least = None
    for name, layout in by_work(config, target).items():
        flops = target.work.step_flops(row_multiple(config, target, layout))
        if too_large := too_large_a_state(config, target, layout):
            yield {"name": name, **too_large}
            continue
        if least is not None and flops > WASTE * least:
            why = f"not compiled: needs {flops / least:.1f} times the FLOPs of a layout that fits"
            yield {"name": name, **_about(config, target, layout), "fits": None, "error": why}
            continue
        tried = list(_policies(config, target, name, layout))
        yield from tried
        if least is None and any(c["fits"] for c in tried):
            least = flops


def _policies(
    config: TrainConfig, target: Target, name: str, layout: Layout
) -> Iterator[dict[str, Any]]:
    """Compiles one layout under one to three remat policies, and yields the results.

    The policy with the least recomputation comes first, the one with the most last.
    """
    # The policy that recomputes most is compiled second. If it does not fit, no policy in between does.
    least, *between, most = REMAT_POLICIES
    first = compiled(config, target, name, layout, least)
    yield first
    if first["fits"]:
        return
    last = compiled(config, target, name, layout, most)
    if last["fits"]:
        for policy in between:
            yield compiled(config, target, name, layout, policy)
    yield last


def compiled(
    config: TrainConfig, target: Target, name: str, layout: str | Layout, policy: str
) -> dict[str, Any]:
    """Compiles one candidate.

    Returns:
        `name`, `fits`, `work` and the entries of `CompiledStep.to_json`. `work` is the step's FLOPs divided by the
        FLOPs that a single device would need for the same tokens. If the TPU compiler refuses the step, `error`
        replaces the entries of `CompiledStep.to_json`.

    Raises:
        InputError: a sharded dimension is not a multiple of the size of its mesh axis.
    """
    about = {"name": name, **_about(config, target, layout)}
    try:
        found = compile_step(config, target.work, make_mesh(layout, target.devices), policy)
    except MemoryError as error:
        log(f"{name}, remat {policy}: {error}")
        return {**about, "remat_policy": policy, "fits": False, "error": str(error)}
    log(f"{name}, remat {policy}: compiled in {found.compile_seconds:.1f} s")
    return {**about, "fits": found.total <= target.limit, **found.to_json()}


def state_of(config: TrainConfig, target: Target, layout: str | Layout) -> dict[str, int]:
    """Returns the bytes of `params` and `optimizer` on one device, computed from their shapes."""
    mesh = make_mesh(layout, target.devices)
    return state_bytes(abstract_state(target.work.model, make_optimizer(config), mesh))


def too_large_a_state(
    config: TrainConfig, target: Target, layout: str | Layout
) -> dict[str, Any] | None:
    """Returns a candidate with an `error` if parameters and optimizer alone do not fit, and otherwise None."""
    state = state_of(config, target, layout)
    if sum(state.values()) <= target.limit:
        return None
    return {
        **_about(config, target, layout),
        "per_device": {**state, "total": sum(state.values())},
        "fits": False,
        "error": "parameters and optimizer alone do not fit",
    }


def _about(config: TrainConfig, target: Target, layout: str | Layout) -> dict[str, Any]:
    """Returns the entries of a candidate that are known before it is compiled."""
    multiple = row_multiple(config, target, layout)
    rows = target.work.rows_of(multiple)
    return {
        "layout": dict(make_mesh(layout, target.devices).shape),
        "groups": [list(group) for group in rows.groups],
        "filled_rows": rows.filled,
        "work": round(target.work.step_flops(multiple) / target.work.step_flops(1), 3),
    }
