"""The families of models by name."""

from typing import Any

from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.t5 import T5_FAMILIES
from stepdistill_jax.models.t5gemma import T5GEMMA
from stepdistill_jax.runtime.checks import one_of

FAMILIES = {**T5_FAMILIES, "t5gemma": T5GEMMA}
VOCAB_MULTIPLE = 128


def model_config(family: str, size: str, *, vocab_size: int, **overrides: Any) -> ModelConfig:
    """Returns the configuration of a published model, its vocabulary rounded up to a multiple of 128.

    The padded rows let the table be cut over any usual number of devices, as T5's own 32128 does.

    Args:
        family: a name of `FAMILIES`; Flan-T5 is a `t5_v1_1`.
        size: `small` to `xxl` of T5, or `tiny` for tests and demos; each family has its own.
        vocab_size: ids of the vocabulary.
        **overrides: other fields of the family's configuration.

    Raises:
        InputError: an unknown family or size.
    """
    one_of("model_family", family, FAMILIES)
    found = FAMILIES[family]
    one_of("model_size", size, found.sizes)
    vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    fields: dict[str, Any] = {**found.sizes[size], **found.traits, **overrides}
    return found.config(**{"vocab_size": vocab_size, **fields})
