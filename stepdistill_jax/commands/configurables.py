"""What a gin file may bind: `NAME.parameter` of the entries below."""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import gin

from stepdistill_jax.data.objectives import ARMS, Objective
from stepdistill_jax.data.schedules import Schedule, cosine_schedule, linear_schedule
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig

ROOT = "train"
CONFIGURABLES: dict[str, Callable[..., Any]] = {
    ROOT: TrainConfig,
    "optimizer": OptimizerConfig,
    "supervision": Supervision,
    "lora": LoraConfig,
    "Layout": Layout,
    "Objective": Objective,
    "linear_schedule": linear_schedule,
    "cosine_schedule": cosine_schedule,
    **ARMS,
}


@functools.cache
def register() -> None:
    """Makes `CONFIGURABLES` known to gin; a second call does nothing."""
    for name, function in CONFIGURABLES.items():
        gin.external_configurable(function, name=name, module="stepdistill_jax")


def parameters(selector: str) -> Mapping[str, inspect.Parameter]:
    """Parameters of a configurable of ours; none of a user's own."""
    function = CONFIGURABLES.get(selector)
    return inspect.signature(function).parameters if function else {}


def defaults(selector: str) -> dict[str, Any]:
    """Each parameter of a configurable of ours that has a literal default."""
    found = {name: p.default for name, p in parameters(selector).items()}
    return {k: v for k, v in found.items() if isinstance(v, str | int | float | None)}


def selector_of(name: str) -> str:
    """The short name of a configurable of ours, or the full one of a user's own.

    Raises:
        InputError: gin knows no such configurable, or several.
    """
    register()
    short = name.removeprefix("stepdistill_jax.")
    if short in CONFIGURABLES:
        return short
    try:
        found = gin.get_configurable(name)
        if getattr(found, "__module__", "").partition(".")[0] == "gin":
            raise KeyError(name)  # gin's own, which would call what it is given
    except Exception:  # gin raises KeyError, ValueError or TypeError here, by the name's form
        raise InputError(
            f"no configurable is called {name!r} (known: {', '.join(CONFIGURABLES)})"
            f"{nearest(short, CONFIGURABLES)}"
        ) from None
    return name


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def check_type(key: str, value: Any) -> None:
    """Raises InputError where a literal is not what a parameter of ours is annotated with."""
    selector, _, parameter = key.rpartition("/")[2].rpartition(".")
    if selector not in CONFIGURABLES:
        return
    annotation = typing.get_type_hints(CONFIGURABLES[selector])[parameter]
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    # a schedule comes by reference only
    kinds = [k for k in typing.get_args(annotation) if k is not Schedule] if union else [annotation]
    accepted = [*kinds, int] if float in kinds else kinds
    if type(value) in accepted or not {*kinds} <= {*_WORDS, type(None)}:
        return
    words = " or ".join(_WORDS[kind] for kind in kinds if kind in _WORDS)
    raise InputError(f"{words} is wanted, got {value!r}")
