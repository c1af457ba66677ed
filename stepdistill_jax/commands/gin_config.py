"""From gin files and `--set` to a checked `TrainConfig`."""

import inspect
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gin
from gin import config as gin_internals

from stepdistill_jax.commands.configurables import (
    CONFIGURABLES,
    ROOT,
    check_type,
    parameters,
    register,
)
from stepdistill_jax.commands.gin_statements import (
    Binding,
    Key,
    parse_override,
    read_bindings,
    shown,
)
from stepdistill_jax.commands.shipped import find_config
from stepdistill_jax.data.objectives import ARMS
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.training.config import TrainConfig

Bindings = dict[Key, Binding]
OBJECTIVES = Key("", "OBJECTIVES", "")
REQUIRED = "gin.REQUIRED"

# what T5X's configs call things
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
    """Reads a config; gin's global state is empty before and after.

    Args:
        config: path, or the name of a shipped config; None where `gin_files` say everything.
        overrides: `NAME=VALUE` each, as after `--set`; the last of a name wins.
        gin_files: more files, each over those before (`--gin_file`).
        gin_bindings: `NAME=VALUE` each, as after `--gin.`.

    Returns:
        The run's config, and gin text of all that made it, which reads back to the same.

    Raises:
        InputError: one line with file and line, or the flag, of what is wrong.
    """
    register()
    names = [*([] if config is None else [os.fspath(config)]), *gin_files]
    if not names:
        raise InputError("a config is wanted: a path, or the name of a shipped one")
    paths = [find_config(name) for name in names]
    read = [binding for path in paths for binding in read_bindings(path)]
    declared = {binding.key: binding for binding in read}
    _check_files(read, declared, paths)

    typed = [parse_override(text, "--set ") for text in overrides]
    typed += [parse_override(text, "--gin.") for text in gin_bindings]
    for binding in typed:
        if binding.key not in declared:
            raise InputError(
                f"{binding.where}: {shown(paths[-1])} declares no {binding.key}"
                f"{_suggestion(binding.key, declared)}"
            )
    final = _arms_by_reference(declared | {binding.key: binding for binding in typed})
    _check_macros(final, shown(paths[-1]))
    reached = dict.fromkeys(_reached(final))
    for binding in typed:
        if binding.key not in reached:
            raise InputError(
                f"{binding.where}: has no effect, since nothing uses {binding.key} in this config"
            )
    for key in reached:
        _check_value(key, final)
    return _build(final, shown(paths[-1])), _text(final, list(reached))


def _references(value: Any) -> Iterator[gin_internals.ConfigurableReference]:
    return gin_internals.iterate_references([value])


def _is_macro(reference: gin_internals.ConfigurableReference) -> bool:
    return reference.selector == "gin.macro"


def _macro_key(reference: gin_internals.ConfigurableReference) -> Key:
    scope, _, name = "/".join(reference.scopes).rpartition("/")
    return Key(scope, name, "")


def _reached(bindings: Bindings) -> Iterator[Key]:
    """Keys that decide the run: those that `train` reads, directly or through references."""
    waiting, seen = [("", ROOT)], set()
    while waiting:
        scope, selector = waiting.pop(0)
        if (scope, selector) in seen:
            continue
        seen.add((scope, selector))
        parts = scope.split("/") if scope else []
        prefixes = {"/".join(parts[:n]) for n in range(len(parts) + 1)}
        for key, binding in bindings.items():
            if key.is_macro or key.selector != selector or key.scope not in prefixes:
                continue
            yield key
            values = [binding.value]
            while values:
                for reference in _references(values.pop()):
                    if not _is_macro(reference):
                        inner = "/".join(reference.scopes) or scope
                        name = reference.selector.removeprefix("stepdistill_jax.")
                        waiting.append((inner, name))
                    elif (macro := _macro_key(reference)) in bindings and macro not in seen:
                        seen.add(macro)
                        yield macro
                        values.append(bindings[macro].value)


def _check_files(read: list[Binding], declared: Bindings, paths: list[pathlib.Path]) -> None:
    """What gin lets pass: macros and bindings of a file that nothing reads."""
    if not any(key.selector == ROOT for key in declared):
        raise InputError(f'{shown(paths[-1])}: `train` is unbound; begin with include "train.gin"')
    used = {
        _macro_key(reference)
        for binding in read
        for reference in _references(binding.value)
        if _is_macro(reference)
    }
    reached = set(_reached(_arms_by_reference(declared)))
    for binding in read:
        # a part's binding may be superseded, say by other objectives; the config's own may not
        own = binding.path == paths[-1] and not binding.key.is_macro
        if (binding.key.is_macro and binding.key not in used) or (
            own and binding.key not in reached
        ):
            raise InputError(
                f"{binding.where}: nothing uses {binding.key}{_suggestion(binding.key, used)}"
            )


