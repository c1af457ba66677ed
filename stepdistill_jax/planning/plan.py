"""Finds the simplest layout, and the remat policy, with which a config fits on a number of devices."""

import dataclasses
import math
import os
from typing import Any

from stepdistill_jax.models.config import REMAT_POLICIES
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.planning.advice import MORE_DEVICES, MORE_WORK, Base, remedies
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

# Host memory that Orbax needs to save and to restore the state of one device, divided by the size of this state: 1
# for a copy of the arrays, plus 0.32 to save and 0.68 to restore, as measured on a CPU (benchmarks/memory.py),
# rounded up.
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
    """Compiles the training step for devices that need not exist, and returns what the step needs.

    Nothing runs on the devices. Without a topology, call this function before anything else uses JAX, or in a
    process that has enough CPU devices.

    Args:
        config: if `layout` is None, its layout and remat policy are ignored.
        devices: number of devices; ignored if there is a topology.
        hbm: bytes of one device's memory. None means that of the topology's chips; without a topology, 80e9.
        layout: a name, such as `fsdp` or `fsdp_tensor 32x8`, or a `Layout`, planned under the config's remat
            policy. None means all layouts that suit the model.
        topology: a TPU slice, such as `v5e:8x8` (needs libtpu), or one host's H100s, such as `cuda:8` (needs
            JAX's CUDA plugin).
        rows: number of packed rows of a step. None means as in `workload`.

    Returns:
        A dict with these entries:

        `devices`, `device_kind`: number and kind of the devices.
        `hbm`, `limit`: bytes of a device's memory, and how many of them a step may take.
        `assumptions`: a string for each assumption.
        `counted`: how the rows of a step were counted, as in `Workload`.
        `model`: fields of the model's configuration.
        `candidates`: dicts as returned by `candidates.candidates`. With a topology, they have a `bound`.
        `best`: the candidate that `recommended` chooses, or None if none fits.
        `remedies`: changed candidates that fit, from `advice.remedies`; empty if `best` is not None.
        `hbm_needed`: bytes of a device's memory that would be enough. It is None if `best` is not None, if there
        is a topology, or if nothing was compiled.
        `host_bytes`: bytes of host memory to `save` and to `restore` a checkpoint, for each device of a host.
        `seconds_at_peak`: {kind of device: lower bound of the step time}.

        If `best` is None, `hbm_needed`, `host_bytes` and `seconds_at_peak` are for the smallest compiled candidate. If
        nothing was compiled, they are None, {} and {}.

    Raises:
        InputError: the devices do not exist, or the layout does not fit the devices or the model.
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
    best = recommended(tried)
    shown = best or min((c for c in tried if "cost" in c), key=_total, default=None)
    helpful: dict[str, Any] = {"remedies": [], "hbm_needed": None}
    if best is None:
        # The TPU compiler gives no sizes for a step that it refuses. If it refused all candidates, advice starts
        # from the first one under the policy that recomputes most, since that layout has the least work.
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
        "counted": target.work.counted,
        "model": dataclasses.asdict(target.work.model),
        "candidates": tried,
        "best": best,
        **helpful,
        "host_bytes": {} if shown is None else _host_bytes(shown),
        "seconds_at_peak": {} if shown is None else _seconds(shown, kind if topology else None),
    }


def recommended(tried: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the simplest candidate that fits, or None if none fits.

    `data` is simpler than `fsdp`, and `fsdp` is simpler than layouts with a `tensor` axis. Among equally simple
    candidates, the lowest `cost` wins. Candidates with over `MORE_WORK` times the fewest FLOPs are left out.
    """
    fitting = [c for c in tried if c["fits"]]
    most = MORE_WORK * min((c["flops"]["per_device"] for c in fitting), default=0)

    def order(candidate: dict[str, Any]) -> tuple[int, float]:
        mesh = candidate["layout"]
        return 2 if mesh["tensor"] > 1 else int(mesh["fsdp"] > 1), candidate["cost"]

    return min((c for c in fitting if c["flops"]["per_device"] <= most), key=order, default=None)


def _total(candidate: dict[str, Any]) -> float:
    """Returns a candidate's bytes on one device, or infinity if the TPU compiler refused the step."""
    return candidate.get("per_device", {}).get("total", math.inf)


def _host_bytes(shown: dict[str, Any]) -> dict[str, int]:
    """Returns {"save": bytes, "restore": bytes}: host memory for saving and restoring one device's state."""
    state = shown["per_device"]["params"] + shown["per_device"]["optimizer"]
    return {"save": round(SAVE_FACTOR * state), "restore": round(RESTORE_FACTOR * state)}


def _seconds(shown: dict[str, Any], kind: str | None) -> dict[str, float]:
    """Returns {kind of device: seconds of a step at the peak bfloat16 FLOP rate}. A `kind` of None means all kinds."""
    chips = CHIPS if kind is None else {kind: chip_of(kind)}
    return {
        name: shown["flops"]["per_device"] / chip.bfloat16
        for name, chip in chips.items()
        if chip is not None
    }
