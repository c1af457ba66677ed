"""Beam search against brute force over a tiny vocabulary; its options, and damaged weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.decoding.beam import beam_search, search
from stepdistill_jax.decoding.greedy import LabelDecoder, greedy_decode
from stepdistill_jax.errors import InputError

VOCAB, LENGTH = 5, 3
beams = jax.jit(
    beam_search, static_argnames=("config", "max_decode_len", "num_beams", "length_penalty")
)


@pytest.fixture(scope="module")
def small(model_of_few_ids):
    """(config, params, inputs [25, 6], the last one filler) of a model with 5 ids."""
    config, params = model_of_few_ids(VOCAB, 2, seed=2)
    # such that best answers of all lengths are among the inputs'
    params["logits_dense"]["kernel"] = params["logits_dense"]["kernel"].at[:, 1].multiply(2.0)
    inputs = np.random.default_rng(0).integers(2, VOCAB, (25, 6)).astype(np.int32)
    inputs[::3, 3:] = 0
    inputs[-1] = 0
    return config, params, inputs


@pytest.fixture(scope="module")
def all_answers(small, log_probs_of):
    """For each input, the log probability of each answer of up to 3 ids, from teacher forcing."""
    config, params, inputs = small
    targets = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)
    count = len(targets)
    source = np.repeat(inputs[:-1], count, axis=0)
    target = np.tile(targets, (len(inputs) - 1, 1))
    log_probs = log_probs_of(config, params, source, target)
    found = []
    for row in log_probs.reshape(-1, count, LENGTH, VOCAB):
        answers = {}
        for ids, steps in zip(targets.tolist(), row, strict=True):
            length = ids.index(1) + 1 if 1 in ids else LENGTH
            answers[tuple(ids[:length])] = sum(steps[i, ids[i]] for i in range(length))
        found.append(answers)
    return found


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_the_best_of_all_answers(small, all_answers, length_penalty):
    config, params, inputs = small
    ids, scores, finished = map(
        np.asarray,
        beams(
            params,
            config,
            inputs,
            max_decode_len=LENGTH,
            num_beams=32,
            length_penalty=length_penalty,
        ),
    )
    for i, answers in enumerate(all_answers):
        assert len(answers) == 1 + 4 + 4 * 4 * 5
        assert sum(map(np.exp, answers.values())) == pytest.approx(1, abs=1e-6)
        best = max(answers, key=lambda a: answers[a] / len(a) ** length_penalty)
        assert ids[i].tolist() == [*best, *[0] * (LENGTH - len(best))]
        # the score has no length penalty in it
        assert scores[i] == pytest.approx(answers[best], abs=1e-5)
        assert finished[i] == (best[-1] == 1)
    assert not ids[-1].any() and scores[-1] == 0 and not finished[-1], "the filler"


def test_the_inputs_of_brute_force_have_answers_of_several_lengths(all_answers):
    def lengths(length_penalty):
        return [
            len(max(answers, key=lambda a: answers[a] / len(a) ** length_penalty))
            for answers in all_answers
        ]

    assert set(lengths(0.0)) == {1, 2, 3}
    assert lengths(0.0) != lengths(1.0), "the test needs answers that the penalty changes"


def test_one_beam_is_greedy(small):
    config, params, inputs = small
    got = beams(params, config, inputs, max_decode_len=8, num_beams=1, length_penalty=2.0)
    decode = jax.jit(greedy_decode, static_argnames=("config", "max_decode_len"))
    want = decode(params, config, inputs, max_decode_len=8)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert search(1) is greedy_decode


def test_the_encoders_keys_are_not_copied_per_beam(tiny_config, tiny_params):
    def biggest(num_beams):
        decode = functools.partial(beam_search, config=tiny_config, max_decode_len=4)
        text = str(
            jax.make_jaxpr(lambda p, ids: decode(p, encoder_input_tokens=ids, num_beams=num_beams))(
                tiny_params, jnp.ones((3, 512), jnp.int32)
            )
        )
        # [layers, rows, heads, kv, length]
        return {rows for rows in range(1, 40) if f"f32[1,{rows},2,8,512]" in text}

    assert biggest(2) == biggest(4) == {3}


def test_damaged_weights_give_a_score_that_is_no_number(small):
    config, params, inputs = small
    params = {**params, "logits_dense": {"kernel": jnp.full((16, VOCAB), jnp.nan)}}
    _, scores, _ = beams(params, config, inputs, max_decode_len=4, num_beams=2, length_penalty=1.0)
    assert np.isnan(scores[:-1]).all() and scores[-1] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 0}, "`num_beams` must be a whole number of at least 1, not 0"),
        ({"num_beams": 2.5}, "`num_beams` must be a whole number of at least 1, not 2.5"),
        ({"num_beams": True}, "`num_beams`"),
        (
            {"num_beams": 2, "length_penalty": float("nan")},
            "`length_penalty` must be a number of at least -10 and at most 10",
        ),
        (
            {"num_beams": 2, "length_penalty": 11.0},
            "`length_penalty` must be a number of at least -10 and at most 10",
        ),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(small, options, message):
    config, params, inputs = small
    for call in (
        lambda: beam_search(params, config, inputs, max_decode_len=3, **options),
        lambda: search(**options),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_length_penalty_for_one_beam_is_refused():
    for length_penalty in (0.6, 1.0):
        with pytest.raises(
            InputError, match=r"`length_penalty`: .* a single beam; .* `num_beams=2`"
        ):
            search(1, length_penalty)


def test_the_score_is_the_log_probability_of_the_answer(tiny_config, tiny_params, log_probs_of):
    rng = np.random.default_rng(4)
    rows = [[*rng.integers(3, 128, 20).tolist(), 1] for _ in range(20)]
    got = LabelDecoder(tiny_config, max_decode_len=8, batch_size=20, decode_fn=search(3))(
        tiny_params, rows
    )
    assert len({len(ids) for ids in got.ids}) > 2
    target = np.zeros((20, 8), np.int32)
    for i, ids in enumerate(got.ids):
        target[i, : len(ids)] = ids
    log_probs = log_probs_of(tiny_config, tiny_params, np.array(rows, np.int32), target)
    for i, ids in enumerate(got.ids):
        want = sum(float(log_probs[i, k, id]) for k, id in enumerate(ids))
        assert got.scores[i] == pytest.approx(want, abs=1e-5)
        assert got.finished[i] == (ids[-1] == 1) and 1 not in ids[:-1]
