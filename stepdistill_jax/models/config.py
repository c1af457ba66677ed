"""Sizes of a T5, and the published families by name."""

import dataclasses
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import keep, number, one_of, refused, whole

# Far above any T5, and small enough that a config.json which claims more is refused before a name is made for
# each layer, or a number leaves 32 bits.
MAX_SIZE, MAX_LAYERS = 2**24, 1000
MAX_LENGTH = 2**16  # ids of an input or of an answer
MAX_WIDTH = 2**16  # that of T5-11B's feed-forward block; dropout's masks repeat beyond

ACTIVATIONS = (("relu",), ("gelu", "linear"))
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "xla", "pallas")
REMAT_POLICIES = ("elementwise", "minimal", "full")
OLD_REMAT_POLICIES = {"none": "elementwise"}  # as configs and `run.json` of older versions say


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: a rank per projection, 0 for none (Hu et al. 2021, arXiv:2106.09685).

    The names are those of the parameter tree; a rank holds for every layer of both sides.

    Attributes:
        query, key, value, out: rank in self-attention and in attention to the encoder.
        wi: rank of the feed-forward block's first projection, or of both where it is gated.
        wo: rank of the feed-forward block's second projection.
        alpha: an adapter's output is multiplied by alpha / rank.

    Raises:
        InputError: a rank that is no whole number from 0, ranks that are all 0, alpha not above 0.
    """

    query: int = 0
    key: int = 0
    value: int = 0
    out: int = 0
    wi: int = 0
    wo: int = 0
    alpha: float = 16.0

    def __post_init__(self):
        *ranks, alpha = (f.name for f in dataclasses.fields(self))
        keep(self, whole, *ranks, of="lora.", least=0)
        keep(self, number, alpha, of="lora.", above=0)
        if not any(getattr(self, name) for name in ranks):
            raise InputError(f"`lora`: a rank above 0 is needed for one of {', '.join(ranks)}")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Everything that decides shapes and arithmetic of a T5 (names as in T5X's `network.py`).

    Attributes:
        vocab_size: rows of the embedding; at least the vocabulary's pieces.
        emb_dim: model width (Hugging Face `d_model`).
        num_heads, head_dim: attention heads and the width of each (`num_heads`, `d_kv`).
        mlp_dim: feed-forward width (`d_ff`).
        num_encoder_layers, num_decoder_layers: depth (`num_layers`, `num_decoder_layers`).
        mlp_activations: `("relu",)` is v1.0's, `("gelu", "linear")` the gated tanh gelu of v1.1.
        dropout_rate: of embeddings, attention weights, and the output of each block; 0 to 1.
        dropout_broadcast: all positions of a row share one dropout mask (`models.dropout`).
        num_buckets, max_distance: relative position bias.
        shared_relative_position_bias: one table per side, read by all its layers; UMT5 has one per
            layer.
        logits_via_embedding: the embedding doubles as output layer (v1.0); v1.1 has its own.
        scale_decoder_outputs: divides what the output layer reads by sqrt(emb_dim), as v1.0 does
            (the name is Hugging Face's).
        dtype: of activations, `float32` or `bfloat16`; parameters are always float32.
        attention: how attention is computed, `auto`, `xla` or `pallas` (`models.attention`).
        remat_policy: what the backward pass recomputes: `elementwise` (norms, softmax, activations and
            dropout's masks, no products; `none` is its old name), `minimal` (all but the products with
            weights), `full` (everything inside a layer).
        scan_layers: layers are a loop, compiled once; else one after the other. Parameters are stacked
            either way.
        lora: adapters beside the projections; None is the plain model, the only one that decodes
            (`models.lora.merge`).
        quantized: kernels are int8 with a scale for each output; for decoding alone
            (`models.quantized.quantize`).
        unrolled_decoder: the decoder has a parameter tree for each layer, and no loop over layers;
            for decoding on a GPU (`models.unrolled.unrolled`).

    Raises:
        InputError: `float16` (it overflows in T5's feed-forward), an unknown dtype or policy, a size
            out of bounds.
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
    dropout_broadcast: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    shared_relative_position_bias: bool = True
    logits_via_embedding: bool = False
    scale_decoder_outputs: bool = False
    dtype: str = "float32"
    attention: str = "xla"
    remat_policy: str = "elementwise"
    scan_layers: bool = True
    lora: LoraConfig | None = None
    quantized: bool = False
    unrolled_decoder: bool = False

    def __post_init__(self):
        check_dtype(self.dtype)
        one_of("attention", self.attention, ATTENTIONS)
        object.__setattr__(self, "remat_policy", known_remat_policy(self.remat_policy))
        if self.mlp_activations not in ACTIVATIONS:
            raise refused("mlp_activations", f"one of {ACTIVATIONS}", self.mlp_activations)
        keep(self, number, "dropout_rate", least=0, below=1)
        keep(self, whole, "emb_dim", "mlp_dim", least=1, most=MAX_WIDTH)
        widths = ("vocab_size", "num_heads", "head_dim", "num_buckets")
        keep(self, whole, *widths, least=1, most=MAX_SIZE)
        keep(self, whole, "num_encoder_layers", "num_decoder_layers", least=1, most=MAX_LAYERS)
        # else the logarithm of `models.layers.relative_buckets` has no scale
        if self.num_buckets < 4 or not self.num_buckets // 2 < self.max_distance <= MAX_SIZE:
            raise InputError(
                f"relative positions: `num_buckets` must be at least 4 and `max_distance` from"
                f" {self.num_buckets // 2 + 1} to {MAX_SIZE}, not {self.num_buckets} and {self.max_distance}"
            )


def check_dtype(dtype: str) -> None:
    """Refuses a type that activations cannot have.

    Raises:
        InputError: float16, or no type that we know.
    """
    if dtype == "float16":
        raise InputError(
            "`dtype`: float16 overflows in T5's feed-forward layers and gives NaN;"
            " set `dtype=bfloat16`"
        )
    one_of("dtype", dtype, DTYPES)


def known_remat_policy(name: str) -> str:
    """The policy of a name, also of an old one; InputError where there is none."""
    policy = OLD_REMAT_POLICIES.get(name, name)
    one_of("remat_policy", policy, REMAT_POLICIES)
    return policy


# Width, heads, head width, feed-forward width, encoder and decoder depth. `tiny` is the demo's.
_COLUMNS = (
    "emb_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_encoder_layers",
    "num_decoder_layers",
)
_TINY = (64, 4, 16, 128, 2, 1)
# t5x examples/t5/t5_1_1/{small,base,large,xl,xxl}.gin; mT5 differs in its vocabulary alone
_V1_1 = {
    "tiny": _TINY,
    "small": (512, 6, 64, 1024, 8, 8),
    "base": (768, 12, 64, 2048, 12, 12),
    "large": (1024, 16, 64, 2816, 24, 24),
    "xl": (2048, 32, 64, 5120, 24, 24),
    "xxl": (4096, 64, 64, 10240, 24, 24),
}
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    # Raffel et al. 2020 (arXiv:1910.10683, section 3.7); xl is "3B" there and xxl "11B"
    "t5_v1_0": {
        "tiny": _TINY,
        "small": (512, 8, 64, 2048, 6, 6),
        "base": (768, 12, 64, 3072, 12, 12),
        "large": (1024, 16, 64, 4096, 24, 24),
        "xl": (1024, 32, 128, 16384, 24, 24),
        "xxl": (1024, 128, 128, 65536, 24, 24),
    },
    "t5_v1_1": _V1_1,
    "mt5": _V1_1,
    # Xue et al. 2022 (arXiv:2105.13626, table 1): the encoder is three times as deep
    "byt5": {
        "tiny": (64, 4, 16, 128, 3, 1),
        "small": (1472, 6, 64, 3584, 12, 4),
        "base": (1536, 12, 64, 3968, 18, 6),
        "large": (1536, 16, 64, 3840, 36, 12),
        "xl": (2560, 32, 64, 6720, 36, 12),
        "xxl": (4672, 64, 64, 12352, 36, 12),
    },
    "umt5": _V1_1,  # Chung et al. 2023 (arXiv:2304.09151); no `large` was published
}
_TRAITS: dict[str, dict[str, Any]] = {
    "t5_v1_0": {
        "mlp_activations": ("relu",),
        "logits_via_embedding": True,
        "scale_decoder_outputs": True,
    },
    "umt5": {"shared_relative_position_bias": False},
}
VOCAB_MULTIPLE = 128


def t5_config(family: str, size: str, *, vocab_size: int, **overrides) -> T5Config:
    """The configuration of a published model, its vocabulary rounded up to a multiple of 128.

    The padded rows let the table be cut over any usual number of devices, as T5's own 32128 does.

    Args:
        family: `t5_v1_0`, `t5_v1_1` (Flan-T5, too), `mt5`, `byt5` or `umt5`.
        size: `small` to `xxl`, or `tiny` for tests and demos.
        vocab_size: ids of the vocabulary.
        **overrides: of other fields of `T5Config`.

    Raises:
        InputError: an unknown family or size.
    """
    one_of("model_family", family, SIZES)
    one_of("model_size", size, SIZES[family])
    vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    sizes: dict[str, Any] = dict(zip(_COLUMNS, SIZES[family][size], strict=True))
    return T5Config(**{"vocab_size": vocab_size, **sizes, **_TRAITS.get(family, {}), **overrides})
