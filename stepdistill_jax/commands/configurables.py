"""Lists the classes and functions whose parameters a gin file can bind, as `NAME.parameter`."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import gin
import optax

from stepdistill_jax.commands.shipped import shipped_folder
from stepdistill_jax.data.objectives import ARMS, Objective
from stepdistill_jax.data.schedules import cosine_schedule, linear_schedule
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.training import learning_rate
from stepdistill_jax.training.config import OptimizerConfig, TrainConfig
from stepdistill_jax.training.mutual_information import MutualInformation

ROOT = "train"
LITERAL = (
    str | int | float | None
)  # types of a plain default, neither `empty` nor a dataclass factory


def _of_no_module(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a wrapper without `__module__`.

    Otherwise, gin would replace our `constant` by its own `gin.constant`.
    """

    @functools.wraps(function)
    def same(*args, **kwargs):
        return function(*args, **kwargs)

    same.__module__ = None  # type: ignore[assignment]  # as for functions written in C
    return same


CONFIGURABLES: dict[str, Callable[..., Any]] = {
    ROOT: TrainConfig,
    "optimizer": OptimizerConfig,
    "supervision": Supervision,
    "lora": LoraConfig,
    "Layout": Layout,
    "Objective": Objective,
    "mutual_information": MutualInformation,
    "linear_schedule": linear_schedule,
    "cosine_schedule": cosine_schedule,
    "linear": learning_rate.linear,
    "cosine": learning_rate.cosine,
    "rsqrt": learning_rate.rsqrt,
    "constant": _of_no_module(learning_rate.constant),
    **ARMS,
}
OPTAX = "optax."  # prefix under which optax's functions that return a transformation can be bound
_registered: set[str] = set()  # the optax functions that gin knows so far


for _name, _function in CONFIGURABLES.items():
    _module = "stepdistill_jax" if _function.__module__ else None
    gin.external_configurable(_function, name=_name, module=_module)


def defaults(selector: str) -> dict[str, Any]:
    """Returns {parameter: default} for one of our configurables; {} for any other name."""
    if selector not in CONFIGURABLES:
        return {}
    signature = inspect.signature(CONFIGURABLES[selector])
    return {name: p.default for name, p in signature.parameters.items()}


@functools.cache
def main_bindings() -> dict[str, str]:
    """Returns the bindings in `train.gin` as text: {"train.task": "%TASK", "TASK": "%gin.REQUIRED", ...}."""
    text = (shipped_folder("gin") / "train.gin").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.]+) += +(\S+)", text, re.MULTILINE))


def selector_of(name: str) -> str:
    """Returns the name by which gin knows a configurable, and registers an optax function on first use.

    Raises:
        InputError: no configurable has this name, or several have.
    """
    short = name.removeprefix("stepdistill_jax.")
    if short in CONFIGURABLES:
        return short
    try:
        found = gin.get_configurable(name)
        if getattr(found, "__module__", "").partition(".")[0] == "gin":
            raise KeyError(name)  # one of gin's own configurables, which would call its arguments
        if any(whole.endswith(f".{name}") for whole in _registered):
            raise KeyError(
                name
            )  # such as `lion`: known only because an earlier config used optax.lion
    except Exception:  # gin raises KeyError, ValueError or TypeError here, by the name's form
        module, _, last = name.rpartition(".")
        if name.startswith(OPTAX) and (function := _of_optax(name.removeprefix(OPTAX))):
            gin.external_configurable(function, name=last, module=module)
            _registered.add(name)
            return name
        raise InputError(
            f"unknown configurable {name!r} (known: {', '.join(CONFIGURABLES)}){_nearest(short)}"
        ) from None
    return name


def _of_optax(name: str) -> Callable[..., Any] | None:
    """Returns the optax function `name` if it exists and returns a gradient transformation; else None."""
    try:
        function: Any = functools.reduce(getattr, name.split("."), optax)
        returns = inspect.signature(function).return_annotation
    except (AttributeError, TypeError, ValueError):
        return None
    return function if "GradientTransformation" in str(returns) else None


def _nearest(name: str) -> str:
    if _of_optax(name):
        return f"; did you mean {OPTAX + name!r}?"
    rules = [OPTAX + n for n in dir(optax) if _of_optax(n)] if name.startswith(OPTAX) else []
    return nearest(name, [*CONFIGURABLES, *rules])
