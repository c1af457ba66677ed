"""Reads gin text into bindings that know where they were written.

gin's own `parse_config` forgets file and line, takes a macro twice in a file, and looks for includes
in the current folder first; its tokenizer and parser are used here, its state is not.
"""

import ast
import dataclasses
import importlib
import os
import pathlib
import re
import tokenize
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from gin import config as gin_internals
from gin import config_parser

from stepdistill_jax.commands.configurables import check_parameter, selector_of
from stepdistill_jax.commands.shipped import shipped_folder
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.lookup import search_current_folder

MAX_BYTES = 1 << 18  # of a file; gin reads 10,000 lines a second
MAX_FILES = 200  # that one config includes, one inside another and one after another


class Key(NamedTuple):
    """What is bound: a macro (`parameter` empty), or a parameter of a configurable in a scope."""

    scope: str
    selector: str
    parameter: str

    @property
    def is_macro(self) -> bool:
        return not self.parameter

    def __str__(self) -> str:
        name = f"{self.selector}.{self.parameter}" if self.parameter else self.selector
        return f"{self.scope}/{name}" if self.scope else name


@dataclasses.dataclass(frozen=True)
class Binding:
    """One statement `KEY = VALUE`; `where` is `file:line` or the flag that was typed."""

    key: Key
    value: Any
    where: str
    path: pathlib.Path | None = None


class _Delegate(gin_internals.ParserDelegate):
    """Refuses a reference to an unknown configurable with a message of ours."""

    def configurable_reference(self, scoped_selector, evaluate):
        selector_of(scoped_selector.rsplit("/", 1)[-1])
        return super().configurable_reference(scoped_selector, evaluate)


def shown(path: pathlib.Path) -> str:
    """A path as short as the reader can use it from the current folder."""
    try:
        return str(path.absolute().relative_to(pathlib.Path.cwd()))
    except ValueError:
        return str(path)


def read_bindings(
    path: pathlib.Path,
    parents: tuple[pathlib.Path, ...] = (),
    left: Iterator[int] | None = None,
) -> list[Binding]:
    """Bindings of a gin file and of the files that it includes, in order.

    An included file is looked for beside the including one, then among the shipped parts. A statement
    `import MODULE` runs that module: a config is code.

    Args:
        path: of the file.
        parents: the files that include it.
        left: how many more may be included.

    Raises:
        InputError: a missing file, a syntax error, an unknown configurable or parameter, an
            include of itself, too many or too large files, or one name bound twice in one file; names
            file and line.
    """
    left = iter(range(MAX_FILES)) if left is None else left
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(
                f"{shown(path)}: larger than {MAX_BYTES >> 10} KiB, so it is no config"
            )
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{shown(path)}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{shown(path)}: not readable as text ({error})") from None
    bindings: list[Binding] = []
    lines: dict[Key, int] = {}
    for line, statement in _statements(path, text):
        where = f"{shown(path)}:{line}"
        try:
            if isinstance(statement, config_parser.IncludeStatement):
                part = _find_include(statement.filename, path)
                if part in (*parents, path.resolve()):
                    raise InputError(f"include {statement.filename!r} leads back to itself")
                if next(left, None) is None:
                    raise InputError(f"more than {MAX_FILES} includes in all")
                bindings += read_bindings(part, (*parents, path.resolve()), left)
            elif isinstance(statement, config_parser.ImportStatement):
                _import(statement)
            elif isinstance(statement, config_parser.BindingStatement):
                key = make_key(statement.scope, statement.selector, statement.arg_name)
                if key in lines:
                    raise InputError(f"{key} is bound already in line {lines[key]}")
                lines[key] = line
                bindings.append(Binding(key, statement.value, where, path))
        except InputError as error:
            # an error of an included file names its own place
            message = str(error)
            nested = isinstance(statement, config_parser.IncludeStatement) and ".gin:" in message
            raise InputError(message if nested else f"{where}: {message}") from None
    return bindings


def make_key(scope: str, selector: str, parameter: str) -> Key:
    """The key, checked against the known configurables."""
    if not parameter:
        return Key(scope, selector, "")
    selector = selector_of(selector)
    check_parameter(selector, parameter)
    return Key(scope, selector, parameter)


def _statements(path: pathlib.Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line, statement) of a file; gin's exceptions become one line each."""
    parser = None
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        for statement in parser:
            yield statement.location.line_num, statement
    except (SyntaxError, tokenize.TokenError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        message = error.msg if isinstance(error, SyntaxError) else error.args[0]
        if quoted := re.search(r"Failed to parse token '(.*)'", message or "", re.DOTALL):
            message = f"{quoted[1]} is no value; write text in quotes"
        raise InputError(f"{shown(path)}:{line}: {_one_line(message)}") from None
    except (ValueError, RecursionError) as error:  # an unknown reference, 1,000 brackets
        line = parser.current_token.start[0] if parser else 1
        deep = isinstance(error, RecursionError)
        message = "too many brackets in brackets" if deep else _first_line(error)
        raise InputError(f"{shown(path)}:{line}: {message}") from None


def _one_line(message: str | None) -> str:
    return " ".join((message or "syntax error").split())


def _first_line(error: Exception) -> str:
    # gin appends lines of context to the exceptions that pass through it
    return str(error).strip().split("\n")[0]


def _find_include(name: str, including: pathlib.Path) -> pathlib.Path:
    folders = (including.parent, shipped_folder("gin"), shipped_folder("configs"))
    for folder in folders:
        if os.path.isfile(folder / name):  # pathlib raises at a name of 5,000 letters
            return (folder / name).resolve()
    raise InputError(
        f"include {name!r}: no such file beside {including.name} or in {shown(folders[1])}"
    )


def _import(statement: config_parser.ImportStatement) -> None:
    if statement.module.startswith("__gin__"):
        raise InputError(f"{statement.format()}: dynamic registration is not used here")
    name = statement.module
    search_current_folder()
    try:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            if not statement.is_from:
                raise
            importlib.import_module(name.rpartition(".")[0])
    except (Exception, SystemExit) as error:  # it is the user's code: whatever comes up
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise InputError(f"{statement.format()}: {kind}{_one_line(str(error))}") from error


def parse_override(text: str, flag: str) -> Binding:
    """The binding of `NAME=VALUE` as typed after `flag` (`--set `, `--gin.`).

    VALUE is a Python literal, a gin reference (`@name()`, `%MACRO`), or else a bare word: a string.

    Raises:
        InputError: no `=`, no name, no value, or a literal that does not end.
    """
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    where = f"{flag}{text}"
    if not equals or not re.fullmatch(r"[A-Za-z_][\w./]*", name):
        raise InputError(f"{where}: NAME=VALUE is wanted")
    if not value:
        raise InputError(f"{where}: a value is wanted after '='; '' is the empty text")
    try:
        key = make_key(*config_parser.parse_binding_key(name))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return Binding(key, _parse_value(value, where), where)


def _parse_value(text: str, where: str) -> Any:
    if text[0] in "@%":
        try:
            return config_parser.ConfigParser(text, _Delegate()).parse_value()
        except (SyntaxError, ValueError, tokenize.TokenError, RecursionError) as error:
            message = error.msg if isinstance(error, SyntaxError) else _first_line(error)
            raise InputError(f"{where}: {_one_line(message)}") from None
    try:
        with warnings.catch_warnings():  # `1or 2` would be a SyntaxWarning before our own line
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        pass
    if text[0] in "[({'\"" or "\n" in text:
        raise InputError(f"{where}: {text!r} is neither a Python literal nor a bare word")
    return text
