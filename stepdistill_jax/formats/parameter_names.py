"""Hugging Face tensor names of our parameters."""

from stepdistill_jax.models.t5 import T5Config

HEAD, EMBEDDING = "lm_head.weight", "shared.weight"
# copies of the embedding that some writers keep
EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# and a table that v1.0 files hold and T5 never reads
IGNORED = (
    *EMBEDDING_COPIES,
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}


def hf_names(config: T5Config) -> dict[str, str]:
    """Our path -> Hugging Face tensor name, `{}` standing for the layer.

    Example: `decoder/layers/mlp/wo/kernel` -> `decoder.block.{}.layer.2.DenseReluDense.wo.weight`.
    """
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
        bias = "0.SelfAttention.relative_attention_bias.weight"
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


def is_transposed(path: str) -> bool:
    """Torch keeps matrices as [out, in], and the bias as [buckets, heads] where ours is [heads, buckets]."""
    return path.endswith(("/kernel", "/rel_embedding"))
