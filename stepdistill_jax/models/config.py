"""The configuration that all models share: sizes of encoder and decoder, arithmetic, adapters."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import keep, number, one_of, refused, whole

# Far above every published model, and small enough to refuse an absurd config.json before its layers are
# named or 32 bits overflow.
MAX_SIZE, MAX_LAYERS = 2**24, 1000
MAX_LENGTH = 2**16  # ids of an input or of an answer
MAX_WIDTH = 2**16  # the feed-forward width of T5-11B; dropout masks repeat above it

ACTIVATIONS = (("relu",), ("gelu", "linear"), ("silu", "linear"))
DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "xla", "pallas")
REMAT_POLICIES = ("elementwise", "minimal", "full")
OLD_REMAT_POLICIES = {"none": "elementwise"}  # in configs and `run.json` of older versions


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: a rank for each projection, 0 for no adapter (Hu et al. 2021, arXiv:2106.09685).

    The fields have the names of the parameter tree. A rank applies to every layer of encoder and decoder.

    Attributes:
        query, key, value, out: rank in self-attention and in attention to the encoder.
        wi: rank of the feed-forward block's first projection, or of both in a gated block.
        wo: rank of the feed-forward block's second projection.
        alpha: an adapter's output is multiplied by alpha / rank.

    Raises:
        InputError: a rank is not a whole number of at least 0, no rank is above 0, or alpha is not.
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
            raise InputError(f"`lora`: at least one rank must be above 0: {', '.join(ranks)}")


@dataclasses.dataclass(frozen=True)
class Side:
    """Sizes and attention of an encoder's or a decoder's layers.

    Attributes:
        emb_dim: model width.
        num_heads, num_kv_heads, head_dim: query heads, heads of keys and values, width of each head.
            Query head i reads the keys and values of head i // (num_heads / num_kv_heads).
        mlp_dim: feed-forward width.
        num_layers: depth.
        score_scale: factor of (query . key).
        score_softcap: a score s becomes softcap x tanh(s / softcap); None leaves scores unchanged.
        windows: for each layer, how many tokens self-attention reaches back (and, in an encoder, ahead);
            0 means all. None means all in every layer.
        rope_theta: base of the rotary position embedding; None for a model without it.
        init_stddev: standard deviation of initial kernels and embeddings; None means T5's rule, which
            depends on the widths of each.

    Raises:
        InputError: a size is out of bounds, or the key/value heads do not divide the heads.
    """

    emb_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    num_layers: int
    score_scale: float = 1.0
    score_softcap: float | None = None
    windows: tuple[int, ...] | None = None
    rope_theta: float | None = None
    init_stddev: float | None = None

    def __post_init__(self):
        keep(self, whole, "emb_dim", "mlp_dim", least=1, most=MAX_WIDTH)
        keep(self, whole, "num_heads", "num_kv_heads", "head_dim", least=1, most=MAX_SIZE)
        keep(self, whole, "num_layers", least=1, most=MAX_LAYERS)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"`num_kv_heads`: {self.num_kv_heads} does not divide the {self.num_heads} heads"
            )
        if self.rope_theta is not None and self.head_dim % 2:
            raise refused("head_dim", "even, since rotary positions turn pairs", self.head_dim)
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise refused("windows", f"one for each of {self.num_layers} layers", self.windows)

    @property
    def joined_kv(self) -> int:
        """Total width of the queries of all heads."""
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Everything that code outside a family's module knows about a model.

    A family is a subclass in its own module and a row of `models.families.FAMILIES`. A row of
    `formats.config_json` and a row of `formats.parameter_names` describe its files. All families use the
    module `models.encoder_decoder.EncoderDecoder`.

    Attributes:
        vocab_size: number of rows of an embedding; at least the number of the vocabulary's pieces.
        mlp_activations: `("relu",)` in T5 v1.0; `("gelu", "linear")`, the gated tanh gelu, in v1.1 and
            Gemma; `("silu", "linear")` in UL2.
        dropout_rate: for embeddings, attention weights, and the output of each block; 0 to 1.
        dropout_broadcast: all positions of a row share one dropout mask (`models.dropout`).
        layer_norm_epsilon: added to the mean of squares.
        logits_via_embedding: the decoder's embedding is also the output layer.
        logits_softcap: a logit x becomes softcap x tanh(x / softcap); None leaves logits unchanged.
        dtype: type of activations, `float32` or `bfloat16`; parameters are always float32.
        attention: how attention is computed, `auto`, `xla` or `pallas` (`models.attention`).
        remat_policy: what the backward pass recomputes: `elementwise` (norms, softmax, activations and
            dropout masks, but no products; `none` is its old name), `minimal` (all but the products with
            weights), `full` (everything inside a layer).
        scan_layers: layers are a loop that is compiled once; false unrolls it. Parameters are stacked
            either way.
        lora: adapters of the projections; None for the plain model. Only the plain model can decode
            (`models.lora.merge`).
        quantized: kernels are int8 with a scale for each output; for decoding only
            (`models.quantized.quantize`).
        unrolled_decoder: the decoder has a parameter tree for each layer and no loop over layers; for
            decoding on a GPU (`models.unrolled.unrolled`).

    Raises:
        InputError: the dtype is `float16` (it overflows in T5's feed-forward layers) or unknown, the
            policy is unknown, or a size is out of bounds.
    """

    vocab_size: int = 32128
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.1
    dropout_broadcast: bool = False
    layer_norm_epsilon: float = 1e-6
    logits_via_embedding: bool = False
    logits_softcap: float | None = None
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
        keep(self, whole, "vocab_size", least=1, most=MAX_SIZE)

    @property
    @abc.abstractmethod
    def encoder(self) -> Side:
        """Sizes of the encoder."""

    @property
    @abc.abstractmethod
    def decoder(self) -> Side:
        """Sizes of the decoder."""

    # Defaults that a family may override.

    @property
    def position_bias(self) -> str | None:
        """Which modules have a table of relative position biases: each `side`, each `layer`, or None."""
        return None

    @property
    def output_scale(self) -> float:
        """Factor by which the decoder's states are multiplied before the output layer."""
        return 1.0

    @property
    def start_id(self) -> int:
        """Id that the decoder reads first; batches hold 0 in its place, whatever the family."""
        return 0

    # a norm multiplies by this plus its scale; Gemma stores the scale's difference from 1
    norm_offset: ClassVar[float] = 0.0
    # whether each block's output is normalised, too
    post_norms: ClassVar[bool] = False
    # whether embeddings are multiplied by the square root of their width
    scaled_embeddings: ClassVar[bool] = False
    # names of the parameters that embed inputs and targets; a tied output layer uses the second
    input_embedder: ClassVar[str] = "token_embedder"
    target_embedder: ClassVar[str] = "token_embedder"


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of published models: a row of `models.families.FAMILIES`.

    Attributes:
        config: class of the family's configuration.
        sizes: fields of `config` for each published size; `tiny` is for tests and demos.
        vocab_size: size of the published vocabulary.
        traits: fields of `config` that all sizes share.
    """

    config: type[ModelConfig]
    sizes: Mapping[str, Mapping[str, Any]]
    vocab_size: int
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_dtype(dtype: str) -> None:
    """Checks the type of activations.

    Raises:
        InputError: it is float16 or unknown.
    """
    if dtype == "float16":
        raise InputError(
            "`dtype`: float16 overflows in T5's feed-forward layers and gives NaN;"
            " set `dtype=bfloat16`"
        )
    one_of("dtype", dtype, DTYPES)


def known_remat_policy(name: str) -> str:
    """Returns the current name of a remat policy; raises InputError for an unknown name."""
    policy = OLD_REMAT_POLICIES.get(name, name)
    one_of("remat_policy", policy, REMAT_POLICIES)
    return policy
