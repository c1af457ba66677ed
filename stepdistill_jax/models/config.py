"""Sizes of a T5, and the v1.1 family by name."""

import dataclasses

from stepdistill_jax.errors import InputError, nearest

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Everything that decides shapes and arithmetic of a T5 v1.1 (names as in T5X's `network.py`).

    Attributes:
        vocab_size: rows of the embedding; at least the vocabulary's pieces.
        emb_dim: model width (Hugging Face `d_model`).
        num_heads, head_dim: attention heads and the width of each (`num_heads`, `d_kv`).
        mlp_dim: feed-forward width (`d_ff`).
        num_encoder_layers, num_decoder_layers: depth (`num_layers`, `num_decoder_layers`).
        mlp_activations: `("gelu", "linear")` is the gated tanh gelu of v1.1.
        dropout_rate: of embeddings, attention weights, and the output of each block; 0 to 1.
        num_buckets, max_distance: relative position bias.
        logits_via_embedding: the embedding doubles as output layer (v1.0); v1.1 has its own.
        dtype: of activations, `float32` or `bfloat16`; parameters are always float32.
        remat_policy: what the backward pass recomputes: `none`, `minimal` (all but matmul
            results), `full` (everything inside a layer).

    Raises:
        InputError: `float16` (it overflows in T5's feed-forward), an unknown dtype or policy.
    """

    vocab_size: int = 32128
    emb_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.1
    num_buckets: int = 32
    max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    logits_via_embedding: bool = False
    dtype: str = "float32"
    remat_policy: str = "none"

    def __post_init__(self):
        if self.dtype == "float16":
            raise InputError(
                "DTYPE: float16 overflows in T5's feed-forward layers and gives NaN;"
                " set DTYPE=bfloat16"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"DTYPE: one of {', '.join(DTYPES)} is wanted, got {self.dtype!r}")
        if self.remat_policy not in REMAT_POLICIES:
            raise InputError(
                f"remat_policy: one of {', '.join(REMAT_POLICIES)} is wanted,"
                f" got {self.remat_policy!r}"
            )
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"dropout_rate: 0 <= rate < 1 is wanted, got {self.dropout_rate}")


# Width, heads, head width, feed-forward width, encoder and decoder depth. `tiny` is the demo's;
# the others are T5 v1.1's (t5x examples/t5/t5_1_1/{small,base,large,xl,xxl}.gin).
SIZES: dict[str, dict[str, int]] = {
    name: dict(
        zip(
            (
                "emb_dim",
                "num_heads",
                "head_dim",
                "mlp_dim",
                "num_encoder_layers",
                "num_decoder_layers",
            ),
            sizes,
            strict=True,
        )
    )
    for name, sizes in {
        "tiny": (64, 4, 16, 128, 2, 1),
        "small": (512, 6, 64, 1024, 8, 8),
        "base": (768, 12, 64, 2048, 12, 12),
        "large": (1024, 16, 64, 2816, 24, 24),
        "xl": (2048, 32, 64, 5120, 24, 24),
        "xxl": (4096, 64, 64, 10240, 24, 24),
    }.items()
}
VOCAB_MULTIPLE = 128


def t5_v1_1(size: str, *, vocab_size: int, **overrides) -> T5Config:
    """The v1.1 configuration of a size, its vocabulary rounded up to a multiple of 128.

    The padded rows let the table be cut over any usual number of devices, as T5's own 32128 does.

    Raises:
        InputError: an unknown size.
    """
    if size not in SIZES:
        raise InputError(
            f"MODEL_SIZE: one of {', '.join(SIZES)} is wanted, got {size!r}{nearest(size, SIZES)}"
        )
    vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return T5Config(vocab_size=vocab_size, **SIZES[size], **overrides)
