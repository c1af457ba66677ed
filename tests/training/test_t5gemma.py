"""Runs of a tiny T5Gemma: from scratch, from a directory of transformers, and all that saves memory."""

import dataclasses
import functools
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.commands.main import main
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference import evaluate, export, load_model, predict
from stepdistill_jax.models.config import LoraConfig
from stepdistill_jax.models.encoder_decoder import EncoderDecoder
from stepdistill_jax.models.lora import base_of, split
from stepdistill_jax.models.t5gemma import T5GemmaConfig, gemma_side
from stepdistill_jax.runtime.checkpoints.manager import restore_params
from stepdistill_jax.training import TrainConfig, train
from stepdistill_jax.training.config import OptimizerConfig
from stepdistill_jax.training.optimizer import make_optimizer
from stepdistill_jax.training.run import assemble, new_model

SETTINGS = {
    "task": "delivery",
    "model_family": "t5gemma",
    "batch_size": 16,
    "input_length": 64,
    "target_length": 64,
    "train_steps": 4,
    "eval_every": 2,
    "checkpoint_every": 2,
    "learning_rate": 1e-3,
    "layout": "fsdp_tensor",
}


@pytest.mark.parametrize(("bos_id", "start_id"), [(0, 1), (3, 3)])
def test_a_new_model_starts_with_the_bos_of_its_vocabulary(bos_id, start_id):
    """Or with its end of sequence: transformers would not attend to the padding id."""
    data = SimpleNamespace(
        vocab_size=300, vocabulary=SimpleNamespace(framing=SimpleNamespace(bos_id=bos_id))
    )
    config = TrainConfig(**SETTINGS)
    assert new_model(config, data).start_id == start_id
    assert new_model(config, None).start_id == 2  # Gemma's own
    t5 = dataclasses.replace(config, model_family="t5_v1_1")
    if bos_id:
        with pytest.raises(InputError, match="decoder does not use the vocabulary's bos 3"):
            new_model(t5, data)
    else:
        assert new_model(t5, data).start_id == 0


MODEL = T5GemmaConfig(
    vocab_size=128,
    encoder=gemma_side(32, 4, 2, 8, 64, 2, window=9),
    decoder=gemma_side(48, 4, 2, 8, 64, 2, window=9),
)
WEIGHTS = (1.0, 0.7)


@pytest.fixture(scope="module")
def three_steps(data, take_steps):
    """`three_steps(optimizer=..., num_microbatches=..., **fields of the model)`: the losses."""
    batches = [Batches(data, 16, 64, 64, seed=0, row_multiple=16)(step) for step in range(3)]

    @functools.cache
    def taken(optimizer="adamw", num_microbatches=1, seed=3, **fields):
        settings = {"train_steps": 3, "optimizer": OptimizerConfig(name=optimizer)}
        tx = make_optimizer(TrainConfig(task="any", learning_rate=1e-2, **settings))
        model = dataclasses.replace(MODEL, **fields)
        more = {"num_microbatches": num_microbatches, "seed": seed}
        _, found = take_steps(model, batches, tx=tx, weights=WEIGHTS, **more)
        return [float(metrics["loss"]) for metrics in found]

    return taken


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"remat_policy": "minimal"},
        {"remat_policy": "full"},
        {"scan_layers": False},
        {"num_microbatches": 2},
    ],
    ids=str,
)
def test_what_saves_memory_or_time_changes_no_loss(three_steps, changes):
    np.testing.assert_allclose(three_steps(**changes), three_steps(), rtol=5e-6)


@pytest.mark.slow
def test_bfloat16_is_near_float32(three_steps):
    np.testing.assert_allclose(three_steps(dtype="bfloat16"), three_steps(), rtol=0.02)


@pytest.mark.slow
def test_adafactor_learns(three_steps):
    losses = three_steps(optimizer="adafactor")
    assert losses[0] == pytest.approx(three_steps()[0], rel=1e-6)
    assert losses[2] < losses[0] - 0.01
    sliced = three_steps(optimizer="adafactor", num_microbatches=2)
    np.testing.assert_allclose(sliced, losses, rtol=5e-6)


