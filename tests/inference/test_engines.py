"""`predict` by CTranslate2: the rows of our own decoder, the same contract, and what it refuses."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.vocabulary import EOS_ID
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.ctranslate2 import write_ctranslate2
from stepdistill_jax.inference import DecodeOptions, engines, evaluate, export, predict
from stepdistill_jax.inference.engines import open_engine, usable_cores
from stepdistill_jax.inference.evaluate import evaluate_tokens

ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")

# nats, of one token of the tiny model, whose rows have 16 to 48 weights (measured 0.11). It depends on
# the weights alone, since every processor computes the same integers
INT8_ERROR = 0.25


@pytest.fixture(scope="module")
def converted(tmp_path_factory, model_dir):
    """Quantization -> its directory, made from the model directory."""
    folder = tmp_path_factory.mktemp("converted")
    for quantization in ("float32", "int8"):
        result = export(
            model_dir, folder / quantization, format="ctranslate2", quantization=quantization
        )
        assert result["files"] == [
            "README.md",
            "config.json",
            "model.bin",
            "shared_vocabulary.json",
            "spiece.model",
            "stepdistill.json",
        ]
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory, questions):
    path = tmp_path_factory.mktemp("source") / "in.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in questions[:150]))
    return path


@pytest.fixture(scope="module")
def of_jax(model_dir, source, tmp_path_factory):
    """(summary, rows) of our own decoder, with rationales."""
    out = tmp_path_factory.mktemp("jax") / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:  # for one device it compiles in half the time
        patch.setattr(engines, "device_mesh", lambda _: None)
        summary = predict(model_dir, source, out, batch_size=150, with_rationale=True)
    return summary, [json.loads(line) for line in out.read_text().splitlines()]


def test_labels_rationales_and_counts_are_those_of_the_jax_engine(
    converted, source, of_jax, read_rows_of, tmp_path
):
    summary = predict(converted["float32"], source, tmp_path / "out.jsonl", with_rationale=True)
    rows = read_rows_of(tmp_path / "out.jsonl")
    for row, want in zip(rows, of_jax[1], strict=True):
        assert list(row) == ["id", "label", "score", "rationale"]
        assert row["score"] == pytest.approx(want["score"], abs=1e-4)  # measured 5e-6 at -15
        assert row["score"] == round(row["score"], 6) <= 0
        assert row | {"score": 0} == want | {"score": 0}
    assert len({row["label"] for row in rows}) > 10
    for name in set(summary) - {"rows_per_second"}:
        assert summary[name] == of_jax[0][name]
    assert 0 < summary["unfinished"] < 150 and summary["cut_inputs"] > 0
    assert summary["rows_per_second"] > 0


@pytest.fixture(scope="module")
def asked(converted, questions):
    """60 rows of ids, each with its end of sequence."""
    encode = open_engine(converted["float32"]).vocabulary.encode
    return [[*encode(f"predict: {row['input']}"), EOS_ID] for row in questions[:60]]


# [[log probability of each token of an answer] for each pair of input and answer], as JSON; by itself,
# since CTranslate2 chooses its kernels once in a process
SCORE = """
import json, sys, ctranslate2
folder, inputs, answers = json.load(sys.stdin)
translator = ctranslate2.Translator(folder, device="cpu", intra_threads=1)
scored = translator.score_batch(inputs, answers, max_input_length=0)
print(json.dumps([one.log_probs for one in scored]))
"""


def token_log_probs(folder, rows, answers, **variables):
    """A flat array: each token of each answer in turn; the end of sequence is a token."""
    names = open_engine(folder)._names
    texts = [
        [[names[i] for i in ids if i != EOS_ID] + [names[EOS_ID]] * ends for ids in of_all]
        for of_all, ends in ((rows, True), (answers, False))
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCORE],
        env=os.environ | variables, input=json.dumps([str(folder), *texts]),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scored = json.loads(done.stdout)
    return [np.array(x[: len(ids)]) for x, ids in zip(scored, answers, strict=True)]


def test_int8_answers_alike_and_is_smaller(converted, asked):
    """Answers of random weights are near ties: int8 keeps a token whose margin is above its error."""
    answers = {x: open_engine(path).decode(asked, 8).ids for x, path in converted.items()}
    by_whole, by_small = (
        [token_log_probs(path, asked, ids) for ids in answers.values()]
        for path in (converted["float32"], converted["int8"])
    )
    gaps = [np.concatenate(a) - np.concatenate(b) for a, b in zip(by_whole, by_small, strict=True)]
    assert 0 < np.abs(np.concatenate(gaps)).max() < INT8_ERROR
    seen = dict(zip(answers, by_whole, strict=True))
    same = 0
    for row, (own, other) in enumerate(zip(answers["float32"], answers["int8"], strict=True)):
        where = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), None)
        same += where != 0
        if where is not None:
            margin = seen["float32"][row][where] - seen["int8"][row][where]
            assert 0 <= margin < 2 * INT8_ERROR
    assert same > 30  # a converter that mixes up its matrices has errors and margins of nats
    sizes = {name: (path / "model.bin").stat().st_size for name, path in converted.items()}
    assert sizes["int8"] < 0.4 * sizes["float32"]


def test_int8_scores_are_the_same_on_processors_without_vnni(converted, asked):
    """These add two products in 16 bits: a sum that did not fit there moved scores by 2 nats."""
    answers = [[5, 9, EOS_ID]] * len(asked)
    without = {"CT2_USE_MKL": "0", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    whole, here, there = (
        np.concatenate(token_log_probs(converted[x], asked, answers, **variables))
        for x, variables in (("float32", {}), ("int8", {}), ("int8", without))
    )
    assert np.abs(here - there).mean() < 0.2 * np.abs(here - whole).mean()


def test_a_stopped_run_goes_on_and_other_weights_begin_anew(
    converted, source, small_windows, tmp_path, capsys
):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    predict(converted["float32"], source, whole)
    windows = small_windows(60, stop_in=2)
    with pytest.raises(KeyboardInterrupt):
        predict(converted["float32"], source, out)
    predict(converted["float32"], source, out, batch_size=7)
    assert windows == [60, 60, 60, 30]
    assert "60 rows that are done" in capsys.readouterr().err
    before, after = ([json.loads(x) for x in p.read_text().splitlines()] for p in (whole, out))
    for row, want in zip(after, before, strict=True):
        assert row["score"] == pytest.approx(want["score"], abs=1e-5)
        assert row["label"] == want["label"]
    windows = small_windows(60, stop_in=2)
    with pytest.raises(KeyboardInterrupt):
        predict(converted["float32"], source, out)
    predict(converted["int8"], source, out)
    assert windows == [60, 60, 60, 60, 30]
    assert "60 rows that are done" not in capsys.readouterr().err


def test_rows_of_another_config_are_not_continued(converted, source, small_windows, tmp_path):
    shutil.copytree(converted["float32"], tmp_path / "model")
    windows = small_windows(60, stop_in=2)
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "model", source, tmp_path / "out.jsonl")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_norm_epsilon": 1e-3}))
    predict(tmp_path / "model", source, tmp_path / "out.jsonl")
    assert windows[2:] == [60, 60, 30]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_rows_and_every_batch_size_give_the_same_answers(converted, count):
    rng = np.random.default_rng(count)
    rows = [[*rng.integers(3, 90, n).tolist(), 1] for n in rng.integers(1, 40, count)]
    whole = open_engine(converted["float32"]).decode(rows, 5)
    assert [len(ids) for ids in whole.ids] == [
        5 if not end else ids.index(1) + 1
        for ids, end in zip(whole.ids, whole.finished, strict=True)
    ]
    for batch_size in (1, 3):
        engine, done = open_engine(converted["float32"], DecodeOptions(batch_size=batch_size)), []
        assert engine.batch_size == -(-batch_size // usable_cores()) * usable_cores()
        decoded = engine.decode(rows, 5, done.append)
        assert decoded.ids == whole.ids and sum(done) == count
        np.testing.assert_allclose(decoded.scores, whole.scores, atol=1e-5)


@pytest.mark.parametrize("length_penalty", [None, 0.0, 2.0])
def test_a_score_of_beams_is_the_plain_probability(converted, length_penalty):
    """CTranslate2's own score is divided by length ** penalty; its `score_batch` is not."""
    rng = np.random.default_rng(0)
    rows = [[*rng.integers(3, 90, n).tolist(), 1] for n in rng.integers(1, 40, 20)]
    engine = open_engine(
        converted["float32"], DecodeOptions(num_beams=3, length_penalty=length_penalty)
    )
    decoded = engine.decode(rows, 8)
    names = engine._names
    ended = [i for i in range(20) if decoded.finished[i]]
    assert ended
    scored = engine._translator.score_batch(
        [[names[i] for i in rows[row]] for row in ended],
        [[names[i] for i in decoded.ids[row][:-1]] for row in ended],
    )
    want = [sum(one.log_probs) for one in scored]
    np.testing.assert_allclose(decoded.scores[ended], want, atol=2e-5)


