"""A validation's numbers against the same numbers counted over all rows of the split at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.data.objectives import step_by_step
from stepdistill_jax.data.vocabulary import EOS_ID, ByteVocabulary
from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.models.sharding import Layout, make_mesh
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.tasks.task_data import TaskData
from stepdistill_jax.tasks.token_store import TokenExample, write_store
from stepdistill_jax.training.loss import ObjectiveSums
from stepdistill_jax.training.validation import Validator

MODEL = T5Config(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
ROWS, BATCH = 11, 4  # two batches of 4 rows and one of 3
INPUT_LENGTH, MAX_DECODE_LEN = 9, 6
WEIGHTS = (1.0, 0.7)
INPUTS = ["abcdefghijk"[: i + 1] for i in range(ROWS)]
LABELS = [text if i % 2 == 0 else "other" for i, text in enumerate(INPUTS)]


def encode(text):
    return [*ByteVocabulary().encode(text), EOS_ID]


def example(i):
    """Later rows have longer rationales, so no two batches have equal token counts."""
    label = encode(INPUTS[i]), encode(LABELS[i])
    rationale = encode("why? " + INPUTS[i]), encode("because " * i) if i else []
    return TokenExample([label, rationale], 1 + i % 3, LABELS[i])


EXAMPLES = [example(i) for i in range(ROWS)]


def made_up_sums(params, batch):
    """Nats of a token are a tenth of its id, and odd ids are right: easy to add up by hand."""
    total = np.zeros((3, len(WEIGHTS)))
    for group in batch:
        ids = np.asarray(group["decoder_target_tokens"])
        of = np.asarray(group["decoder_objective_ids"])
        weight = np.asarray(group["decoder_loss_weights"])
        for o in range(len(WEIGHTS)):
            each = weight * (of == o + 1)
            total[:, o] += (each * ids / 10).sum(), (each * (ids % 2)).sum(), each.sum()
    return ObjectiveSums(*total)


def echo(params, config, encoder_input_tokens, *, max_decode_len):
    """Answers each input with itself, as far as `max_decode_len` goes."""
    ids = encoder_input_tokens[:, :max_decode_len]
    return ids, jnp.zeros(len(ids)), (ids == EOS_ID).any(1)


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """(metrics without their common prefix, prompts, how often `on_batch` was called)."""
    store = write_store(tmp_path_factory.mktemp("store"), ("label", "rationale"), EXAMPLES)
    data = TaskData.of_store(
        "synthetic", "validation", step_by_step(*WEIGHTS), store, ByteVocabulary()
    )
    mesh, prompts, calls = make_mesh(Layout(), jax.devices()[:1]), [], []
    decoder = LabelDecoder(
        MODEL, max_decode_len=MAX_DECODE_LEN, batch_size=BATCH, mesh=mesh, decode_fn=echo
    )

    def answer(params, rows, on_progress):
        prompts.extend(rows)
        return decoder(params, rows, on_progress)

    batches = Batches(data, BATCH, INPUT_LENGTH, 96, seed=0, shuffle=False)
    assert batches.num_steps == 3
    validator = Validator(MODEL, data, batches, answer, made_up_sums, mesh)
    found = validator.compute({"no": np.zeros(1)}, on_batch=lambda: calls.append(1))
    return {k.removeprefix("eval/validation/"): v for k, v in found.items()}, prompts, len(calls)


def test_losses_are_means_over_all_tokens_of_the_split(validation):
    """Neither is a batch left out, nor are means of batches averaged."""
    metrics, _, _ = validation
    for objective, name in enumerate(("label", "rationale")):
        ids = np.concatenate([e.rows[objective][1] for e in EXAMPLES]).astype(int)
        weights = np.concatenate([[e.weight] * len(e.rows[objective][1]) for e in EXAMPLES])
        assert metrics[f"loss/{name}"] == pytest.approx(np.average(ids / 10, weights=weights))
        assert metrics[f"accuracy/{name}"] == pytest.approx(np.average(ids % 2, weights=weights))
    total = WEIGHTS[0] * metrics["loss/label"] + WEIGHTS[1] * metrics["loss/rationale"]
    assert metrics["loss"] == pytest.approx(total)


def test_answers_are_compared_with_the_labels_of_all_rows(validation):
    metrics, _, _ = validation
    right = [
        text == label and len(encode(text)) <= MAX_DECODE_LEN
        for text, label in zip(INPUTS, LABELS, strict=True)
    ]
    assert sum(right) == 3
    assert metrics["label_accuracy"] == pytest.approx(3 / ROWS)
    assert metrics["collapsed"] == 0 and "unparsed" not in metrics


def test_unfinished_is_the_share_of_answers_that_do_not_end_within_max_decode_len(validation):
    too_long = [len(encode(text)) > MAX_DECODE_LEN for text in INPUTS]
    assert sum(too_long) == 6
    assert validation[0]["unfinished"] == pytest.approx(6 / ROWS)


def test_the_prompts_are_the_labels_inputs_cut_as_in_training(validation):
    ids = map(encode, INPUTS)
    expected = [x if len(x) <= INPUT_LENGTH else [*x[: INPUT_LENGTH - 1], EOS_ID] for x in ids]
    assert validation[1] == expected
    assert len(encode(INPUTS[-1])) > INPUT_LENGTH


def test_on_batch_is_called_after_each_batch_of_losses_and_of_answers(validation):
    assert validation[2] == 3 + 3
