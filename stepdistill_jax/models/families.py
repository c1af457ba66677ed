"""The families of models by name."""

import dataclasses
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.t5 import T5_FAMILIES
from stepdistill_jax.models.t5gemma import T5GEMMA
from stepdistill_jax.runtime.checks import one_of

FAMILIES = {**T5_FAMILIES, "t5gemma": T5GEMMA}
VOCAB_MULTIPLE = 128
_EOS_ID = 1  # of every vocabulary that `data` reads


def model_config(
    family: str, size: str, *, vocab_size: int, bos_id: int | None = None, **overrides: Any
) -> ModelConfig:
    """Returns the configuration of a published model, its vocabulary rounded up to a multiple of 128.

    The padded rows let the table be cut over any usual number of devices, as T5's own 32128 does.

    Args:
        family: a name of `FAMILIES`; Flan-T5 is a `t5_v1_1`.
        size: `small` to `xxl` of T5, or `tiny` for tests and demos; each family has its own, such as
            T5Gemma's `9b-2b`, whose encoder is larger than its decoder.
        vocab_size: ids of the vocabulary.
        bos_id: of the vocabulary, 0 if it has none; None is the published models'. Without a bos, a
            T5Gemma starts with the end of sequence: transformers would take a 0 for padding and not
            attend to it.
        **overrides: other fields of the family's configuration.

    Raises:
        InputError: an unknown family or size, or a vocabulary with bos for a family without.
    """
    one_of("model_family", family, FAMILIES)
    found = FAMILIES[family]
    one_of("model_size", size, found.sizes)
    vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    fields: dict[str, Any] = {**found.sizes[size], **found.traits, **overrides}
    if bos_id is not None and "bos_id" in {f.name for f in dataclasses.fields(found.config)}:
        fields["bos_id"] = bos_id or _EOS_ID
    config = found.config(**{"vocab_size": vocab_size, **fields})
    if bos_id and bos_id != config.start_id:
        raise InputError(
            f"`model_family`: the vocabulary has bos {bos_id} like Gemma's, which a decoder of {family}"
            " does not use; choose t5gemma, or a vocabulary of T5's kind"
        )
    return config
