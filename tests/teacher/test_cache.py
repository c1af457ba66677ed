import contextlib
import multiprocessing
import sqlite3

import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.teacher.answers import Answer
from stepdistill_jax.teacher.cache import AnswerCache


def test_an_answer_comes_back_as_it_was_also_after_closing(tmp_path):
    answer = Answer("Grüße\n", "stop", 3, 4, "2026-01-01T00:00:00+00:00", {"temperature": 0.5})
    cache = AnswerCache(tmp_path / "c.sqlite")
    cache.put("k", "m", answer)
    cache.close()
    again = AnswerCache(tmp_path / "c.sqlite")
    assert again.get("k") == answer
    assert again.get("other") is None


def test_the_first_of_two_answers_of_a_key_stays(tmp_path):
    one, two = AnswerCache(tmp_path / "c.sqlite"), AnswerCache(tmp_path / "c.sqlite")
    assert one.put("k", "m", Answer("first")).text == "first"
    assert two.put("k", "m", Answer("second")).text == "first"


def test_fetched_answers_are_no_answers_until_they_are_put(tmp_path):
    cache = AnswerCache(tmp_path / "c.sqlite")
    assert cache.fetch([("k", Answer("a")), ("k", Answer("b"))]) == 2
    assert cache.fetched("k").text == "b"
    assert cache.get("k") is None


@pytest.mark.parametrize("counts", [(None, None), (12.5, None), (7, 3)])
def test_an_answer_that_an_earlier_version_kept_from_a_batch_is_read(tmp_path, counts):
    """It kept the counts as the results said them."""
    cache = AnswerCache(tmp_path / "c.sqlite")
    cache.put("k", "m", Answer("a", parameters={"temperature": 0.5}))
    with sqlite3.connect(tmp_path / "c.sqlite") as db:
        db.execute("UPDATE answers SET prompt_tokens = ?, completion_tokens = ?", counts)
    db.close()
    answer = cache.get("k")
    assert (answer.prompt_tokens, answer.completion_tokens) == tuple(int(n or 0) for n in counts)
    cache.close()


@pytest.mark.parametrize("trouble", ["full", "locked"])
def test_a_sound_file_that_cannot_be_written_is_not_said_to_be_none(tmp_path, trouble):
    cache, other = (AnswerCache(tmp_path / "c.sqlite") for _ in range(2))
    cache._db.execute("PRAGMA busy_timeout=1")
    if trouble == "full":
        cache._db.execute("PRAGMA max_page_count=1")
    else:
        other._db.execute("BEGIN IMMEDIATE")
    with pytest.raises(InputError, match=rf"c.sqlite: .* {trouble}; the saved answers are safe"):
        for i in range(20):
            cache.put(f"{i}", "m", Answer("a" * 5000))
    other.close()


def _put(path, start):
    cache = AnswerCache(path)
    for i in range(start, start + 300):
        cache.put(str(i), "m", Answer(f"a{i}"))


def test_processes_write_at_once_without_losing_an_answer(tmp_path):
    path = tmp_path / "c.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_put, args=(path, 300 * i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    cache = AnswerCache(path)
    assert all(cache.get(str(i)).text == f"a{i}" for i in range(900))


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("not a database, but long enough to look like one" * 10)
    with pytest.raises(InputError, match="`cache`"):
        AnswerCache(tmp_path / "text")
    sqlite3.connect(tmp_path / "new").execute("PRAGMA user_version=99")
    with pytest.raises(InputError, match="another version"):
        AnswerCache(tmp_path / "new")


def test_a_database_of_something_else_is_left_alone(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "theirs.sqlite")) as db:
        db.execute("CREATE TABLE thesis (chapter TEXT)")
        db.commit()
    before = (tmp_path / "theirs.sqlite").read_bytes()
    with pytest.raises(InputError, match=r"theirs\.sqlite: exists and was not written by"):
        AnswerCache(tmp_path / "theirs.sqlite")
    assert (tmp_path / "theirs.sqlite").read_bytes() == before
