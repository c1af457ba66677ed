"""The families of models by name."""

import dataclasses
from typing import Any

from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.t5 import T5_FAMILIES
from stepdistill_jax.models.t5gemma import T5GEMMA
from stepdistill_jax.runtime.checks import one_of

FAMILIES = {**T5_FAMILIES, "t5gemma": T5GEMMA}
VOCAB_MULTIPLE = 128


def model_config(
    family: str, size: str, *, vocab_size: int, bos_id: int | None = None, **overrides: Any
) -> ModelConfig:
    """Returns the configuration of a published model, its vocabulary rounded up to a multiple of 128.

    The padded rows let the table be cut over any usual number of devices, as T5's own 32128 does.

    Args:
        family: a name of `FAMILIES`; Flan-T5 is a `t5_v1_1`.
        size: `small` to `xxl` of T5, or `tiny` for tests and demos; each family has its own, such as
            `9b-2b` of T5Gemma, whose encoder is the larger.
        vocab_size: ids of the vocabulary.
        bos_id: id that the decoder reads first, where that is the family's to say; None is that of
            the published vocabulary.
        **overrides: other fields of the family's configuration.

    Raises:
        InputError: an unknown family or size.
    """
    one_of("model_family", family, FAMILIES)
    found = FAMILIES[family]
    one_of("model_size", size, found.sizes)
    vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    fields: dict[str, Any] = {**found.sizes[size], **found.traits, **overrides}
    starts_with_bos = "bos_id" in {field.name for field in dataclasses.fields(found.config)}
    if bos_id is not None and starts_with_bos:
        fields["bos_id"] = bos_id
    return found.config(**{"vocab_size": vocab_size, **fields})
