"""`--num-beams` and `--length-penalty` of `predict` and `evaluate`, and their Python arguments."""

import json

import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.decoding.beam import search
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import DecodeOptions, LabelDecoder, evaluate, load_model, predict
from stepdistill_jax.inference.evaluate import evaluate_tokens


def run(capsys, *arguments):
    """(exit code, stdout lines, stderr)."""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, questions, lay_out):
    rows = [{"id": str(i), **q} for i, q in enumerate(questions[:60])]
    return lay_out(tmp_path_factory.mktemp("data"), rows)


@pytest.mark.slow
def test_predict_writes_the_answers_of_a_beam_search(
    model_dir, questions, write_rows, read_rows_of, tmp_path, capsys
):
    source, out = write_rows(questions[:40]), tmp_path / "o.jsonl"
    flags = "--num-beams 4 --length-penalty 0.6 --batch-size 40"
    assert run(capsys, "predict", model_dir, source, out, *flags.split())[0] == 0
    rows = read_rows_of(out)
    model = load_model(model_dir)
    ids = [[*model.vocabulary.encode("predict: " + q["input"])[:39], 1] for q in questions[:40]]
    want, plain = (
        LabelDecoder(model.config, max_decode_len=8, batch_size=40, decode_fn=decode_fn)(
            model.params, ids
        )
        for decode_fn in (search(4, 0.6), search(1))
    )
    labels = list(map(model.vocabulary.decode, want.ids))
    assert [row["label"] for row in rows] == labels
    assert [row["score"] for row in rows] == pytest.approx(want.scores.tolist(), abs=1.1e-5)
    assert labels != list(map(model.vocabulary.decode, plain.ids)), "the test needs a difference"


@pytest.mark.slow
def test_evaluate_says_how_it_searched_and_keeps_the_answers_apart(
    workdir, model_dir, data_dir, tmp_path, capsys
):
    flags = ("--task", "roads", "--data-dir", data_dir, "--json")
    for more in ((), ("--num-beams", "3"), ("--num-beams", "3", "--length-penalty", "0.0")):
        code, out, err = run(capsys, "evaluate", workdir, *flags, *more)
        assert code == 0, err
        result = json.loads(out[-1])
        assert result["num_beams"] == (3 if more else 1)
        assert result["length_penalty"] == (0.0 if len(more) > 2 else None)
    names = ["roads-test-3", "roads-test-3-beams3", "roads-test-3-beams3-penalty0.0"]
    kept = [(workdir / "predictions" / f"{name}.jsonl").read_bytes() for name in names]
    assert len(set(kept)) == 3
    source = data_dir / "roads" / "test.jsonl"
    predict(model_dir, source, tmp_path / "o.jsonl", num_beams=3)
    assert (tmp_path / "o.jsonl").read_bytes() == kept[1]


def test_tokens_are_searched_like_texts(model_dir, data_dir):
    rows = [json.loads(line) for line in (data_dir / "roads" / "test.jsonl").open()]
    vocabulary = load_model(model_dir).vocabulary
    options = {"num_beams": 3, "length_penalty": 0.0}
    result = evaluate_tokens(
        model_dir,
        [[*vocabulary.encode("predict: " + row["input"]), 1] for row in rows],
        [row["label"] for row in rows],
        metric="text_match",
        options=DecodeOptions(**options),
    )
    want = evaluate(model_dir, task="roads", data_dir=data_dir, **options)
    plain = evaluate(model_dir, task="roads", data_dir=data_dir)
    for name in set(result) - {"rows_per_second"}:
        assert result[name] == want[name], name
    assert result["unfinished"] != plain["unfinished"], "the test needs a difference"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 2, "length_penalty": 0.5}],
    ids=["beams", "length penalty"],
)
def test_a_partial_output_of_another_search_is_not_continued(
    model_dir, questions, write_rows, tmp_path, small_windows, options
):
    source, out = write_rows(questions[:30]), tmp_path / "out.jsonl"
    windows = small_windows(20, stop_in=2)
    with pytest.raises(KeyboardInterrupt):
        predict(model_dir, source, out, num_beams=2)
    predict(model_dir, source, out, **options)
    assert windows[2:] == [20, 10], "from the beginning"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-beams 0", "--num-beams must be a whole number of at least 1, not 0"),
        (
            "--num-beams 2 --length-penalty nan",
            "--length-penalty must be a number of at least -10 and at most 10, not nan",
        ),
        ("--length-penalty 0.6", "--length-penalty: it has no effect with a single beam"),
        (
            "--num-beams 1 --length-penalty 1",
            "--length-penalty: it has no effect with a single beam",
        ),
    ],
)
def test_bad_values_are_one_line_and_exit_2(workdir, write_rows, tmp_path, capsys, flags, message):
    source, out = write_rows([{"input": "a"}]), tmp_path / "o.jsonl"
    for command in (
        ("predict", workdir, source, out),
        # said before the task is looked for
        ("evaluate", workdir, "--task", "none", "--data-dir", tmp_path),
    ):
        code, lines, err = run(capsys, *command, *flags.split())
        assert code == 2 and lines == [] and err.count("\n") == 1
        assert err.startswith(f"stepdistill: error: {message}")
    assert not out.exists()


@pytest.mark.parametrize("flags", ["--num-beams two", "--num-beams 2.5", "--length-penalty long"])
def test_values_that_are_no_numbers_are_one_line_and_exit_2(workdir, write_rows, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(workdir), str(write_rows([{"input": "a"}])), "o", *flags.split()])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and flags.split()[0] in err


def test_python_refuses_what_the_command_refuses(model_dir, data_dir, write_rows, tmp_path):
    source = write_rows([{"input": "a"}])
    for call in (
        lambda: predict(model_dir, source, tmp_path / "o", length_penalty=0.5),
        lambda: evaluate(model_dir, task="roads", data_dir=data_dir, length_penalty=0.5),
        lambda: DecodeOptions(length_penalty=0.5),
    ):
        with pytest.raises(InputError, match="`num_beams=2` or more"):
            call()
