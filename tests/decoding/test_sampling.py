"""Sampling: frequencies against exact probabilities, and what a draw depends on."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from stepdistill_jax.decoding.greedy import LabelDecoder, greedy_decode
from stepdistill_jax.decoding.sampling import filter_logits, row_keys, sample_decode
from stepdistill_jax.errors import InputError

VOCAB, DRAWS = 6, 4000
SEED = 1  # of the draws; over 100 other seeds the p-values of these tests are uniform
SETTINGS = {
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "all": {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
}


@pytest.fixture(scope="module")
def model(model_of_few_ids):
    """(config, params, two inputs [2, 5]) with 6 ids."""
    config, params = model_of_few_ids(VOCAB, 1, seed=1)
    return config, params, np.array([[2, 3, 4, 5, 1], [5, 5, 1, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def logits(model, log_probs_of):
    """[2, 1 + 6, 6] float64 by teacher forcing: at the start, and after each first id."""
    config, params, inputs = model
    source = np.repeat(inputs, VOCAB, axis=0)
    first = np.tile(np.arange(VOCAB, dtype=np.int32), 2)
    out = log_probs_of(config, params, source, np.stack([first, first], axis=1))
    out = out.reshape(2, VOCAB, 2, VOCAB)
    return np.concatenate([out[:, :1, 0], out[:, :, 1]], axis=1)


@pytest.fixture(scope="module")
def draw(model):
    """(name of settings) -> ids [draws, 2, 2], scores [draws, 2] and finished [draws, 2]."""
    config, params, inputs = model
    keys = jax.random.split(jax.random.key(SEED), DRAWS)

    @functools.cache
    def draws(name):
        decode = functools.partial(
            sample_decode, params, config, inputs, max_decode_len=2, **SETTINGS[name]
        )
        return tuple(map(np.asarray, jax.jit(jax.vmap(lambda rng: decode(rng=rng)))(keys)))

    return draws


def exact(logits, *, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities [vocab] of the next id, by a loop over the ids, the likeliest first."""
    scaled = np.exp(logits / temperature)
    scaled /= scaled.sum()
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])[: top_k or None]
    total, before, keep = sum(scaled[i] for i in order), 0.0, []
    for i in order:
        if keep and before >= top_p:
            break
        keep.append(i)
        before += scaled[i] / total
    probs = np.zeros(len(scaled))
    probs[keep] = scaled[keep] / scaled[keep].sum()
    return probs


def p_value(counts, probs):
    """Of the chi-square test; what has probability 0 must not have been drawn."""
    assert not counts[probs == 0].any()
    expected = probs * counts.sum()
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        counts, expected = counts[:-1], expected[:-1]
    return scipy.stats.chisquare(counts, expected).pvalue


