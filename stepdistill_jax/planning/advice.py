"""Finds changes to a config that make its step fit into memory. Each change is compiled before it is recommended."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.models.config import REMAT_POLICIES
from stepdistill_jax.models.sharding import LAYOUTS, Layout, make_mesh
from stepdistill_jax.planning.candidates import (
    Target,
    by_work,
    compiled,
    layouts_for,
    row_multiple,
    state_of,
    too_large_a_state,
)
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig
from stepdistill_jax.training.optimizer_function import OptimizerFunction

MORE_DEVICES = (2, 4)  # factors by which the number of devices is raised, to try more devices
# Other layouts and numbers of microbatches and devices round the rows up to other multiples. This may raise the FLOPs
# of a step by at most this factor.
MORE_WORK = 1.25
_COUNTS = sorted(part << power for part in (2, 3) for power in range(12))  # 2, 3, 4, 6, 8, 12, ...


@dataclasses.dataclass(frozen=True)
class Base:
    """A candidate that does not fit into memory.

    Attributes:
        found: the candidate, as returned by `compiled`.
        given: whether the user chose the layout.
    """

    config: TrainConfig
    target: Target
    found: dict[str, Any]
    layout: str | Layout
    given: bool

    @property
    def policy(self) -> str:
        """The candidate's remat policy, or the policy that saves the most memory if the candidate was not compiled."""
        return self.found.get("remat_policy", REMAT_POLICIES[-1])

    @property
    def most_flops(self) -> float:
        """Most FLOPs that a step may take after a remedy has changed the number of microbatches or devices."""
        multiple = row_multiple(self.config, self.target, self.layout)
        return MORE_WORK * self.target.work.step_flops(multiple)


def remedies(base: Base, more_devices: list[Any]) -> list[dict[str, Any]]:
    """Returns variants of the candidate `base` that fit into memory.

    Args:
        more_devices: the target's devices, followed by additional devices that a variant may use.

    Returns:
        The variants, cheapest first. If there is one on more devices, it comes last. The entry `changes` of each has
        its changes: {name of the setting: new value}.
    """
    single = list(_single(base))
    tried = [found for changes in single if (found := _with(base, changes)) is not None]
    fitting = [found for found in tried if found["fits"]]
    if not fitting and (together := _together(base, single, tried)) is not None:
        fitting = [together]
    if base.given:  # otherwise all layouts are candidates
        fitting += _in_another_layout(base)
    return [*sorted(fitting, key=lambda c: c["cost"]), *_on_more_devices(base, more_devices)]


def _single(base: Base) -> Iterator[dict[str, Any]]:
    """Yields the changes to try. Each changes one setting: {name of the setting: new value}."""
    config = base.config
    if base.given:  # otherwise the candidates already include all policies
        stronger = REMAT_POLICIES[REMAT_POLICIES.index(config.remat_policy) + 1 :]
        yield from ({"remat_policy": policy} for policy in stronger)
    optimizer = config.optimizer
    if isinstance(optimizer, OptimizerFunction):
        yield {"optimizer": "adafactor"}
    elif optimizer.name == "adamw" and optimizer.mu_dtype == "float32":
        if not optimizer.eps_before_correction:  # a config with this option may not name Adafactor
            yield {"optimizer": "adafactor"}
        yield {"mu_dtype": "bfloat16"}
    # XLA's CPU backend computes bfloat16 in float32, so virtual devices would show no saving
    on_cpu = base.target.devices[0].platform == "cpu"
    if config.dtype == "float32" and not on_cpu:
        yield {"dtype": "bfloat16"}
    yield from ({"num_microbatches": count} for count in _slices(base))


def _slices(base: Base) -> list[int]:
    """Returns up to two values of `num_microbatches` to try, none of which adds many empty rows to a step."""
    config, work = base.config, base.target.work
    shards = row_multiple(config, base.target, base.layout) // config.num_microbatches
    most = max(rows for rows, *_ in base.found["groups"]) // shards
    counts = [k for k in _COUNTS if config.num_microbatches < k <= most]
    sizes = base.found.get("per_device", {})
    enough = counts[-1:]
    # starts with the first count with which a microbatch's activations, its gradients and the sum of all
    # gradients fit
    if "activations" in sizes:
        fixed = sizes["arguments"] + 2 * sizes["gradients"]
        part = sizes["activations"] * config.num_microbatches
        enough = [k for k in counts if fixed + part / k <= base.target.limit] or enough
    fuller = (k for k in enough if work.step_flops(shards * k) <= base.most_flops)
    return list(itertools.islice(fuller, 2))