def test_inputs_of_more_than_1024_tokens_are_read_whole(converted):
    engine = open_engine(converted["float32"])
    rng = np.random.default_rng(0)
    start = rng.integers(3, 90, 1100).tolist()
    one, other = engine.decode([[*start, 7, 8, 9, 1], [*start, 20, 30, 40, 1]], 4).scores
    assert abs(one - other) > 1e-4


def test_evaluate_says_what_predict_says(
    converted, source, tmp_path, capsys, lay_out, read_rows_of
):
    folder = lay_out(tmp_path / "data", read_rows_of(source))
    data = ["--task", "roads", "--data-dir", str(folder), "--json"]
    command = ["evaluate", str(converted["int8"]), "--engine", "ctranslate2", *data]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    want = predict(converted["int8"], source, tmp_path / "out.jsonl")
    for name in ("rows", "accuracy", "unfinished", "cut_inputs"):
        assert result[name] == want[name]
    assert main(["evaluate", str(converted["int8"]), "--engine", "jax", *data]) == 2
    assert "--engine jax: " in capsys.readouterr().err


def test_evaluate_of_ids_reads_it_too(converted, model_dir):
    from stepdistill_jax.inference import load_model

    vocabulary = load_model(model_dir).vocabulary
    inputs = [[*vocabulary.encode(f"predict: with rain {i}"), 1] for i in range(9)]
    engine = open_engine(converted["float32"])
    labels = [vocabulary.decode(ids) for ids in engine.decode(inputs, 8).ids]
    labelled = sum(label != "" for label in labels[1:]) + 1
    labels[0] = "another"
    result = evaluate_tokens(converted["float32"], inputs, labels, metric="text_match")
    assert result["rows"] == 9 and labelled > 4
    assert result["accuracy"] == pytest.approx(1 - 1 / labelled)
    assert result["step"] is None


