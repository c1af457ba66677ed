"""What a config needs on N devices, and which layout and remat policy fit at the least cost."""

import dataclasses
import math
import os
from typing import Any

from stepdistill_jax.models.config import REMAT_POLICIES
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.planning.advice import MORE_DEVICES, Base, remedies
from stepdistill_jax.planning.candidates import Target, candidates, compiled, named_layout
from stepdistill_jax.planning.devices import (
    memory_of,
    topology_devices,
    usable_share,
    virtual_devices,
)
from stepdistill_jax.planning.workload import workload
from stepdistill_jax.runtime.checks import whole
from stepdistill_jax.runtime.chips import CHIPS, chip_of
from stepdistill_jax.training.config import TrainConfig

# What a host holds while Orbax saves and restores the part of one device, as multiples of it: a copy of
# the arrays, and 0.32 and 0.68 times as much as measured on a CPU (benchmarks/memory.py), rounded up
SAVE_FACTOR, RESTORE_FACTOR = 1.35, 1.7


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
        hbm: memory of one device in bytes; None is 80e9, or what the topology's chips have. Of a GPU,
            and so of virtual devices, JAX's share of it is what a step may take.
        layout: only this one (a name, also such as `fsdp_tensor 32x8`, or sizes), with the config's
            remat policy. None compares those that divide the model, the least work first, each
            under the remat policies until one fits; layouts of more than twice the work of one that
            fits are not compiled.
        topology: a TPU slice such as `v5e:8x8`, compiled by libtpu, or `cuda:8`, eight H100 of a
            host, compiled by JAX's CUDA plugin; candidates have a `bound` then.
        rows: packed rows of a step, where they are known.
        data_dir: of prepared datasets.

    Returns:
        `devices`, `device_kind`, `hbm`, `assumptions`; `candidates`: list of `Figures.to_json` with
        `name`, `fits` and `work` (times the FLOPs that its tokens need on one device); one that was
        not compiled has `error` instead of sizes, and `fits` None where that is for its work; `best`: the candidate that fits at the least cost, or None;
        `remedies`: where none does, candidates that fit with `changes` to the config or the number
        of devices, and `hbm_needed`: bytes of a device that the smallest fits on unchanged (None
        for a topology, whose chips have what they have);
        `host_bytes`: what saving and restoring take for each device of a host;
        `seconds_at_peak`: lower bounds of a step of the best, or of the smallest, by device kind.

    Raises:
        InputError: devices that cannot be had, a layout that does not divide them or the model.
    """
    whole("devices", devices, 1)
    if rows is not None:
        whole("rows", rows, 1)
    found = (
        topology_devices(topology)
        if topology
        else virtual_devices(devices, most=MORE_DEVICES[-1] * devices)
    )
    used = found if topology else found[:devices]
    kind = used[0].device_kind if topology else "virtual CPU"
    memory, usable = memory_of(kind, hbm), usable_share(used[0])
    target = Target(workload(config, rows=rows, data_dir=data_dir), used, memory * usable)
    if layout is None:
        tried = list(candidates(config, target))
    else:
        name = layout if isinstance(layout, str) else "given"
        layout = named_layout(layout, target.work.model, len(used))
        tried = [compiled(config, target, name, layout, config.remat_policy)]
    best = min((c for c in tried if c["fits"]), key=lambda c: c["cost"], default=None)
    shown = best or min((c for c in tried if "cost" in c), key=_total, default=None)
    helpful: dict[str, Any] = {"remedies": [], "hbm_needed": None}
    if best is None:
        # the TPU compiler gives no sizes of what it refused: of these the least work and most remat
        refused = (c for c in tried if c.get("remat_policy") == REMAT_POLICIES[-1])
        nearest = shown or next(refused, None) or min(tried, key=_total)
        sizes = layout or Layout(**nearest["layout"])
        base = Base(config, target, nearest, sizes, given=layout is not None)
        helpful["remedies"] = remedies(base, found)
        if shown is not None and not topology:
            helpful["hbm_needed"] = math.ceil(_total(shown) / usable)
    return {
        "devices": len(used),
        "device_kind": kind,
        "hbm": memory,
        "limit": round(target.limit),
        "assumptions": list(target.work.assumptions),
        "model": dataclasses.asdict(target.work.model),
        "candidates": tried,
        "best": best,
        **helpful,
        "host_bytes": {} if shown is None else _host_bytes(shown),
        "seconds_at_peak": {} if shown is None else _seconds(shown, kind if topology else None),
    }


def _total(candidate: dict[str, Any]) -> float:
    """Bytes of one device; of what the TPU compiler refused they are not known."""
    return candidate.get("per_device", {}).get("total", math.inf)


def _host_bytes(shown: dict[str, Any]) -> dict[str, int]:
    """Host memory to save and to restore the part of one device."""
    state = shown["per_device"]["params"] + shown["per_device"]["optimizer"]
    return {"save": round(SAVE_FACTOR * state), "restore": round(RESTORE_FACTOR * state)}


def _seconds(shown: dict[str, Any], kind: str | None) -> dict[str, float]:
    """Seconds of a step at the bfloat16 peak of each known device, or of one; links are free."""
    chips = CHIPS if kind is None else {kind: chip_of(kind)}
    return {
        name: shown["flops"]["per_device"] / chip.bfloat16
        for name, chip in chips.items()
        if chip is not None
    }