def p_values(ids, logits, **settings):
    """Of the first id, and of the answers of up to 2 ids."""
    first = exact(logits[0], **settings)
    both = {}
    for a, b in itertools.product(range(VOCAB), repeat=2):
        answer = (a, 0) if a == 1 else (a, b)
        prob = first[a] * exact(logits[1 + a], **settings)[b]
        both[answer] = both.get(answer, 0.0) + prob
    counts = [(ids == answer).all(-1).sum() for answer in both]
    assert sum(counts) == len(ids), "ids after the end"
    return (
        p_value(np.bincount(ids[:, 0], minlength=VOCAB), first),
        p_value(np.array(counts), np.array(list(both.values()))),
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_are_the_probabilities(draw, logits, name):
    ids, _, _ = draw(name)
    for row in range(2):
        assert min(p_values(ids[:, row], logits[row], **SETTINGS[name])) > 1e-3


def test_another_temperature_fails_the_same_test(draw, logits):
    ids, _, _ = draw("temperature 0.7")
    for row, wrong in itertools.product(range(2), (0.6, 0.85, 1.0)):
        assert max(p_values(ids[:, row], logits[row], temperature=wrong)) < 1e-3


def test_rows_are_drawn_independently_of_each_other(draw):
    ids, _, _ = draw("temperature 1")
    table = np.zeros((VOCAB, VOCAB))
    np.add.at(table, (ids[:, 0, 0], ids[:, 1, 0]), 1)
    table = table[table.sum(1) > 100][:, table.sum(0) > 100]
    assert min(table.shape) > 2
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_scores_are_log_probabilities_at_temperature_1_with_all_ids(draw, logits):
    ids, scores, finished = (x[:200] for x in draw("all"))
    log_probs = np.log(np.apply_along_axis(exact, -1, logits))
    for row in range(2):
        for (a, b), score, done in zip(ids[:, row], scores[:, row], finished[:, row], strict=True):
            want = log_probs[row, 0, a] + (0 if a == 1 else log_probs[row, 1 + a, b])
            assert score == pytest.approx(want, abs=1e-5)
            assert done == (1 in (a, b))
    assert {len(set(finished[:, row])) for row in range(2)} == {2}


def decode(model, inputs, decode_fn, **settings):
    config, params, _ = model
    return tuple(
        map(
            np.asarray,
            jax.jit(functools.partial(decode_fn, params, config, max_decode_len=8, **settings))(
                inputs
            ),
        )
    )


@pytest.mark.slow
def test_the_likeliest_id_alone_is_greedy(model):
    inputs = np.random.default_rng(0).integers(2, VOCAB, (40, 7)).astype(np.int32)
    want = decode(model, inputs, greedy_decode)
    for settings in ({"top_k": 1, "temperature": 3.0}, {"top_p": 0.0}):
        got = decode(model, inputs, sample_decode, rng=jax.random.key(0), **settings)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_equal_rows_get_equal_answers_another_key_others_and_fillers_none(model):
    inputs = np.tile(np.array([[2, 3, 4, 1, 0]], np.int32), (6, 1))
    inputs[3:] = [[3, 2, 4, 1, 0], [2, 3, 4, 4, 1], [0] * 5]
    ids, scores, finished = decode(model, inputs, sample_decode, rng=jax.random.key(0))
    assert (ids[1:3] == ids[0]).all() and (scores[1:3] == scores[0]).all()
    assert not ids[5].any() and scores[5] == 0 and not finished[5]
    other, _, _ = decode(model, inputs, sample_decode, rng=jax.random.key(1))
    assert (other[:5] != ids[:5]).any()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_a_rows_key_depends_on_its_ids_their_order_and_nothing_else(impl):
    rng = jax.random.key(0, impl=impl)
    rows = np.array([[2, 3, 1, 0], [3, 2, 1, 0], [2, 3, 3, 1], [2, 1, 0, 0]], np.int32)
    keys = jax.random.key_data(row_keys(rng, rows))
    assert len(set(map(tuple, keys.tolist()))) == 4
    longer = np.pad(rows, ((0, 0), (0, 60)))[::-1]
    np.testing.assert_array_equal(jax.random.key_data(row_keys(rng, longer))[::-1], keys)
    np.testing.assert_array_equal(jax.random.key_data(row_keys(rng, rows[1:2])), keys[1:2])


@pytest.mark.parametrize(
    "settings",
    [(0.7, 0, 1.0), (1.0, 10, 1.0), (1.0, 0, 0.9), (2.0, 20, 0.5), (1.0, 500, 0.0)],
    ids=str,
)
def test_filtered_logits_are_those_of_transformers(settings):
    torch = pytest.importorskip("torch", reason="torch is not installed: no oracle to compare with")
    from transformers.generation import logits_process as peer

    temperature, top_k, top_p = settings
    logits = np.random.default_rng(0).normal(size=(50, 100)).astype(np.float32) * 3
    want = peer.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k:
        want = peer.TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = peer.TopPLogitsWarper(top_p)(None, want)
    got = filter_logits(jnp.asarray(logits), temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": 0.0}, "`temperature` must be a number above 0, not 0.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(model, settings, message):
    config, params, inputs = model
    with pytest.raises(InputError, match=message):
        sample_decode(params, config, inputs, max_decode_len=2, rng=jax.random.key(0), **settings)


def test_label_decoder_draws_the_same_in_any_order(model):
    """The last 8 of 32 rows are gathered and go on by themselves, each with its own key."""
    config, params, _ = model
    decoder = LabelDecoder(
        config,
        max_decode_len=16,
        batch_size=32,
        decode_fn=functools.partial(sample_decode, rng=jax.random.key(7)),
    )
    rows = [[2 + i % 4, 2 + i // 4 % 4, 2 + i // 16, 1] for i in range(32)]
    want = decoder(params, rows)
    got = decoder(params, rows[::-1])
    assert got.ids[::-1] == want.ids
    assert len(set(map(tuple, want.ids))) > 16
    gathered, end = np.sort([len(ids) for ids in want.ids])[[-9, -1]]
    assert gathered + 2 < end, "the test needs rows that go on after they were gathered"
