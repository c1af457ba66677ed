"""Greedy decoding against teacher forcing; for all searches: no effect of batch, bucket or mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdistill_jax.decoding.beam import beam_search
from stepdistill_jax.decoding.greedy import (
    LabelDecoder,
    _jit_decode,
    bucket_length,
    bucketed,
    greedy_decode,
    jit_over_rows,
    rows_at_once,
)
from stepdistill_jax.decoding.sampling import sample_decode
from stepdistill_jax.models import sharding
from stepdistill_jax.models.encoder_decoder import EncoderDecoder, abstract_params

MAX_DECODE_LEN = 10
SEARCHES = {
    "greedy": greedy_decode,
    "beam": functools.partial(beam_search, num_beams=4),
    "sampling": functools.partial(sample_decode, rng=jax.random.key(3), temperature=0.8, top_k=50),
}


@pytest.fixture(autouse=True)
def compiled_anew():
    """What is compiled is kept for the next decoder; here it is counted, and traced with stand-ins."""
    _jit_decode.cache_clear()


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    return [[*rng.integers(3, 128, rng.integers(1, 63)).tolist(), 1] for _ in range(45)]


@pytest.fixture(scope="module")
def decoder(tiny_config):
    return LabelDecoder(tiny_config, max_decode_len=MAX_DECODE_LEN, batch_size=8)


@pytest.fixture(scope="module")
def decoded(decoder, tiny_params, rows):
    return decoder(tiny_params, rows)


def test_ids_are_the_argmax_of_teacher_forcing_and_scores_their_log_probability(
    tiny_config, tiny_params, rows, decoded, log_probs_of
):
    source = np.zeros((len(rows), 64), np.int32)
    target = np.zeros((len(rows), MAX_DECODE_LEN), np.int32)
    for i, (row, ids) in enumerate(zip(rows, decoded.ids, strict=True)):
        source[i, : len(row)], target[i, : len(ids)] = row, ids
    log_probs = log_probs_of(tiny_config, tiny_params, source, target)
    lengths = [len(ids) for ids in decoded.ids]
    assert len(set(lengths)) > 3, "the test needs rows that stop at different places"
    for i, ids in enumerate(decoded.ids):
        assert log_probs[i, : len(ids)].argmax(-1).tolist() == ids
        want = log_probs[i, np.arange(len(ids)), ids].sum()
        np.testing.assert_allclose(decoded.scores[i], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_around_a_whole_batch_each_row_is_answered_once(decoder, tiny_params, rows, decoded, count):
    done = []
    found = decoder(tiny_params, rows[:count], done.append)
    assert found.ids == decoded.ids[:count] and sum(done) == count
    np.testing.assert_allclose(found.scores, decoded.scores[:count], atol=1e-5)
    assert found.finished.tolist() == decoded.finished[:count].tolist()


def test_a_short_answer_is_the_beginning_of_a_long_one(tiny_config, tiny_params, rows, decoded):
    length = 2
    assert 2 * length <= tiny_config.head_dim < 2 * MAX_DECODE_LEN, "two ways to read the input"
    decoder = LabelDecoder(tiny_config, max_decode_len=length, batch_size=45)
    got = decoder(tiny_params, rows)
    assert got.ids == [ids[:length] for ids in decoded.ids]
    whole = [len(ids) <= length for ids in decoded.ids]
    np.testing.assert_allclose(got.scores[whole], decoded.scores[whole], rtol=0, atol=1e-5)


def test_an_answer_ends_with_its_first_end_of_sequence_or_is_unfinished(decoded):
    assert 0 < decoded.finished.sum() < len(decoded.ids)
    for ids, finished in zip(decoded.ids, decoded.finished, strict=True):
        assert finished == (ids[-1] == 1)
        assert 1 not in ids[:-1]
        assert finished or len(ids) == MAX_DECODE_LEN


def test_greedy_decode_pads_after_the_end_and_leaves_fillers_alone(
    tiny_config, tiny_params, rows, decoded
):
    stopped = next(i for i, ids in enumerate(decoded.ids) if len(ids) < MAX_DECODE_LEN - 2)
    endless = next(i for i, ids in enumerate(decoded.ids) if ids[-1] != 1)
    batch = np.zeros((3, 64), np.int32)
    batch[0, : len(rows[stopped])], batch[2, : len(rows[endless])] = rows[stopped], rows[endless]
    decode = jax.jit(greedy_decode, static_argnames=("config", "max_decode_len"))
    ids, scores, finished = map(
        np.asarray, decode(tiny_params, tiny_config, batch, max_decode_len=MAX_DECODE_LEN)
    )
    answer = decoded.ids[stopped]
    assert ids[0].tolist() == answer + [0] * (MAX_DECODE_LEN - len(answer))
    assert not ids[1].any() and scores[1] == 0
    assert ids[2].tolist() == decoded.ids[endless]
    assert finished.tolist() == [True, False, False]
    np.testing.assert_allclose(scores[[0, 2]], decoded.scores[[stopped, endless]], atol=1e-5)


@pytest.fixture(scope="module")
def decoded_by(tiny_config, tiny_params, rows, decoded):
    """The answers of a search, in batches of 8 and in the order of `rows`."""

    @functools.cache
    def decode(search):
        if search == "greedy":
            return decoded
        decoder = LabelDecoder(
            tiny_config, max_decode_len=MAX_DECODE_LEN, batch_size=8, decode_fn=SEARCHES[search]
        )
        return decoder(tiny_params, rows)

    return decode


@pytest.mark.parametrize(
    "search, batch_size, longest",
    [
        ("greedy", 1, None),
        ("greedy", 46, 90),
        pytest.param("greedy", 46, 250, marks=pytest.mark.slow),
        pytest.param("beam", 1, None, marks=pytest.mark.slow),
        pytest.param("beam", 46, 250, marks=pytest.mark.slow),
        pytest.param("sampling", 1, None, marks=pytest.mark.slow),
        pytest.param("sampling", 46, 250, marks=pytest.mark.slow),
    ],
)
def test_an_answer_does_not_depend_on_batch_size_order_or_bucket(
    tiny_config, tiny_params, rows, decoded_by, search, batch_size, longest
):
    decoded = decoded_by(search)
    order = np.random.default_rng(batch_size).permutation(len(rows))
    asked = [rows[i] for i in order]
    if longest:  # all 46 rows are one batch, padded to the bucket of this one: 96 or 256, not 64
        asked.insert(17, [*np.random.default_rng(longest).integers(3, 128, longest - 1), 1])
    other = LabelDecoder(
        tiny_config,
        max_decode_len=MAX_DECODE_LEN,
        batch_size=batch_size,
        decode_fn=SEARCHES[search],
    )
    compiled = other._decode._cache_size()  # shared with the decoders of its kind in this process
    got = other(tiny_params, asked)
    if longest:
        assert other._decode._cache_size() == compiled + 1
        del got.ids[17]
        got = dataclasses.replace(
            got, scores=np.delete(got.scores, 17), finished=np.delete(got.finished, 17)
        )
    assert len(set(map(tuple, decoded.ids))) > 10, "the test needs rows with different answers"
    assert got.ids == [decoded.ids[i] for i in order]
    # measured: 1.2e-5, at scores of up to -43
    np.testing.assert_allclose(got.scores, decoded.scores[order], rtol=0, atol=4e-5)
    np.testing.assert_array_equal(got.finished, decoded.finished[order])


def test_a_function_of_the_users_own_is_asked_like_greedy_decode(tiny_config, tiny_params):
    def longest_answer(params, config, encoder_input_tokens, *, max_decode_len):
        assert config is tiny_config and params.keys() == tiny_params.keys()
        ids = jnp.broadcast_to(encoder_input_tokens[:, :1], (2, max_decode_len))
        return ids, jnp.array([-1.0, -2.0]), jnp.array([False, False])

    decoder = LabelDecoder(tiny_config, max_decode_len=3, batch_size=2, decode_fn=longest_answer)
    got = decoder(tiny_params, [[9, 1], [8, 7, 1]])
    assert got.ids == [[9] * 3, [8] * 3]
    assert got.scores.tolist() == [-2, -1], "the longer input comes first in the batch"


def test_progress_counts_rows_and_not_fillers(decoder, tiny_params, rows):
    seen = []
    decoder(tiny_params, rows, seen.append)
    assert sum(seen) == len(rows) and len(seen) == 6


@pytest.fixture
def steps(monkeypatch):
    """The number of rows in each step of the loop over tokens."""
    seen, step = [], EncoderDecoder.decode_step

    def watched(self, last, *args):
        jax.debug.callback(lambda: seen.append(last.shape[0]))
        return step(self, last, *args)

    monkeypatch.setattr(EncoderDecoder, "decode_step", watched)
    return seen


def test_rows_that_stop_early_end_the_loop(tiny_config, tiny_params, rows, decoded, steps):
    lengths = [len(ids) for ids in decoded.ids]
    early = [i for i in np.argsort(lengths) if lengths[i] < MAX_DECODE_LEN][-3:]
    assert max(lengths[i] for i in early) > 1 and decoded.finished[early].all()
    decoder = LabelDecoder(tiny_config, max_decode_len=MAX_DECODE_LEN, batch_size=4)
    got = decoder(tiny_params, [rows[i] for i in early])
    jax.effects_barrier()
    assert got.ids == [decoded.ids[i] for i in early]
    assert steps == [4] * max(map(len, got.ids))


def test_when_a_quarter_of_the_rows_is_left_these_are_decoded_by_themselves(
    tiny_config, tiny_params, rows, decoded, steps
):
    decoder = LabelDecoder(tiny_config, max_decode_len=MAX_DECODE_LEN, batch_size=32)
    got = decoder(tiny_params, rows[:32])
    jax.effects_barrier()
    assert got.ids == decoded.ids[:32]
    going = [sum(len(ids) > step for ids in got.ids) for step in range(MAX_DECODE_LEN)]
    assert going[0] == 32 and 0 < going[-1] <= 8
    assert steps == [32 if count > 8 else 8 for count in going]


def test_a_search_in_bfloat16_reads_all_matrices_in_it(tiny_params, tiny_t5gemma):
    """Else each token would read, and cast, a table of all ids; norms and biases stay float32."""
    for params in (tiny_params, tiny_t5gemma[1]):
        params_of_search = jit_over_rows(lambda params, _: params, None, "bfloat16")
        for x in jax.tree.leaves(jax.eval_shape(params_of_search, params, ())):
            is_matrix = x.ndim > 1 and min(x.shape[-2:]) > 3  # a stack of scales has 2 or 3 rows
            assert x.dtype == ("bfloat16" if is_matrix else "float32"), x.shape


def test_a_row_without_ids_is_refused(decoder, tiny_params):
    with pytest.raises(ValueError, match="row 1 has no ids"):
        decoder(tiny_params, [[5, 1], []])


def test_few_shapes_are_compiled(tiny_config, tiny_params):
    decoder = LabelDecoder(tiny_config, max_decode_len=2, batch_size=4)
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 65, 21)
        decoder(tiny_params, [[3] * n for n in lengths])
    assert decoder._decode._cache_size() == len({bucket_length(n) for n in range(1, 65)}) == 5


def test_a_gpu_decodes_at_least_eight_rows_at_once(monkeypatch):
    assert [rows_at_once(n, None) for n in (1, 9, None)] == [1, 9, 64]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [rows_at_once(n, None) for n in (1, 9, None)] == [8, 9, 64]


@given(st.integers(1, 5000))
def test_a_bucket_holds_its_row_with_at_most_a_quarter_as_much_padding(length):
    bucket = bucket_length(length)
    assert length <= bucket <= max(32, 1.25 * length)
    assert bucket_length(bucket) == bucket


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 9))
def test_bucketed_holds_each_row_once_the_longest_first(lengths, batch_size):
    rows = [[i + 3] * n for i, n in enumerate(lengths)]
    places, widths = [], []
    for batch_places, batch in bucketed(rows, batch_size):
        assert batch.shape[0] == batch_size
        for i, place in enumerate(batch_places):
            assert batch[i][batch[i] > 0].tolist() == rows[place]
        assert not batch[len(batch_places) :].any()
        places += batch_places
        widths.append(batch.shape[1])
    assert sorted(places) == list(range(len(rows)))
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    "search, batch_size",
    [("greedy", 45), *(pytest.param(s, 9, marks=pytest.mark.slow) for s in ("greedy", "beam"))],
)
def test_a_mesh_gives_the_same_answers(
    tiny_config, tiny_params, rows, decoded_by, search, batch_size
):
    decoded = decoded_by(search)
    assert len(jax.devices()) == 8
    mesh = sharding.make_mesh(sharding.Layout(data=2, fsdp=2, tensor=2))
    params = jax.device_put(
        tiny_params, sharding.param_shardings(mesh, abstract_params(tiny_config), tiny_config)
    )
    decoder = LabelDecoder(
        tiny_config,
        max_decode_len=MAX_DECODE_LEN,
        batch_size=batch_size,
        mesh=mesh,
        decode_fn=SEARCHES[search],
    )
    filled = {9: 12, 45: 48}[batch_size]
    assert decoder.batch_size == filled, "rounded up to a multiple of the 4 parts of a batch"
    got = decoder(params, rows)
    assert got.ids == decoded.ids
    np.testing.assert_allclose(got.scores, decoded.scores, rtol=1e-6, atol=1e-5)
