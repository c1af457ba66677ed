"""What this package or a teacher wrote, and is not as it was written: caches, batches, datasets, vocabularies."""

import gzip
import io
import json
import os
import random
import sqlite3
import time
import tracemalloc

import pytest

from stepdistill_jax.data.corpora import jsonl
from stepdistill_jax.data.nli_rationale import parse_anli, parse_esnli
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.data.rationale import parse_choice, parse_equation
from stepdistill_jax.data.train_vocabulary import train_vocabulary
from stepdistill_jax.data.vocabulary import MAX_BYTES, load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import MAX_LINE_BYTES, json_lines
from stepdistill_jax.teacher.answers import _parse_free
from stepdistill_jax.teacher.batch import read_batch
from stepdistill_jax.teacher.cache import AnswerCache
from stepdistill_jax.teacher.prompting import load_prompting
from stepdistill_jax.teacher.settings import Settings

GOOD = '{"id": "one", "input": "is it wet ?", "label": "yes"}\n'

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def refused(record_fault):
    """`refused(kind, says, look)`: `look` must raise an InputError that has `says` in it."""
    tried, wrong = [], []

    def refuse(kind, says, look):
        tried.append(kind)
        try:
            look()
            wrong.append(f"{kind}: not noticed")
        except InputError as error:
            if says not in str(error):
                wrong.append(f"{kind}: {error}")
        except Exception as error:
            wrong.append(f"{kind}: {error!r}")

    def told(family):
        record_fault(family, tried=len(tried), survived=len(tried) - len(wrong))
        assert tried and not wrong, "\n".join(wrong)

    refuse.told = told
    return refuse


ANSWERS = """CREATE TABLE answers (key TEXT PRIMARY KEY, model TEXT, time TEXT, text TEXT,
    finish_reason TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, parameters TEXT)
    WITHOUT ROWID"""
KEPT = {
    "model": "m",
    "time": "t",
    "text": "a text",
    "finish_reason": "stop",
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "parameters": "{}",
}


