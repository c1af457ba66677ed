"""Answers that were paid for, in one SQLite file; several processes may use it at once."""

import dataclasses
import json
import os
import pathlib
import sqlite3
from collections.abc import Iterable

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.overwriting import foreign_file
from stepdistill_jax.teacher.answers import Answer

SCHEMA = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS {name} (
    key TEXT PRIMARY KEY, model TEXT, time TEXT, text TEXT, finish_reason TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, parameters TEXT
) WITHOUT ROWID"""
# the second where SQLite's own message holds bytes of a damaged file
_DAMAGED = (sqlite3.Error, UnicodeDecodeError)
# a file that is sound, as far as these say
_FOR_NOW = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
)
_COLUMNS = "text, finish_reason, prompt_tokens, completion_tokens, time, parameters"


class AnswerCache:
    """Whole, readable answers by key; what failed is never put here.

    An answer is on its way to the disk when `put` returns: it survives the death of the process.
    """

    def __init__(self, path: os.PathLike | str):
        """Opens the file or makes it.

        Raises:
            InputError: it cannot be written, or is something else.
        """
        self.path = pathlib.Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
            if tables - {"answers"}:
                raise foreign_file(f"`cache` {path}", "annotate")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA):
                raise InputError(
                    f"`cache` {path}: written by another version (its schema is {version}, ours"
                    f" {SCHEMA}); give another file"
                )
            self._db.execute(_TABLE.format(name="answers"))
            self._db.execute(f"PRAGMA user_version={SCHEMA}")
            self._db.execute("CREATE TEMP TABLE fetched AS SELECT * FROM answers WHERE 0")
            self._db.execute("CREATE UNIQUE INDEX temp.fetched_key ON fetched (key)")
        except InputError:
            raise
        except (*_DAMAGED, OSError) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> InputError:
        """Of a file that is none of SQLite's, a damaged one, a full disk."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _FOR_NOW:
            return InputError(
                f"`cache` {self.path}: {error}; what is in it is kept: start again when that is mended"
            )
        return InputError(
            f"`cache` {self.path}: cannot be used as an SQLite file ({error}); move it away, or give"
            " another file"
        )

    def get(self, key: str) -> Answer | None:
        """The answer of that key."""
        return self._get("answers", key)

    def put(self, key: str, model: str, answer: Answer) -> Answer:
        """Keeps a whole, readable answer; gives back the one that is kept.

        That is another process's where it was first.
        """
        try:
            done = self._insert("IGNORE INTO answers", key, model, answer)
        except _DAMAGED as error:
            raise self._unusable(error) from None
        return answer if done.rowcount else self.get(key) or answer

    def fetch(self, answers: Iterable[tuple[str, Answer]]) -> int:
        """Holds answers of a batch, readable or not, until the process ends; their number."""
        count = 0
        self._db.execute("BEGIN")
        try:
            for key, answer in answers:
                self._insert("REPLACE INTO fetched", key, "", answer)
                count += 1
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        return count

    def fetched(self, key: str) -> Answer | None:
        """An answer that `fetch` holds."""
        return self._get("fetched", key)

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def _insert(self, how: str, key: str, model: str, answer: Answer) -> sqlite3.Cursor:
        row = (key, model, answer.time, answer.text, answer.finish_reason)
        row += (answer.prompt_tokens, answer.completion_tokens, json.dumps(answer.parameters))
        return self._db.execute(f"INSERT OR {how} VALUES (?,?,?,?,?,?,?,?)", row)  # noqa: S608

    def _get(self, table: str, key: str) -> Answer | None:
        try:
            found = self._db.execute(f"SELECT {_COLUMNS} FROM {table} WHERE key = ?", (key,))  # noqa: S608
            row = found.fetchone()
            if row is None:
                return None
            text, reason, *counts, time, parameters = row
            # earlier versions kept what a batch's results said: null, or a fraction
            prompt, completion = (int(n or 0) if isinstance(n, float | None) else n for n in counts)
            answer = Answer(text, reason, prompt, completion, time, json.loads(parameters))
        except _DAMAGED as error:
            raise self._unusable(error) from None
        except (TypeError, ValueError, OverflowError, RecursionError):
            answer = None
        types = [] if answer is None else [type(v) for v in dataclasses.astuple(answer)]
        if types != [str, str, int, int, str, dict]:
            raise self._unusable(ValueError(f"the answer {key} is damaged"))
        return answer
