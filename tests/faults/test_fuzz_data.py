"""Valid files of the data side, mutated: each is read, or refused in one line; nothing else is raised."""

import contextlib
import json
import pathlib
import sqlite3

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepdistill_jax.data.corpora import anli, cqa, esnli, jsonl, svamp
from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.data.writing import describe, write_rows
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.input_rows import read_questions
from stepdistill_jax.teacher.batch import read_batch
from stepdistill_jax.teacher.cache import AnswerCache
from stepdistill_jax.teacher.prompting import Estimate, load_prompting, unanswered
from stepdistill_jax.teacher.questions import check_questions
from stepdistill_jax.teacher.settings import Settings

DATA = pathlib.Path(__file__).parents[1] / "bad_inputs" / "data"
FEW, MANY = 25, 2000  # inputs of a family

TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "\ud800", "\0", "\u0131", "(\u017f)", "So the answer is (b) x", "1 / 0"]),
)
NUMBERS = st.sampled_from(
    [0, -1, 10**30, 10**400, 1e39, 1e-50, float("nan"), float("inf"), -0.0, True, 1.5]
)
JSON = st.recursive(
    st.one_of(st.none(), TEXT, NUMBERS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
ROW = {
    "id": "two", "input": "is it dry ?", "label": "no", "rationale": "no rain .", "llm_label": "no",
    "weight": 2, "choices": ["yes", "no"], "rationales": [{"text": "a", "source": "m", "label": "no"}],
}  # fmt: skip
MARKED = "Ducks like water. So the answer is "
TEACHER = "Ducks like water. So the answer is (b) pond. The answer is (1 + 2). Answer: neutral"


def places(value, path=()):
    """Of every part of a JSON value, itself included."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for name, part in inner:
        yield from places(part, (*path, name))


def changed(value, path, new):
    """A copy of a JSON value with another part at `path`."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def structural(value):
    """Bytes of a JSON value of which one part is arbitrary JSON."""
    # allow_nan and ensure_ascii write what Python does: NaN, and halves of surrogate pairs
    new = st.tuples(st.sampled_from(list(places(value))), JSON)
    return new.map(lambda n: json.dumps(changed(value, *n)).encode())


@st.composite
def bytewise(draw, content):
    """`content` with a few bytes replaced, left out, doubled, or all cut behind a place."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        new = draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"\n", b'"', b"\\", b"\0"])))
        kind = draw(st.sampled_from(["replace", "drop", "double", "cut"]))
        rest = {"cut": b"", "double": content[at:]}.get(kind, content[at + 1 :])
        content = content[:at] + (new if kind != "drop" else b"") + rest
    return content


def mutated(value):
    whole = json.dumps(value).encode()
    return st.one_of(structural(value), bytewise(whole))


@pytest.fixture(params=[FEW, pytest.param(MANY, marks=pytest.mark.faults)], ids=["few", "many"])
def fuzz(request, tmp_path, record_fault):
    """`fuzz(family, strategy, read)`: `read` works, or raises an InputError that names a file."""

    def run(family, strategy, read):
        tried, worked, wrong = 0, 0, []

        @settings(
            max_examples=request.param, database=None, derandomize=True, deadline=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def each(content):
            nonlocal tried, worked
            tried += 1
            try:
                read(content)
                worked += 1
            except InputError as error:
                if str(tmp_path) not in str(error):
                    wrong.append((content, error))
            except Exception as error:  # not raised: the others are to be tried, too
                wrong.append((content, error))

        each()
        seen = f"{worked} were read, {tried - worked - len(wrong)} refused"
        record_fault(f"mutated: {family}", tried=tried, survived=tried - len(wrong), seen=seen)
        assert not wrong, "\n".join(f"{c!r}: {e!r}" for c, e in wrong[:5])

    return run


def test_json_lines(fuzz, tmp_path):
    good = json.dumps({"input": "is it wet ?", "label": "yes"}).encode() + b"\n"
    prompting = load_prompting(Settings(task="generic", model="m"))
    count = 0

    def read(content):
        nonlocal count
        count += 1
        path = tmp_path / "test.jsonl"
        path.write_bytes(good + content)
        list(read_questions(path))  # of `predict`: bad ones are told, not raised
        with contextlib.suppress(InputError):
            list(
                unanswered(
                    prompting, check_questions(path, (), label_given=False), None, Estimate()
                )
            )
        write_rows(jsonl.read(tmp_path), tmp_path / "made")

    fuzz("JSON lines, by prepare, predict and annotate", mutated(ROW), read)
    assert count


def test_csv(fuzz, tmp_path):
    good = b'id,input,label,weight\n1,"is it ""wet"" ?",yes,2\n\n2,"a\nb",no,\n'

    def read(content):
        path = tmp_path / "test.csv"
        path.write_bytes(content)
        write_rows(jsonl.read(tmp_path), tmp_path / "made")

    fuzz("CSV, by prepare", bytewise(good), read)


ORIGINALS = {"cqa": cqa, "svamp": svamp, "esnli": esnli, "anli": anli}


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_papers_layout(fuzz, tmp_path, name):
    (rows,) = (DATA / "good" / name).glob("*.json")
    row = json.loads(rows.read_text().splitlines()[0])
    texts = [TEACHER]

    def read(pair):
        content, said = pair
        (tmp_path / "llm").mkdir(exist_ok=True)
        (tmp_path / rows.name).write_bytes(content)
        (tmp_path / "llm" / "train_CoT_0.json").write_bytes(said)
        write_rows(ORIGINALS[name].read(tmp_path), tmp_path / "made")

    whole = st.just(json.dumps(row).encode()), st.just(json.dumps(texts).encode())
    said = st.lists(TEXT, min_size=1, max_size=5).map("".join)
    pairs = st.one_of(
        st.tuples(mutated(row), whole[1]),
        st.tuples(whole[0], mutated(texts)),
        st.tuples(whole[0], said.map(lambda s: json.dumps([MARKED + s]).encode())),
    )
    fuzz(f"rows and teacher texts of {name}", pairs, read)


def test_results_of_a_batch(fuzz, tmp_path):
    source, results = tmp_path / "in.jsonl", tmp_path / "results.jsonl"
    source.write_text('{"input": "is it wet ?"}\n')
    prompting = load_prompting(Settings(task="generic", model="m"))
    (key,) = prompting.keys(prompting.prompt(next(check_questions(source, (), label_given=False))))
    message = {"content": "Sure. So the answer is yes."}
    body = {
        "choices": [{"message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1},
    }
    row = {"custom_id": key, "response": {"status_code": 200, "body": body}, "error": None}
    cache = AnswerCache(tmp_path / "cache.sqlite")

    def read(content):
        results.write_bytes(content)
        read_batch(prompting, source, cache, [str(results)])

    fuzz("results of a batch", mutated(row), read)
    cache.close()


def test_a_cache_file(fuzz, tmp_path):
    path = tmp_path / "cache.sqlite"
    with sqlite3.connect(tmp_path / "made.sqlite") as db:
        db.execute(
            "CREATE TABLE answers (key TEXT PRIMARY KEY, model TEXT, time TEXT, text TEXT,"
            " finish_reason TEXT, prompt_tokens INTEGER, completion_tokens INTEGER,"
            " parameters TEXT) WITHOUT ROWID"
        )
        row = ("m", "t", "a text", "stop", 1, 1, "{}")
        db.executemany("INSERT INTO answers VALUES (?,?,?,?,?,?,?,?)", [("k", *row), ("l", *row)])
    db.close()

    def read(content):
        for old in tmp_path.glob("cache.sqlite*"):
            old.unlink()
        path.write_bytes(content)
        cache = AnswerCache(path)
        try:
            assert cache.get("k") is None or isinstance(cache.get("k").text, str)
        finally:
            cache.close()

    fuzz("a teacher's cache", bytewise((tmp_path / "made.sqlite").read_bytes()), read)


def test_a_description_of_a_dataset(fuzz, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    made = tmp_path / "data" / "mine"
    reading = jsonl.read(tmp_path)
    _, fingerprint, _ = write_rows(reading, made)
    (made / "1.0.0").mkdir()
    about = {"fingerprint": fingerprint, "splits": {"test": 1}, "labels": ["no"], "files": {}}

    def read(content):
        (made / "dataset.json").write_bytes(content)
        open_prepared("mine", tmp_path / "data").file("test")

    fuzz("dataset.json", mutated(about | describe(reading)), read)


def test_a_vocabulary(fuzz, tmp_path, delivery_data_dir):
    from stepdistill_jax.data.vocabulary import load_vocabulary

    path = tmp_path / "spiece.model"

    def read(content):
        path.write_bytes(content)
        vocabulary = load_vocabulary(path)
        vocabulary.decode(vocabulary.encode("with rain in the forecast , \u0131 \0"))

    content = (delivery_data_dir / "delivery" / "spiece.model").read_bytes()
    fuzz("a SentencePiece file", bytewise(content), read)


def test_a_token_stores_manifest(fuzz, tmp_path, capfd):
    from stepdistill_jax.tasks.token_store import TokenExample, open_store, write_store

    made = write_store(tmp_path / "s", ["label"], [TokenExample([([5, 1], [6, 1])])], {"task": "t"})
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())

    def read(content):
        (tmp_path / "s" / "manifest.json").write_bytes(content)
        found = open_store(tmp_path / "s")
        if found is None:  # it is tokenised anew
            raise InputError(f"{tmp_path}: {capfd.readouterr().err}")
        assert found.fingerprint == made.fingerprint and found.about.get("source") is None

    fuzz("a token store's manifest", mutated(manifest), read)


@pytest.mark.faults
def test_any_text_can_be_prepared(tmp_path, record_fault):
    """Whole preparations, vocabulary and TFDS files with them, of rows of arbitrary text."""
    from stepdistill_jax.data.prepare import prepare

    tried, refused, wrong = 0, 0, []
    wide = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
    texts = st.lists(st.tuples(wide, wide, st.text(max_size=20)), min_size=1, max_size=30)

    @settings(
        max_examples=150, database=None, derandomize=True, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(texts)
    def each(rows):
        nonlocal tried, refused
        tried += 1
        names = ("input", "label", "rationale")
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows))
        try:
            prepare("jsonl", source=path, new_name="mine", data_dir=tmp_path / "data")
        except InputError:
            refused += 1
        except Exception as error:
            wrong.append((rows, error))

    each()
    seen = f"{refused} refused, most for a blank input or label"
    record_fault(
        "arbitrary text, prepared whole", tried=tried, survived=tried - len(wrong), seen=seen
    )
    assert not wrong, "\n".join(f"{r!r}: {e!r}" for r, e in wrong[:3])
