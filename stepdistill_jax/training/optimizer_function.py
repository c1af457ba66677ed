"""A user's update rule."""

import dataclasses
import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import refused
from stepdistill_jax.training.learning_rate import LearningRate

COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
PLAIN = "plain (a number, text, True, False, None, lists and dicts of these) or a `LearningRate`"


@dataclasses.dataclass(frozen=True)
class OptimizerFunction:
    """A user's complete update rule: a function and the arguments to call it with.

    The function returns an optax transformation. No clip, weight decay or learning rate is added.

    Attributes:
        function: called when a run is assembled.
        arguments: {argument: plain value or `LearningRate`}. A `LearningRate` is passed as an optax schedule.

    Raises:
        InputError: an argument is unknown or missing, or its value is neither plain nor a `LearningRate`.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not callable(self.function):
            words = "a function that returns an optax transformation"
            raise refused("optimizer", words, self.function)
        object.__setattr__(self, "arguments", dict(self.arguments))
        self._all_arguments()
        for name, value in self.arguments.items():
            if not isinstance(value, LearningRate) and not _is_plain(value):
                raise refused(f"{self.name}.{name}", PLAIN, value)

    @property
    def name(self) -> str:
        """Name of the function under its public module, such as `my_module.my_function`."""
        module = getattr(self.function, "__module__", None) or ""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return f"{module.partition('._')[0]}.{name}"

    @property
    def rate(self) -> LearningRate | None:
        """The argument `learning_rate` if it is a `LearningRate`; otherwise None, since the rate is unknown."""
        rate = self.arguments.get("learning_rate")
        return rate if isinstance(rate, LearningRate) else None

    def takes(self, learning_rate: float) -> bool:
        """Returns whether an argument is the run's `learning_rate`, or a schedule whose peak is that rate."""
        return any(
            x.learning_rate in (None, learning_rate)
            if isinstance(x, LearningRate)
            else x == learning_rate
            for x in self.arguments.values()
        )

    def __str__(self) -> str:
        """Returns the function call as text, such as `my_module.my_function(b1=0.9)`."""
        return f"{self.name}({', '.join(f'{n}={x!r}' for n, x in self.arguments.items())})"

    def to_json(self) -> dict[str, Any]:
        """Returns the function's name and all arguments, with defaults, for `run.json`."""
        described = {
            name: dataclasses.asdict(value) if isinstance(value, LearningRate) else value
            for name, value in {**self._all_arguments(), **self.arguments}.items()
            if isinstance(value, LearningRate) or _is_plain(value)  # a default may be any object
        }
        return {"function": self.name, "arguments": described}

    def transformation(
        self, learning_rate: float, train_steps: int
    ) -> optax.GradientTransformation:
        """Calls the function, and returns its optax transformation with a wrapped `init`.

        The wrapped `init` also tries `update`. It raises InputError if either of the two fails, or if `update` returns
        wrong shapes or types.

        Args:
            learning_rate: the run's peak learning rate.
            train_steps: the run's number of steps, for learning rate schedules.

        Raises:
            InputError: the function raises, or does not return a transformation.
        """
        arguments = {
            name: value.schedule(learning_rate, train_steps)
            if isinstance(value, LearningRate)
            else value
            for name, value in self.arguments.items()
        }
        try:
            tx = self.function(**arguments)
        except Exception as error:
            raise self._failed("", error) from error
        if not isinstance(tx, optax.GradientTransformation):
            kind = f"{type(tx).__module__}.{type(tx).__qualname__}"
            raise self._refused(f"it must return an optax.GradientTransformation, not a {kind}")

        def init(params: Any) -> Any:
            try:
                state = tx.init(params)
            except Exception as error:
                raise self._failed("the transformation's init ", error) from error
            self._check_update(tx, state, params)
            return state

        return optax.GradientTransformation(init, tx.update)

    def _check_update(self, tx: optax.GradientTransformation, state: Any, params: Any) -> None:
        """Raises InputError if a training step could not call `update`. Computes only shapes."""

        def step(params: Any, state: Any) -> Any:
            return (params, state), tx.update(params, state, params)

        try:
            before, after = jax.eval_shape(step, params, state)
        except Exception as error:
            called = "the transformation's update, called with gradients, state and parameters, "
            raise self._failed(called, error) from error
        for what, got, wanted in (
            ("updates with the parameters' shapes", _shapes(after[0]), _shapes(before[0])),
            ("a state whose shapes and types are unchanged", _types(after[1]), _types(before[1])),
        ):
            if got != wanted:
                raise self._refused(f"the transformation's update must return {what}")

    def _all_arguments(self) -> dict[str, Any]:
        """Returns {name: value} for the function's arguments, including defaults.

        Arguments that `*args` or `**kwargs` collects are left out.
        """
        try:
            signature = inspect.signature(self.function)
            bound = signature.bind(**self.arguments)
        except (TypeError, ValueError) as error:
            raise InputError(f"`optimizer`: {self.name}: {error}") from None
        bound.apply_defaults()
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        return {n: x for n, x in bound.arguments.items() if kinds[n] not in COLLECTING}

    def _refused(self, problem: str) -> InputError:
        code = _code(self.function)
        place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        return InputError(f"`optimizer`: {self.name}{place}: {problem}")

    def _failed(self, what: str, error: Exception) -> InputError:
        code, frames = _code(self.function), traceback.extract_tb(error.__traceback__)
        # the user's line: the deepest frame in the function's file, if there is one
        own = [f for f in frames if code and f.filename == code.co_filename] or frames
        kind, text = type(error).__name__, " ".join(str(error).split())[:500]
        return self._refused(f"{what}raised {kind} at {own[-1].filename}:{own[-1].lineno}: {text}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _code(function: Any) -> Any:
    """Returns a Python function's code object, which records its file and line; None for other callables."""
    return getattr(inspect.unwrap(function), "__code__", None)


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return [x.shape for x in leaves], structure


def _types(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return [(x.shape, x.dtype) for x in leaves], structure