def _check_macros(final: Bindings, config: str) -> None:
    """Every macro that is read has a value."""
    for key in _reached(final):
        for reference in _references(final[key].value):
            if repr(reference) == f"%{REQUIRED}":
                raise InputError(
                    f"{config}: {key} has no default; bind it there or give --set {key}=VALUE"
                )
            if _is_macro(reference) and (macro := _macro_key(reference)) not in final:
                raise InputError(
                    f"{final[key].where}: %{macro} is bound nowhere{_suggestion(macro, final)}"
                )


def _check_value(key: Key, final: Bindings) -> None:
    """The literal that a parameter of ours gets, directly or through macros, has its type."""
    if key.is_macro or key.selector not in CONFIGURABLES:
        return
    binding, seen = final[key], {key}
    while _is_reference(binding.value) and _is_macro(binding.value):
        macro = _macro_key(binding.value)
        if macro in seen:
            raise InputError(f"{binding.where}: %{macro} leads back to itself")
        seen.add(macro)
        binding = final[macro]
    if any(_references(binding.value)):
        return
    try:
        check_type(key.selector, key.parameter, str(binding.key), binding.value)
    except InputError as error:
        raise InputError(f"{binding.where}: {error}") from None


def _is_reference(value: Any) -> bool:
    return isinstance(value, gin_internals.ConfigurableReference)


def _suggestion(key: Key, known: Iterable[Key]) -> str:
    """`; did you mean ...?`, or the macros that there are."""
    if str(key) in T5X_NAMES:
        return f"; here it is {T5X_NAMES[str(key)]}"
    names = {str(k) for k in known}
    if (upper := str(key).upper()) in names:
        return f"; did you mean {upper!r}?"
    macros = ", ".join(sorted(str(k) for k in known if k.is_macro))
    return nearest(str(key), names) or nearest(upper, names) or f" (known: {macros})"


def _arms_by_reference(bindings: Bindings) -> Bindings:
    """An arm by its name takes the weights that the config binds for it, as `@arm()` does."""
    bound = bindings.get(OBJECTIVES)
    if bound is None or not isinstance(bound.value, str) or bound.value not in ARMS:
        return bindings
    reference = gin_internals.ConfigurableReference(bound.value, True)
    return bindings | {OBJECTIVES: Binding(OBJECTIVES, reference, bound.where, bound.path)}


def _build(final: Bindings, config: str) -> TrainConfig:
    gin.clear_config()
    try:
        for key, binding in final.items():
            if key.is_macro:
                gin.bind_parameter((str(key), "gin.macro", "value"), binding.value)
            else:
                gin.bind_parameter(tuple(key), binding.value)
        return gin.get_configurable(ROOT)()
    except RecursionError:
        raise InputError(
            f"{config}: a reference leads back to itself, as @train() in a parameter of train does"
        ) from None
    except (TypeError, ValueError, RuntimeError) as error:
        # gin appends lines of context to what passes through it
        message = str(error).strip().split("\n")[0]
        # a macro, a binding, or the parameter alone
        name = message.partition(":")[0]
        named = (b for k, b in final.items() if name in (str(k), k.parameter))
        culprit = next(named, None)
        raise InputError(f"{culprit.where if culprit else config}: {message}") from None
    finally:
        gin.clear_config()


def _text(final: Bindings, reached: list[Key]) -> str:
    """The operative config: bindings in use, then the defaults of what they leave open."""
    macros = sorted(str(key) for key in reached if key.is_macro)
    lines = [f"{name} = {final[_key_of_macro(name)].value!r}" for name in macros] + [""]
    selectors = dict.fromkeys((key.scope, key.selector) for key in reached if not key.is_macro)
    selectors |= dict.fromkeys(
        ("", reference.selector)
        for key in reached
        for reference in _references(final[key].value)
        if not reference.scopes and reference.selector in CONFIGURABLES
    )
    for scope, selector in sorted(selectors, key=lambda name: (name[1] != ROOT, name[1], name[0])):
        bound = {
            key.parameter: repr(final[key].value)
            for key in sorted(reached)
            if key[:2] == (scope, selector)
        }
        if not scope and selector in CONFIGURABLES:
            for name, default in parameters(selector).items():
                if default is not inspect.Parameter.empty:
                    bound.setdefault(name, repr(default))
        lines += [f"{Key(scope, selector, name)} = {bound[name]}" for name in sorted(bound)] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _key_of_macro(name: str) -> Key:
    scope, _, name = name.rpartition("/")
    return Key(scope, name, "")
