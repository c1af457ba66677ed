"""The configuration that all model families share."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import keep, number, one_of, refused, whole

# These limits are far above every published model. They refuse an absurd config.json before its layers are
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
    """Ranks of low-rank adapters (Hu et al. 2021, arXiv:2106.09685). Rank 0 means no adapter.

    The ranks apply to every layer.

    Attributes:
        query, key, value, out: ranks in self-attention and in attention to the encoder.
        wi: rank for the feed-forward block's input projection, or for each of the two in a gated block.
        wo: rank for the feed-forward block's output projection.
        alpha: an adapter's output is multiplied by alpha / rank.

    Raises:
        InputError: a rank is negative or not a whole number, all ranks are 0, or alpha is not above 0.
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
    """Sizes and attention options of an encoder's or a decoder's layers.

    Attributes:
        emb_dim: model width.
        num_kv_heads: number of key and value heads. `num_heads` is a multiple of it.
        mlp_dim: feed-forward width.
        score_scale, score_softcap: `scale` and `softcap` of `attention.attention`.
        windows: reach of self-attention in each layer, in tokens (`stacks.windows_of`). 0 or None means all tokens.
        rope_theta: base of the rotary positions; None if there are none.
        init_stddev: standard deviation of all initial kernels and embeddings. None means T5's values: 1 for
            embeddings, and a value that depends on the layer's size for kernels.

    Raises:
        InputError: a size is out of bounds, or two fields do not fit together.
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
            raise refused(
                "head_dim", "even, since rotary positions rotate pairs of features", self.head_dim
            )
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise refused(
                "windows",
                f"a tuple with one window for each of {self.num_layers} layers",
                self.windows,
            )

    @property
    def joined_kv(self) -> int:
        """Total width of the queries of all heads."""
        return self.num_heads * self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Configuration of a model of any family.

    Each family has a subclass. Code outside a family's module uses only what is declared here.

    Attributes:
        vocab_size: number of rows of an embedding. The vocabulary may have fewer pieces.
        mlp_activations: `("relu",)` in T5 v1.0, `("gelu", "linear")` in v1.1 and Gemma, or
            `("silu", "linear")` in UL2. Two names mean a gated block.
        dropout_rate: 0 <= rate < 1.
        dropout_broadcast: whether all positions of a row share one dropout mask.
        layer_norm_epsilon: added to the mean of squares in a norm.
        logits_via_embedding: whether the decoder's embedding is also the output layer.
        logits_softcap: a logit x becomes softcap * tanh(x / softcap); None leaves logits unchanged.
        dtype: type of activations, `float32` or `bfloat16`.
        attention: `auto`, `xla` or `pallas` (`models.attention`).
        remat_policy: what the backward pass recomputes. `elementwise`: norms, softmax, activations and dropout
            masks. `minimal`: everything except the matmuls with weights. `full`: everything inside a layer.
        scan_layers: whether the layers run in a loop. False unrolls the loop, but keeps the parameters stacked.
        lora: None for no adapters. A model with adapters cannot decode before `models.lora.merge`.
        quantized: whether kernels are int8. Such a model can only decode.
        unrolled_decoder: whether each decoder layer has its own parameter tree, from `models.unrolled.unrolled`.

    Raises:
        InputError: a value is not supported.
    """

    # A new family also needs entries in `models.families.FAMILIES`, `formats.config_json` and
    # `formats.parameter_names`.

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
        """Scope of a table of relative position biases: `side` or `layer`. None means no table."""
        return None

    @property
    def output_scale(self) -> float:
        """Factor by which the decoder's states are multiplied before the output layer."""
        return 1.0

    @property
    def start_id(self) -> int:
        """Id that the decoder reads first. Batches contain 0 instead, which the model replaces by this id."""
        return 0

    # a norm multiplies by norm_offset + its stored scale; Gemma stores the scale's difference from 1
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
    """A family of published models, as in `models.families.FAMILIES`.

    Attributes:
        sizes: the fields of `config` that depend on the size. The size `tiny` is for tests and demos.
        vocab_size: size of the published vocabulary.
        traits: the fields of `config` that are equal for all sizes.
    """

    config: type[ModelConfig]
    sizes: Mapping[str, Mapping[str, Any]]
    vocab_size: int
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_dtype(dtype: str) -> None:
    """Checks the type of activations.

    Raises:
        InputError: the type is float16 or unknown.
    """
    if dtype == "float16":
        raise InputError(
            "`dtype`: float16 overflows in T5's feed-forward layers and gives NaN;"
            " set `dtype=bfloat16`"
        )
    one_of("dtype", dtype, DTYPES)


def known_remat_policy(name: str) -> str:
    """Returns the current name of a remat policy, given its current or old name.

    Raises:
        InputError: the name is unknown.
    """
    policy = OLD_REMAT_POLICIES.get(name, name)
    one_of("remat_policy", policy, REMAT_POLICIES)
    return policy