def test_cache_files(tmp_path, refused):
    path = tmp_path / "cache.sqlite"

    def answers(*rows, schema=ANSWERS):
        with sqlite3.connect(path) as db:
            db.execute(schema)
            for row in rows:
                db.execute(f"INSERT INTO answers VALUES ({','.join('?' * len(row))})", row)
        db.close()

    def kept(**changes):
        return lambda: answers(("key", *(KEPT | changes).values()))

    def damaged(content):
        answers(*((f"{i:04}", *KEPT.values()) for i in range(2000)), ("key", *KEPT.values()))
        path.write_bytes(content(path.read_bytes()))

    kinds = {
        "other columns": lambda: answers((1,), schema="CREATE TABLE answers (x)"),
        "a view": lambda: answers(schema="CREATE VIEW answers AS SELECT 1 AS key"),
        "another version": lambda: answers(schema="PRAGMA user_version=9"),
        "cut": lambda: damaged(lambda whole: whole[: len(whole) // 2]),
        "zeros in it": lambda: damaged(lambda whole: whole[:4096] + bytes(400_000)),
        "zeros": lambda: path.write_bytes(bytes(8192)),
        "text": lambda: path.write_text("no database, but as long as one" * 200),
        "a folder": path.mkdir,
        "no text": kept(text=None),
        "a blob": kept(text=b"\xff\xfe"),
        "no reason": kept(finish_reason=None),
        "no time": kept(time=None),
        "tokens in words": kept(prompt_tokens="many"),
        "no parameters": kept(parameters=None),
        "broken parameters": kept(parameters="{"),
        "deep parameters": kept(parameters="[" * 100_000),
        "a list of parameters": kept(parameters="[]"),
    }

    def look():
        cache = AnswerCache(path)
        try:
            cache.get("key")
        finally:
            cache.close()

    for kind, make in kinds.items():
        for old in tmp_path.iterdir():
            old.rmdir() if old.is_dir() else old.unlink()
        make()
        refused(kind, f"`cache` {path}: ", look)
    refused.told("a teacher's cache: damaged pages, other tables, wrong values")


WRONG = [None, 1, -1, 10**30, 1.5, float("nan"), True, "x", "\ud800", "\0", [], [1], {}, {"a": 1}]
PARTS = (
    "custom_id", "response", "error", "response status_code", "response body",
    "response body choices", "response body choices 0", "response body choices 0 message",
    "response body choices 0 message content", "response body choices 0 finish_reason",
    "response body usage", "response body usage prompt_tokens",
)  # fmt: skip


def test_results_of_a_batch(tmp_path, record_fault):
    source, path = tmp_path / "in.jsonl", tmp_path / "results.jsonl"
    source.write_text(GOOD)
    prompting = load_prompting(Settings(task="generic", model="m"))
    cache = AnswerCache(tmp_path / "cache.sqlite")
    tried, wrong = 0, []
    for part in PARTS:
        for value in WRONG:
            message = {"content": "Sure. So the answer is yes."}
            body = {"choices": [{"message": message}], "usage": {"prompt_tokens": 1}}
            row = {"custom_id": "k", "response": {"status_code": 200, "body": body}, "error": None}
            inner = row
            *above, last = (int(p) if p == "0" else p for p in part.split())
            for name in above:
                inner = inner[name]
            inner[last] = value
            path.write_text(json.dumps(row) + "\n")
            tried += 1
            try:
                assert read_batch(prompting, source, cache, [str(path)])["results"] == 1
            except InputError as error:
                if f"{path}:1: " not in str(error):
                    wrong.append(f"{part} {value!r}: {error}")
            except Exception as error:
                wrong.append(f"{part} {value!r}: {error!r}")
    cache.close()
    record_fault(
        "results of a batch: a wrong value in each part", tried=tried, survived=tried - len(wrong)
    )
    assert not wrong, "\n".join(wrong)


def prepared(folder):
    """A small prepared dataset as `prepare` leaves it, but for the TFDS files' contents."""
    from stepdistill_jax.data import writing
    from stepdistill_jax.runtime.files import write_json
    from stepdistill_jax.runtime.fingerprints import sha256

    (folder / "source").mkdir()
    (folder / "source" / "test.jsonl").write_text(GOOD)
    reading = jsonl.read(folder / "source")
    made = folder / "data" / "mine"
    splits, fingerprint, _ = writing.write_rows(reading, made)
    (made / "1.0.0").mkdir()
    (made / "1.0.0" / "features.json").write_text("{}")
    described = writing.describe(reading) | {
        "name": "mine",
        "fingerprint": fingerprint,
        "splits": {split: counts.rows for split, counts in splits.items()},
        "labels": [],
        "notes": [],
        "vocabulary": {},
        "files": {
            p.relative_to(made).as_posix(): sha256(p) for p in made.rglob("*") if p.is_file()
        },
    }
    write_json(made / "dataset.json", described)
    return made, described


CHANGED = (
    ("fingerprint", 5), ("fingerprint", None), ("fingerprint", "0" * 64), ("metric", "accuracy"),
    ("metric", "value_match"), ("metric", None), ("metric", []), ("splits", {}), ("splits", []),
    ("splits", 3), ("splits", {"test": "one"}), ("splits", {"test": -1}), ("splits", {"test": 0}),
    ("splits", {"../../secret": 1}), ("splits", {"/etc/passwd": 1}), ("splits", {"a\0b": 1}),
    ("splits", {"test": 1, "train": 1}), ("splits", {"Test": 1}), ("labels", "yes"), ("labels", 1),
    ("labels", [1]), ("labels", None), ("reader", None), ("reader", {}), ("reader", []),
    ("format", 99), ("options", {"teacher": 3}), ("sources", {}), ("files", []), ("files", 3),
    ("files", {"../../x": "0"}), ("files", {"/etc/passwd": "0"}), ("files", {"test.jsonl": 3}),
)  # fmt: skip
TEXTS = {
    "empty": b"", "brace": b"{", "list": b"[]", "null": b"null", "text": b'"a"', "number": b"3",
    "html": b"<html>", "zeros": bytes(99), "utf-16": "{}".encode("utf-16"), "latin-1": b'{"\xe9"}',
    "nested": b"[" * 100_000, "digits": b"9" * 5000, "twice": b"{}{}", "object": b"{}",
}  # fmt: skip


def test_a_prepared_dataset(tmp_path, refused):
    made, described = prepared(tmp_path)
    open_prepared("mine", tmp_path / "data").check()

    def damaged(kind, says, look=lambda: open_prepared("mine", tmp_path / "data")):
        refused(kind, says, look)

    path = made / "dataset.json"
    whole = path.read_bytes()
    for name, value in CHANGED:
        path.write_text(json.dumps(described | {name: value}))
        damaged(f"{name}={value}", "dataset.json: damaged (")
    for name in ("fingerprint", "metric", "splits", "labels", "reader"):
        path.write_text(json.dumps({k: v for k, v in described.items() if k != name}))
        damaged(f"no {name}", "dataset.json: damaged (")
    for kind, content in TEXTS.items():
        path.write_bytes(content)
        damaged(kind, "dataset.json")
    path.write_bytes(whole)

    def check():
        open_prepared("mine", tmp_path / "data").check()

    edited = "changed since `prepare` wrote it; run `stepdistill prepare jsonl --source FILE --name mine`"
    for name in ("test.jsonl", "defects.jsonl", "1.0.0/features.json"):
        file, content = made / name, (made / name).read_bytes()
        for kind, other in (("edited", content + b"\n"), ("empty", b"x"), ("random", b"\x80")):
            file.write_bytes(other)
            damaged(f"{name} {kind}", f"{name}: {edited}", check)
        file.unlink()
        damaged(f"{name} gone", name, check)
        os.mkfifo(file)
        damaged(f"{name} is a pipe", "is a pipe or device", check)
        file.unlink()
        file.write_bytes(content)
    (made / "test.jsonl").write_bytes(GOOD.replace("yes", "no").encode())
    dataset = open_prepared("mine", tmp_path / "data")
    damaged("a label edited", edited, lambda: dataset.file("test"))
    for name in ("../mine", "/etc", "", ".", "mine/", "Mine", "a\0b", "x" * 300):
        damaged(f"{name[:9]!r}", "is not prepared", lambda n=name: open_prepared(n, tmp_path))
    refused.told("prepared datasets: dataset.json, rows, TFDS files")


def sentencepiece(**special):
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the truck takes the narrow bridge"] * 50),
        model_writer=made,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **special,
    )
    return made.getvalue()


def test_vocabularies(tmp_path, capfd, refused):
    good = sentencepiece(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    ids = "pad and eos ids must be 0 and 1"
    kinds = {
        "empty": (b"", "not a SentencePiece model"),
        "cut": (good[: len(good) // 2], "not a SentencePiece model"),
        "a byte more": (good + b"\xff", "not a SentencePiece model"),
        "random": (random.Random(0).randbytes(5000), "not a SentencePiece model"),
        "zeros": (bytes(5000), "not a SentencePiece model"),
        "html": (b"<!DOCTYPE html><html>404</html>", "not a SentencePiece model"),
        "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "not a SentencePiece model"),
        "json": (b'{"model": {"type": "Unigram"}}', "not a SentencePiece model"),
        "gzip": (gzip.compress(good), "not a SentencePiece model"),
        "no pad": (sentencepiece(pad_id=-1, unk_id=0, eos_id=1, bos_id=-1), ids),
        "no end": (sentencepiece(pad_id=0, eos_id=-1, unk_id=2, bos_id=-1), ids),
        "default ids": (sentencepiece(), ids),
    }
    path = tmp_path / "spiece.model"
    for kind, (content, says) in kinds.items():
        path.write_bytes(content)
        refused(kind, f"{path}: {says}", lambda: load_vocabulary(path))
    with open(path, "wb") as f:
        f.truncate(MAX_BYTES + 1)  # a hole
    refused("huge", "not a SentencePiece model (more than", lambda: load_vocabulary(path))
    path.unlink()
    refused("missing", "no such vocabulary", lambda: load_vocabulary(path))
    os.mkfifo(path)
    refused("pipe", "is a pipe or device", lambda: load_vocabulary(path))
    path.unlink()
    path.mkdir()
    refused("folder", "got a folder", lambda: load_vocabulary(path))
    path.rmdir()
    refused.told("SentencePiece files")
    assert capfd.readouterr().err == ""  # the library says nothing of its own
    path.write_bytes(good)
    assert load_vocabulary(path).size > 10


def test_a_line_of_100_megabytes_takes_the_memory_of_its_limit(tmp_path, record_fault):
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as f:
        f.write(GOOD.encode() + b"{")
        f.truncate(100_000_000)  # a hole: zeros without a line's end
        f.seek(0, os.SEEK_END)
        f.write(b"\n" + GOOD.encode())
    tracemalloc.start()
    start = time.monotonic()
    found = list(json_lines(path))  # as `predict --on-error skip` reads it
    seconds, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    fine = peak < 4 * MAX_LINE_BYTES and [number for number, _ in found] == [1, 2, 3]
    fine = fine and "2: a line of more than 16 MiB" in str(found[1][1])
    seen = f"peak {peak / 2**20:.0f} MiB, {seconds:.1f} s"
    record_fault("a line of 100 MB, passed over", tried=1, survived=int(fine), seen=seen)
    assert fine, (seen, found)


LOOKS_BAD = {
    "byte order mark": (b"\xef\xbb\xbf" + GOOD.encode(), 1),
    "CRLF": (GOOD.replace("\n", "\r\n").encode(), 1),
    "no last line end": (GOOD.strip().encode(), 1),
    "blank lines": (b"\n\n" + GOOD.encode() + b"\r\n \n", 1),
    "NUL as an escape": (GOOD.replace("wet", "\\u0000").encode(), 1),
    "a line separator in a text": (GOOD.replace("wet", "\u2028\x85").encode(), 1),
    "NaN in an unknown field": (GOOD.replace('"id"', '"x": NaN, "id"').encode(), 1),
    "surrogate in an unknown name": (GOOD.replace('"id"', '"\\ud800": 1, "id"').encode(), 1),
    "nulls": (GOOD.replace('"id"', '"weight": null, "choices": null, "id"').encode(), 1),
    "choices twice": (GOOD.replace('"id"', '"choices": ["yes", "yes"], "id"').encode(), 1),
    "a label of 100,000 letters": (GOOD.replace("yes", "y" * 100_000).encode(), 1),
}


def test_what_only_looks_bad_is_read_and_its_notes_can_be_written(tmp_path):
    from stepdistill_jax.data.writing import write_rows

    for kind, (content, rows) in LOOKS_BAD.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "test.jsonl").write_bytes(content)
        reading = jsonl.read(folder)
        splits, *_ = write_rows(reading, folder / "made")
        assert splits["test"].rows == rows, kind
        assert "\n".join(reading.notes).encode()


N = 200_000  # characters; what takes the square of it takes hours
ENDLESS = {
    "open parentheses": "The answer is (" + "(" * N,
    "empty lines": "\n" * N,
    "blanks": "x" + " " * N,
    "equations": "1 = 2 " * (N // 6) + "The answer is (1).",
    "one sum": "1 + " * (N // 4) + "The answer is (1).",
    "markers": "So the answer is " * (N // 17),
    "questions": "Q:" * (N // 2),
}


def test_a_teachers_text_is_read_in_bounded_time(record_fault):
    def seconds(text):
        start = time.process_time()
        parse_choice(text, ("a", "b"))
        parse_equation(text)
        parse_esnli(text)
        parse_anli(text)
        _parse_free(text)
        return time.process_time() - start

    took = {kind: seconds(text) for kind, text in ENDLESS.items()}
    slow = [kind for kind, value in took.items() if value > 10]
    seen = f"at most {max(took.values()):.1f} s for {N:,} characters"
    record_fault(
        "teacher texts that look endless",
        tried=len(took),
        survived=len(took) - len(slow),
        seen=seen,
    )
    assert not slow, took


def test_letters_that_fold_to_others_are_no_letters_of_a_choice():
    for letter in "\u017f\u0131\u212a":  # long s, dotless i, Kelvin
        parsed = parse_choice(f"It is. So the answer is ({letter}) pond.", ("zoo", "pond"))
        assert "no_letter" in parsed.problems and parsed.rationale == "It is."


def test_more_characters_than_pieces_leave_the_rare_ones_unknown(tmp_path):
    text = "the truck takes the bridge " * 50 + "".join(chr(0x4E00 + i) for i in range(1000))
    train_vocabulary(
        [text[i : i + 50] for i in range(0, len(text), 50)], tmp_path / "m", vocab_size=300
    )
    vocabulary = load_vocabulary(tmp_path / "m")
    assert vocabulary.decode(vocabulary.encode("the truck")) == "the truck"
