"""What a config needs on N devices, and which layout and remat policy fit at the least cost."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.models.config import REMAT_POLICIES, T5Config
from stepdistill_jax.models.flops import PEAK_FLOPS, peak_flops
from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.planning.compiling import Figures, figures, groups_on, state_bytes
from stepdistill_jax.planning.devices import TPU_MEMORY, topology_devices, virtual_devices
from stepdistill_jax.planning.workload import Workload, workload
from stepdistill_jax.runtime.checks import whole
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.optimizer_function import OptimizerFunction
from stepdistill_jax.training.state import abstract_state

DEFAULT_HBM = 80 * 10**9  # an A100 or H100
# of a device's memory, for the runtime, buffers of its collectives, and gaps between arrays
HEADROOM = 0.1
# What a host holds while Orbax saves and restores the part of one device, as multiples of it: a copy of
# the arrays, and 0.32 and 0.68 times as much as measured on a CPU (benchmarks/memory.py), rounded up
SAVE_FACTOR, RESTORE_FACTOR = 1.35, 1.7
TENSOR_PARTS = (2, 4, 8)


def plan(
    config: TrainConfig,
    *,
    devices: int = 16,
    hbm: int | None = None,
    layout: str | Layout | None = None,
    topology: str | None = None,
    rows: int | None = None,
    data_dir: os.PathLike | str | None = None,
) -> dict[str, Any]:
    """Compiles the training step for devices that need not be there, and says what it takes.

    No weight and no data is read. The devices are virtual CPU devices, which JAX can make only before
    it has any: call this first, or in a process that has enough of them.

    Args:
        config: of the run. Without `layout`, its layout and remat policy are not used.
        devices: how many; a topology says it itself.
        hbm: memory of one device in bytes; None is 80e9, or what the topology's chips have.
        layout: only this one (a name or sizes), with the config's remat policy. None compares those
            that divide the model, each under the remat policies from the least to the most
            recomputation until one fits.
        topology: a TPU slice such as `v5e:8x8`: compiled by the TPU compiler (libtpu).
        rows: packed rows of a step, where they are known.
        data_dir: of prepared datasets.

    Returns:
        `devices`, `device_kind`, `hbm`, `assumptions`; `candidates`: list of `Figures.to_json` with
        `name` and `fits` (one that was not compiled has `error`); `best`: the
        candidate that fits at the least cost, or None; `advice`: what would fit, where none does;
        `host_bytes`: what saving and restoring take for each device of a host;
        `seconds_at_peak`: lower bounds of a step of the best, or of the smallest, by device kind.

    Raises:
        InputError: devices that cannot be had, a layout that does not divide them or the model.
    """
    whole("devices", devices, 1)
    if rows is not None:
        whole("rows", rows, 1)
    found = topology_devices(topology) if topology else virtual_devices(devices)
    kind = found[0].device_kind if topology else "virtual CPU"
    memory = hbm or (TPU_MEMORY.get(kind, DEFAULT_HBM) if topology else DEFAULT_HBM)
    # the TPU compiler lays out all that a step holds; the CPU's figures are an estimate
    limit = memory if topology else memory * (1 - HEADROOM)
    work = workload(config, rows=rows, data_dir=data_dir)
    candidates = list(_candidates(config, work, found, layout, limit))
    fitting = [c for c in candidates if c["fits"]]
    best = min(fitting, key=lambda c: c["cost"], default=None)
    compiled = [c for c in candidates if "cost" in c]
    shown = best or min(compiled, key=lambda c: c["per_device"]["total"], default=None)
    return {
        "devices": len(found),
        "device_kind": kind,
        "hbm": memory,
        "limit": round(limit),
        "assumptions": list(work.assumptions),
        "model": dataclasses.asdict(work.model),
        "candidates": candidates,
        "best": best,
        "advice": [] if best else _advice(config, shown, limit),
        "host_bytes": {} if shown is None else _host_bytes(shown),
        "seconds_at_peak": {} if shown is None else _seconds(shown, kind if topology else None),
    }


def layouts_for(model: T5Config, devices: int) -> dict[str, Layout]:
    """The layouts by name whose axes divide the model's dimensions."""

    def divides(fsdp: int, tensor: int) -> bool:
        heads_and_widths = (model.num_heads, model.mlp_dim, model.vocab_size)
        return model.emb_dim % fsdp == 0 and all(size % tensor == 0 for size in heads_and_widths)

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


