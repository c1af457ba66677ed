"""Answers that go on from a decoder prefix: every search, every engine, and transformers' `generate`."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.data.objectives import shared_encoder, step_by_step
from stepdistill_jax.data.vocabulary import load_vocabulary
from stepdistill_jax.decoding.beam import search
from stepdistill_jax.decoding.sampling import sample_decode
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.directory import read_task_info, write_model_files
from stepdistill_jax.inference import DecodeOptions, LabelDecoder, engines, export, predict
from stepdistill_jax.runtime.checkpoints.manager import Checkpoints

LENGTH, ROWS = 8, 40
PREFIX = (17, 5, 88, 23)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    return [[*rng.integers(3, 128, rng.integers(1, 30)).tolist(), 1] for _ in range(ROWS)]


def answers(config, params, inputs, **options):
    decoder = LabelDecoder(config, max_decode_len=LENGTH, batch_size=ROWS, **options)
    return decoder(params, inputs)


@pytest.fixture(scope="module")
def greedy(tiny_config, tiny_params, inputs):
    return answers(tiny_config, tiny_params, inputs, decoder_prefix=PREFIX)


def check_teacher_forcing(config, params, inputs, found, log_probs_of):
    """Teacher forcing after the prefix finds the same ids likeliest, and gives the same scores."""
    source, forced = np.zeros((ROWS, 31), np.int32), np.zeros((ROWS, 12), np.int32)
    for i, (row, ids) in enumerate(zip(inputs, found.ids, strict=True)):
        source[i, : len(row)] = row
        forced[i, : 4 + len(ids)] = [*PREFIX, *ids]
    log_probs = log_probs_of(config, params, source, forced)
    for i, ids in enumerate(found.ids):
        at = range(4, 4 + len(ids))
        assert log_probs[i, at].argmax(-1).tolist() == ids
        assert found.scores[i] == pytest.approx(log_probs[i, at, ids].sum(), abs=1e-4)


def test_scores_are_those_of_teacher_forcing_after_the_prefix(
    tiny_config, tiny_params, inputs, greedy, log_probs_of
):
    check_teacher_forcing(tiny_config, tiny_params, inputs, greedy, log_probs_of)
    assert 0 < greedy.finished.sum() < ROWS


@pytest.mark.slow
def test_windows_count_from_the_start_of_the_prefix(tiny_t5gemma, inputs, log_probs_of):
    config, params = tiny_t5gemma
    found = answers(config, params, inputs, decoder_prefix=PREFIX)
    check_teacher_forcing(config, params, inputs, found, log_probs_of)
    assert len({tuple(ids) for ids in found.ids}) > ROWS // 4


@pytest.mark.slow
def test_another_prefix_gives_other_answers(tiny_config, tiny_params, inputs, greedy):
    for other in ((), PREFIX[:-1]):
        found = answers(tiny_config, tiny_params, inputs, decoder_prefix=other)
        assert sum(a != b for a, b in zip(found.ids, greedy.ids, strict=True)) > ROWS // 2


@pytest.mark.slow
def test_sampling_goes_on_from_it_too(tiny_config, tiny_params, inputs, greedy):
    likeliest = functools.partial(sample_decode, rng=jax.random.key(0), top_k=1)
    found = answers(tiny_config, tiny_params, inputs, decode_fn=likeliest, decoder_prefix=PREFIX)
    assert found.ids == greedy.ids


def test_a_decode_function_of_ones_own_needs_no_such_argument(tiny_config, tiny_params, inputs):
    def ends_at_once(params, config, encoder_input_tokens, *, max_decode_len):
        rows = encoder_input_tokens.shape[0]
        return jnp.ones((rows, max_decode_len), jnp.int32), jnp.zeros(rows), jnp.ones(rows, bool)

    found = answers(tiny_config, tiny_params, inputs, decode_fn=ends_at_once)
    assert found.ids == [[1]] * ROWS


@pytest.fixture(scope="module")
def task_of(task_info):
    """(objectives) -> what stepdistill.json says of them."""
    return lambda objectives: dataclasses.replace(task_info, objectives=objectives)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_config, tiny_params, task_of, spiece):
    """(objectives) -> a workdir of the same weights."""

    def make(objectives):
        folder = tmp_path_factory.mktemp("run")
        write_model_files(folder, tiny_config, load_vocabulary(spiece), task_of(objectives))
        checkpoints = Checkpoints(folder)
        metrics = {"step": 1, "validated": False}
        checkpoints.save(1, tiny_params, {"step": np.int32(1)}, metrics)
        checkpoints.close()
        return folder

    return make


@pytest.fixture(scope="module")
def shared(trained, tmp_path_factory, questions):
    """(workdir, its export, rows to ask, what `predict` says of them with rationales)."""
    workdir, folder = trained(shared_encoder()), tmp_path_factory.mktemp("shared")
    export(workdir, folder / "hf")
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(q) + "\n" for q in questions[:ROWS]))
    with pytest.MonkeyPatch.context() as patch:  # one device compiles in half the time
        patch.setattr(engines, "device_mesh", lambda _: None)
        predict(workdir, source, folder / "out.jsonl", batch_size=ROWS, with_rationale=True)
    return workdir, folder / "hf", source, (folder / "out.jsonl").read_text()


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(engines, "device_mesh", lambda _: None)


def test_labels_are_those_of_a_model_without_it_to_the_byte(shared, trained, tmp_path, one_device):
    """The label's prompt and program are the same; only the rationale is asked in another way."""
    _, _, source, text = shared
    out = tmp_path / "out.jsonl"
    predict(trained(step_by_step()), source, out, batch_size=ROWS, with_rationale=True)
    plain = rows_of(out.read_text())
    for row, other in zip(rows_of(text), plain, strict=True):
        assert list(row) == ["id", "label", "score", "rationale"]
        assert row | {"rationale": ""} == other | {"rationale": ""}
    assert sum(r["rationale"] != o["rationale"] for r, o in zip(rows_of(text), plain)) > ROWS // 2  # noqa: B905


