"""`export --format jax`: the answers of `predict`, from a process that has only jax and numpy."""

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import sentencepiece

from stepdistill_jax.commands.main import main
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import LabelDecoder, export, load_model, predict
from stepdistill_jax.inference.prompting import encode_input
from stepdistill_jax.inference.stablehlo import PLATFORMS, decoder_readme, export_decoder
from stepdistill_jax.models.encoder_decoder import init_params

# jax with its dependencies, and what `jax.export` asks for beside them
ALLOWED = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers")
# what a machine without our environment is: any other package is refused as if it were not installed
GUARD = """\
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        if top not in ALLOWED and not known and top != "web_pdb":  # jax looks whether it is there
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""
CHECK = """
try:
    import flax
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the guard lets flax pass")
import json
print(json.dumps([ids.tolist(), scores.tolist(), finished.tolist()]))
"""


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """(result, directory) of the best step."""
    folder = tmp_path_factory.mktemp("stablehlo") / "new" / "decoder"
    return export(workdir, folder, format="jax"), folder


def python_of(readme):
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return code


def run_readme(folder, rows):
    """What the lines of the README give for `rows`, run by a process that has only jax."""
    code = python_of((folder / "README.md").read_text()).replace("THIS_FOLDER", str(folder))
    code, found = re.subn(r"^rows = .*$", f"rows = {rows}", code, flags=re.MULTILINE)
    assert found == 1
    program = f"ALLOWED = {ALLOWED}\n{GUARD}{code}{textwrap.dedent(CHECK)}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_lines_of_the_readme_give_the_answers_of_predict_where_only_jax_is(
    exported, workdir, questions, write_rows, read_rows_of, tmp_path
):
    _, folder = exported
    asked = questions[:40]
    predict(workdir, write_rows(asked), tmp_path / "out.jsonl")
    want = read_rows_of(tmp_path / "out.jsonl")
    model = load_model(workdir)
    rows = [[*model.vocabulary.encode("predict: " + q["input"]), 1] for q in asked]
    rows = [row if len(row) <= 40 else [*row[:39], 1] for row in rows]
    ids, scores, finished = run_readme(folder, rows)
    assert [model.vocabulary.decode(row) for row in ids] == [row["label"] for row in want]
    # another padded length than predict's: sums in another order (measured 5e-7)
    np.testing.assert_allclose(scores, [row["score"] for row in want], atol=5e-6)
    assert 0 < sum(finished) < len(finished)
    assert len({row["label"] for row in want}) > 5


def test_the_directory_says_what_it_is(exported, workdir):
    result, folder = exported
    assert (result["step"], result["format"]) == (3, "jax")
    assert result["files"] == [
        "README.md",
        "config.json",
        "label_decoder.jax_export",
        "params",
        "spiece.model",
        "stepdistill.json",
    ]
    params = load_model(workdir, 3).params
    assert result["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    table = np.load(folder / "params" / "token_embedder.npy", mmap_mode="r")
    np.testing.assert_array_equal(table, params["token_embedder"])
    assert json.loads((folder / "stepdistill.json").read_text())["provenance"]["step"] == 3
    readme = (folder / "README.md").read_text()
    for part in ("roads", "'predict: ...'", *PLATFORMS, jax.__version__, "6 months", "3 weeks"):
        assert part in readme
    assert (folder / "label_decoder.jax_export").stat().st_size < 100_000, "weights are beside it"


def test_the_directory_is_refused_as_a_model(exported, workdir, write_rows, tmp_path):
    _, folder = exported
    message = f"{folder}: this is a StableHLO directory .*README.md shows how to run it"
    for use in (
        lambda: predict(folder, write_rows([{"input": "a"}]), tmp_path / "o.jsonl"),
        lambda: export(folder, tmp_path / "new", format="ctranslate2"),
    ):
        with pytest.raises(InputError, match=message):
            use()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "t5gemma"])
def test_what_other_families_have_is_exported_too(tiny_config, tiny_t5gemma, kind):
    """ReLU and the tied, scaled head of v1.0 with a bias per layer, as in UMT5; windows of T5Gemma."""
    if kind == "t5gemma":
        config, params = tiny_t5gemma
    else:
        config = dataclasses.replace(
            tiny_config,
            mlp_activations=("relu",),
            logits_via_embedding=True,
            scale_decoder_outputs=True,
            shared_relative_position_bias=False,
        )
        params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(1))
    exported = export_decoder(params, config, max_decode_len=6)
    assert exported.platforms == PLATFORMS
    assert str(exported.in_avals[-1]) == "int32[batch,length]"
    again = jax.export.deserialize(exported.serialize())
    flat = {
        ".".join(key.key for key in path): x
        for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    # two lengths: the encoder's windows are shorter than the one and longer than the other
    for length in (40, 4):
        batch = np.random.default_rng(0).integers(2, 128, (3, length)).astype(np.int32)
        batch[1:, 9:] = 0
        ids, scores, _ = map(np.asarray, jax.jit(again.call)(flat, batch))
        rows = [row[row > 0].tolist() for row in batch]
        want = LabelDecoder(config, max_decode_len=6, batch_size=3)(params, rows)
        for got, row in zip(ids.tolist(), want.ids, strict=True):
            assert got == row + [0] * (6 - len(row))
        np.testing.assert_allclose(scores, want.scores, atol=1e-4)


def test_a_model_directory_without_a_task_is_a_source_too(model_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "spiece.model"):
        (bare / name).symlink_to(model_dir / name)
    assert main(["export", str(bare), str(tmp_path / "out"), "--format", "jax"]) == 0
    assert "out: " in capsys.readouterr().out
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "# The label decoder of bare" in readme and "[rows, 64] int32" in readme
    assert not (tmp_path / "out" / "stepdistill.json").exists()
    with pytest.raises(InputError, match="contains only one model"):
        export(bare, tmp_path / "other", format="jax", step=3)


def test_without_flatbuffers_the_package_to_install_is_named(workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(InputError, match="pip install flatbuffers"):
        export(workdir, tmp_path / "model", format="jax")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_and_a_failure_leave_nothing(workdir, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match="`format` must be one of hf, jax, ctranslate2, not 'onnx'"
    ):
        export(workdir, tmp_path / "model", format="onnx")

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        export(workdir, tmp_path / "model", format="jax")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bos, eos", [(True, False), (False, False), (True, True)])
def test_the_readme_frames_the_inputs_of_a_gemma(gemma_model, bos, eos):
    vocabulary = load_vocabulary(gemma_model(add_bos_token=bos, add_eos_token=eos))
    readme = decoder_readme(
        SimpleNamespace(platforms=PLATFORMS, calling_convention_version=9),
        vocabulary,
        task="roads",
        prompt="predict: ...",
        num_parameters=1,
        input_length=40,
        max_decode_len=8,
    )
    want, _ = encode_input(vocabulary, "predict: ...", 40)
    assert f"rows = [{want}]" in readme
    lines = re.findall(r"^    ((?:vocabulary|row) = .*)$", readme, re.MULTILINE)
    code = "\n".join(lines).replace("THIS_FOLDER", str(vocabulary.path.parent))
    found = {"sentencepiece": sentencepiece, "text": "predict: ..."}
    exec(code, found)
    assert found["row"] == want
