"""What a SeqIO task of other people's making must have, so that an encoder-decoder can learn it."""

import inspect
from typing import Any

from stepdistill_jax.errors import InputError

FEATURES = ("inputs", "targets")
READ_BESIDE = ("id", "weight")  # of a row, where there are any


def check_trainable(task: Any) -> None:
    """Refuses a `seqio.Task` whose rows cannot be trained on.

    Raises:
        InputError: one line with the task, what it has, and what to give it instead.
    """
    import seqio

    features = task.output_features
    if set(features) & set(FEATURES) == {"targets"}:
        raise _refused(
            task,
            "it has targets alone, for a decoder without an encoder, and an encoder-decoder needs the"
            " features inputs and targets; give it a preprocessor that splits its text in two",
        )
    if not set(FEATURES) <= set(features):
        raise _refused(
            task,
            "an encoder-decoder needs the features inputs and targets, it has"
            f" {', '.join(features)}; rename them in its preprocessors (seqio.preprocessors.rekey)",
        )
    for name, feature in features.items():
        if name not in (*FEATURES, *READ_BESIDE) and feature.required:
            raise _refused(
                task,
                f"the output feature {name!r} is required, and an encoder-decoder reads inputs and"
                f" targets; put its text into inputs, or say seqio.Feature(..., required=False)",
            )
    for name in FEATURES:
        _check_ids(task, name, features[name])
    inputs, targets = (features[name].vocabulary for name in FEATURES)
    if inputs != targets:
        raise _refused(
            task,
            f"inputs and targets must share one vocabulary, since a model has one embedding; they have"
            f" {inputs} and {targets}; give both the one that knows the text of both",
        )
    if not isinstance(inputs, seqio.SentencePieceVocabulary | seqio.ByteVocabulary):
        raise _refused(
            task,
            "expected a seqio.SentencePieceVocabulary or seqio.ByteVocabulary, got"
            f" {type(inputs).__name__}; `stepdistill prepare` trains a SentencePiece vocabulary",
        )
    _check_preprocessors(task)


def _check_ids(task: Any, name: str, feature: Any) -> None:
    """Raises InputError where a feature is not ids of a vocabulary."""
    import seqio

    if feature.rank != 1 or not feature.dtype.is_integer:
        raise _refused(
            task,
            f"the feature {name!r} is {feature.dtype.name} of rank {feature.rank}, and an"
            " encoder-decoder reads token ids, int32 of rank 1; tokenise it (seqio.preprocessors.tokenize)",
        )
    if isinstance(feature.vocabulary, seqio.PassThroughVocabulary):
        raise _refused(
            task,
            f"the feature {name!r} has a PassThroughVocabulary, which turns no answer into text; give it"
            " the vocabulary that made its ids, a seqio.SentencePieceVocabulary or seqio.ByteVocabulary",
        )


def _check_preprocessors(task: Any) -> None:
    """Raises InputError where rows depend on lengths: they are tokenised once, before those are chosen."""
    try:
        named = [(p, inspect.signature(p).parameters) for p in task.preprocessors]
    except (TypeError, ValueError) as error:  # of functions that SeqIO itself cannot call
        raise _refused(task, f"its preprocessors: {' '.join(str(error).split())}") from error
    for preprocessor, parameters in named:
        length = parameters.get("sequence_length")
        if length is not None and length.default is inspect.Parameter.empty:
            function = getattr(preprocessor, "func", preprocessor)
            raise _refused(
                task,
                f"its preprocessor {getattr(function, '__name__', function)} makes rows by"
                " sequence_length, and rows are tokenised once for all lengths; fix it:"
                " functools.partial(..., sequence_length={'inputs': 512, 'targets': 64})",
            )
    if task.requires_caching:
        raise _refused(
            task,
            "it is read from a cache of seqio_cache_tasks alone, and training keeps tokens of its own;"
            " leave required=True out of its CacheDatasetPlaceholder",
        )


def _refused(task: Any, why: str) -> InputError:
    return InputError(f"task {task.name!r}: {why}")
