"""Reads gin text into bindings that know where they were written.

gin's `parse_config` forgets that and lets a later file win over an earlier one without a word; its
parser is used here, its state is not.
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

MAX_BYTES = 1 << 18  # of a file; gin reads 10,000 lines a second
MAX_FILES = 200  # that one config includes, one inside another and one after another
# what gin's parser raises: an unknown reference is a ValueError, 1,000 brackets are too deep
_NOT_GIN = (SyntaxError, tokenize.TokenError, ValueError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Binding:
    """One statement `KEY = VALUE`.

    Attributes:
        key: a macro (`SEED`), or a parameter of a configurable, perhaps in a scope (`train.seed`,
            `hint/Objective.weight`).
        where: `file:line`, or the flag that was typed.
        path: of the file; None of a flag.
        rival: the same key's binding in another part, where neither goes before the other.
    """

    key: str
    value: Any
    where: str
    path: pathlib.Path | None = None
    rival: "Binding | None" = None

    def __post_init__(self):
        # an arm by its name takes the weights that are bound for it, as `@arm()` does
        if self.key == "OBJECTIVES" and isinstance(self.value, str) and self.value in ARMS:
            arm = gin_internals.ConfigurableReference(self.value, True)
            object.__setattr__(self, "value", arm)

    @property
    def owner(self) -> str:
        """Who reads it, as `calls` names it: `@train`, `@hint/Objective`, `%SEED`."""
        return f"@{self.key.rpartition('.')[0]}" if "." in self.key else f"%{self.key}"

    @property
    def calls(self) -> list[str]:
        """Each reference in the value: `@optimizer`, `@hint/Objective`, `%SEED`."""
        found = map(repr, gin_internals.iterate_references([self.value]))
        return [r.removesuffix("()").replace("stepdistill_jax.", "") for r in found]

    @property
    def macro(self) -> str | None:
        """The macro that is the whole value."""
        whole = isinstance(self.value, gin_internals.ConfigurableReference)
        return self.calls[0][1:] if whole and self.calls[0][0] == "%" else None


Bindings = dict[str, Binding]


@contextlib.contextmanager
def at(where: str) -> Iterator[None]:
    """Puts the place before an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {said(error)}") from error


def said(error: Exception) -> str:
    """One line of an exception, without the lines of context that gin adds at either end."""
    if isinstance(error, RecursionError):
        return "too many brackets in brackets"
    from_parser = isinstance(error, SyntaxError | tokenize.TokenError)
    lines = str(error.args[0] if from_parser else error).strip().split("\n")
    if "Failed to parse token" in lines[-1]:
        return f"{lines[-1].strip()}; write text in quotes"
    return lines[0]


def shown(path: pathlib.Path) -> str:
    """A path as short as the reader can use it from the current folder."""
    try:
        return str(path.absolute().relative_to(pathlib.Path.cwd()))
    except ValueError:
        return str(path)


class _Delegate(gin_internals.ParserDelegate):
    """Refuses a reference to an unknown configurable with a message of ours."""

    def configurable_reference(self, scoped_selector, evaluate):
        selector_of(scoped_selector.rpartition("/")[2])
        return super().configurable_reference(scoped_selector, evaluate)


class Reader:
    """Reads gin files.

    Attributes:
        read: every binding of every file, also those that another one supersedes.
        imports: the import statements.
    """

    def __init__(self):
        self.read: list[Binding] = []
        self.imports: list[str] = []
        self._included = 0

    def bindings(self, path: pathlib.Path, parents: tuple[pathlib.Path, ...] = ()) -> Bindings:
        """What a gin file binds, over what the files bind that it includes (`parents` include it).

        An included file is looked for beside the including one, then among the shipped ones. A
        statement `import MODULE` runs that module: a config is code.

        Raises:
            InputError: whatever is wrong, with file and line.
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
                        raise InputError(f"{key} is bound already in {own[key].where}")
                own[key] = Binding(key, statement.value, where, path)
        self.read += own.values()
        return laid(included) | own

    def _find_include(self, name: str, parents: tuple[pathlib.Path, ...]) -> pathlib.Path:
        beside = parents[-1].parent / name
        found = beside if os.path.isfile(beside) else find_shipped(name)
        self._included += 1
        if found is None:
            raise InputError(
                f"include {name!r}: no such file beside {parents[-1].name} or in"
                f" {shown(shipped_folder('gin'))}"
            )
        if found.resolve() in parents:
            raise InputError(f"include {name!r} leads back to itself")
        if self._included > MAX_FILES:
            raise InputError(f"more than {MAX_FILES} includes in all")
        return found


def laid(files: Iterable[tuple[pathlib.Path, Bindings]]) -> Bindings:
    """Each file over those before it, but the order of shipped parts does not matter.

    A part says whole what it refers to: where it has `@optimizer()`, what other files bind of
    `optimizer` goes back to the defaults. A key that two parts bind has a `rival`, save that the
    parts in `paper/`, each a run's size and all that goes with it, or the published code's habits,
    give way to the others.
    """
    found: Bindings = {}
    paper: Bindings = {}
    others: Bindings = {}
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
    """Returns whether a gin file is a shipped part, in a folder of `gin/`; of `kind`, in that one."""
    if path is None:
        return False
    folder = path.resolve().parent
    return folder.parent == shipped_folder("gin") and kind in ("", folder.name)


def _key(scope: str, selector: str, parameter: str) -> str:
    """The key, checked against the known configurables."""
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
    """(file:line, statement) of a file; gin's exceptions become one line each."""
    name, parser = shown(path), None
    try:
        text = path.read_text(encoding="utf-8-sig") if path.stat().st_size <= MAX_BYTES else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not readable as text ({error})") from None
    if text is None:
        raise InputError(f"{name}: larger than {MAX_BYTES >> 10} KiB, so it is no config")
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        for statement in parser:
            yield f"{name}:{statement.location.line_num}", statement
    except _NOT_GIN as error:
        line = getattr(error, "lineno", None) or (parser.current_token.start[0] if parser else 1)
        raise InputError(f"{name}:{line}: {said(error)}") from None


def _import(statement: config_parser.ImportStatement) -> None:
    if statement.module.startswith("__gin__"):
        raise InputError("dynamic registration is not used here")
    search_current_folder()
    try:
        try:
            importlib.import_module(statement.module)
        except ModuleNotFoundError:
            if not statement.is_from:
                raise
            importlib.import_module(statement.module.rpartition(".")[0])
    except (Exception, SystemExit) as error:  # it is the user's code: whatever comes up
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise InputError(kind + " ".join(str(error).split())) from error


def parse_override(text: str, flag: str) -> Binding:
    """The binding of `NAME=VALUE` as typed after `flag` (`--set `, `--gin.`).

    VALUE is what gin reads (a Python literal, `@name()`, `%MACRO`), or else a bare word: a string.

    Raises:
        InputError: no `=`, no name, no value, or a literal that does not end.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    with at(f"{flag}{text}"):
        if not equals or not re.fullmatch(r"[A-Za-z_][\w./]*", name):
            raise InputError("NAME=VALUE is wanted")
        if not value:
            raise InputError("a value is wanted after '='; '' is the empty text")
        key = _key(*config_parser.parse_binding_key(name))
        return Binding(key, _value(value), f"{flag}{text}")


def _value(text: str) -> Any:
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        value = parser.parse_value()
        if not parser.current_token.string:  # nothing is left
            return value
    except InputError:  # an unknown reference
        raise
    except _NOT_GIN:
        pass
    if text[0] in "@%[({'\"" or "\n" in text:
        raise InputError(f"{text!r} is neither a Python literal nor a bare word")
    return text
