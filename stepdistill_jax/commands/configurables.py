"""What a gin file may bind: `NAME.parameter` of the entries below."""

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
LITERAL = str | int | float | None  # of a default: no `empty`, no mark of a dataclass's factory


def _of_no_module(function: Callable[..., Any]) -> Callable[..., Any]:
    """gin has a `gin.constant` of its own, and only a name without a module goes before it."""

    @functools.wraps(function)
    def same(*args, **kwargs):
        return function(*args, **kwargs)

    same.__module__ = None  # type: ignore[assignment]  # as functions of C have none
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
OPTAX = "optax."  # its functions that return a transformation can be bound, too, by these names
_registered: set[str] = set()  # of these


for _name, _function in CONFIGURABLES.items():
    _module = "stepdistill_jax" if _function.__module__ else None
    gin.external_configurable(_function, name=_name, module=_module)


def defaults(selector: str) -> dict[str, Any]:
    """Each parameter of a configurable of ours with its default."""
    if selector not in CONFIGURABLES:
        return {}
    signature = inspect.signature(CONFIGURABLES[selector])
    return {name: p.default for name, p in signature.parameters.items()}


@functools.cache
def main_bindings() -> dict[str, str]:
    """What `train.gin` binds, as it stands there: `train.task` is `%TASK`, `TASK` is `%gin.REQUIRED`."""
    text = (shipped_folder("gin") / "train.gin").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.]+) += +(\S+)", text, re.MULTILINE))


def selector_of(name: str) -> str:
    """The short name of a configurable of ours, or the full one of optax's or a user's own.

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
        if any(whole.endswith(f".{name}") for whole in _registered):
            raise KeyError(name)  # `lion`, which means something since another config was read
    except Exception:  # gin raises KeyError, ValueError or TypeError here, by the name's form
        module, _, last = name.rpartition(".")
        if name.startswith(OPTAX) and (function := _of_optax(name.removeprefix(OPTAX))):
            gin.external_configurable(function, name=last, module=module)
            _registered.add(name)
            return name
        raise InputError(
            f"no configurable is called {name!r} (known: {', '.join(CONFIGURABLES)})"
            f"{_nearest(short)}"
        ) from None
    return name


def _of_optax(name: str) -> Callable[..., Any] | None:
    """The function of optax of this name (`lion`, `contrib.muon`) that returns a transformation, or None."""
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