@pytest.mark.slow
def test_dropout_is_drawn_by_the_seed(three_steps):
    """The first loss: of the same parameters, which the seed draws, too."""
    dropped = three_steps(dropout_rate=0.3)
    assert np.isfinite(dropped).all()
    assert abs(dropped[0] - three_steps()[0]) > 1e-3
    assert three_steps(dropout_rate=0.3, remat_policy="full")[0] == pytest.approx(
        dropped[0], rel=1e-6
    )


def of_steps(workdir, data_dir, step, **changes):
    run = assemble(TrainConfig(**SETTINGS | changes), workdir, data_dir)
    return jax.tree.map(np.asarray, restore_params(workdir, step, run.abstract.params))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, delivery_data_dir):
    """Workdir of a run from scratch."""
    workdir = tmp_path_factory.mktemp("scratch") / "run"
    train(TrainConfig(**SETTINGS), workdir=workdir, data_dir=delivery_data_dir)
    return workdir


@pytest.mark.slow
def test_a_run_on_the_tasks_vocabulary_starts_with_eos_which_transformers_sees(trained, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers import T5GemmaForConditionalGeneration

    export(trained, tmp_path / "model", step=4)
    model = load_model(tmp_path / "model")
    assert isinstance(model.config, T5GemmaConfig) and model.config.start_id == 1
    ids = np.random.default_rng(0).integers(3, 200, (2, 9)).astype(np.int32)
    targets = np.concatenate([np.zeros((2, 1), np.int32), ids[:, :5]], axis=1)  # 0 begins a batch's
    batch = {"encoder_input_tokens": ids, "encoder_segment_ids": np.ones_like(ids)}
    batch |= {"decoder_input_tokens": targets, "decoder_segment_ids": np.ones_like(targets)}
    ours = EncoderDecoder(model.config).apply({"params": model.params}, batch)
    theirs = T5GemmaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    targets[:, 0] = theirs.generation_config.decoder_start_token_id
    for use_cache in (True, False):
        with torch.no_grad():
            logits = theirs(
                input_ids=torch.tensor(ids).long(),
                decoder_input_ids=torch.tensor(targets).long(),
                use_cache=use_cache,
            ).logits
        np.testing.assert_allclose(ours, logits.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp_tensor", "data"])
def test_a_resume_is_exact_and_on_another_layout_as_near_as_rounding(
    trained, tmp_path, delivery_data_dir, layout
):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    config = TrainConfig(**SETTINGS | {"layout": layout})
    train(config, workdir=tmp_path / "run", data_dir=delivery_data_dir)
    want = of_steps(trained, delivery_data_dir, 4)
    found = of_steps(tmp_path / "run", delivery_data_dir, 4)
    if layout == SETTINGS["layout"]:
        jax.tree.map(np.testing.assert_array_equal, found, want)
    gaps = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), found, want)
    assert max(jax.tree.leaves(gaps)) < 1e-5


@pytest.mark.slow
def test_adapters_are_trained_alone_and_merged_by_an_export(tmp_path, delivery_data_dir, trained):
    lora = LoraConfig(query=2, key=2, value=2, out=2, wi=2, wo=2)
    config = TrainConfig(
        **SETTINGS | {"init_from": str(trained), "lora": lora, "learning_rate": 0.05}
    )
    train(config, workdir=tmp_path / "run", data_dir=delivery_data_dir)
    run = assemble(config, tmp_path / "run", delivery_data_dir)
    before = run.initial_state().params
    after = restore_params(tmp_path / "run", 4, run.abstract.params)
    jax.tree.map(np.testing.assert_array_equal, base_of(before), base_of(after))
    moved = flatten_dict(split(after)[0])
    for path, x in flatten_dict(split(before)[0]).items():
        assert np.abs(np.asarray(x) - moved[path]).max() > 1e-4, path
    export(tmp_path / "run", tmp_path / "model", step=4)
    merged = load_model(tmp_path / "run", 4)
    jax.tree.map(
        np.testing.assert_array_equal, load_model(tmp_path / "model").params, merged.params
    )
    assert merged.config.lora is None