@pytest.mark.slow
def test_evaluate_of_a_seqio_task_reads_it_too(converted, model_dir, questions, tmp_path):
    from stepdistill_jax.tasks.registry import add_task

    def rows(split):
        return [{"input": q["input"], "label": "smooth"} for q in questions[:20]]

    add_task("read_by_both_engines", source=rows, splits=["test"])
    options = {"task": "read_by_both_engines", "data_dir": tmp_path}
    ours, theirs = (evaluate(path, **options) for path in (model_dir, converted["float32"]))
    for name in ours.keys() - {"rows_per_second"}:
        assert theirs[name] == ours[name]
    assert ours["rows"] == 20


def test_the_readme_works_as_it_stands(converted, tmp_path, read_rows_of, write_rows, capsys):
    readme = (converted["float32"] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(block.replace("THIS_FOLDER", str(converted["float32"])), {})
    # an untrained model names rows that no piece has, which `predict` leaves out
    printed = re.sub(r"<row \d+>", "", capsys.readouterr().out.strip())
    predict(converted["float32"], write_rows([{"input": "..."}]), tmp_path / "out.jsonl")
    (row,) = read_rows_of(tmp_path / "out.jsonl")
    assert printed.startswith(row["label"])
    assert float(printed.split()[-1]) == pytest.approx(row["score"], abs=1e-5)
    assert "roads" in readme and "float32" in readme
    assert "VNNI" not in readme and "VNNI" in (converted["int8"] / "README.md").read_text()


def test_the_commands_make_it_and_ask_it(workdir, converted, source, tmp_path, capsys):
    folder, out, want = tmp_path / "new", tmp_path / "out.jsonl", tmp_path / "want.jsonl"
    command = ["export", str(workdir), str(folder), "--step", "3"]
    command += ["--format", "ctranslate2", "--quantization", "int8"]
    assert main(command) == 0
    provenance = json.loads((folder / "stepdistill.json").read_text())["provenance"]
    assert provenance["step"] == 3
    assert main(["predict", str(folder), str(source), str(out), "--engine", "ctranslate2"]) == 0
    assert "150 rows" in capsys.readouterr().out
    predict(converted["int8"], source, want)  # of the same parameters
    assert out.read_bytes() == want.read_bytes()


def test_weights_that_give_nan_are_said_to_be_damaged(
    tiny_config, tiny_params, task_info, spiece, source, tmp_path
):
    from stepdistill_jax.data.vocabulary import load_vocabulary

    params = jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), tiny_params)
    write_ctranslate2(tmp_path / "m", params, tiny_config, load_vocabulary(spiece), task_info)
    with pytest.raises(InputError, match="the model gives NaN"):
        predict(tmp_path / "m", source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def refusals(model_dir, folder):
    return {
        "jax": ((folder,), {"engine": "jax"}, "`engine=jax`: .* is a CTranslate2 directory"),
        "a plain directory": (
            (model_dir,),
            {"engine": "ctranslate2"},
            "`engine=ctranslate2`: .*stepdistill export .* --format ctranslate2",
        ),
        "another engine": (
            (folder,),
            {"engine": "vllm"},
            "`engine` must be one of jax, ctranslate2",
        ),
        "no folder": (("nowhere",), {"engine": "ctranslate2"}, "no such folder"),
        "a step": ((folder,), {"step": 3}, "`step` 3: .*contains only one model"),
        "a layout": (
            (folder,),
            {"layout": "tensor"},
            "`layout`: CTranslate2 runs only on CPU cores",
        ),
        "beams": ((folder,), {"num_beams": 0}, "`num_beams`"),
        "nothing to read": ((folder,), {"prefix": ""}, "cannot answer a row with an empty input"),
    }


@pytest.mark.parametrize("what", refusals(None, None))
def test_what_cannot_be_is_refused_in_one_line(model_dir, converted, write_rows, tmp_path, what):
    arguments, options, words = refusals(model_dir, converted["float32"])[what]
    rows = write_rows([{"input": "a"}, {"input": ""}])
    with pytest.raises(InputError, match=words) as error:
        predict(*arguments, rows, tmp_path / "out.jsonl", **options)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_model_that_ctranslate2_cannot_open_is_named(converted, source, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(converted["float32"], folder)
    model = (folder / "model.bin").read_bytes()[:1000]
    (folder / "model.bin").write_bytes(model)
    config = json.loads((folder / "config.json").read_text())
    config["stepdistill"]["sha256"] = hashlib.sha256(model).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"copy: CTranslate2 cannot open this directory \(.*payload size"
    ) as error:
        predict(folder, source, tmp_path / "out.jsonl")
    assert "\n" not in str(error.value)


def test_damaged_weights_are_refused_before_they_are_opened(converted, source, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(converted["float32"], folder)
    data = bytearray((folder / "model.bin").read_bytes())
    data[len(data) // 2] ^= 64
    (folder / "model.bin").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.bin: damaged"):
        predict(folder, source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_several_processes_are_refused(converted, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        InputError, match="CTranslate2 runs in a single process, but this job has 2"
    ):
        open_engine(converted["float32"])


@pytest.mark.parametrize("action", ["export", "predict"])
def test_without_the_package_the_command_to_install_it_is_named(
    model_dir, converted, source, tmp_path, monkeypatch, action
):
    for name in [name for name in sys.modules if name.split(".")[0] == "ctranslate2"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        InputError,
        match=r"run pip install -c constraints\.txt -e '\.\[ctranslate2\]' in the source folder",
    ) as error:
        if action == "export":
            export(model_dir, tmp_path / "new", format="ctranslate2")
        else:
            predict(converted["float32"], source, tmp_path / "out.jsonl")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_quantization_is_of_this_format_only(model_dir, workdir, tmp_path):
    with pytest.raises(InputError, match="`quantization`: only `format=ctranslate2` accepts"):
        export(workdir, tmp_path / "new", quantization="int8")
    with pytest.raises(InputError, match=r"float16 gives NaN"):
        export(model_dir, tmp_path / "new", format="ctranslate2", quantization="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_predict_needs_neither_torch_nor_transformers_nor_tensorflow(
    converted, source, tmp_path, of_jax
):
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("torch", "transformers", "tensorflow"):
        (absent / f"{name}.py").write_text(f"raise ImportError('no {name}')")
    out = tmp_path / "out.jsonl"
    command = ["-m", "stepdistill_jax", "predict", converted["float32"], source, out]
    environment = os.environ | {"PYTHONPATH": str(absent)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    labels = [json.loads(line)["label"] for line in out.read_text().splitlines()]
    assert labels == [row["label"] for row in of_jax[1]]
