"""Weights of target tokens from a field: each token gets its word's weight, also in batches."""

import dataclasses
import json

import numpy as np
import pytest

from stepdistill_jax.batches.batch import Batches
from stepdistill_jax.commands.gin_config import load_config
from stepdistill_jax.data.objectives import Objective, step_by_step
from stepdistill_jax.data.vocabulary import EOS_ID, ByteVocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.tasks.load import load_task
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.tasks.token_weights import begins_word, of_tokens, with_token_weights
from stepdistill_jax.training import TrainConfig
from stepdistill_jax.training.run import assemble

GOLD = Supervision()
FIELDS = {"rationale": "importance"}


def weights_in_bytes(text, target):
    vocabulary = ByteVocabulary()
    ids = np.array([*vocabulary.encode(target), EOS_ID])
    return of_tokens(text, target, ids, begins_word(vocabulary)).tolist()


def test_bytes_get_their_words_weight_and_the_end_gets_1():
    # a blank belongs to the word after it
    assert weights_in_bytes("2 0.5", "ab c") == [2, 2, 0.5, 0.5, 1]
    # à is the bytes C3 A0, and A0 alone would be a blank in Latin-1
    assert weights_in_bytes("2 0 3", "à  b\tc") == [2, 2, 0, 0, 0, 3, 3, 1]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("1", "1 numbers, but the target has 2 words: 'ab c'"),
        ("1 2 3", "3 numbers"),
        ("1 x", "could not convert string to float: 'x'"),
        ("1 -1", "expected numbers of at least 0, got -1"),
        ("1 nan", "expected numbers of at least 0, got nan"),
        ("1 1e39", "expected numbers of at least 0, got 1e39"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(text, wanted):
    with pytest.raises(ValueError, match=wanted):
        weights_in_bytes(text, "ab c")


def prepare_rows(folder, rows, name="parcels"):
    from stepdistill_jax.data.prepare import prepare

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ["importance", "remark"]
    prepare("jsonl", source=folder / "rows.jsonl", new_name=name, data_dir=folder, fields=fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepares rows with rationales of 3 + i % 3 words; the last has weight i, some have no weights."""
    folder = tmp_path_factory.mktemp("parcels")
    rows = []
    for i in range(40):
        words = ["a", "late", "parcel", "matters", "much"][: 2 + i % 3] + [f"{i}{i + 7}"]
        row = {"input": f"parcel number {i}", "label": "delivery", "remark": "1"}
        if i % 5:
            row["rationale"] = " ".join(words)
        if i % 5 and i % 4:
            row["importance"] = " ".join(["0.5"] * (len(words) - 1) + [str(i)])
        rows.append(row | {"weight": 2})
    prepare_rows(folder, rows)
    return folder


@pytest.fixture(scope="module")
def data(folder):
    plain = load_task("parcels", split="train", data_dir=folder, supervision=GOLD)
    return plain, with_token_weights(plain, FIELDS, supervision=GOLD, data_dir=folder)


def of_words(data, group):
    """Returns {(input, objective): [(piece, weight)]} for a packed group, without end of sequence."""
    vocabulary, pieces = data.vocabulary, data.vocabulary.pieces()
    found = {}
    for row in range(len(group["decoder_segment_ids"])):
        for segment in range(1, group["decoder_segment_ids"][row].max() + 1):
            mine = group["decoder_segment_ids"][row] == segment
            source = group["encoder_segment_ids"][row] == segment
            asked = vocabulary.decode(group["encoder_input_tokens"][row][source].tolist())
            ids = group["decoder_target_tokens"][row][mine]
            weights = group["decoder_loss_weights"][row][mine]
            number = int(asked.split()[-1])
            objective = int(group["decoder_objective_ids"][row][mine][-1])
            found[number, objective] = [
                (pieces[i], float(w)) for i, w in zip(ids, weights, strict=True)
            ]
    return found


SIZES = {"batch_size": 32, "input_length": 64, "target_length": 64, "seed": 0}


def test_a_batch_has_the_words_weights_times_the_rows(data):
    plain, weighted = data
    before, after = Batches(plain, **SIZES)(0)[0], Batches(weighted, **SIZES)(0)[0]
    for name in before.keys() - {"decoder_loss_weights"}:
        np.testing.assert_array_equal(before[name], after[name])
    found, seen = of_words(plain, after), 0
    for (i, objective), tokens in found.items():
        if objective == 1 or not i % 4:
            assert {w for _, w in tokens} == {2.0}
            continue
        starts = [n for n, (piece, _) in enumerate(tokens) if piece.startswith("▁")]
        assert len(starts) == 3 + i % 3  # one per word
        assert [w for _, w in tokens[: starts[-1]]] == [1.0] * starts[-1]
        last = len(tokens) - 1 - starts[-1]
        assert [w for _, w in tokens[starts[-1] :]] == [2.0 * i] * last + [2.0]
        seen += last > 1
    assert seen  # some word has several tokens


def test_under_the_mean_over_examples_a_target_still_weighs_as_its_row(data):
    group = Batches(data[1], **SIZES, loss_mean="example")(0)[0]
    weighed = of_words(data[0], group)
    for tokens in weighed.values():
        assert sum(w for _, w in tokens) == pytest.approx(2.0, rel=1e-5)
    assert any(len({w for _, w in tokens}) == 3 for tokens in weighed.values())


def test_a_cut_target_keeps_the_weights_of_what_is_left(data):
    plain, weighted = data
    sizes = SIZES | {"target_length": 4}
    uncut, cut = (of_words(plain, Batches(weighted, **s)(0)[0]) for s in (SIZES, sizes))
    longer = [key for key, tokens in uncut.items() if len(tokens) > 4]
    assert longer
    for key in longer:
        # the last token is the end of sequence, with the same weight as without truncation
        kept = [*uncut[key][:3], uncut[key][-1]]
        assert [w for _, w in cut[key]] == [w for _, w in kept]


def test_the_fingerprint_knows_the_weights(folder, data):
    plain, weighted = data
    assert plain.fingerprint != weighted.fingerprint
    again = with_token_weights(plain, FIELDS, supervision=GOLD, data_dir=folder)
    assert again.fingerprint == weighted.fingerprint


@pytest.mark.parametrize(
    "fields, supervision, wanted",
    [
        ({"rational": "importance"}, GOLD, "there is no objective 'rational'; did you mean 'rationale'"),
        ({"rationale": "importanc"}, GOLD, "has no field 'importanc' .*did you mean 'importance'"),
        (FIELDS, Supervision(rationales="all"), "set `label_source=gold` and `rationales=first`"),
        ({"rationale": "remark"}, GOLD, r"row '\d+': remark: it has 1 numbers, but the target has \d words"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder, data, fields, supervision, wanted):
    with pytest.raises(InputError, match=wanted):
        with_token_weights(data[0], fields, supervision=supervision, data_dir=folder)


def test_the_teachers_label_as_target_is_refused(folder, data):
    label = Objective("label", "{input}", "{llm_label}")
    other = dataclasses.replace(data[0], objectives=(label, step_by_step()[1]))
    with pytest.raises(InputError, match="`label_source=gold`"):
        with_token_weights(other, FIELDS, supervision=GOLD, data_dir=folder)


def test_a_run_trains_with_them_and_a_resume_compares_them(folder, data, tmp_path):
    setting = 'train.token_weights={"rationale": "importance"}'
    sizes = ["BATCH_SIZE=32", "INPUT_LENGTH=64", "TARGET_LENGTH=64", "LAYOUT=fsdp"]
    config, text = load_config("demo_step_by_step", ["TASK=parcels", setting, *sizes])
    assert "token_weights = {'rationale': 'importance'}" in text
    run = assemble(config, tmp_path, folder)
    assert run.data.fingerprint == data[1].fingerprint
    weights = run.batches(0)[0]["decoder_loss_weights"]
    assert weights.max() > 10 and set(np.unique(weights)) > {0, 1, 2}
    held_out = run.validator.data.stores[0].rows[1]
    assert held_out.keys() == {"inputs", "targets"}
    assert config.to_json()["token_weights"] == FIELDS


@pytest.mark.parametrize("value", [{}, "importance", {"rationale": 1}, ["rationale", "importance"]])
def test_a_setting_that_is_no_table_of_names_is_refused(value):
    with pytest.raises(
        InputError, match=r"`token_weights` must be {\"OBJECTIVE\": \"FIELD\"} or None"
    ):
        TrainConfig("parcels", token_weights=value)