@pytest.fixture(scope="module")
def given(tmp_path_factory, delivery_data_dir):
    """A random T5Gemma that `transformers` wrote, with the dataset's vocabulary beside it."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("given") / "model"
    side = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 7,
        "initializer_range": 0.3,
        "bos_token_id": 1,  # the vocabulary has no bos
    }
    config = transformers.T5GemmaConfig(
        encoder=side | {"num_hidden_layers": 3, "hidden_size": 48},
        decoder=side | {"cross_attention_hidden_size": 48},
        vocab_size=512,
        tie_word_embeddings=False,  # a tied one, untrained, repeats its start, which is the end
        dropout_rate=0.0,
        attention_dropout=0.0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(config)
    head = model.lm_head.out_proj.weight.data
    head *= 20  # far from ties
    head[0] = 0  # no answer has the padding
    model.save_pretrained(folder)
    shutil.copy(delivery_data_dir / "delivery" / "spiece.model", folder)
    return folder


def lines_of_card(folder):
    """Names that the first block of Python of the model card leaves."""
    block = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(block.replace("THIS_FOLDER", str(folder)), names)
    return names


@pytest.mark.slow
def test_the_road_from_a_directory_of_transformers_and_back(given, tmp_path, delivery_data_dir):
    import torch

    settings = SETTINGS | {"init_from": str(given), "dropout_rate": 0.0, "learning_rate": 3e-3}
    workdir, data_dir = tmp_path / "run", delivery_data_dir
    train(TrainConfig(**settings), workdir=workdir, data_dir=data_dir)
    source = tmp_path / "in.jsonl"
    lines = (data_dir / "delivery" / "test.jsonl").read_text().splitlines()[:40]
    source.write_text("\n".join(lines) + "\n")
    found = evaluate(workdir, task="delivery", split="test", step=4, data_dir=data_dir)
    assert found["rows"] == 500
    export(workdir, tmp_path / "model", step=4)

    def answers(model, name, **options):
        predict(model, source, tmp_path / name, **options)
        return (tmp_path / name).read_bytes()

    for name, options in {
        "greedy": {},
        "beams": {"num_beams": 3},
        "choices": {"choices": "labels"},
    }.items():
        of_run = answers(workdir, f"{name}.run", step=4, **options)
        assert answers(tmp_path / "model", f"{name}.model", **options) == of_run
    rows = [json.loads(line) for line in (tmp_path / "greedy.run").read_text().splitlines()]
    assert len({row["label"] for row in rows}) > 1
    int8 = answers(tmp_path / "model", "int8", quantization="int8")
    labels = [json.loads(line)["label"] for line in int8.decode().splitlines()]
    assert np.mean([a == row["label"] for a, row in zip(labels, rows, strict=True)]) > 0.5

    names, decode = (
        lines_of_card(tmp_path / "model"),
        load_model(tmp_path / "model").vocabulary.decode,
    )
    model, tokenizer = names["model"], names["tokenizer"]
    assert type(model).__name__ == "T5GemmaForConditionalGeneration"
    assert model.generation_config.decoder_start_token_id == 1
    for line, row in zip(lines, rows, strict=True):
        prompt = "predict: " + json.loads(line)["input"]
        inputs = tokenizer(prompt, truncation=True, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False)[0]
        assert decode(ids[1:].tolist()).strip() == row["label"].strip()


@pytest.mark.slow
def test_what_a_t5gemma_cannot_be_exported_to_is_refused_in_one_line(trained, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["export", str(trained), str(out), "--format", "ctranslate2"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "ctranslate2 supports only T5 models" in said and not out.exists()
    assert main(["export", str(trained), str(out), "--format", "jax"]) == 0
    assert (out / "label_decoder.jax_export").is_file()
