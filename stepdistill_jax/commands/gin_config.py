"""Turns gin files and `--set` flags into a checked `TrainConfig`."""

import inspect
import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import gin
from gin.config import ConfigurableReference

from stepdistill_jax.commands.configurables import CONFIGURABLES, LITERAL, ROOT, defaults
from stepdistill_jax.commands.gin_statements import (
    Binding,
    Bindings,
    Reader,
    is_part,
    merged,
    one_line,
    parse_override,
    shown,
)
from stepdistill_jax.commands.shipped import find_config
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.training.config import TrainConfig
from stepdistill_jax.training.optimizer_function import OptimizerFunction

# T5X's names of settings -> our names
T5X_NAMES = {
    "MODEL_DIR": "--workdir",
    "MIXTURE_OR_TASK_NAME": "TASK",
    "MIXTURE_OR_TASK_MODULE": "TASK_MODULE",
    "TASK_FEATURE_LENGTHS": "INPUT_LENGTH and TARGET_LENGTH",
    "INITIAL_CHECKPOINT_PATH": "INIT_FROM",
    "DROPOUT_RATE": "train.dropout_rate",
    "EVAL_PERIOD": "EVAL_EVERY",
    "CHECKPOINT_PERIOD": "CHECKPOINT_EVERY",
}


def load_config(
    config: str | os.PathLike | None,
    overrides: Sequence[str] = (),
    gin_files: Sequence[str] = (),
    gin_bindings: Sequence[str] = (),
) -> tuple[TrainConfig, str]:
    """Reads a config. Afterwards, gin's global state is empty.

    Args:
        config: path of a config, or name of a shipped one; None if `gin_files` contain everything.
        overrides: `NAME=VALUE` from `--set`. The last value of a name applies.
        gin_files: further files, from `--gin_file`, merged by `gin_statements.merged`.
        gin_bindings: `NAME=VALUE` from `--gin.`. They override `overrides`.

    Returns:
        The run's config.
        A gin text that gives the same config.

    Raises:
        InputError: the config is wrong. The message names the line or the flag.
    """
    names = [*([] if config is None else [os.fspath(config)]), *gin_files]
    if not names:
        raise InputError(
            "expected a config: pass the path of a config, or the name of a shipped one"
        )
    paths = [find_config(name) for name in names]
    last, reader = shown(paths[-1]), Reader()
    declared = merged([(path, reader.bindings(path)) for path in paths])
    if not any(b.owner == f"@{ROOT}" for b in declared.values()):
        raise InputError(f'{last}: `train` is unbound; begin the config with include "train.gin"')
    reached = _reached(declared)
    _check_use(reader.read, paths[-1], reached)

    typed = [parse_override(text, "--set ") for text in overrides]
    typed += [parse_override(text, "--gin.") for text in gin_bindings]
    known = {*declared, *reached}
    for b in typed:
        if "." not in b.key and b.key not in known:
            hint = suggestion(b.key, known)
            raise InputError(f"{b.where}: {last} has no setting {b.key}{hint}")
    reached = _reached(declared | {b.key: b for b in typed})
    _check_values(reached, last)
    for b in typed:
        if b.key not in reached:
            raise InputError(
                f"{b.where}: this has no effect, since this config does not use {b.key}"
            )
    return _build(reached, last), _text(reached, reader.imports)


def _reached(bindings: Bindings) -> Bindings:
    """Returns the bindings that `train` reads, directly or through references.

    Unbound parameters are added with their defaults. With `train.seed = %SEED`, an unbound macro `SEED` is added
    with the default of `train.seed`.

    Example: with `train.optimizer = @optimizer()` and `optimizer.beta = %BETA`, the result has the bindings of
    `train`, `optimizer` and `BETA`. A reference `@hint/Objective` adds the bindings of `hint/Objective` and those
    of `Objective`.
    """
    found: Bindings = {}
    calls = [f"@{ROOT}"]
    for call in calls:  # the list grows during the loop
        *scopes, name = call[1:].split("/")
        owners = {call[0] + "/".join([*scopes[:n], name]) for n in range(len(scopes) + 1)}
        read = {key: b for key, b in bindings.items() if b.owner in owners}
        for parameter, default in () if scopes else defaults(name).items():
            if isinstance(default, LITERAL):
                key, macro = f"{name}.{parameter}", parameter.upper()
                b = read.setdefault(key, Binding(key, default, key))
                if b.macro == macro and macro not in bindings:
                    found[macro] = Binding(macro, default, b.where)
        found |= read
        for inner in (c for b in read.values() for c in b.calls):
            if inner[0] == call[0] == "@" and "/" not in inner:
                inner = "@" + "/".join([*scopes, inner[1:]])
            if inner not in calls:
                calls.append(inner)
    return found


