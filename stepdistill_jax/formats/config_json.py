"""Converts between Hugging Face's `config.json` and our configurations, with a reader and a writer per family."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from stepdistill_jax.data.vocabulary import EOS_ID, PAD_ID
from stepdistill_jax.errors import InputError
from stepdistill_jax.formats.fields import choice, flag, positive, share, size
from stepdistill_jax.formats.parameter_names import NAMES
from stepdistill_jax.formats.tensors import Weights
from stepdistill_jax.formats.weights import has_own_head
from stepdistill_jax.models.config import ModelConfig, Side
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.models.t5gemma import T5GemmaConfig

# `feed_forward_proj` of Hugging Face -> our activations
_FEED_FORWARD = {
    "relu": ("relu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
}
_T5_SIZES = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "num_encoder_layers": "num_layers",
}


def config_of(path: pathlib.Path, raw: dict[str, Any], weights: Weights | None) -> ModelConfig:
    """Returns the configuration of a `config.json`, whose content is `raw`.

    Weights, if given, decide whether the output layer is tied to the embedding.

    Raises:
        InputError: a field is missing, wrong or not supported.
    """
    family = _FAMILIES[choice(path, raw, "model_type", None, _FAMILIES)]
    tied = flag(path, raw, "tie_word_embeddings", True)
    if weights is not None:
        names = NAMES[family.config]
        # a head that equals the embedding counts as tied, unless config.json says that it is not
        tied = names.head not in weights.shapes() or (tied and not has_own_head(weights, names))
    try:
        return family.read(path, raw, tied)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(str(path)) else f"{path}: {error}") from None


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` for `transformers`."""
    write = next(family.write for family in _FAMILIES.values() if family.config is type(config))
    return write(config) | {
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.logits_via_embedding,
        "decoder_start_token_id": config.start_id,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": "float32",
        "use_cache": True,
    }


def _read_t5(path: pathlib.Path, raw: dict[str, Any], tied: bool) -> T5Config:
    sizes: dict[str, Any] = {ours: size(path, raw, theirs) for ours, theirs in _T5_SIZES.items()}
    if raw.get("num_decoder_layers") is None:  # default of transformers: as deep as the encoder
        raw["num_decoder_layers"] = raw["num_layers"]
    return T5Config(
        **sizes,
        num_decoder_layers=size(path, raw, "num_decoder_layers"),
        num_buckets=size(path, raw, "relative_attention_num_buckets", 32),
        max_distance=size(path, raw, "relative_attention_max_distance", 128),
        dropout_rate=share(path, raw, "dropout_rate", 0.1),
        layer_norm_epsilon=share(path, raw, "layer_norm_epsilon", 1e-6),
        # the default of transformers
        mlp_activations=_FEED_FORWARD[
            choice(path, raw, "feed_forward_proj", "relu", _FEED_FORWARD)
        ],
        # mT5 and ByT5 are T5 v1.1 with other vocabularies; UMT5 has a bias table per layer
        shared_relative_position_bias=raw["model_type"] != "umt5",
        logits_via_embedding=tied,
        scale_decoder_outputs=flag(path, raw, "scale_decoder_outputs", tied),
    )


def _write_t5(config: Any) -> dict[str, Any]:
    model_type = "t5" if config.shared_relative_position_bias else "umt5"
    kinds: dict[tuple[str, ...], str] = {v: k for k, v in _FEED_FORWARD.items()}
    return {
        "architectures": [f"{model_type.upper()}ForConditionalGeneration"],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in _T5_SIZES.items()},
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": kinds[config.mlp_activations],
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_factor": 1.0,
        "scale_decoder_outputs": config.scale_decoder_outputs,
    }


_ACTIVATION = "gelu_pytorch_tanh"  # the default of transformers
_HIDDEN = {"gelu_pytorch_tanh": ("gelu", "linear"), "silu": ("silu", "linear")}
_LAYER_TYPES = ("sliding_attention", "full_attention")
_MOST_POSITIONS = 8192  # Gemma 2's limit; nothing here depends on it


def _read_t5gemma(path: pathlib.Path, raw: dict[str, Any], tied: bool) -> T5GemmaConfig:
    choice(path, raw, "is_encoder_decoder", True, [True])
    sides = {}
    for name in ("encoder", "decoder"):
        if not isinstance(raw.get(name), dict):
            raise InputError(f"{path}: {name} must be an object, got {raw.get(name)!r}")
        sides[name] = _read_side(f"{path}: {name}", raw[name])
    encoder, decoder = raw["encoder"], raw["decoder"]
    here = f"{path}: decoder"
    for name, default in (
        ("vocab_size", 256_000),
        ("rms_norm_eps", 1e-6),
        ("hidden_activation", _ACTIVATION),
    ):
        choice(f"{path}: encoder", encoder, name, default, [decoder.get(name, default)])
    given = decoder.get("cross_attention_hidden_size")
    if given not in (None, sides["encoder"].emb_dim):
        raise InputError(
            f"{path}: decoder.cross_attention_hidden_size must be encoder.hidden_size"
            f" ({sides['encoder'].emb_dim}), got {given!r}"
        )
    choice(here, decoder, "pad_token_id", PAD_ID, [PAD_ID])
    # instruction-tuned models also stop at the end-of-turn token, which none of our targets contains
    ends = decoder.get("eos_token_id", EOS_ID)
    if (ends[:1] if isinstance(ends, list) else [ends]) != [EOS_ID]:
        raise InputError(
            f"{here}: eos_token_id must be {EOS_ID}, or a list that begins with it, got {ends!r}"
        )
    return T5GemmaConfig(
        vocab_size=size(here, decoder, "vocab_size", 256_000),
        encoder=sides["encoder"],
        decoder=sides["decoder"],
        bos_id=0 if decoder.get("bos_token_id", 2) == 0 else size(here, decoder, "bos_token_id", 2),
        mlp_activations=_HIDDEN[choice(here, decoder, "hidden_activation", _ACTIVATION, _HIDDEN)],
        dropout_rate=share(path, raw, "dropout_rate", 0.0),
        layer_norm_epsilon=share(here, decoder, "rms_norm_eps", 1e-6),
        logits_via_embedding=tied,
        logits_softcap=positive(here, decoder, "final_logit_softcapping", 30.0),
    )