def test_workdir_and_export_answer_alike(shared, tmp_path, one_device):
    _, exported, source, text = shared
    predict(exported, source, tmp_path / "out.jsonl", batch_size=ROWS, with_rationale=True)
    assert (tmp_path / "out.jsonl").read_text() == text


def test_ctranslate2_goes_on_from_it_too(shared, tmp_path):
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    _, exported, source, text = shared
    converted, out = tmp_path / "ctranslate2", tmp_path / "out.jsonl"
    export(exported, converted, format="ctranslate2")
    predict(converted, source, out, with_rationale=True)
    for row, want in zip(rows_of(out.read_text()), rows_of(text), strict=True):
        assert row["score"] == pytest.approx(want["score"], abs=1e-4)
        assert row | {"score": 0} == want | {"score": 0}
    # it would divide by the length of prefix and answer
    options = {"num_beams": 3, "with_rationale": True}
    with pytest.raises(InputError, match="set `length_penalty=0`"):
        predict(converted, source, tmp_path / "beams.jsonl", **options)
    predict(converted, source, tmp_path / "beams.jsonl", length_penalty=0.0, **options)
    beams = DecodeOptions(num_beams=3, length_penalty=0.0)
    found, ours = (
        engines.open_engine(path, beams).decode([[20, 30, 40, 1]], LENGTH, decoder_prefix=PREFIX)
        for path in (converted, exported)
    )
    assert found.ids == ours.ids
    np.testing.assert_allclose(found.scores, ours.scores, atol=1e-4)


@pytest.mark.parametrize("num_beams", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_generate_goes_on_from_decoder_input_ids_in_the_same_way(
    shared, tiny_config, tiny_params, inputs, num_beams
):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    import transformers

    ours = answers(
        tiny_config, tiny_params, inputs, decoder_prefix=PREFIX, decode_fn=search(num_beams)
    )
    model = transformers.T5ForConditionalGeneration.from_pretrained(shared[1]).eval()
    source = np.zeros((ROWS, 31), np.int64)
    for row, ids in zip(source, inputs, strict=True):
        row[: len(ids)] = ids
    out = model.generate(
        torch.tensor(source),
        attention_mask=torch.tensor(source > 0),
        decoder_input_ids=torch.tensor([[0, *PREFIX]] * ROWS),
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=LENGTH,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = out.sequences[:, 1 + len(PREFIX) :].tolist()
    for got, want in zip(ids, ours.ids, strict=True):
        assert got[: len(want)] == want
        assert len(want) == LENGTH or want[-1] == 1
    if num_beams > 1:
        lengths = [len(i) for i in ours.ids]
        np.testing.assert_allclose(out.sequences_scores * np.array(lengths), ours.scores, atol=1e-4)


def test_the_lines_of_card_and_page_give_the_rationale_of_predict(
    shared, tmp_path, capsys, one_device
):
    pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    _, exported, _, _ = shared
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    names = {}
    for block in blocks[:2]:
        exec(block.replace("THIS_FOLDER", str(exported)), names)
    page = pathlib.Path(__file__).parents[2] / "docs" / "lab" / "shared_encoder.md"
    (block,) = re.findall(r"```python\n(inputs = .*?)```", page.read_text(), re.DOTALL)
    length = read_task_info(exported).target_length
    exec(block.replace("max_new_tokens=100", f"max_new_tokens={length}"), names)
    label, rationale, of_the_page = capsys.readouterr().out.splitlines()
    assert of_the_page == rationale
    (tmp_path / "in.jsonl").write_text('{"input": "..."}\n')
    predict(exported, tmp_path / "in.jsonl", tmp_path / "out.jsonl", with_rationale=True)
    (row,) = rows_of((tmp_path / "out.jsonl").read_text())
    assert (row["label"], row["rationale"]) == (label, rationale)
