"""What a gin file may bind: `NAME.parameter` of the entries below."""

import functools
import inspect
import types
import typing
from collections.abc import Callable
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


def parameters(selector: str) -> dict[str, Any]:
    """Default of each parameter of a configurable of ours; `inspect.Parameter.empty` where none."""
    signature = inspect.signature(CONFIGURABLES[selector])
    # a dataclass's factory shows as a private marker, which is no default that gin could write
    return {
        name: p.default if isinstance(p.default, (str, int, float, bool, type(None))) else p.empty
        for name, p in signature.parameters.items()
    }


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


def check_parameter(selector: str, parameter: str) -> None:
    """Raises InputError where a configurable of ours has no such parameter."""
    if selector in CONFIGURABLES and parameter not in parameters(selector):
        known = parameters(selector)
        raise InputError(
            f"{selector} has no parameter {parameter!r} (known: {', '.join(known)})"
            f"{nearest(parameter, known)}"
        )


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def check_type(selector: str, parameter: str, name: str, value: Any) -> None:
    """Raises InputError where a literal is not what a parameter of ours is annotated with.

    Args:
        selector: of `CONFIGURABLES`.
        parameter: of the selector.
        name: what the user bound, a macro or a parameter; the message begins with it.
        value: a literal without references.
    """
    annotation = typing.get_type_hints(CONFIGURABLES[selector])[parameter]
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    wanted = typing.get_args(annotation) if union else (annotation,)
    if float in wanted:
        wanted = (*wanted, int)
    # a schedule comes by reference only, so a literal is to be of the other kinds
    wanted = tuple(kind for kind in wanted if kind is not Schedule)
    if type(value) in wanted or not all(kind in (*_WORDS, type(None)) for kind in wanted):
        return
    words = [
        _WORDS[kind] for kind in wanted if kind in _WORDS and not (kind is int and float in wanted)
    ]
    raise InputError(f"{name}: {' or '.join(words)} is wanted, got {value!r}")
