"""Span corruption (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4): pretraining on plain text.

The text `We hold these truths` becomes the inputs `We hold <X>` and the targets `<X> these truths`. With the
same seeds, the package `t5` gives the same results (t5/data/preprocessors.py, version 0.9.4).
"""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

from stepdistill_jax.data.builder import tensorflow
from stepdistill_jax.data.vocabulary import BYTES, load_vocabulary
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.checks import number, whole

NOISE_DENSITY, MEAN_NOISE_SPAN_LENGTH, SENTINELS = 0.15, 3.0, 100  # T5's


def add_span_corruption(
    name: str,
    *,
    files: Mapping[str, os.PathLike | str],
    vocabulary: os.PathLike | str = BYTES,
    inputs_length: int = 512,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
    masks: int = 1,
) -> Any:
    """Registers a SeqIO task in which the model predicts masked spans of texts.

    A text has the same masks in every epoch (like RoBERTa's static masking, arXiv 1907.11692, section 4.1).

    Args:
        files: {name of a split: file with lines `{"text": ...}`, or glob pattern of such files}.
        vocabulary: path of a `spiece.model`, or `bytes`. The model needs 100 more ids, for sentinels. The
            first sentinel has the highest id.
        inputs_length: the config's `input_length`. Longer texts are split into segments.
        noise_density: share of the ids to predict, above 0 and below 1.
        mean_noise_span_length: mean length of a masked span in ids, 1 or more.
        masks: count of masks for each segment. Each mask makes one example.

    Returns:
        The `seqio.Task`. The config's `target_length` should be `random_spans_helper(...)[1]`.

    Raises:
        InputError: a file does not exist, the name is taken, a number is out of range, or a segment has more
            spans than there are sentinels. A malformed line raises the error later, when rows are read.
    """
    tf = tensorflow()
    import seqio

    where = f"add_span_corruption({name!r})"
    whole("inputs_length", inputs_length, 8)
    number("noise_density", noise_density, above=0, below=1)
    number("mean_noise_span_length", mean_noise_span_length, least=1)
    whole("masks", masks, 1)
    length, _ = random_spans_helper(inputs_length, noise_density, mean_noise_span_length)
    spans = round(round(length * noise_density) / mean_noise_span_length)
    if spans > SENTINELS:
        raise InputError(
            f"{where}: a segment of {length} ids has {spans} spans, but there are {SENTINELS}"
            " sentinels; use a shorter inputs_length or longer spans"
        )
    for split, path in files.items():
        if not tf.io.gfile.glob(os.fspath(path)):
            raise InputError(f"{where}: no file {path} for the split {split}")
    if name in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise InputError(f"{where}: SeqIO already has a task or mixture of that name")
    load_vocabulary(vocabulary)
    if os.fspath(vocabulary) == BYTES:
        pieces = seqio.ByteVocabulary(extra_ids=SENTINELS)
    else:
        pieces = seqio.SentencePieceVocabulary(os.fspath(vocabulary), extra_ids=SENTINELS)
    feature = seqio.Feature(pieces, add_eos=True)
    source: Any = seqio.TextLineDataSource({split: os.fspath(p) for split, p in files.items()})
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            text_of_json_lines,
            functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
            functools.partial(split_tokens, length=length),
            functools.partial(repeat, times=masks),
            functools.partial(
                corrupt_spans,
                noise_density=noise_density,
                mean_noise_span_length=mean_noise_span_length,
            ),
            seqio.preprocessors.append_eos,
        ],
        output_features={"inputs": feature, "targets": feature},
    )


def _plain(function: Any) -> Any:
    """Marks a function as plain TensorFlow, so that autograph does not convert it."""
    return tensorflow().autograph.experimental.do_not_convert(function)


def text_of_json_lines(dataset: Any) -> Any:
    """SeqIO preprocessor: reads `targets` from lines `{"text": ...}`, and skips blank lines."""
    tf = tensorflow()

    def parse(line: bytes) -> bytes:
        try:
            return json.loads(line)["text"].encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            shown = line[:80].decode(errors="replace")
            raise InputError(f'expected a row {{"text": "..."}}, got {shown}') from None

    @_plain
    def convert(line: Any) -> dict[str, Any]:
        return {"targets": tf.ensure_shape(tf.numpy_function(parse, [line], tf.string), [])}

    dataset = dataset.filter(_plain(lambda line: tf.strings.length(tf.strings.strip(line)) > 0))
    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def split_tokens(dataset: Any, *, length: int) -> Any:
    """SeqIO preprocessor: splits `targets` into pieces of at most `length` ids.

    Pieces of a single id are dropped: if this id were masked, no context would be left.
    """
    tf = tensorflow()

    @_plain
    def pieces(row: Mapping[str, Any]) -> Any:
        return tf.data.Dataset.from_tensor_slices({"targets": row["targets"]}).batch(length)

    return dataset.flat_map(pieces).filter(_plain(lambda row: tf.size(row["targets"]) > 1))


def repeat(dataset: Any, *, times: int) -> Any:
    """SeqIO preprocessor: repeats each row `times` times."""
    tf = tensorflow()
    return dataset.flat_map(_plain(lambda row: tf.data.Dataset.from_tensors(row).repeat(times)))


