"""Checks that a plain SeqIO task can train an encoder-decoder."""

import inspect
from typing import Any

from stepdistill_jax.errors import InputError

FEATURES = ("inputs", "targets")
EXTRA_FEATURES = ("id", "weight")  # features that are also read, if a row has them


def check_trainable(task: Any) -> None:
    """Checks that an encoder-decoder can be trained on a `seqio.Task`.

    Raises:
        InputError: the task is unsuitable. The message is one line with the task, the problem and the remedy.
    """
    import seqio

    features = task.output_features
    if set(features) & set(FEATURES) == {"targets"}:
        raise _refused(
            task,
            "this task has the feature `targets` but not `inputs`, and an encoder-decoder needs both; add a"
            " preprocessor that splits the text in two",
        )
    if not set(FEATURES) <= set(features):
        raise _refused(
            task,
            "an encoder-decoder needs the features inputs and targets, but this task has"
            f" {', '.join(features)}; rename them in a preprocessor (seqio.preprocessors.rekey)",
        )
    for name, feature in features.items():
        if name not in (*FEATURES, *EXTRA_FEATURES) and feature.required:
            raise _refused(
                task,
                f"the output feature {name!r} is required, but an encoder-decoder reads only inputs"
                " and targets; put its text into inputs, or declare the feature with"
                " seqio.Feature(..., required=False)",
            )
    for name in FEATURES:
        _check_ids(task, name, features[name])
    inputs, targets = (features[name].vocabulary for name in FEATURES)
    if inputs != targets:
        raise _refused(
            task,
            f"inputs and targets must share a vocabulary, since a model has one embedding, but inputs"
            f" have {inputs} and targets have {targets}; give both the same vocabulary",
        )
    if not isinstance(inputs, seqio.SentencePieceVocabulary | seqio.ByteVocabulary):
        raise _refused(
            task,
            "its vocabulary must be a seqio.SentencePieceVocabulary or seqio.ByteVocabulary, but it is a"
            f" {type(inputs).__name__}; `stepdistill prepare` trains a SentencePiece vocabulary",
        )
    _check_preprocessors(task)


def _check_ids(task: Any, name: str, feature: Any) -> None:
    """Raises InputError if a feature does not contain token ids that a vocabulary can decode."""
    import seqio

    if feature.rank != 1 or not feature.dtype.is_integer:
        raise _refused(
            task,
            f"the feature {name!r} must be token ids, int32 of rank 1, but it is {feature.dtype.name} of"
            f" rank {feature.rank}; tokenise it (seqio.preprocessors.tokenize)",
        )
    if isinstance(feature.vocabulary, seqio.PassThroughVocabulary):
        raise _refused(
            task,
            f"the feature {name!r} has a PassThroughVocabulary, which cannot decode answers; use the"
            " vocabulary that made its ids, a seqio.SentencePieceVocabulary or seqio.ByteVocabulary",
        )


def _check_preprocessors(task: Any) -> None:
    """Raises InputError if a preprocessor needs `sequence_length`, or if the task requires SeqIO's cache.

    Rows are tokenised only once, for runs with different sequence lengths.
    """
    try:
        named = [(p, inspect.signature(p).parameters) for p in task.preprocessors]
    except (TypeError, ValueError) as error:  # SeqIO itself cannot call a function
        raise _refused(task, f"its preprocessors: {' '.join(str(error).split())}") from error
    for preprocessor, parameters in named:
        length = parameters.get("sequence_length")
        if length is not None and length.default is inspect.Parameter.empty:
            function = getattr(preprocessor, "func", preprocessor)
            raise _refused(
                task,
                f"its preprocessor {getattr(function, '__name__', function)} depends on"
                " sequence_length, but rows are tokenised once for all lengths; fix the length:"
                " functools.partial(..., sequence_length={'inputs': 512, 'targets': 64})",
            )
    if task.requires_caching:
        raise _refused(
            task,
            "this task can be read only from a cache that `seqio_cache_tasks` wrote, but training tokenises"
            " the rows itself; remove required=True from the task's CacheDatasetPlaceholder",
        )


def _refused(task: Any, why: str) -> InputError:
    return InputError(f"task {task.name!r}: {why}")