def _candidates(
    config: TrainConfig,
    work: Workload,
    devices: list[Any],
    layout: str | Layout | None,
    limit: float,
) -> Iterator[dict[str, Any]]:
    if layout is not None:
        name = layout if isinstance(layout, str) else "given"
        yield _one(config, work, devices, layout, config.remat_policy, limit, name)
        return
    for name, sizes in layouts_for(work.model, len(devices)).items():
        mesh = make_mesh(sizes, devices)
        state = state_bytes(abstract_state(work.model, make_optimizer(config), mesh))
        if sum(state.values()) > limit:
            yield {
                "name": name,
                "layout": dict(mesh.shape),
                "groups": groups_on(work, mesh, config.num_microbatches),
                "per_device": {**state, "total": sum(state.values())},
                "fits": False,
                "error": "parameters and optimizer alone do not fit",
            }
            continue
        for policy in REMAT_POLICIES:
            one = _one(config, work, devices, sizes, policy, limit, name)
            yield one
            if one["fits"]:
                break


def _one(
    config: TrainConfig,
    work: Workload,
    devices: list[Any],
    layout: str | Layout,
    policy: str,
    limit: float,
    name: str,
) -> dict[str, Any]:
    mesh = make_mesh(layout, devices)
    try:
        found: Figures = figures(config, work, mesh, policy)
    except MemoryError as error:
        log(f"{name}, remat {policy}: {error}")
        about = {"layout": dict(mesh.shape), "remat_policy": policy, "error": str(error)}
        return {"name": name, "fits": False, **about}
    log(f"{name}, remat {policy}: compiled in {found.compile_seconds:.1f} s")
    fits = found.total <= limit
    return {"name": name, "fits": fits, **found.to_json()}


def _host_bytes(shown: dict[str, Any]) -> dict[str, int]:
    """Host memory to save and to restore the part of one device."""
    state = shown["per_device"]["params"] + shown["per_device"]["optimizer"]
    return {"save": round(SAVE_FACTOR * state), "restore": round(RESTORE_FACTOR * state)}


def _seconds(shown: dict[str, Any], kind: str | None) -> dict[str, float]:
    """Seconds of a step at the bfloat16 peak of each known device, or of one; links are free."""
    kinds = {name: peak for name, peak in PEAK_FLOPS.items() if kind is None or name == kind}
    if kind is not None and not kinds and (peak := peak_flops(kind)) is not None:
        kinds = {kind: peak}
    return {name: shown["flops"]["per_device"] / peak for name, peak in kinds.items()}


def _advice(config: TrainConfig, nearest: dict[str, Any] | None, limit: float) -> list[str]:
    """What else to change, each with what it gives by arithmetic on the smallest candidate."""
    if nearest is None:
        return ["more devices: parameters and optimizer of one device are 1/N under fsdp"]
    sizes = nearest["per_device"]
    devices = nearest["layout"]["data"] * nearest["layout"]["fsdp"] * nearest["layout"]["tensor"]
    wanted = devices
    while wanted * limit < sizes["total"] * devices:
        wanted *= 2
    found = [f"`devices={wanted}`, if all shrinks as 1/N (fsdp)"]
    slices, fixed = 1, sizes["arguments"] + 2 * sizes["gradients"]  # a slice's, and their sum
    while slices < max(rows for rows, *_ in nearest["groups"]):
        slices *= 2
        if fixed + sizes["activations"] / slices <= limit:
            total = config.num_microbatches * slices
            found.append(f"`num_microbatches={total}` (activations / {slices}, same result)")
            break
    if config.dtype == "float32":
        found.append("`gin_files=memory/bfloat16.gin` (activations of half the size)")
    if isinstance(config.optimizer, OptimizerFunction):
        held = sizes["optimizer"] / 2**30
        found.append(
            f"`optimizer={config.optimizer.name}` holds {held:.2f} GiB; one with less state"
        )
    elif config.optimizer.name == "adamw":
        saved = sizes["optimizer"] / 2**30
        found.append(f"`gin_files=optimizers/adafactor.gin` (saves most of {saved:.2f} GiB)")
        if config.optimizer.mu_dtype == "float32":
            found.append(f"`gin_files=memory/bfloat16_moment.gin` (saves {saved / 4:.2f} GiB)")
    return found
