"""`stepdistill predict`, `evaluate` and `export` as a user types them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import read_task_info, write_model_files
from stepdistill_jax.inference import evaluate

KEYS = {"rows", "invalid_labels", "unfinished", "rows_per_second"}
LABELLED = KEYS | {"accuracy", "majority_baseline"}


def run(capsys, *arguments):
    """(exit code, stdout lines, stderr)."""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_predict_prints_words_and_then_one_json_object(
    workdir, questions, write_rows, tmp_path, capsys
):
    source = write_rows(questions[:5])
    code, out, _ = run(capsys, "predict", workdir, source, tmp_path / "o.jsonl", "--json")
    assert code == 0
    assert json.loads(out[-1]).keys() >= LABELLED
    assert (
        "5 rows  accuracy" in out[0]
        and "(baseline that always gives the commonest label: 0.6)" in out[0]
    )
    source = write_rows([{"input": "a"}])
    code, out, _ = run(capsys, "predict", workdir, source, tmp_path / "o.jsonl", "--json")
    assert json.loads(out[-1]).keys() >= KEYS
    assert "accuracy" not in json.loads(out[-1])


def test_flags_of_predict_reach_it(workdir, questions, write_rows, tmp_path, capsys):
    source = write_rows([*questions[:3], {"question": "bad"}])
    out = tmp_path / "o.jsonl"
    flags = "--step last --batch-size 2 --max-decode-len 3 --with-rationale --on-error skip"
    code, lines, err = run(capsys, "predict", workdir, source, out, *flags.split())
    assert code == 0 and "bad rows skipped 1" in lines[0] and f"skipped: {source}:4" in err
    rows = [json.loads(line) for line in out.open()]
    assert [list(row) for row in rows] == [["id", "label", "score", "rationale"]] * 3
    before = out.read_bytes()
    flags = flags.replace("last", "3") + " --prefix with"
    run(capsys, "predict", workdir, source, out, *flags.split())
    assert out.read_bytes() != before


def test_export_and_predict_by_command(workdir, questions, write_rows, tmp_path, capsys):
    source, model = write_rows(questions[:4]), tmp_path / "model"
    code, out, _ = run(capsys, "export", workdir, model, "--step", "5", "--json")
    assert code == 0 and json.loads(out[-1])["step"] == 5
    assert run(capsys, "predict", model, source, tmp_path / "a.jsonl")[0] == 0
    run(capsys, "predict", workdir, source, tmp_path / "b.jsonl", "--step", "5")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_bad_usage_is_one_line_and_exit_2(workdir, write_rows, tmp_path, capsys):
    source, out = write_rows([{"input": "a"}]), tmp_path / "o.jsonl"
    broken, mistyped = tmp_path / "broken.jsonl", workdir.parent / "wrokdir"
    broken.write_text('{"input": "a"}\n' * 6 + '{"input": "a"\n')
    for arguments, part in (
        (("predict", workdir, broken, out), "broken.jsonl:7: broken JSON"),
        (("predict", workdir, tmp_path / "none.jsonl", out), "none.jsonl: no such file"),
        (("predict", tmp_path / "none", source, out), "none: no such folder"),
        (("predict", tmp_path / "none", broken, out), "none: no such folder"),
        (("predict", workdir, source, out, "--step", "4"), "4"),
        (("predict", workdir, source, out, "--module", "mine"), "--module"),
        (
            ("evaluate", workdir, "--task", "none", "--data-dir", tmp_path),
            "set --module to the module that registers your task",
        ),
        # said before the task is looked for, not after all has been decoded
        (("evaluate", workdir, "--task", "none", "--output", tmp_path), "--output"),
        (("export", workdir, tmp_path), "is not empty"),
        *(
            ((name, mistyped, *flags), "wrokdir: no such folder; did you mean 'workdir")
            for name, *flags in (
                ("evaluate", "--task", "roads"),
                ("serve",),
                ("checkpoints",),
                ("export", tmp_path / "new"),
                ("report", "--output", tmp_path / "r"),
            )
        ),
    ):
        code, lines, err = run(capsys, *arguments)
        assert code == 2 and lines == []
        assert err.startswith("stepdistill: error: ") and part in err and err.count("\n") == 1
    assert not out.exists()


PLAIN_TASK = """
import seqio, tensorflow as tf
vocabulary = seqio.SentencePieceVocabulary({spiece!r}, extra_ids=0)
ROWS = {rows!r}
def read(split, shuffle_files=False, seed=None):
    inputs, targets = map(list, zip(*ROWS))
    return tf.data.Dataset.from_tensor_slices({{"inputs": inputs, "targets": targets}})
