"""Saves the teacher's answers in an SQLite file, which several processes may use at once."""

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
# UnicodeDecodeError: SQLite's message may quote bytes of a damaged file
_DAMAGED = (sqlite3.Error, UnicodeDecodeError)
# errors that pass, and do not mean a damaged file
_FOR_NOW = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
)
_COLUMNS = "text, finish_reason, prompt_tokens, completion_tokens, time, parameters"


class AnswerCache:
    """An SQLite file of complete, readable answers, each saved under its key.

    After `put` has returned, the answer is not lost even if the process is killed.
    """

    def __init__(self, path: os.PathLike | str):
        """Opens or creates the file.

        Raises:
            InputError: the file cannot be written, or it is not a cache that this version can read.
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
                    f"`cache` {path}: expected schema {SCHEMA}, got schema {version}, which another version"
                    " of this package wrote; choose another file"
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
        """Returns the InputError for an exception of SQLite: the file is bad, or cannot be used at the moment."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _FOR_NOW:
            return InputError(
                f"`cache` {self.path}: {error}; the saved answers are safe; remove the cause, and start again"
            )
        return InputError(
            f"`cache` {self.path}: the file cannot be used as an SQLite file ({error}); move it away, or"
            " choose another file"
        )

    def get(self, key: str) -> Answer | None:
        """Returns the saved answer for a key; None if there is none."""
        return self._get("answers", key)

    def put(self, key: str, model: str, answer: Answer) -> Answer:
        """Saves a complete, readable answer, unless another process has already saved one for the key.

        Returns:
            The answer that is saved for the key.
        """
        try:
            done = self._insert("IGNORE INTO answers", key, model, answer)
        except _DAMAGED as error:
            raise self._unusable(error) from None
        return answer if done.rowcount else self.get(key) or answer

    def fetch(self, answers: Iterable[tuple[str, Answer]]) -> int:
        """Stores the answers of a batch, and returns their count.

        `fetched` returns them until the cache is closed.
        """
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
        """Returns the answer that `fetch` stored for a key; None if there is none."""
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
            # earlier versions did not check the token counts of batch results: null, or a fraction
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
