"""What T5Gemma has and T5 has not, against `transformers`: windows in packed rows, caps, turned positions."""

import dataclasses

import numpy as np
import pytest

from stepdistill_jax.decoding.greedy import LabelDecoder
from stepdistill_jax.formats import hf


@pytest.fixture(scope="module")
def gemma(make_random_hf, oracle, tmp_path_factory):
    """(model of `transformers`, our configuration, our parameters)."""
    folder = tmp_path_factory.mktemp("t5gemma")
    return make_random_hf(folder, family="t5gemma"), *oracle.load(folder)


def packed_row():
    """(batch of one row of three examples, their targets in it, the examples), all beyond the windows."""
    rng = np.random.default_rng(2)
    examples = [(rng.integers(2, 384, n), rng.integers(2, 384, m)) for n, m in ((25, 19), (40, 11), (13, 30))]  # fmt: skip
    batch = {f"{side}_{what}": np.zeros((1, length), np.int32) for side, length in (("encoder", 85), ("decoder", 64)) for what in ("input_tokens", "segment_ids")}  # fmt: skip
    target, start, begin = np.zeros((1, 64), np.int32), 0, 0
    for i, (source, ids) in enumerate(examples, 1):
        here, there = slice(start, start + len(source)), slice(begin, begin + len(ids))
        batch["encoder_input_tokens"][0, here] = source
        batch["encoder_segment_ids"][0, here] = batch["decoder_segment_ids"][0, there] = i
        batch["decoder_input_tokens"][0, there] = [0, *ids[:-1]]
        target[0, there] = ids
        start, begin = here.stop, there.stop
    return batch, target, examples


def test_logits_in_a_packed_row_are_those_of_each_example_alone_in_transformers(gemma, oracle):
    model, config, params = gemma
    batch, target, examples = packed_row()
    got = np.asarray(oracle.our_logits(config, params, batch))[target > 0]
    alone = [oracle.torch_outputs(model, *(x[None] for x in e)).logits for e in examples]
    want = np.concatenate(alone)
    assert np.abs(got - want).max() / oracle.rms(want) < 2e-5  # measured 7.7e-6


@pytest.mark.slow
def test_gradients_of_a_packed_row_are_those_of_its_examples_in_transformers(gemma, oracle):
    model, config, params = gemma
    batch, target, examples = packed_row()
    (loss, _), gradients = oracle._ours(config, params, batch, target)
    parts = [oracle.torch_outputs(model, *(x[None] for x in e)) for e in examples]
    shares = [len(ids) / (target > 0).sum() for _, ids in examples]
    assert abs(loss / sum(s * p.loss for s, p in zip(shares, parts, strict=True)) - 1) < 2e-6
    for name, got in hf.to_hf(gradients, config).items():
        want = sum(s * p.gradients[name] for s, p in zip(shares, parts, strict=True))
        # measured 5.1e-6
        assert np.linalg.norm(got - want) < 2e-5 * np.linalg.norm(want), name


def of_sides(config, **changes):
    """`config` with fields of one side or both changed: `encoder_`, `decoder_` or neither before a name."""
    sides = {"encoder": {}, "decoder": {}}
    for name, value in changes.items():
        side, _, rest = name.partition("_")
        for one in [side] if side in sides else sides:
            sides[one][rest if side in sides else name] = value
    return dataclasses.replace(
        config,
        **{side: dataclasses.replace(getattr(config, side), **c) for side, c in sides.items()},
    )


MISTAKES = {
    "the encoder's window": lambda c: of_sides(c, encoder_windows=(8, 0, 9)),
    "the decoder's window": lambda c: of_sides(c, decoder_windows=(7, 0)),
    "which layers have one": lambda c: of_sides(c, decoder_windows=(0, 6)),
    "the cap of scores": lambda c: of_sides(c, score_softcap=None),
    "the scale of scores": lambda c: of_sides(c, score_scale=32**-0.5),
    "the base of positions": lambda c: of_sides(c, rope_theta=9_000.0),
    "no positions": lambda c: of_sides(c, decoder_rope_theta=None),
    "the cap of logits": lambda c: dataclasses.replace(c, logits_softcap=None),
    "the start": lambda c: dataclasses.replace(c, bos_id=3),
    "the activation": lambda c: dataclasses.replace(c, mlp_activations=("silu", "linear")),
}


@pytest.mark.slow
def test_no_field_could_be_wrong_unseen(gemma, oracle, padded_batch):
    _, config, params = gemma
    source, target = (x[:2, :40] for x in padded_batch)
    batch = oracle.teacher_forced(source, target)

    def logits(config):
        return np.asarray(oracle.our_logits(config, params, batch))[target > 0]

    want = logits(config)
    for what, change in MISTAKES.items():
        gap = np.abs(logits(change(config)) - want).max() / oracle.rms(want)
        assert gap > 1e-2, what  # 500 times the tolerance; measured 0.1 and more


@pytest.mark.slow
def test_answers_longer_than_the_window_are_the_argmax_of_teacher_forcing(gemma, oracle):
    _, config, params = gemma
    rows = oracle.random_rows(40)
    got = LabelDecoder(config, max_decode_len=24, batch_size=40)(params, rows)
    source, answers = np.zeros((40, 31), np.int32), np.zeros((40, 24), np.int32)
    for i, (row, ids) in enumerate(zip(rows, got.ids, strict=True)):
        source[i, : len(row)] = row
        answers[i, : len(ids)] = ids
    forced = np.asarray(oracle.our_logits(config, params, oracle.teacher_forced(source, answers)))
    assert (forced.argmax(-1) == answers)[answers > 0].all()
    assert sum(len(ids) > 18 for ids in got.ids) > 5  # three windows


@pytest.mark.slow
def test_answers_do_not_depend_on_how_the_inputs_are_read(gemma, oracle):
    """16 tokens of 32 features read the encoder's states, 17 read keys and values of them."""
    _, config, params = gemma
    rows = oracle.random_rows(40)
    states, cache = (
        LabelDecoder(config, max_decode_len=n, batch_size=40)(params, rows) for n in (16, 17)
    )
    ended = states.finished
    assert 5 < ended.sum() < 40
    assert [ids[:16] for ids in cache.ids] == states.ids
    np.testing.assert_allclose(states.scores[ended], cache.scores[ended], atol=2e-5)
