"""The T5 families: their configuration and published sizes."""

import dataclasses
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import MAX_LAYERS, MAX_SIZE, Family, ModelConfig, Side
from stepdistill_jax.runtime.checks import keep, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """Configuration of a T5, whose encoder and decoder have the same width.

    Attributes are named as in T5X's `network.py`. Hugging Face's names are in parentheses.

    Attributes:
        emb_dim: model width (`d_model`).
        head_dim: `d_kv`.
        mlp_dim: feed-forward width (`d_ff`).
        num_encoder_layers: `num_layers`.
        num_buckets: buckets of the relative position bias (`relative_attention_num_buckets`).
        max_distance: distances from here on share one bucket (`relative_attention_max_distance`).
        shared_relative_position_bias: whether all layers of a side share one table. False for UMT5.
        scale_decoder_outputs: whether the input of the output layer is divided by sqrt(emb_dim), as in v1.0.

    Raises:
        InputError: as for `ModelConfig`, or a size is out of bounds.
    """

    emb_dim: int = 512
    num_heads: int = 6
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    num_buckets: int = 32
    max_distance: int = 128
    shared_relative_position_bias: bool = True
    scale_decoder_outputs: bool = False

    def __post_init__(self):
        super().__post_init__()
        keep(self, whole, "num_buckets", least=1, most=MAX_SIZE)
        # otherwise `models.positions.relative_buckets` would divide by 0, or by a logarithm of at most 0
        if self.num_buckets < 4 or not self.num_buckets // 2 < self.max_distance <= MAX_SIZE:
            raise InputError(
                f"relative positions: `num_buckets` must be at least 4 and `max_distance` must be from"
                f" {self.num_buckets // 2 + 1} to {MAX_SIZE}; got {self.num_buckets} and {self.max_distance}"
            )
        keep(self, whole, "num_encoder_layers", "num_decoder_layers", least=1, most=MAX_LAYERS)
        _ = self.encoder  # checks the sizes

    @property
    def encoder(self) -> Side:
        return self._side(self.num_encoder_layers)

    @property
    def decoder(self) -> Side:
        return self._side(self.num_decoder_layers)

    def _side(self, layers: int) -> Side:
        heads = self.num_heads
        return Side(self.emb_dim, heads, heads, self.head_dim, self.mlp_dim, layers)

    @property
    def position_bias(self) -> str:
        return "side" if self.shared_relative_position_bias else "layer"

    @property
    def output_scale(self) -> float:
        return self.emb_dim**-0.5 if self.scale_decoder_outputs else 1.0


_TINY = (64, 4, 16, 128, 2, 1)
# t5x examples/t5/t5_1_1/{small,base,large,xl,xxl}.gin; mT5 differs only in its vocabulary
_V1_1 = {
    "tiny": _TINY,
    "small": (512, 6, 64, 1024, 8, 8),
    "base": (768, 12, 64, 2048, 12, 12),
    "large": (1024, 16, 64, 2816, 24, 24),
    "xl": (2048, 32, 64, 5120, 24, 24),
    "xxl": (4096, 64, 64, 10240, 24, 24),
}
# Raffel et al. 2020 (arXiv:1910.10683, section 3.7); xl is "3B" there and xxl "11B"
_V1_0 = {
    "tiny": _TINY,
    "small": (512, 8, 64, 2048, 6, 6),
    "base": (768, 12, 64, 3072, 12, 12),
    "large": (1024, 16, 64, 4096, 24, 24),
    "xl": (1024, 32, 128, 16384, 24, 24),
    "xxl": (1024, 128, 128, 65536, 24, 24),
}
# Xue et al. 2022 (arXiv:2105.13626, table 1): the encoder is three times as deep
_BYT5 = {
    "tiny": (64, 4, 16, 128, 3, 1),
    "small": (1472, 6, 64, 3584, 12, 4),
    "base": (1536, 12, 64, 3968, 18, 6),
    "large": (1536, 16, 64, 3840, 36, 12),
    "xl": (2560, 32, 64, 6720, 36, 12),
    "xxl": (4672, 64, 64, 12352, 36, 12),
}
# Tay et al. 2022 (arXiv:2205.05131): one size, with `d_kv` 256 as in google/ul2 and google/flan-ul2
_UL2 = {"tiny": _TINY, "xxl": (4096, 16, 256, 16384, 32, 32)}


def _family(sizes: dict[str, tuple[int, ...]], vocab_size: int, **traits: Any) -> Family:
    columns = [
        "emb_dim",
        "num_heads",
        "head_dim",
        "mlp_dim",
        "num_encoder_layers",
        "num_decoder_layers",
    ]
    of_sizes = {name: dict(zip(columns, row, strict=True)) for name, row in sizes.items()}
    return Family(T5Config, of_sizes, vocab_size, traits)


T5_FAMILIES = {
    "t5_v1_0": _family(
        _V1_0,
        32128,
        mlp_activations=("relu",),
        logits_via_embedding=True,
        scale_decoder_outputs=True,
    ),
    "t5_v1_1": _family(_V1_1, 32128),
    "mt5": _family(_V1_1, 250112),
    "byt5": _family(_BYT5, 384),
    # Chung et al. 2023 (arXiv:2304.09151); no `large` was published
    "umt5": _family(_V1_1, 256384, shared_relative_position_bias=False),
    "ul2": _family(_UL2, 32128, mlp_activations=("silu", "linear")),
}
