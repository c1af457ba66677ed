"""`stepdistill settings`: lists the macros and fields of a config, with defaults and meanings."""

import argparse
import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Callable
from typing import Any

from stepdistill_jax.commands.flag_names import as_set
from stepdistill_jax.commands.terminal import say

REQUIRED = "%gin.REQUIRED"
# `warmup_steps (steps): until the peak`, `key, value: ranks`; a more indented line continues an entry
_ENTRY = re.compile(r"    (?P<names>\w+(?:, \w+)*)(?: \((?P<unit>[^)]+)\))?: (?P<meaning>.*)")
_SECTIONS = ("Attributes:", "Args:")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting that `--set` and a config can bind.

    Attributes:
        name: the macro, or `field` if there is no macro.
        field: full name, such as `train.batch_size`.
        required: whether a config must bind the setting.
        default: the value in the config that was passed to `settings`, or else the default; None if `required`.
        bound: whether that config, or a file that it includes, binds the setting.
        unit: a unit such as `tokens`, or None.
    """

    name: str
    field: str
    required: bool
    default: Any
    unit: str | None
    meaning: str
    bound: bool = False

    @property
    def owner(self) -> str:
        """The part of `field` before the dot, such as `train` for `train.batch_size`."""
        return self.field.partition(".")[0]

    @property
    def value(self) -> str:
        """The default as written in a config; empty for a required setting."""
        if self.required:
            return ""
        if isinstance(self.default, str) and not self.default.startswith("@"):
            return f'"{self.default}"'
        return str(self.default)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `settings`."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="[CONFIG] [NAME]",
        help="CONFIG: path or name of a config, whose values are shown instead of the defaults; NAME: a macro"
        " (BATCH_SIZE), a field (train.remat_policy or remat_policy), a class or function (optimizer), or part of a"
        " name (dropout); without NAME, the settings that CONFIG binds are listed; without both, all settings",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the settings that NAME and CONFIG select, or all settings if both are missing."""
    config, name = _config_and_name(args.names)
    known = settings(config)
    if name is not None:
        found = find_settings(name, known)
    else:
        shown = [s for s in known if s.bound or (s.required and s.name.isupper())]
        found = known if config is None else shown
    width = shutil.get_terminal_size((100, 24)).columns
    for owner in dict.fromkeys(s.owner for s in found):
        say(f"{owner}: {summary_of(owner)}")
        for s in (s for s in found if s.owner == owner):
            unit = f"  [{s.unit}]" if s.unit else ""
            say(f"  {s.name}{'  required' if s.required else f' = {s.value}'}{unit}")
            say(textwrap.fill(s.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
        say("")
    say("To change a setting, pass --set NAME=VALUE, or write NAME = VALUE in a config.")
    if config is None:
        say("A config may replace these defaults; `stepdistill settings CONFIG` shows its values.")
    elif name is None:
        say("All other settings have their defaults; `stepdistill settings` lists them.")
    return {"settings": [dataclasses.asdict(s) for s in found]}


def _config_and_name(names: list[str]) -> tuple[str | None, str | None]:
    from stepdistill_jax.commands.shipped import find_shipped
    from stepdistill_jax.errors import InputError

    if len(names) > 2:
        raise InputError(f"settings: expected at most CONFIG and NAME, got {' '.join(names)}")
    if len(names) == 2:
        return names[0], names[1]
    if names and (names[0].endswith(".gin") or find_shipped(names[0])):
        return names[0], None
    return None, names[0] if names else None


def settings(config: str | None = None) -> list[Setting]:
    """Returns all settings. The fields of `train` come first.

    Args:
        config: path or name of a config, whose values replace the defaults. It need not bind all required settings.

    Raises:
        InputError: the config cannot be read.
    """
    from stepdistill_jax.commands.configurables import CONFIGURABLES, LITERAL, main_bindings
    from stepdistill_jax.commands.gin_statements import Reader
    from stepdistill_jax.commands.shipped import find_config

    bound, found = main_bindings(), []
    own = {} if config is None else Reader().bindings(find_config(config))
    for owner, configurable in CONFIGURABLES.items():
        meanings = _meanings(configurable)
        for parameter, given in inspect.signature(configurable).parameters.items():
            # `train.seed = %SEED` in train.gin: the setting's name is SEED. A value such as
            # `@optimizer()` is the default of a field without a macro.
            field = f"{owner}.{parameter}"
            reference = bound.get(field, "")
            name = reference[1:] if reference.startswith("%") else field
            required = given.default is given.empty or bound.get(name) == REQUIRED
            default = reference if reference.startswith("@") else given.default
            unit, meaning = meanings[parameter]
            meaning = as_set(meaning, field)
            if is_bound := name in own:
                value = own[name].value
                default = (
                    value if isinstance(value, LITERAL) else repr(value)
                )  # such as @optimizer()
                required = default == REQUIRED
            value = None if required else default
            found.append(Setting(name, field, required, value, unit, meaning, is_bound))
    return found


def find_settings(name: str, known: list[Setting]) -> list[Setting]:
    """Returns the settings of `known` whose macro, field or owner is `name`, ignoring case.

    If there are none, returns the settings whose macro or field contains `name`.

    Raises:
        InputError: there are no such settings.
    """
    from stepdistill_jax.commands.gin_config import suggestion
    from stepdistill_jax.commands.shipped import shipped_configs
    from stepdistill_jax.errors import InputError, nearest

    names = [{s.name, s.field, s.field.partition(".")[2], s.owner} for s in known]
    wanted = name.removeprefix("%").removeprefix("@").removesuffix("()").lower()
    found = [s for s, of in zip(known, names, strict=True) if wanted in {n.lower() for n in of}]
    if not found:  # `dropout` finds `train.dropout_rate`
        found = [s for s in known if wanted in s.name.lower() or wanted in s.field.lower()]
    if not found:
        configs = nearest(name, shipped_configs())
        hint = configs or suggestion(name, {n for s in known for n in (s.name, s.field)})
        raise InputError(f"there is no setting {name!r}{hint}; `stepdistill settings` lists all")
    return found


def summary_of(owner: str) -> str:
    """Returns the first line of the docstring of `owner`, a class or function."""
    from stepdistill_jax.commands.configurables import CONFIGURABLES

    line = (inspect.getdoc(CONFIGURABLES[owner]) or "").partition("\n")[0]
    return as_set(line, f"{owner}.")


def _meanings(configurable: Callable[..., Any]) -> dict[str, tuple[str | None, str]]:
    """Returns {parameter: (unit, meaning)}, from the docstrings of a configurable and the class it returns.

    An arm's parameter such as `label_weight` has the unit and the meaning of `Objective.weight`.
    """
    returned = inspect.signature(configurable).return_annotation
    returned = next(iter(typing.get_args(returned)), returned)  # of tuple[Objective, ...]
    documented = _entries(returned) | _entries(configurable)
    found = {}
    for parameter in inspect.signature(configurable).parameters:
        objective, _, field = parameter.rpartition("_")
        if parameter in documented:
            found[parameter] = documented[parameter]
        elif field in documented:
            unit, meaning = documented[field]
            found[parameter] = unit, f"of the objective {objective}: {meaning}"
        else:
            raise LookupError(
                f"{configurable.__name__}: its docstring does not explain {parameter}"
            )
    return found


def _entries(documented: Any) -> dict[str, tuple[str | None, str]]:
    """Returns {name: (unit, meaning)} from the sections `Attributes:` and `Args:` of a docstring."""
    found, names, inside = {}, [], False
    for line in (inspect.getdoc(documented) or "").splitlines():
        if not line.startswith(" "):  # a heading or plain text; an empty line ends nothing
            inside = line in _SECTIONS if line else inside
        elif inside and (entry := _ENTRY.fullmatch(line)):
            names = entry["names"].split(", ")
            found |= dict.fromkeys(names, (entry["unit"], entry["meaning"]))
        elif inside:
            found |= {n: (found[n][0], f"{found[n][1]} {line.strip()}") for n in names}
    return found
