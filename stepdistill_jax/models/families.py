"""The tables of families and published models, and the configuration of a family's model."""

import dataclasses
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.t5 import T5_FAMILIES
from stepdistill_jax.models.t5gemma import T5GEMMA
from stepdistill_jax.runtime.checks import one_of

FAMILIES = {**T5_FAMILIES, "t5gemma": T5GEMMA}
# names on the Hugging Face hub; {} stands for the size
_HUB_NAMES = {
    "t5_v1_0": ("google-t5/t5-{}",),
    "t5_v1_1": ("google/t5-v1_1-{}", "google/flan-t5-{}"),
    **{name: (f"google/{name}-{{}}",) for name in ("mt5", "byt5", "umt5")},
    "ul2": ("google/ul2", "google/flan-ul2"),
    "t5gemma": tuple(
        f"google/t5gemma-{{}}-{kind}" for kind in ("prefixlm", "prefixlm-it", "ul2", "ul2-it")
    ),
}
# sizes whose names on the hub differ from ours
_HUB_SIZES = {
    "t5_v1_0": {"xl": "3b", "xxl": "11b"},
    "t5gemma": {"small": "s-s", "base": "b-b", "large": "l-l", "ml": "ml-ml", "xl": "xl-xl"},
}
PUBLISHED = {
    name.format(_HUB_SIZES.get(family, {}).get(size, size)): (family, size)
    for family, names in _HUB_NAMES.items()
    for name in names
    for size in FAMILIES[family].sizes
    if size != "tiny" and (family, size) != ("umt5", "large")  # neither was published
}
VOCAB_MULTIPLE = 128  # so that the rows of the embedding can be sharded
_EOS_ID = 1  # the same in every vocabulary that `data` reads


def model_config(
    family: str, size: str, *, vocab_size: int, bos_id: int | None = None, **overrides: Any
) -> ModelConfig:
    """Returns the configuration of a published model, adapted to a vocabulary.

    Args:
        family: a name in `FAMILIES`. Flan-T5 is `t5_v1_1`.
        size: `small` to `xxl` for T5, a name such as `9b-2b` for T5Gemma, or `tiny` for tests and demos.
        vocab_size: rounded up to a multiple of 128.
        bos_id: the vocabulary's bos id; 0 means no bos. None takes the published models' id.
        **overrides: fields that differ from the published model.

    Raises:
        InputError: the family or size is unknown, or the vocabulary has a bos that the family does not use.
    """
    one_of("model_family", family, FAMILIES)
    found = FAMILIES[family]
    one_of("model_size", size, found.sizes)
    vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    fields: dict[str, Any] = {**found.sizes[size], **found.traits, **overrides}
    if bos_id is not None and "bos_id" in {f.name for f in dataclasses.fields(found.config)}:
        # without bos, a T5Gemma decoder starts with the end-of-sequence id: `transformers` treats id 0 as padding
        fields["bos_id"] = bos_id or _EOS_ID
    config = found.config(**{"vocab_size": vocab_size, **fields})
    if bos_id and bos_id != config.start_id:
        raise InputError(
            f"`model_family`: a {family} decoder does not use the vocabulary's bos {bos_id}; choose"
            " t5gemma, or a vocabulary without bos, such as T5's"
        )
    return config


def published_model(path: str) -> tuple[str, str] | None:
    """Returns the family and size of a published model, by the last part of its name or path.

    >>> published_model("google/t5gemma-b-b-prefixlm"), published_model("models/flan-t5-xl")
    (('t5gemma', 'base'), ('t5_v1_1', 'xl'))
    """
    last = path.rstrip("/").rpartition("/")[2]
    return next((of for name, of in PUBLISHED.items() if name.partition("/")[2] == last), None)