def _read_side(where: str, raw: dict[str, Any]) -> Side:
    """Reads one side, encoder or decoder, of a T5Gemma's `config.json`, with transformers' defaults.

    Args:
        where: file and side, for messages.
        raw: fields of the side.
    """
    choice(where, raw, "attention_bias", False, [False])
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or not _is_plain(rope):
        raise InputError(
            f"{where}: rope_parameters must describe plain rotary positions"
            f' ({{"rope_type": "default", "rope_theta": ...}}), got {rope!r}'
        )
    theta = {"rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}
    layers = size(where, raw, "num_hidden_layers", 26)
    types = raw.get("layer_types") or [_LAYER_TYPES[i % 2] for i in range(layers)]
    if (
        not isinstance(types, list)
        or len(types) != layers
        or not all(t in _LAYER_TYPES for t in types)
    ):
        raise InputError(
            f"{where}: layer_types must name one of {', '.join(_LAYER_TYPES)} for each of"
            f" {layers} layers, got {types!r}"
        )
    window = size(where, raw, "sliding_window", 4096) if _LAYER_TYPES[0] in types else 0
    return Side(
        emb_dim=size(where, raw, "hidden_size", 2304),
        num_heads=size(where, raw, "num_attention_heads", 8),
        num_kv_heads=size(where, raw, "num_key_value_heads", 4),
        head_dim=size(where, raw, "head_dim", 256),
        mlp_dim=size(where, raw, "intermediate_size", 9216),
        num_layers=layers,
        score_scale=size(where, raw, "query_pre_attn_scalar", 256) ** -0.5,
        score_softcap=positive(where, raw, "attn_logit_softcapping", 50.0),
        windows=tuple(window if t == _LAYER_TYPES[0] else 0 for t in types),
        rope_theta=positive(where, theta, "rope_theta") or 10_000.0,
        init_stddev=positive(where, raw, "initializer_range", 0.02),
    )


def _is_plain(rope: dict[str, Any]) -> bool:
    # neither a separate RoPE type for each kind of layer nor a scaling factor is supported
    return rope.get("rope_type", "default") == "default" and rope.keys() <= {
        "rope_type",
        "rope_theta",
    }


def _write_t5gemma(config: Any) -> dict[str, Any]:
    kinds: dict[tuple[str, ...], str] = {v: k for k, v in _HIDDEN.items()}

    def module(side: Side, is_decoder: bool) -> dict[str, Any]:
        windows, scalar = side.windows or (0,) * side.num_layers, side.score_scale**-2
        if len({*windows} - {0}) > 1 or abs(scalar - round(scalar)) > 1e-3:
            raise InputError(
                "a T5Gemma's config.json can store only one window size, and only a score scale of"
                f" 1 / sqrt(whole number); this model has the windows {windows} and the scale"
                f" 1 / sqrt({scalar:g})"
            )
        return {
            "model_type": "t5_gemma_module",
            "vocab_size": config.vocab_size,
            "hidden_size": side.emb_dim,
            "intermediate_size": side.mlp_dim,
            "num_hidden_layers": side.num_layers,
            "num_attention_heads": side.num_heads,
            "num_key_value_heads": side.num_kv_heads,
            "head_dim": side.head_dim,
            "hidden_activation": kinds[config.mlp_activations],
            "max_position_embeddings": _MOST_POSITIONS,
            "initializer_range": side.init_stddev,
            "rms_norm_eps": config.layer_norm_epsilon,
            "rope_theta": side.rope_theta,
            "attention_bias": False,
            "attention_dropout": config.dropout_rate,
            "dropout_rate": config.dropout_rate,
            "query_pre_attn_scalar": round(scalar),
            # transformers makes the mask of the window even if no layer has a window
            "sliding_window": max(windows) or 4096,
            "layer_types": [_LAYER_TYPES[0 if window else 1] for window in windows],
            "final_logit_softcapping": config.logits_softcap,
            "attn_logit_softcapping": side.score_softcap,
            "pad_token_id": PAD_ID,
            "eos_token_id": EOS_ID,
            "bos_token_id": config.bos_id,
            "is_decoder": is_decoder,
            "use_cache": is_decoder,
            **({"cross_attention_hidden_size": config.encoder.emb_dim} if is_decoder else {}),
        }

    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": "t5gemma",
        "encoder": module(config.encoder, False),
        "decoder": module(config.decoder, True),
        "vocab_size": config.vocab_size,
        "dropout_rate": config.dropout_rate,
        "attention_dropout": config.dropout_rate,
        "classifier_dropout_rate": 0.0,
        "initializer_range": config.decoder.init_stddev,
        "bos_token_id": config.bos_id,
    }


class _Json(NamedTuple):
    config: type[ModelConfig]
    read: Callable[[pathlib.Path, dict[str, Any], bool], ModelConfig]
    write: Callable[[Any], dict[str, Any]]


_T5 = _Json(T5Config, _read_t5, _write_t5)
_FAMILIES = {
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "t5gemma": _Json(T5GemmaConfig, _read_t5gemma, _write_t5gemma),
}
