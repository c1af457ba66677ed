"""The configuration that all models share: sizes of encoder and decoder, arithmetic, adapters."""

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
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): a rank for each projection, where 0 means no adapter.

    The fields are named like the projections in the parameter tree. A rank applies to every layer of encoder
    and decoder.

    Attributes:
        query, key, value, out: rank for this projection in self-attention and in attention to the encoder.
        wi: rank for the feed-forward block's input projection. A gated block has two, and each gets this rank.
        wo: rank for the feed-forward block's output projection.
        alpha: an adapter's output is multiplied by alpha / rank.

    Raises:
        InputError: a rank is not a whole number of at least 0, all ranks are 0, or alpha is not above 0.
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
        num_heads: number of query heads.
        num_kv_heads: number of heads of keys and values. Query head i reads the keys and values of head
            i // (num_heads / num_kv_heads).
        head_dim: width of each head.
        mlp_dim: feed-forward width.
        num_layers: number of layers.
        score_scale: factor by which (query . key) is multiplied.
        score_softcap: a score s becomes softcap x tanh(s / softcap); None leaves scores unchanged.
        windows: for each layer, how many tokens back (and, in an encoder, also ahead) self-attention
            reaches, as in Hugging Face (`stacks.windows_of`). 0 means all tokens. None means all tokens in
            every layer.
        rope_theta: base of the rotary position embedding; None if the model has none.
        init_stddev: standard deviation of initial kernels and embeddings. None means T5's rule: the standard
            deviation depends on the widths of the kernel.

    Raises:
        InputError: a size is out of bounds, or `num_kv_heads` does not divide `num_heads`.
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
    """Configuration of a model. Code outside a family's module only uses what is declared here.

    A family's module defines a subclass of this class, and `models.families.FAMILIES` has an entry for the
    family. An entry in `formats.config_json` and one in `formats.parameter_names` describe the family's files.
    All families use the same Flax module, `models.encoder_decoder.EncoderDecoder`.

    Attributes:
        vocab_size: number of rows of an embedding. The vocabulary must not have more pieces.
        mlp_activations: `("relu",)` in T5 v1.0; `("gelu", "linear")`, the gated tanh gelu, in v1.1 and
            Gemma; `("silu", "linear")` in UL2.
        dropout_rate: rate of the dropout on embeddings, on attention weights, inside feed-forward blocks, and
            on the output of each block and of each stack. At least 0 and below 1.
        dropout_broadcast: whether all positions of a row share one dropout mask (`models.dropout`).
        layer_norm_epsilon: number that a norm adds to the mean of squares.
        logits_via_embedding: whether the decoder's embedding is also the output layer.
        logits_softcap: a logit x becomes softcap x tanh(x / softcap); None leaves logits unchanged.
        dtype: type of activations, `float32` or `bfloat16`. Parameters are always float32.
        attention: how attention is computed: `auto`, `xla` or `pallas` (`models.attention`).
        remat_policy: what the backward pass recomputes. `elementwise` recomputes norms, softmax, activations
            and dropout masks, but no matmuls (its old name is `none`). `minimal` recomputes everything except
            the matmuls with weights. `full` recomputes everything inside a layer.
        scan_layers: whether the layers run in a loop whose body is compiled once. If False, the loop is
            unrolled. In both cases, the parameters of the layers are stacked.
        lora: adapters of the projections; None for a model without adapters. A model with adapters cannot
            decode before they are merged (`models.lora.merge`).
        quantized: whether kernels are int8 with a scale for each output. Such a model can only decode
            (`models.quantized.quantize`).
        unrolled_decoder: whether each layer of the decoder has its own parameter tree
            (`models.unrolled.unrolled`). True is meant for decoding on a GPU. If False, the layers are stacked.

    Raises:
        InputError: the dtype is `float16` (which overflows in T5's feed-forward layers) or unknown, another
            option is unknown, or a size or rate is out of bounds.
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
        """Whether each `side` or each `layer` has its own table of relative position biases. None means no table."""
        return None

    @property
    def output_scale(self) -> float:
        """Factor by which the decoder's states are multiplied before the output layer."""
        return 1.0

    @property
    def start_id(self) -> int:
        """Id that the decoder reads first. The arrays of a batch contain 0 in its place."""
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
        config: class of the family's configuration.
        sizes: for each size, the values of those fields of `config` that depend on the size. `tiny` is not
            published; it is for tests and demos.
        vocab_size: size of the published vocabulary.
        traits: values of those fields of `config` that are the same for all sizes.
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
    """Returns the current name of a remat policy, which may be given by an old name.

    Raises:
        InputError: the name is unknown.
    """
    policy = OLD_REMAT_POLICIES.get(name, name)
    one_of("remat_policy", policy, REMAT_POLICIES)
    return policy