def _with(base: Base, changes: dict[str, Any]) -> dict[str, Any] | None:
    """Compiles the candidate `base` with `changes` to its settings, and returns the new candidate.

    Returns None, without compiling, if the parameters and the optimizer state alone do not fit into memory.
    """
    config, policy = _changed(base.config, changes), changes.get("remat_policy", base.policy)
    target = base.target
    if "dtype" in changes:
        model = dataclasses.replace(target.work.model, dtype=changes["dtype"])
        work = dataclasses.replace(target.work, model=model)
        target = dataclasses.replace(target, work=work)
    if too_large_a_state(config, target, base.layout) is not None:
        return None
    log(f"with {', '.join(f'{name}={value}' for name, value in changes.items())}:")
    found = compiled(config, target, base.found["name"], base.layout, policy)
    return {**found, "changes": changes}


def _changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """Returns the config with the changes applied. Ignores `remat_policy`, which callers pass to `compiled`."""
    fields = {name: changes[name] for name in ("dtype", "num_microbatches") if name in changes}
    if "optimizer" in changes:
        fields["optimizer"] = OptimizerConfig(name=changes["optimizer"])
    elif "mu_dtype" in changes:
        fields["optimizer"] = dataclasses.replace(config.optimizer, mu_dtype=changes["mu_dtype"])
    return dataclasses.replace(config, **fields)


def _together(
    base: Base, single: list[dict[str, Any]], tried: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Compiles the base with all changes in `single` that save memory, and returns the candidate.

    Returns None if the candidate does not fit, or if fewer than two settings would change. `tried` has the
    candidates that were compiled with a single change.
    """
    # if the base's size is unknown, all changes count as saving
    saving, size = single, base.found.get("per_device", {}).get("total")
    if size is not None:
        smaller = (c for c in tried if c.get("per_device", {}).get("total", math.inf) < size)
        saving = [found["changes"] for found in smaller]
    # of several changes of one setting, the last wins: the most microbatches, or the remat policy that saves
    # most
    changes = {name: value for change in saving for name, value in change.items()}
    if "optimizer" in changes:
        changes.pop("mu_dtype", None)
    if len(changes) < 2:
        return None
    found = _with(base, changes)
    return found if found is not None and found["fits"] else None


def _in_another_layout(base: Base) -> list[dict[str, Any]]:
    """Compiles the layout with the fewest FLOPs, other than the layout of `base`.

    Of layouts with equal FLOPs, it takes the one with the smallest state per device.

    Returns [the candidate], or [] if it does not fit or there is no other layout.
    """
    config, target = base.config, base.target

    def work_and_state(item: tuple[str, Layout]) -> tuple[float, int]:
        flops = target.work.step_flops(row_multiple(config, target, item[1]))
        return flops, sum(state_of(config, target, item[1]).values())

    others = [
        (name, layout)
        for name, layout in layouts_for(target.work.model, len(target.devices)).items()
        if make_mesh(layout, target.devices).shape != base.found["layout"]
    ]
    if not others:
        return []
    name, layout = min(others, key=work_and_state)
    if too_large_a_state(config, target, layout) is not None:
        return []
    log(f"with layout={name}:")
    found = compiled(config, target, name, layout, base.policy)
    return [{**found, "changes": {"layout": name}}] if found["fits"] else []


def _on_more_devices(base: Base, devices: list[Any]) -> Iterator[dict[str, Any]]:
    """Yields the first candidate that fits on 2 or 4 times as many devices, if there is one."""
    config, name = base.config, base.found["name"]
    if base.given and name not in LAYOUTS:
        return  # a name with sizes, such as `fsdp_tensor 4x2`, is for a single number of devices
    for times in MORE_DEVICES:
        count = times * len(base.target.devices)
        if count > len(devices):
            return
        target = dataclasses.replace(base.target, devices=devices[:count])
        layouts = {name: name} if base.given else by_work(config, target)
        for called, layout in layouts.items():
            if target.work.step_flops(row_multiple(config, target, layout)) > base.most_flops:
                return
            if too_large_a_state(config, target, layout) is None:
                log(f"with devices={count}:")
                found = compiled(config, target, called, layout, base.policy)
                if found["fits"]:
                    yield {**found, "changes": {"devices": count}}
                    return
                break
