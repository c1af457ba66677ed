"""`stepdistill settings`: each macro and field of a config, from the classes that check them."""

import argparse
import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Callable
from typing import Any

from stepdistill_jax.commands.terminal import say

REQUIRED = "%gin.REQUIRED"
# `warmup_steps (steps): until the peak`, `key, value: ranks`; a deeper line goes on with the one before
_ENTRY = re.compile(r"    (?P<names>\w+(?:, \w+)*)(?: \((?P<unit>[^)]+)\))?: (?P<meaning>.*)")
_SECTIONS = ("Attributes:", "Args:")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What `--set` and a config can bind.

    Attributes:
        name: the macro, or the field where it has none.
        field: `train.batch_size`.
        required: whether a config has to bind it.
        default: its value if nothing binds it; None also where it is required.
        unit: `tokens`, `steps`, ...; None has none.
        meaning: in a sentence or two.
    """

    name: str
    field: str
    required: bool
    default: Any
    unit: str | None
    meaning: str

    @property
    def owner(self) -> str:
        """`train` of `train.batch_size`."""
        return self.field.partition(".")[0]

    @property
    def value(self) -> str:
        """The default as a config writes it; empty where there is none."""
        if self.required:
            return ""
        if isinstance(self.default, str) and not self.default.startswith("@"):
            return f'"{self.default}"'
        return str(self.default)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="a macro (BATCH_SIZE), a field (train.remat_policy, remat_policy) or what has fields"
        " (optimizer); default: all",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the settings of that name, or all of them; returns the list."""
    found = settings() if args.name is None else find_settings(args.name)
    width = shutil.get_terminal_size((100, 24)).columns
    for owner in dict.fromkeys(s.owner for s in found):
        say(f"{owner}: {summary_of(owner)}")
        for s in (s for s in found if s.owner == owner):
            unit = f"  [{s.unit}]" if s.unit else ""
            say(f"  {s.name}{'  required' if s.required else f' = {s.value}'}{unit}")
            say(textwrap.fill(s.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
        say("")
    say("Set one by --set NAME=VALUE, or in a config by NAME = VALUE.")
    return {"settings": [dataclasses.asdict(s) for s in found]}


def settings() -> list[Setting]:
    """Returns all settings: those of `train` first, then of what it is given."""
    from stepdistill_jax.commands.configurables import CONFIGURABLES, main_bindings

    bound, found = main_bindings(), []
    for owner, configurable in CONFIGURABLES.items():
        meanings = _meanings(configurable)
        for parameter, given in inspect.signature(configurable).parameters.items():
            field = f"{owner}.{parameter}"
            reference = bound.get(field, "")
            name = reference[1:] if reference.startswith("%") else field
            required = given.default is given.empty or bound.get(name) == REQUIRED
            default = reference if reference.startswith("@") else given.default
            unit, meaning = meanings[parameter]
            found.append(
                Setting(name, field, required, None if required else default, unit, meaning)
            )
    return found


def find_settings(name: str) -> list[Setting]:
    """Returns the settings that have a name, in any case, or whose owner has it.

    Raises:
        InputError: none has; names the nearest.
    """
    from stepdistill_jax.commands.gin_config import suggestion
    from stepdistill_jax.errors import InputError

    known = settings()
    names = [{s.name, s.field, s.field.partition(".")[2], s.owner} for s in known]
    wanted = name.removeprefix("%").removeprefix("@").removesuffix("()").lower()
    found = [s for s, of in zip(known, names, strict=True) if wanted in {n.lower() for n in of}]
    if not found:
        hint = suggestion(name, {n for s in known for n in (s.name, s.field)})
        raise InputError(f"no setting {name!r}{hint}; `stepdistill settings` lists all")
    return found


def summary_of(owner: str) -> str:
    """Returns the first line on what has these fields."""
    from stepdistill_jax.commands.configurables import CONFIGURABLES

    return (inspect.getdoc(CONFIGURABLES[owner]) or "").partition("\n")[0]


def _meanings(configurable: Callable[..., Any]) -> dict[str, tuple[str | None, str]]:
    """Returns unit and meaning of each parameter, by the docstring of a class or function of ours.

    A function's own `Args:` go before the fields of the class that it returns. `label_weight` of an
    arm is the field `weight` of its objective `label`.
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
            raise LookupError(f"{configurable.__name__}: no line on {parameter} in its docstring")
    return found


def _entries(documented: Any) -> dict[str, tuple[str | None, str]]:
    """Returns unit and meaning by name, of the lines below `Attributes:` or `Args:`."""
    found, names, inside = {}, [], False
    for line in (inspect.getdoc(documented) or "").splitlines():
        if not line.startswith(" "):
            inside = line in _SECTIONS if line else inside
        elif inside and (entry := _ENTRY.fullmatch(line)):
            names = entry["names"].split(", ")
            found |= dict.fromkeys(names, (entry["unit"], entry["meaning"]))
        elif inside:
            found |= {n: (found[n][0], f"{found[n][1]} {line.strip()}") for n in names}
    return found
