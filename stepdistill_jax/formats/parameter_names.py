"""Maps the paths of our parameters to Hugging Face's tensor names."""

import dataclasses
from collections.abc import Callable
from typing import Any

from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.t5 import T5Config
from stepdistill_jax.models.t5gemma import T5GemmaConfig

HEAD, EMBEDDING = "lm_head.weight", "shared.weight"
# some tools save the tied embedding under these names, too
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# files of v1.0 contain a position bias for cross-attention (the last name below), which no T5 reads
IGNORED = (
    *EMBEDDING_COPIES,
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def _t5_names(config: Any) -> dict[str, str]:
    # Hugging Face numbers the sublayers of a block: 0 is self-attention, the decoder's 1 is
    # cross-attention, and the last one is the feed-forward layer, each with its norm.
    table = {
        "token_embedder": EMBEDDING,
        "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
        "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    }
    if not config.logits_via_embedding:
        table["logits_dense/kernel"] = HEAD
    gates = ("wi",) if len(config.mlp_activations) == 1 else ("wi_0", "wi_1")
    for side, attention, norm in (
        ("encoder", "attention", "pre_attention_layer_norm"),
        ("decoder", "self_attention", "pre_self_attention_layer_norm"),
    ):
        ours, block = f"{side}/layers/", f"{side}.block.{{}}.layer."
        bias = "0.SelfAttention.relative_attention_bias.weight"  # UMT5 has one in each block
        if config.shared_relative_position_bias:  # only block 0 has a table; all layers share it
            table[f"{side}/relpos_bias/rel_embedding"] = f"{side}.block.0.layer.{bias}"
        else:
            table[f"{ours}relpos_bias/rel_embedding"] = block + bias
        table[f"{ours}{norm}/scale"] = f"{block}0.layer_norm.weight"
        for name, letter in _ATTENTION.items():
            table[f"{ours}{attention}/{name}/kernel"] = f"{block}0.SelfAttention.{letter}.weight"
        if side == "decoder":
            table[f"{ours}pre_cross_attention_layer_norm/scale"] = f"{block}1.layer_norm.weight"
            for name, letter in _ATTENTION.items():
                path = f"{ours}encoder_decoder_attention/{name}/kernel"
                table[path] = f"{block}1.EncDecAttention.{letter}.weight"
        last = 2 if side == "decoder" else 1
        table[f"{ours}pre_mlp_layer_norm/scale"] = f"{block}{last}.layer_norm.weight"
        for name in (*gates, "wo"):
            table[f"{ours}mlp/{name}/kernel"] = f"{block}{last}.DenseReluDense.{name}.weight"
    return table


def _t5gemma_names(config: Any) -> dict[str, str]:
    # unlike a T5, a T5Gemma has an embedding for each side, and two norms around each sublayer
    table = {
        "input_embedder": "model.encoder.embed_tokens.weight",
        "target_embedder": GEMMA.embedding,
    }
    if not config.logits_via_embedding:
        table["logits_dense/kernel"] = GEMMA.head
    for side in ("encoder", "decoder"):
        table[f"{side}/{side}_norm/scale"] = f"model.{side}.norm.weight"
        blocks = {"attention" if side == "encoder" else "self_attention": "self_attn"}
        if side == "decoder":
            blocks["encoder_decoder_attention"] = "cross_attn"
        ours, theirs = f"{side}/layers/", f"model.{side}.layers.{{}}."
        for block, module in blocks.items():
            norm_of = "cross_attention" if block == "encoder_decoder_attention" else block
            for when in ("pre", "post"):
                path = f"{ours}{when}_{norm_of}_layer_norm/scale"
                table[path] = f"{theirs}{when}_{module}_layernorm.weight"
            for name, letter in _ATTENTION.items():
                table[f"{ours}{block}/{name}/kernel"] = f"{theirs}{module}.{letter}_proj.weight"
        for when in ("pre", "post"):
            path = f"{ours}{when}_mlp_layer_norm/scale"
            table[path] = f"{theirs}{when}_feedforward_layernorm.weight"
        # in a gated layer, `gate` passes through the activation and `up` is linear
        for name, theirs_name in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            table[f"{ours}mlp/{name}/kernel"] = f"{theirs}mlp.{theirs_name}_proj.weight"
    return table


@dataclasses.dataclass(frozen=True)
class Names:
    """Hugging Face's tensor names of one model family.

    Attributes:
        table: function from a configuration to {our path: tensor name}, where `{}` stands for the layer's
            index: {"decoder/layers/mlp/wo/kernel": "decoder.block.{}.layer.2.DenseReluDense.wo.weight", ...}.
        head: name of the output layer.
        embedding: name of the embedding table.
        ignored: names of tensors that some files contain, but no model reads.
    """

    table: Callable[[Any], dict[str, str]]
    head: str
    embedding: str
    ignored: tuple[str, ...] = ()


T5 = Names(_t5_names, HEAD, EMBEDDING, IGNORED)
GEMMA = Names(_t5gemma_names, "lm_head.out_proj.weight", "model.decoder.embed_tokens.weight")
NAMES = {T5Config: T5, T5GemmaConfig: GEMMA}


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Returns {our path: Hugging Face's tensor name}; see `Names.table`."""
    return NAMES[type(config)].table(config)


def is_transposed(path: str) -> bool:
    """Returns whether torch stores the parameter transposed.

    Torch keeps a matrix as [out, in] and the position bias as [buckets, heads]. We keep them as [in, out] and
    [heads, buckets].
    """
    return path.endswith(("/kernel", "/rel_embedding"))