def corrupt_spans(
    dataset: Any, output_features: Any, *, noise_density: float, mean_noise_span_length: float
) -> Any:
    """SeqIO preprocessor: moves the unmasked ids of `targets` to `inputs`, and keeps only the masked spans.

    A sentinel stands for each masked span in `inputs`, and for each unmasked span in `targets`. The mask depends
    on the task's seed and the row's index.
    """
    import seqio

    tf, vocabulary = tensorflow(), output_features["targets"].vocabulary

    @seqio.map_over_dataset(num_seeds=2)
    @_plain
    def corrupt(row: Mapping[str, Any], seeds: Any) -> dict[str, Any]:
        ids = row["targets"]
        noise = random_spans_noise_mask(
            tf.size(ids), noise_density, seeds, mean_noise_span_length=mean_noise_span_length
        )
        return {
            "inputs": noise_span_to_unique_sentinel(ids, noise, vocabulary.vocab_size),
            "targets": noise_span_to_unique_sentinel(ids, ~noise, vocabulary.vocab_size),
        }

    return corrupt(dataset)


def random_spans_noise_mask(
    length: Any, noise_density: float, seeds: Any, *, mean_noise_span_length: float
) -> Any:
    """Returns a random mask of the ids to predict, which are called noise.

    There are `n = max(1, round(length * noise_density))` noise ids, in
    `max(1, round(n / mean_noise_span_length))` spans. Kept spans and noise spans alternate: the first span is
    kept, and the last span is noise. All such masks are equally likely.

    Args:
        length: int32 scalar, count of ids.
        seeds: two random seeds, [2, 2] int32.

    Returns:
        [length] bool: True for noise ids.
    """
    import seqio

    tf = tensorflow()
    kept_length = length
    length = tf.maximum(length, 2)

    def rounded(x: Any) -> Any:
        return tf.cast(tf.round(x), tf.int32)

    noise_ids = rounded(tf.cast(length, tf.float32) * noise_density)
    noise_ids = tf.minimum(tf.maximum(noise_ids, 1), length - 1)
    spans = tf.maximum(rounded(tf.cast(noise_ids, tf.float32) / mean_noise_span_length), 1)
    spans = tf.minimum(spans, length - noise_ids)  # without it, as in `t5`, dense short spans fail

    def segment_lengths(ids: Any, seed: Any) -> Any:
        """Returns random lengths of `spans` segments, [spans] int32. Each is at least 1, and their sum is `ids`."""
        # The first id starts a segment, and so do `spans - 1` of the other ids. Example for 5 ids: `starts` of
        # the other ids is [0, 1, 0, 1], so the segment of each id is [0, 0, 1, 1, 2] and the lengths [2, 2, 1]
        starts = seqio.stateless_shuffle(tf.cast(tf.range(ids - 1) < spans - 1, tf.int32), seed)
        segment = tf.cumsum(tf.pad(starts, [[1, 0]]))
        return tf.math.segment_sum(tf.ones_like(segment), segment)

    noise, kept = (
        segment_lengths(noise_ids, seeds[0]),
        segment_lengths(length - noise_ids, seeds[1]),
    )
    # kept [3, 1] and noise [1, 2] alternate: lengths [3, 1, 1, 2], starts of spans [3, 4, 5],
    # number of each id's span [0, 0, 0, 1, 2, 3, 3]; odd spans are noise
    lengths = tf.reshape(tf.stack([kept, noise], axis=1), [spans * 2])
    starts = tf.cumsum(lengths)[:-1]
    number = tf.cumsum(tf.math.unsorted_segment_sum(tf.ones_like(starts), starts, length))
    return (number % 2 == 1)[:kept_length]


def noise_span_to_unique_sentinel(ids: Any, noise: Any, vocab_size: int) -> Any:
    """Replaces each run of noise ids by one sentinel: `vocab_size - 1`, `vocab_size - 2`, ... from left to right.

    Example: ids [5, 6, 7, 8], noise [0, 1, 1, 0] and vocab_size 100 give [5, 99, 8].

    Args:
        ids: [length] int32.
        noise: [length] bool.
        vocab_size: size of the vocabulary with its sentinels.

    Returns:
        [at most length] int32.
    """
    tf = tensorflow()
    before = tf.pad(noise[:-1], [[1, 0]])
    first = noise & ~before
    sentinels = vocab_size - tf.cumsum(tf.cast(first, ids.dtype))
    return tf.boolean_mask(tf.where(first, sentinels, ids), ~(noise & before))


def random_spans_helper(
    inputs_length: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
    """Returns (segment length, target length) for a segment whose masked inputs have `inputs_length` ids.

    `noise` masked ids in `spans` spans give `length - noise + spans + 1` input ids and `noise + spans + 1`
    target ids. The 1 is the end of sequence.

    Example: `random_spans_helper(512, 0.15, 3.0)` is (568, 114).
    """

    def lengths(ids: int) -> tuple[int, int]:
        noise = round(ids * noise_density)
        spans = round(noise / mean_noise_span_length)
        return ids - noise + spans + 1, noise + spans + 1

    ids = inputs_length - 1
    while lengths(ids + 1)[0] <= inputs_length:
        ids += 1
    return ids, lengths(ids)[1]
