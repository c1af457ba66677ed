"""`attention` against a loop in numpy, and dropout masks that positions share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.models.attention import attention
from stepdistill_jax.models.dropout import Dropout
from stepdistill_jax.models.positions import RelativeBias, relative_buckets
from stepdistill_jax.models.t5 import T5Config

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 5, 7, 4, 3
QUERY_SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]], np.int32)
KEY_SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0, 0]], np.int32)


def by_hand(q, k, v, *, bias=None, causal=False, softcap=None, window=None, scale=1.0):
    """One query after the other; NaN where it sees no key."""
    out = np.full(q.shape, np.nan)
    group = q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        scores, values = [], []
        for j in range(k.shape[1]):
            if KEY_SEGMENTS[b, j] == 0 or KEY_SEGMENTS[b, j] != QUERY_SEGMENTS[b, i]:
                continue
            if (causal and j > i) or (window is not None and abs(i - j) >= window):
                continue
            score = scale * q[b, i, h] @ k[b, j, h // group]
            score = score if softcap is None else softcap * np.tanh(score / softcap)
            scores.append(score if bias is None else score + bias[0, h, i, j])
            values.append(v[b, j, h // group])
        if scores:
            weights = np.exp(np.array(scores) - max(scores))
            out[b, i, h] = weights @ np.array(values) / weights.sum()
    return out


def arrays(kv_heads=HEADS):
    rng = np.random.default_rng(3)
    shapes = (QUERIES, HEADS), (KEYS, kv_heads), (KEYS, kv_heads)
    return tuple(rng.normal(size=(BATCH, *shape, WIDTH)).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize(
    ("kv_heads", "options"),
    [
        (HEADS, {}),
        (HEADS, {"causal": True}),
        (HEADS, {"bias": True, "window": 3, "softcap": 1.5, "scale": 2.0}),
        (2, {"bias": True, "causal": True, "window": 2}),
        (1, {"softcap": 0.7}),
    ],
    ids=str,
)
def test_attention_is_the_mean_of_what_each_query_sees(kv_heads, options):
    q, k, v = arrays(kv_heads)
    options = dict(options)
    bias = None
    if options.pop("bias", False):
        bias = np.random.default_rng(4).normal(size=(1, HEADS, QUERIES, KEYS)).astype(np.float32)
    want = by_hand(q, k, v, bias=bias, **options)
    got = attention(
        *map(jnp.asarray, (q, k, v)),
        relative_bias=bias,
        query_segments=jnp.asarray(QUERY_SEGMENTS),
        key_segments=jnp.asarray(KEY_SEGMENTS),
        **{"causal": False, **options},
    )
    known = ~np.isnan(want)
    assert 0.5 < known.mean() < 1 and np.isfinite(got).all()
    np.testing.assert_allclose(np.asarray(got)[known], want[known], rtol=2e-5, atol=2e-6)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'flash'"):
        attention(*arrays(), query_segments=QUERY_SEGMENTS, key_segments=KEY_SEGMENTS, causal=False, implementation="flash")  # fmt: skip


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_relative_bias_is_the_table_looked_up_to_the_bit(bidirectional):
    config = T5Config(num_heads=3, num_buckets=8, max_distance=20)
    query, key = jnp.arange(30), jnp.arange(40)
    module = RelativeBias(config, bidirectional)
    table = np.random.default_rng(5).normal(size=(3, 8)).astype(np.float32)
    weights = np.random.default_rng(6).normal(size=(1, 3, 30, 40)).astype(np.float32)

    def total(table):
        bias = module.apply({"params": {"rel_embedding": table}}, query, key)
        return jnp.vdot(bias, weights), bias

    (_, bias), gradient = jax.value_and_grad(total, has_aux=True)(table)
    buckets = np.asarray(relative_buckets(
        query, key, bidirectional=bidirectional, num_buckets=8, max_distance=20
    ))  # fmt: skip
    np.testing.assert_array_equal(bias, table[:, buckets][None])
    want = np.zeros((3, 8))
    for h in range(3):
        np.add.at(want[h], buckets, weights[0, h])
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-4)


def test_a_shared_mask_is_the_same_at_all_positions_and_meets_its_rate():
    layer, rngs = Dropout(0.3, broadcast=True, deterministic=False), {"dropout": jax.random.key(1)}
    x = np.asarray(layer.apply({}, jnp.ones((50, 6, 400)), rngs=rngs))
    np.testing.assert_array_equal(x, np.broadcast_to(x[:, :1], x.shape))
    kept = x[:, 0] != 0
    assert abs(kept.mean() - 0.7) < 5 * (0.3 * 0.7 / kept.size) ** 0.5
    assert abs((kept[0] == kept[1]).mean() - (0.7**2 + 0.3**2)) < 0.15  # rows have their own


@pytest.mark.parametrize("shared", [True, False])
def test_attention_weights_share_a_mask_along_the_queries(shared):
    """Equal queries then lose the same keys."""
    q, k, v = (jnp.asarray(x) for x in arrays())
    q = jnp.broadcast_to(q[:, :1], q.shape)
    segments = jnp.ones((1, 1), jnp.int32), jnp.ones((1, KEYS), jnp.int32)
    call = functools.partial(
        attention, q, k, v, query_segments=segments[0], key_segments=segments[1], causal=False
    )
    whole = np.asarray(call())
    dropped = call(dropout_rate=0.5, dropout_rng=jax.random.key(2), dropout_broadcast=shared)
    assert np.abs(dropped - whole).max() > 0.1
    by_query = np.abs(np.asarray(dropped) - np.asarray(dropped)[:, :1]).max()
    assert by_query < 1e-6 if shared else by_query > 0.1
