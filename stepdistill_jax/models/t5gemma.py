"""T5Gemma (Zhang et al. 2025, arXiv:2504.06225): encoder and decoder are Gemma 2 stacks, whose sizes may differ."""

import dataclasses
from typing import Any, ClassVar

from stepdistill_jax.models.config import Family, ModelConfig, Side


def gemma_side(
    emb_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    mlp_dim: int,
    num_layers: int,
    *,
    window: int = 4096,
    **other: Any,
) -> Side:
    """Returns the sizes of a Gemma 2 stack (Gemma Team 2024, arXiv:2408.00118, section 2 and table 1).

    Layers alternate between local and global attention, starting with a local one.

    Args:
        window: reach of self-attention in local layers, in tokens.
        **other: fields of `Side` that differ from Gemma 2.
    """
    windows = tuple(0 if layer % 2 else window for layer in range(num_layers))
    given: dict[str, Any] = {
        "score_scale": head_dim**-0.5,
        "score_softcap": 50.0,
        "windows": windows,
        "rope_theta": 10_000.0,
        "init_stddev": 0.02,
    }
    sizes = (emb_dim, num_heads, num_kv_heads, head_dim, mlp_dim, num_layers)
    return Side(*sizes, **{**given, **other})


# google-deepmind/gemma, gemma/research/t5gemma/config.py
_SIDES = {
    "tiny": gemma_side(64, 4, 2, 16, 128, 2),
    "small": gemma_side(512, 8, 8, 64, 1024, 8),
    "base": gemma_side(768, 12, 12, 64, 2048, 12),
    "large": gemma_side(1024, 16, 16, 64, 2816, 24),
    "ml": gemma_side(1152, 4, 4, 256, 6912, 26),
    "xl": gemma_side(2048, 32, 32, 64, 5120, 24),
    "2b": gemma_side(2304, 8, 4, 256, 9216, 26),
    "9b": gemma_side(3584, 16, 8, 256, 14336, 42),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5GemmaConfig(ModelConfig):
    """Configuration of a T5Gemma.

    Encoder and decoder have separate embeddings. A tied output layer uses the decoder's embedding.

    Attributes:
        encoder, decoder: the two stacks, from `gemma_side`.
        bos_id: id that the decoder reads first.
    """

    vocab_size: int = 256_000
    dropout_rate: float = 0.0
    logits_via_embedding: bool = True
    logits_softcap: float | None = 30.0
    encoder: Side = _SIDES["base"]  # pyright: ignore[reportIncompatibleMethodOverride]
    decoder: Side = _SIDES["base"]  # pyright: ignore[reportIncompatibleMethodOverride]
    bos_id: int = 2

    @property
    def start_id(self) -> int:
        return self.bos_id

    norm_offset: ClassVar[float] = 1.0
    post_norms: ClassVar[bool] = True
    scaled_embeddings: ClassVar[bool] = True
    input_embedder: ClassVar[str] = "input_embedder"
    target_embedder: ClassVar[str] = "target_embedder"


def _sizes(encoder: str, decoder: str) -> dict[str, Any]:
    return {"encoder": _SIDES[encoder], "decoder": _SIDES[decoder]}


# `9b-2b` is the published t5gemma-9b-2b, `small` is t5gemma-s-s
T5GEMMA = Family(
    T5GemmaConfig,
    {
        **{name: _sizes(name, name) for name in ("tiny", "small", "base", "large", "ml", "xl")},
        "2b-2b": _sizes("2b", "2b"),
        "9b-2b": _sizes("9b", "2b"),
        "9b-9b": _sizes("9b", "9b"),
    },
    vocab_size=256_000,
)