def _check_use(read: list[Binding], last: pathlib.Path, reached: Bindings) -> None:
    """Refuses macros and bindings that nothing reads, which gin itself would accept."""
    used = {call for b in read for call in b.calls}
    for b in read:
        # a part's binding may be overridden, say by other objectives; the config's own may not
        own = b.path == last and not is_part(b.path)
        is_read = b.key in reached or not own if "." in b.key else b.owner in used
        if not is_read:
            hint = suggestion(b.key, {call[1:] for call in used})
            raise InputError(f"{b.where}: nothing uses {b.key}{hint}")


def _check_values(reached: Bindings, config: str) -> None:
    """Refuses a key with conflicting bindings in two shipped gin files, and settings that have no value."""
    missing = []
    for key, b in reached.items():
        if b.rival is not None:
            raise InputError(
                f"{b.where}: {b.rival.where} also binds {key}; use only one of the two files, or"
                f" add --set {key}=VALUE"
            )
        for call in b.calls:
            if call == "%gin.REQUIRED":
                missing.append(key)
            elif call[0] == "%" and call[1:] not in reached:
                hint = suggestion(call[1:], reached)
                raise InputError(f"{b.where}: {call} is not bound{hint}")
        _source(b, reached)
    if missing:
        *others, last = missing
        names = f"{', '.join(others)} and {last} have" if others else f"{last} has"
        flags = " ".join(f"--set {key}=VALUE" for key in missing)
        raise InputError(
            f"{config}: {names} no default; bind {'them' if others else 'it'} there, or pass {flags}"
        )


def _source(b: Binding, bindings: Bindings) -> Binding:
    """Follows the macros from `b`, and returns the last binding, which has the value."""
    seen = []
    while b.macro in bindings:
        if b.macro in seen:
            raise InputError(f"{b.where}: %{b.macro} refers to itself")
        seen.append(b.macro)
        b = bindings[b.macro]
    return b


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns a hint for an unknown setting: a similar name, or a list of all macros."""
    if name in T5X_NAMES:
        return f"; here it is {T5X_NAMES[name]}"
    known, upper = set(known), name.upper()
    if upper in known:
        return f"; did you mean {upper!r}?"
    macros = sorted(k for k in known if "." not in k)
    # for `batchsize`, suggest the macro BATCH_SIZE rather than its field
    first = "" if "." in name else nearest(upper, macros)
    return (
        first or nearest(name, known) or nearest(upper, known) or f" (known: {', '.join(macros)})"
    )


def _build(reached: Bindings, config: str) -> TrainConfig:
    gin.clear_config()
    try:
        for key, b in reached.items():
            gin.bind_parameter(key if "." in key else f"{key}/gin.macro.value", b.value)
        _bind_optimizer(reached)
        return gin.get_configurable(ROOT)()
    except RecursionError:
        raise InputError(
            f"{config}: a reference refers to itself, as @train() in a parameter of train does"
        ) from None
    except (TypeError, ValueError, RuntimeError) as error:
        text = one_line(error)
        named = re.search(r"`([\w.]+)`", text)
        name = named[1] if named else ""
        for key, b in reached.items():
            parameter = key.rpartition(".")[2]  # `label_weight` of an arm is `label.weight`
            ours = name in (key, parameter) or name.replace(".", "_") == parameter
            if ours or name.endswith(f".{key}"):  # a function's module precedes its name
                source = _source(b, reached)
                config, text = source.where, text.replace(f"`{name}`", source.key)
                break
        raise InputError(f"{config}: {text}") from None
    finally:
        gin.clear_config()


def _bind_optimizer(reached: Bindings) -> None:
    """Wraps the user's or optax's function that `train.optimizer` names in an `OptimizerFunction`.

    The wrapper lets a run record the function with its arguments, and compare them when it is resumed.
    """
    key = f"{ROOT}.optimizer"
    reference = _source(reached[key], reached).value if key in reached else None
    if not isinstance(reference, ConfigurableReference) or not reference.evaluate:
        return
    configurable: Any = reference.configurable
    function = configurable.wrapped
    if function in CONFIGURABLES.values():
        return
    # references among the arguments are evaluated in the scope of the function's own reference
    with gin.config_scope(list(reference.scopes)):
        arguments = gin.get_bindings(reference.selector)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is gin.REQUIRED and name not in arguments:
            raise InputError(f"`{key}`: {reference.selector}.{name} has no default; bind it")
    gin.bind_parameter(key, OptimizerFunction(function, arguments))


def _text(reached: Bindings, imports: Sequence[str]) -> str:
    """Returns the bindings as a gin text: first the imports, then the macros, then the parameters."""
    lines = {
        key: f"{key} = {'1e999' if b.value == math.inf else repr(b.value)}"
        for key, b in sorted(reached.items())
    }
    macros = [line for key, line in lines.items() if "." not in key]
    return "\n".join([*imports, *macros, "", *(lines[key] for key in lines if "." in key), ""])
