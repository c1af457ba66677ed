"""Defines `DecodeOptions`, the options that choose the checkpoint, the way of decoding and the devices."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepdistill_jax.decoding.beam import search
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.models.config import MAX_LENGTH
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.runtime.checks import number, one_of, whole

ENGINES = ("jax", "ctranslate2")
QUANTIZATIONS = ("int8",)  # for the JAX engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """The options that `predict`, `evaluate` and `serve` accept as keywords.

    Attributes:
        step: checkpoint of a workdir: `best` on the validation split, `last`, or a step number.
        batch_size: number of rows decoded at once, on all devices together; None means 64 times the
            number of devices over which rows are split (with CTranslate2, of CPU cores).
        layout: how the devices of all processes share the work (`sharding.LAYOUTS`). `tensor` splits a
            model that does not fit on one device.
        max_decode_len: largest number of ids in a label, its end of sequence included. None means
            `max_decode_len` of `stepdistill.json`, or 64 without that file.
        num_beams: number of beams; 1 means greedy decoding.
        length_penalty: beam search divides log probabilities by LENGTH ** length_penalty; None means 1.
        choices: the allowed answers: a list, the path of a file of labels, `labels` for the task's labels, or
            `row` for the field `choices` of each row. The likeliest one becomes the label. None allows any
            answer.
        choices_temperature: temperature of the choices' probabilities; see `best_temperature` of `evaluate`.
        prefix: text before the input; None keeps the model's own prompt.
        engine: `jax` or `ctranslate2`; None means the engine that can read the directory.
        quantization: `int8` stores the projection kernels of the JAX engine as int8; None means float32.
    """

    step: str | int = "best"
    batch_size: int | None = None
    layout: str | Layout = "data"
    max_decode_len: int | None = None
    num_beams: int = 1
    length_penalty: float | None = None
    choices: os.PathLike | str | Sequence[str] | None = None
    choices_temperature: float = 1.0
    prefix: str | None = None
    engine: str | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        """Checks the options, as far as that is possible without the model.

        Raises:
            InputError: an option is out of range, or two options exclude each other.
        """
        if self.batch_size is not None:
            whole("batch_size", self.batch_size, 1)
        if self.max_decode_len is not None:
            whole("max_decode_len", self.max_decode_len, 1, MAX_LENGTH)
        search(self.num_beams, self.length_penalty)  # checks both
        number("choices_temperature", self.choices_temperature, least=0.01, most=100)
        if self.choices is None and self.choices_temperature != 1:
            raise InputError(
                "`choices_temperature`: this option has an effect only with `choices`; add `choices`, or leave"
                " `choices_temperature` out"
            )
        if self.choices is not None and self.num_beams != 1:
            raise InputError(
                "`num_beams`: with `choices`, all allowed labels are scored and nothing is searched; leave"
                " `num_beams` out"
            )
        if self.choices is not None and self.max_decode_len is not None:
            raise InputError(
                "`max_decode_len`: with `choices`, nothing is decoded; leave `max_decode_len` out"
            )
        if self.engine is not None:
            one_of("engine", self.engine, ENGINES)
        if self.quantization is not None:
            one_of("quantization", self.quantization, QUANTIZATIONS)


def decode_options(
    function: Callable, given: Mapping[str, Any], without: Sequence[str] = ()
) -> DecodeOptions:
    """Returns the `DecodeOptions` that a function has received as `**options`.

    Args:
        given: the function's `**options`.
        without: fields of `DecodeOptions` that the function does not accept.

    Raises:
        TypeError: a name is unknown. The message names the function.
        InputError: see `DecodeOptions`.
    """
    known = {field.name for field in dataclasses.fields(DecodeOptions)} - set(without)
    for name in given:
        if name not in known:
            own = inspect.signature(function).parameters.values()
            names = known | {p.name for p in own if p.kind is p.KEYWORD_ONLY}
            raise TypeError(
                f"{function.__name__}() got an unexpected keyword argument {name!r}"
                f"{nearest(name, sorted(names))}"
            )
    return DecodeOptions(**given)
