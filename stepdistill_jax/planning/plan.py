"""Computes what a config needs on N devices, and finds the layout and remat policy that fit at least cost."""

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

# Host memory for Orbax to save and restore the part of one device, as a multiple of its size: a copy of
# the arrays, plus 0.32 (save) and 0.68 (restore) as measured on a CPU (benchmarks/memory.py), rounded up.
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
    """Compiles the training step for devices that need not exist, and returns what it needs.

    It reads no weights and runs nothing on the devices. Without a topology, they are virtual CPU devices,
    which JAX can create only before its first use: call this first, or in a process that has enough of
    them.

    Args:
        config: of the run. Without `layout`, its layout and remat policy are not used.
        devices: number of devices; ignored with a topology.
        hbm: memory of one device in bytes; None means 80e9, or the memory of the topology's chips. On a
            GPU, and so on virtual devices, a step may take only JAX's share of it.
        layout: plans only this layout, with the config's remat policy: a name, such as `fsdp` or
            `fsdp_tensor 32x8`, or sizes. None compares the layouts that divide the model, the
            least work first, each under the remat policies until one fits. A layout with more than
            twice the work of one that fits is not compiled.
        topology: a TPU slice such as `v5e:8x8`, compiled by libtpu, or `cuda:8`, eight H100s of a
            host, compiled by JAX's CUDA plugin. Candidates then have a `bound`.
        rows: number of packed rows of a step, if known.
        data_dir: folder of prepared datasets.

    Returns:
        `devices`, `device_kind`, `hbm`, `limit`, `assumptions`, `model`, and

        `candidates`: list of `Figures.to_json` with `name`, `fits` and `work` (FLOPs divided by the
        FLOPs that the same tokens need on one device). A candidate that was not compiled has `error`
        instead of sizes; its `fits` is None if the reason is its work.
        `best`: the candidate that fits at the least cost, or None.
        `remedies`: if none fits, candidates that fit with `changes` to the config or to the number of
        devices.
        `hbm_needed`: if none fits, bytes of a device on which the smallest candidate would fit; None for a
        topology, whose chips have a fixed memory.
        `host_bytes`: host memory to save and to restore, for each device of a host.
        `seconds_at_peak`: lower bound of a step's time for each kind of device, for the best candidate or
        the smallest.

    Raises:
        InputError: the devices do not exist, or the layout does not divide them or the model.
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
        # The TPU compiler gives no sizes for a step that it refuses. If it refused all, advice starts from
        # the first candidate under the policy that recomputes most; it has the least work.
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
    """Returns the bytes of one device; infinite for a step that the TPU compiler refused, whose size is unknown."""
    return candidate.get("per_device", {}).get("total", math.inf)


def _host_bytes(shown: dict[str, Any]) -> dict[str, int]:
    """Returns the bytes of host memory to save and to restore the part of one device."""
    state = shown["per_device"]["params"] + shown["per_device"]["optimizer"]
    return {"save": round(SAVE_FACTOR * state), "restore": round(RESTORE_FACTOR * state)}


def _seconds(shown: dict[str, Any], kind: str | None) -> dict[str, float]:
    """Returns the seconds of a step at the bfloat16 peak of one or each known device, without traffic."""
    chips = CHIPS if kind is None else {kind: chip_of(kind)}
    return {
        name: shown["flops"]["per_device"] / chip.bfloat16
        for name, chip in chips.items()
        if chip is not None
    }
