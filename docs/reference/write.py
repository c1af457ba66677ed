"""Writes the pages of docs/reference from the code: `make reference`, or `python docs/reference/write.py`."""

import argparse
import pathlib
from collections.abc import Iterable

from stepdistill_jax.commands.main import COMMANDS, parser_of
from stepdistill_jax.commands.settings import settings, summary_of

FOLDER = pathlib.Path(__file__).parent
WRITTEN = "<!-- written by `make reference` from the code; edit that -->"
COMMON = ("help", "json", "debug")  # options of every command

SETTINGS = f"""{WRITTEN}
# Settings of a config

A config, or `--set NAME=VALUE`, binds a macro (`BATCH_SIZE`) or a field (`train.remat_policy`). A macro has the name of its field in
capitals. `stepdistill settings [NAME]` prints this page, or a part of it. A bare word is a string: `--set LAYOUT=fsdp`. Fields of
`optax.NAME` and of your own functions can be bound, too: [loss and optimizer](../how-to/losses.md#optimizers-and-learning-rates).
"""

COMMANDS_PAGE = f"""{WRITTEN}
# Commands

`stepdistill COMMAND --help` prints the same. Every command also takes `--json` (ends standard output with one JSON object) and
`--debug` (shows the whole traceback of any error). `stepdistill --version` prints versions and devices.

Exit codes: 0 done; 2 bad usage, config or input, in one line; 1 a failure in the run; 75 stopped by a signal after a clean save: run
the same command again to continue ([all codes](files.md#exit-codes)).
"""


def settings_page() -> str:
    """Returns `settings.md`: a table for each class and function that a config can bind fields of."""
    found, parts = settings(), [SETTINGS]
    for owner in dict.fromkeys(s.owner for s in found):
        rows = [
            (
                _code(s.name),
                "required" if s.required else _code(s.value),
                s.unit or "",
                s.meaning,
            )
            for s in found
            if s.owner == owner
        ]
        table = _table(("setting", "default", "unit", "meaning"), rows)
        parts.append(f"## {owner}\n\n{summary_of(owner)}\n\n{table}")
    return "\n".join(parts)


def commands_page() -> str:
    """Returns `commands.md`: a table of arguments for each command."""
    parts = [COMMANDS_PAGE]
    for command, summary in COMMANDS.items():
        _, parser, _ = parser_of(command)
        shown = [a for a in parser._actions if a.dest not in COMMON and a.help != argparse.SUPPRESS]
        rows = [(_code(_typed(a)), _expanded(a)) for a in shown]
        table = _table(("argument", "meaning"), rows)
        parts.append(f"## {command}\n\n{summary[0].upper()}{summary[1:]}.\n\n{table}")
    return "\n".join(parts)


def _typed(action: argparse.Action) -> str:
    """Returns an argument as it is typed: `CONFIG`, `--workdir DIR`, `--with-rationale`."""
    value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
    if action.choices and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    value = " ".join(value) if isinstance(value, tuple) else value
    if action.nargs in ("*", "+"):
        value += "..."
    return " ".join([", ".join(action.option_strings), value]).strip()


def _expanded(action: argparse.Action) -> str:
    needed = "required; " if action.option_strings and action.required else ""
    return needed + (action.help or "").replace("%%", "%")


def _code(text: str) -> str:
    return f"`{text}`"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table of Markdown; a bar within a cell is escaped, in code, too."""
    cells = [list(columns)]
    cells += [["---"] * len(cells[0]), *(map(_cell, row) for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"settings.md": settings_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
        print(FOLDER / name)
