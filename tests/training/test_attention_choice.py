"""Which attention a run takes, and what its first lines say of it, with a kernel of any behaviour."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdistill_jax.errors import InputError
from stepdistill_jax.models import fused_attention
from stepdistill_jax.models.attention import attention
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.models.t5gemma import T5GemmaConfig, gemma_side
from stepdistill_jax.training import run as run_module
from stepdistill_jax.training.attention_choice import settle_attention
from stepdistill_jax.training.config import TrainConfig

LENGTHS = ((20, 20),)


def mesh(platform="tpu", kind="TPU v5 lite"):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    return types.SimpleNamespace(devices=np.array([device]), shape={"tensor": 1})


def model(implementation):
    return T5Config(
        vocab_size=64,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=24,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_buckets=6,
        attention=implementation,
    )


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
    return right(q, k, v, None if bias is None else jnp.zeros_like(bias), *others, **options)


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
        module = types.SimpleNamespace(attention=kernel, reason_against=lambda *_, **__: reason)
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
        (with_other_masks, "the kernel has a relative error of "),
        pytest.param(without_bias, "the kernel has a relative error of ", marks=pytest.mark.slow),
        (without_gradient, "the kernel has a relative error of 1 for 20 x 20 tokens"),
        pytest.param(
            across_segments, "the kernel has a relative error of ", marks=pytest.mark.slow
        ),
        (refused_by_the_compiler, "NotImplementedError: no lowering for this"),
    ],
)
def test_auto_warns_once_and_goes_on_without_a_kernel_that_fails(chip, capsys, kernel, why):
    chip(kernel)
    assert settle_attention(model("auto"), mesh(), LENGTHS).attention == "xla"
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: attention uses plain operations (xla)") and why in said


def test_a_kernel_without_these_shapes_is_a_warning_by_auto_and_an_error_by_pallas(chip, capsys):
    chip(right, reason="heads of 3 values")
    assert settle_attention(model("auto"), mesh(), LENGTHS).attention == "xla"
    assert "heads of 3 values" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"`attention`: .*heads of 3 values"):
        settle_attention(model("pallas"), mesh(), LENGTHS)


def test_a_t5gemma_has_no_kernel_which_is_said_once(chip, capsys):
    chip(right)
    sides = {name: gemma_side(16, 2, 1, 8, 24, 2) for name in ("encoder", "decoder")}
    model = T5GemmaConfig(vocab_size=64, **sides, attention="auto")
    none = "no kernel supports soft caps of scores, shared heads of keys and values, windows, a scale of scores"
    assert settle_attention(model, mesh(), LENGTHS).attention == "xla"
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"warning: attention uses plain operations (xla): {none}"
    assert settle_attention(model, mesh("cpu"), LENGTHS).attention == "xla"
    assert not capsys.readouterr().err
    for platform in ("tpu", "gpu", "cpu"):
        with pytest.raises(InputError, match=f"^`attention`: pallas cannot be used here: {none};"):
            settle_attention(
                dataclasses.replace(model, attention="pallas"), mesh(platform), LENGTHS
            )


def test_a_cpu_computes_plain_operations_unless_the_kernel_is_asked_for(capsys):
    assert settle_attention(model("auto"), mesh("cpu"), LENGTHS).attention == "xla"
    assert not capsys.readouterr().err
    kernel = dataclasses.replace(model("pallas"), head_dim=64)
    assert settle_attention(kernel, mesh("cpu"), LENGTHS).attention == "pallas"
    assert "interpreted" in capsys.readouterr().err
    with pytest.raises(InputError, match="there is no kernel for another chip"):
        settle_attention(model("pallas"), mesh("other", "another chip"), LENGTHS)


def test_float32_that_is_multiplied_as_bfloat16_is_no_float32(chip, capsys):
    def rounded(q, k, v, *others, **options):
        q, k, v = (x.astype(jnp.bfloat16).astype(x.dtype) for x in (q, k, v))
        return right(q, k, v, *others, **options)

    chip(rounded)
    assert settle_attention(model("auto"), mesh(), LENGTHS).attention == "xla"
    assert "the kernel has a relative error of " in capsys.readouterr().err


@pytest.mark.parametrize("pack", [True, False])
def test_a_run_settles_its_attention_for_the_lengths_of_its_rows(
    pack, monkeypatch, tmp_path, delivery_data_dir
):
    asked = []

    def settled(model, mesh, lengths):
        asked.append((model.attention, lengths))
        return dataclasses.replace(model, attention="pallas")

    monkeypatch.setattr(run_module, "settle_attention", settled)
    config = TrainConfig(
        task="delivery", model_size="tiny", batch_size=8, input_length=64, target_length=40,
        train_steps=2, eval_every=2, checkpoint_every=2, pack=pack,
    )  # fmt: skip
    run = run_module.assemble(config, tmp_path / "run", delivery_data_dir)
    assert run.model.attention == "pallas" and asked == [("auto", run.batches.lengths)]
    assert len(asked[0][1]) == (1 if pack else 2)
    # a validation's many lengths are not tried
    assert run.validator is not None and run.validator.config.attention == "xla"