seqio.TaskRegistry.add(
    "plain_roads",
    source=seqio.FunctionDataSource(read, splits=["train", "test"]),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={{k: seqio.Feature(vocabulary, add_eos=True) for k in ("inputs", "targets")}},
)
"""


@pytest.mark.slow  # imports SeqIO
def test_a_seqio_task_of_a_module_is_evaluated_like_its_texts(
    workdir, model_dir, tiny_config, spiece, questions, write_rows, tmp_path, capsys, monkeypatch
):
    rows = [("predict: " + q["input"], q["label"]) for q in questions[:40]]
    code = PLAIN_TASK.format(spiece=str(spiece), rows=rows)
    (tmp_path / "roads_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--task", "plain_roads", "--module", "roads_module", "--data-dir", tmp_path / "data")
    code, out, err = run(
        capsys, "evaluate", workdir, *flags, "--json", "--output", tmp_path / "r.json"
    )
    assert code == 0, err
    source = write_rows(questions[:40])
    _, want, _ = run(capsys, "predict", workdir, source, tmp_path / "o.jsonl", "--json")
    result, want = json.loads(out[-1]), json.loads(want[-1])
    for name in ("rows", "accuracy", "majority_baseline", "unfinished", "cut_inputs"):
        assert result[name] == want[name]
    assert json.loads((tmp_path / "r.json").read_text()) == result
    code, _, err = run(capsys, "evaluate", workdir, *flags, "--with-rationale")
    assert code == 2 and "--with-rationale: plain_roads is a SeqIO task" in err
    # a model that was trained on this task knows its module
    info = read_task_info(model_dir)
    origin = {"config": {"task_module": "roads_module"}}
    info = dataclasses.replace(info, task="plain_roads", provenance=origin)
    own = shutil.copytree(model_dir, tmp_path / "own")
    write_model_files(own, tiny_config, load_vocabulary(spiece), info)
    without_module = [*flags[:2], *flags[4:]]
    code, out, err = run(capsys, "evaluate", own, *without_module, "--json")
    assert code == 0, err
    for name in ("rows", "accuracy", "majority_baseline", "unfinished", "cut_inputs"):
        assert json.loads(out[-1])[name] == want[name]


def test_the_module_of_a_models_own_task_is_looked_in_and_of_no_other(
    task_info, tiny_config, spiece, tmp_path
):
    own, bare = tmp_path / "own", tmp_path / "bare"  # of a task that no other test registers
    origins = {own: {"config": {"task_module": "module_of_roads"}}, bare: {}}
    for folder, origin in origins.items():
        info = dataclasses.replace(task_info, task="gravel_roads", provenance=origin)
        write_model_files(folder, tiny_config, load_vocabulary(spiece), info)
    for task, module, message in (
        ("gravel_roads", None, "no module 'module_of_roads'"),
        ("gravel_roads", "other", "no module 'other'"),
        ("lanes", None, "unknown task 'lanes'"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(own, task=task, task_module=module, data_dir=tmp_path)
    with pytest.raises(InputError, match="unknown task 'gravel_roads'"):  # no module
        evaluate(bare, task="gravel_roads", data_dir=tmp_path)


def test_a_prepared_dataset_is_evaluated_without_tensorflow(model_dir, tmp_path, lay_out):
    folder = lay_out(tmp_path, [{"input": "with rain", "label": "smooth"}], "lanes")
    code = """
import sys
from stepdistill_jax.commands.main import main
flags = ["--data-dir", sys.argv[2], "--json", "--task"]
assert main(["evaluate", sys.argv[1], *flags, "lanes"]) == 0
assert main(["evaluate", sys.argv[1], *flags, "absent"]) == 2
print([m for m in ("tensorflow", "seqio", "tensorflow_datasets", "gin") if m in sys.modules])
"""
    command = [sys.executable, "-c", code, str(model_dir), str(folder)]
    one_device = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]}
    done = subprocess.run(command, capture_output=True, text=True, env=one_device)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-3])["rows"] == 1
    assert json.loads(done.stdout.splitlines()[-2])["exit_code"] == 2
    assert done.stdout.splitlines()[-1] == "[]"
