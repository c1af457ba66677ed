"""What a gin file may bind: `NAME.parameter` of the entries below."""

import inspect
from collections.abc import Callable
from typing import Any

import gin

from stepdistill_jax.data.objectives import ARMS, Objective
from stepdistill_jax.data.schedules import cosine_schedule, linear_schedule
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig

ROOT = "train"
LITERAL = str | int | float | None  # of a default: no `empty`, no mark of a dataclass's factory
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


for _name, _function in CONFIGURABLES.items():
    gin.external_configurable(_function, name=_name, module="stepdistill_jax")


def defaults(selector: str) -> dict[str, Any]:
    """Each parameter of a configurable of ours with its default."""
    if selector not in CONFIGURABLES:
        return {}
    signature = inspect.signature(CONFIGURABLES[selector])
    return {name: p.default for name, p in signature.parameters.items()}


def selector_of(name: str) -> str:
    """The short name of a configurable of ours, or the full one of a user's own.

    Raises:
        InputError: gin knows no such configurable, or several.
    """
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
