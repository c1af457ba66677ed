"""`stepdistill_jax.load`: the answers that `predict` writes, from Python and from several threads."""

import importlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import stepdistill_jax
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import DecodeOptions, Predictor, engines, predict

OPTIONS = DecodeOptions(batch_size=2)


@pytest.fixture(scope="module")
def engine(model_dir):
    """One for all, on one device: it keeps what it has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "device_mesh", lambda _: None)
        return engines.open_engine(model_dir, OPTIONS)


@pytest.fixture
def predicted(engine, model_dir, write_rows, read_rows_of, tmp_path, monkeypatch):
    """What `predict` writes of rows, asked of the same engine."""
    module = importlib.import_module("stepdistill_jax.inference.predict")
    monkeypatch.setattr(module, "open_engine", lambda *_: engine)

    def of(rows, **options):
        predict(model_dir, write_rows(rows), tmp_path / "out.jsonl", **options)
        return read_rows_of(tmp_path / "out.jsonl")

    return of


def test_labels_and_rationales_are_those_that_predict_writes(engine, predicted, questions):
    """Texts and objects, in one call; more rows than a window has."""
    rows = [*questions[:5], {"input": "Ünïcode \U0001f600\nof two lines", "id": 7}]
    want = predicted(rows, with_rationale=True)
    assert "id" not in rows[0]  # a text will do
    found = Predictor(engine, OPTIONS).predict([rows[0]["input"], *rows[1:]], with_rationale=True)
    assert [list(row) for row in found] == [["id", "label", "score", "rationale"]] * len(rows)
    assert found == want
    assert len({row["rationale"] for row in found}) > 2
    assert Predictor(engine, OPTIONS).predict([]) == []


def test_a_long_list_is_answered_in_its_order(engine, questions, monkeypatch):
    module = importlib.import_module("stepdistill_jax.inference.predictor")
    model, texts = Predictor(engine, OPTIONS), [row["input"] for row in questions[:4]]
    want = model.predict(texts)
    monkeypatch.setattr(module, "window_rows", lambda *_: 2)
    found = model.predict(texts)
    assert [row["id"] for row in found] == ["1", "2", "3", "4"]
    assert [row["label"] for row in found] == [row["label"] for row in want]


def test_choices_are_scored_as_predict_scores_them(engine, predicted, questions):
    three = ["yes", "no", "fast"]
    rows = [{"input": row["input"], "choices": three} for row in questions[:2]]
    want = predicted(rows, choices="row", choices_temperature=2.0)
    model = Predictor(engine, OPTIONS)
    assert model.predict(rows, choices="row", choices_temperature=2.0) == want
    texts = [row["input"] for row in rows]
    assert model.predict(texts, choices=three, choices_temperature=2.0) == want
    with pytest.raises(InputError, match="row 2: the field 'choices' is missing"):
        model.predict([rows[0], "no choices here"], choices="row")


def test_threads_take_turns_and_nothing_is_compiled_twice(engine, questions, compiled, monkeypatch):
    model, texts = Predictor(engine, OPTIONS), [row["input"] for row in questions[:2]]
    want = model.predict(texts)
    compiled.clear()
    decode, busy = engine.decode, threading.Lock()

    def alone(*args):
        assert busy.acquire(blocking=False), "another thread is at it"
        time.sleep(0.002)
        try:
            return decode(*args)
        finally:
            busy.release()

    monkeypatch.setattr(engine, "decode", alone)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: model.predict(texts), range(16)))
    assert found == [want] * 16
    assert compiled == []


def test_a_workdir_is_opened_at_its_best_step_or_another(workdir):
    model = stepdistill_jax.load(workdir)
    assert (model.path, model.step, model.labels) == (workdir, 3, ("smooth", "trouble"))
    assert stepdistill_jax.load(workdir, step="last").step == 5


@pytest.mark.parametrize(
    ("rows", "options", "part"),
    [
        ("a text", {}, "`rows`: expected a list of rows, but got a single row"),
        ({"input": "a"}, {}, "`rows`: expected a list of rows, but got a single row"),
        (["a", 3], {}, "row 2: expected a string or a dict, but got int"),
        (["a", {"question": "b"}], {}, "row 2: no field 'input' (found: question)"),
        ([{"input": 1.5}], {}, "row 1: the field 'input' must be text"),
        (["a"], {"choices": ["yes"]}, "`choices`: expected at least two labels, got 1"),
        (
            ["a"],
            {"choices_temperature": 2},
            "`choices_temperature`: this option has an effect only with `choices`",
        ),
    ],
)
def test_what_cannot_be_asked_is_one_line(rows, options, part, engine):
    with pytest.raises(InputError) as caught:
        Predictor(engine, OPTIONS).predict(rows, **options)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_model_or_option_is_refused(tmp_path, model_dir):
    with pytest.raises(InputError, match="no such folder"):
        stepdistill_jax.load(tmp_path / "nothing")
    with pytest.raises(
        TypeError, match=r"load\(\) got an unexpected keyword argument 'bach_size'.*batch"
    ):
        stepdistill_jax.load(model_dir, bach_size=2)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = stepdistill_jax.laod


def test_the_package_itself_imports_nothing_until_it_is_used():
    code = "import sys; before = set(sys.modules); import stepdistill_jax"
    code += "; print(*sorted(set(sys.modules) - before), *dir(stepdistill_jax))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    module, *names = out.stdout.split()
    assert module == "stepdistill_jax"
    assert {"load", "curves", "plot_curves", "__version__"} <= set(names)
    assert not any("." in name for name in names)
