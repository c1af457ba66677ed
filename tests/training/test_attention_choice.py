"""Which attention a run takes, and what its first lines say of it, with a kernel of any behaviour."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.models import fused_attention
from stepdistill_jax.models.attention import attention
from stepdistill_jax.models.config import T5Config
from stepdistill_jax.training.attention_choice import settle_attention

LENGTHS = ((20, 20),)  # two kinds of call: one for the encoder and across, one for the decoder


def mesh(platform="tpu"):
    device = types.SimpleNamespace(platform=platform, device_kind="TPU v5 lite")
    return types.SimpleNamespace(devices=np.array([device]), shape={"tensor": 1})


def model(implementation):
    return T5Config(64, 16, 2, 8, 24, 1, 1, num_buckets=6, attention=implementation)


def right(q, k, v, bias, query_segments, key_segments, seeds, *, causal, kept, interpret):
    """The plain operations under the masks of `seeds`."""
    del interpret
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepdistill_jax.models.dropout.dropout_seeds", lambda *_: seeds)
        return attention(
            q,
            k,
            v,
            relative_bias=None if bias is None else bias[None],
            query_segments=query_segments,
            key_segments=key_segments,
            causal=causal,
            dropout_rate=1 - kept / 2**16,
            dropout_rng=jax.random.key(0),
        )


def with_other_masks(q, k, v, bias, queries, keys, seeds, **options):
    return right(q, k, v, bias, queries, keys, seeds + 1, **options)


def without_bias(q, k, v, bias, *others, **options):
    return right(q, k, v, jnp.zeros_like(bias), *others, **options)


def without_gradient(q, *others, **options):
    return right(jax.lax.stop_gradient(q), *others, **options)


def across_segments(q, k, v, bias, queries, keys, seeds, **options):
    return right(q, k, v, bias, queries * 0 + 1, keys * 0 + 1, seeds, **options)


def refused_by_the_compiler(*_, **__):
    raise NotImplementedError("no lowering for this")


@pytest.fixture
def chip(monkeypatch):
    """`chip(kernel, reason)`: a TPU that has such a kernel, which the CPU computes."""

    def made(kernel, reason=None):
        module = types.SimpleNamespace(attention=kernel, reason_against=lambda *_: reason)
        monkeypatch.setattr(fused_attention, "kernel_of", lambda platform: module)

    return made


def test_auto_takes_a_kernel_that_computes_what_plain_operations_do(chip, capsys):
    chip(right)
    assert settle_attention(model("auto"), mesh(), LENGTHS).attention == "pallas"
    said = capsys.readouterr().err.splitlines()
    assert said == ["attention: one kernel (pallas), equal to plain operations on TPU v5 lite"]


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (with_other_masks, "it differs by "),
        pytest.param(without_bias, "it differs by ", marks=pytest.mark.slow),
        (without_gradient, "it differs by 1 of the norm at 20 x 20 tokens"),
        pytest.param(across_segments, "it differs by ", marks=pytest.mark.slow),
        (refused_by_the_compiler, "NotImplementedError: no lowering for this"),
    ],
)
def test_auto_warns_once_and_goes_on_without_a_kernel_that_fails(chip, capsys, kernel, why):
    chip(kernel)
    assert settle_attention(model("auto"), mesh(), LENGTHS).attention == "xla"
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: attention by plain operations (xla)") and why in said


def test_a_kernel_without_these_shapes_is_a_warning_by_auto_and_an_error_by_pallas(chip, capsys):
    chip(right, reason="heads of 3 values")
    assert settle_attention(model("auto"), mesh(), LENGTHS).attention == "xla"
    assert "heads of 3 values" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"`attention`: .*heads of 3 values"):
        settle_attention(model("pallas"), mesh(), LENGTHS)


def test_a_cpu_computes_plain_operations_unless_the_kernel_is_asked_for(capsys):
    assert settle_attention(model("auto"), mesh("cpu"), LENGTHS).attention == "xla"
    assert not capsys.readouterr().err
    assert settle_attention(model("pallas"), mesh("cpu"), LENGTHS).attention == "pallas"
    assert "interpreted" in capsys.readouterr().err
    with pytest.raises(InputError, match="there is none for rocm"):
        settle_attention(model("pallas"), mesh("rocm"), LENGTHS)
