"""Reads gin files with gin's parser, and records the file and line of each binding.

No binding enters gin's global state.
"""

import contextlib
import dataclasses
import importlib
import os
import pathlib
import re
import tokenize
from collections.abc import Iterable, Iterator
from typing import Any

from gin import config as gin_internals
from gin import config_parser

from stepdistill_jax.commands.configurables import defaults, selector_of
from stepdistill_jax.commands.shipped import find_shipped, shipped_folder
from stepdistill_jax.data.objectives import ARMS
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.tasks.lookup import search_current_folder

MAX_BYTES = 1 << 18  # limit for a file; gin reads 10,000 lines per second
MAX_FILES = 200  # limit for the includes of a config, nested ones counted
# errors of gin's parser: ValueError for an unknown reference, RecursionError for 1,000 nested brackets
_NOT_GIN = (SyntaxError, tokenize.TokenError, ValueError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Binding:
    """One statement `KEY = VALUE`.

    Attributes:
        key: a macro such as `SEED`, or a parameter such as `train.seed` or `hint/Objective.weight`.
        where: `file:line`, or the flag as the user wrote it.
        path: path of the file; None for a flag.
        rival: binding of the same key in another part, if the two parts conflict; else None. See `merged`.
    """

    key: str
    value: Any
    where: str
    path: pathlib.Path | None = None
    rival: "Binding | None" = None

    def __post_init__(self):
        # the name of an arm means `@arm()`, so the weights bound for that arm apply
        if self.key == "OBJECTIVES" and isinstance(self.value, str) and self.value in ARMS:
            arm = gin_internals.ConfigurableReference(self.value, True)
            object.__setattr__(self, "value", arm)

    @property
    def owner(self) -> str:
        """The gin reference to which this binding belongs, such as `@train`, `@hint/Objective` or `%SEED`."""
        return f"@{self.key.rpartition('.')[0]}" if "." in self.key else f"%{self.key}"

    @property
    def calls(self) -> list[str]:
        """The references in the value, such as `@optimizer`, `@hint/Objective` or `%SEED`."""
        found = map(repr, gin_internals.iterate_references([self.value]))
        return [r.removesuffix("()").replace("stepdistill_jax.", "") for r in found]

    @property
    def macro(self) -> str | None:
        """Name of the macro if the value is a macro; else None."""
        whole = isinstance(self.value, gin_internals.ConfigurableReference)
        return self.calls[0][1:] if whole and self.calls[0][0] == "%" else None


Bindings = dict[str, Binding]


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Puts `where` in front of the message of an InputError in the `with` block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Returns the message of an exception as one line, without the lines that gin adds."""
    if isinstance(error, RecursionError):
        return "too many nested brackets"
    from_parser = isinstance(error, SyntaxError | tokenize.TokenError)
    lines = str(error.args[0] if from_parser else error).strip().split("\n")
    if "Failed to parse token" in lines[-1]:
        return f"{lines[-1].strip()}; put text in quotes"
    return lines[0]


def shown(path: pathlib.Path) -> str:
    """Returns a path for messages, relative to the current folder if possible."""
    try:
        return str(path.absolute().relative_to(pathlib.Path.cwd()))
    except ValueError:
        return str(path)


class _Delegate(gin_internals.ParserDelegate):
    """Raises our own error for an unknown configurable, before gin raises its error."""

    def configurable_reference(self, scoped_selector, evaluate):
        selector_of(scoped_selector.rpartition("/")[2])
        return super().configurable_reference(scoped_selector, evaluate)


class Reader:
    """Reads gin files.

    Attributes:
        read: all bindings in the files, overridden bindings included.
        imports: all import statements in the files.
    """

    def __init__(self):
        self.read: list[Binding] = []
        self.imports: list[str] = []
        self._included = 0

    def bindings(self, path: pathlib.Path, parents: tuple[pathlib.Path, ...] = ()) -> Bindings:
        """Returns the bindings of a gin file and its includes. The file's own bindings take precedence.

        Executes the file's `import` statements.

        Args:
            parents: the files that include this file.

        Raises:
            InputError: the file is wrong. The message names the line.
        """
        parents = (*parents, path.resolve())
        own: Bindings = {}
        included: list[tuple[pathlib.Path, Bindings]] = []
        for where, statement in _statements(path):
            if isinstance(statement, config_parser.IncludeStatement):
                with at(where):
                    part = self._find_include(statement.filename, parents)
                included.append((part, self.bindings(part, parents)))
            elif isinstance(statement, config_parser.ImportStatement):
                with at(f"{where}: {statement.format()}"):
                    _import(statement)
                self.imports.append(statement.format())
            elif isinstance(statement, config_parser.BindingStatement):
                with at(where):
                    key = _key(statement.scope, statement.selector, statement.arg_name)
                    if key in own:
                        raise InputError(f"{key} is already bound in {own[key].where}")
                own[key] = Binding(key, statement.value, where, path)
        self.read += own.values()
        return merged(included) | own

    def _find_include(self, name: str, parents: tuple[pathlib.Path, ...]) -> pathlib.Path:
        sibling = parents[-1].parent / name
        found = sibling if os.path.isfile(sibling) else find_shipped(name)
        self._included += 1
        if found is None:
            raise InputError(
                f"include {name!r}: there is no such file next to {parents[-1].name} or in"
                f" {shown(shipped_folder('gin'))}"
            )
        if found.resolve() in parents:
            raise InputError(f"include {name!r} includes itself")
        if self._included > MAX_FILES:
            raise InputError(f"expected at most {MAX_FILES} includes in total")
        return found


def merged(files: Iterable[tuple[pathlib.Path, Bindings]]) -> Bindings:
    """Merges the bindings of several files.

    A later file overrides earlier files. Shipped parts (see `is_part`) have additional rules:

    - If a part contains a reference such as `@optimizer()`, earlier bindings of `optimizer` are dropped, except
      those in other parts.
    - A part outside `paper/` overrides a part in `paper/`, even if the part in `paper/` comes later.
    - If two parts in `paper/`, or two outside it, bind the same key, the earlier binding is kept as `rival` of the
      later one.

    Example: `optimizers/adamw.gin` binds `train.optimizer = @optimizer()`, so the user's earlier binding of
    `optimizer.b1` is dropped.
    """
    found: Bindings = {}
    paper: Bindings = {}  # bindings of all parts in `paper/` so far
    others: Bindings = {}  # bindings of all other parts so far
    for path, bindings in files:
        if is_part(path):
            of_kind = paper if is_part(path, "paper") else others
            for key in bindings.keys() & of_kind.keys():
                if of_kind[key].path != path:
                    bindings |= {key: dataclasses.replace(bindings[key], rival=of_kind[key])}
            of_kind |= bindings
            if of_kind is paper:
                bindings = {k: b for k, b in bindings.items() if k not in others}
            whole = {call for b in bindings.values() for call in b.calls if call[0] == "@"}
            found = {
                k: b
                for k, b in found.items()
                if k in others or b.owner not in whole or is_part(b.path, "paper")
            }
        found |= bindings
    return found


def is_part(path: pathlib.Path | None, kind: str = "") -> bool:
    """Returns whether a file is a shipped part, which lies in `gin/KIND/`. If `kind` is "", any KIND counts."""
    if path is None:
        return False
    folder = path.resolve().parent
    return folder.parent == shipped_folder("gin") and kind in ("", folder.name)


def _key(scope: str, selector: str, parameter: str) -> str:
    """Returns the key of a statement. Raises InputError for an unknown configurable or parameter."""
    if parameter:
        selector = selector_of(selector)
        if (known := defaults(selector)) and parameter not in known:
            raise InputError(
                f"{selector} has no parameter {parameter!r} (known: {', '.join(known)})"
                f"{nearest(parameter, known)}"
            )
        selector = f"{selector}.{parameter}"
    return f"{scope}/{selector}" if scope else selector


def _statements(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yields (`file:line`, statement) for each statement of a file. gin's exceptions become InputErrors."""
    name, parser = shown(path), None
    try:
        text = path.read_text(encoding="utf-8-sig") if path.stat().st_size <= MAX_BYTES else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: the file is not readable as text ({error})") from None
    if text is None:
        raise InputError(
            f"{name}: the file is larger than {MAX_BYTES >> 10} KiB, so it is not a config"
        )
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        for statement in parser:
            yield f"{name}:{statement.location.line_num}", statement
    except _NOT_GIN as error:
        line = getattr(error, "lineno", None) or (parser.current_token.start[0] if parser else 1)
        raise InputError(f"{name}:{line}: {one_line(error)}") from None


def _import(statement: config_parser.ImportStatement) -> None:
    if statement.module.startswith("__gin__"):
        raise InputError(
            "gin's dynamic registration is not supported; remove this line, and import the module that defines the"
            " configurable"
        )
    search_current_folder()
    try:
        try:
            importlib.import_module(statement.module)
        except ModuleNotFoundError:
            if not statement.is_from:
                raise
            importlib.import_module(statement.module.rpartition(".")[0])
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise InputError(kind + " ".join(str(error).split())) from error


def parse_override(text: str, flag: str) -> Binding:
    """Returns the binding for `NAME=VALUE`, which follows `flag` (`--set ` or `--gin.`).

    VALUE is a Python literal, `@name()`, `%MACRO`, or a string without quotes.

    Raises:
        InputError: the name or the value is missing or wrong.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    with at(f"{flag}{text}"):
        if not equals or not re.fullmatch(r"[A-Za-z_][\w./]*", name):
            raise InputError("expected NAME=VALUE")
        if not value:
            raise InputError("expected a value after '='; write '' for the empty string")
        key = _key(*config_parser.parse_binding_key(name))
        return Binding(key, _value(value), f"{flag}{text}")


def _value(text: str) -> Any:
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        value = parser.parse_value()
        # an empty token: the text is used up
        if not parser.current_token.string:  # type: ignore[union-attr]  # set when constructed
            return value
    except InputError:  # an unknown reference
        raise
    except _NOT_GIN:
        pass
    if text[0] in "@%[({'\"" or "\n" in text:
        raise InputError(f"{text!r} is neither a Python literal nor a word without quotes")
    return text
