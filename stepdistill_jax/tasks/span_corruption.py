"""Span corruption (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4): pretraining on plain text.

`We hold these truths` becomes the pair `We hold <X>` -> `<X> these truths`. SeqIO brings no such
preprocessor; the functions here do what those of the same name in the package `t5` do
(t5/data/preprocessors.py, version 0.9.4), so that the same seeds give the same masks.
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

NOISE_DENSITY, MEAN_NOISE_SPAN_LENGTH, SENTINELS = 0.15, 3.0, 100  # those of T5


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
    """Registers the SeqIO task NAME: texts of JSON lines, cut into segments, with spans to guess.

    The token store keeps what is read once, so a segment has the same mask in every epoch: that of its
    place in the file. `masks` gives it several, each an example of its own (as in RoBERTa's static
    masking, arXiv 1907.11692, section 4.1).

    Args:
        name: of the task.
        files: by split, a file of rows `{"text": ...}`, or a pattern of such files.
        vocabulary: path of a `spiece.model`, or `bytes`; 100 sentinels follow its last id, the first
            of them the highest, so the model has that many more ids.
        inputs_length: the config's `input_length`: most ids of corrupted inputs, end of sequence included. A
            longer text is cut into segments that give just as many.
        noise_density: share of the ids to guess, above 0 and below 1.
        mean_noise_span_length: ids of a span on average, 1 or more.
        masks: how often each segment is corrupted.

    Returns:
        The `seqio.Task`. Its longest targets have `random_spans_helper(...)[1]` ids: `target_length`.

    Raises:
        InputError: no such file, a name that is taken, a bad number, or more spans in a segment than
            there are sentinels. A row that is no object with a `text` is named when it is read.
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
            f"{where}: {spans} spans in a segment of {length} ids, and there are {SENTINELS}"
            " sentinels; take shorter inputs_length or longer spans"
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
    """Plain TensorFlow, whose source autograph need not read."""
    return tensorflow().autograph.experimental.do_not_convert(function)


def text_of_json_lines(dataset: Any) -> Any:
    """SeqIO preprocessor: a line `{"text": ...}` -> `targets`, the text; blank lines are left out."""
    tf = tensorflow()

    def parse(line: bytes) -> bytes:
        try:
            return json.loads(line)["text"].encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            shown = line[:80].decode(errors="replace")
            raise InputError(f'a row {{"text": "..."}} is wanted, got {shown}') from None

    @_plain
    def convert(line: Any) -> dict[str, Any]:
        return {"targets": tf.ensure_shape(tf.numpy_function(parse, [line], tf.string), [])}

    dataset = dataset.filter(_plain(lambda line: tf.strings.length(tf.strings.strip(line)) > 0))
    return dataset.map(convert, num_parallel_calls=tf.data.AUTOTUNE)


def split_tokens(dataset: Any, *, length: int) -> Any:
    """SeqIO preprocessor: `targets` in pieces of `length` ids, the last of a text maybe shorter.

    A piece of a single id is left out: nothing would stand beside what is to be guessed.
    """
    tf = tensorflow()

    @_plain
    def pieces(row: Mapping[str, Any]) -> Any:
        return tf.data.Dataset.from_tensor_slices({"targets": row["targets"]}).batch(length)

    return dataset.flat_map(pieces).filter(_plain(lambda row: tf.size(row["targets"]) > 1))


def repeat(dataset: Any, *, times: int) -> Any:
    """SeqIO preprocessor: each row `times` times."""
    tf = tensorflow()
    return dataset.flat_map(_plain(lambda row: tf.data.Dataset.from_tensors(row).repeat(times)))


def corrupt_spans(
    dataset: Any, output_features: Any, *, noise_density: float, mean_noise_span_length: float
) -> Any:
    """SeqIO preprocessor: `targets`, ids of a text -> `inputs` without the spans, `targets` the spans.

    SeqIO gives each row two seeds, by the task's seed and the row's place.
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
    """Which ids are noise; all masks with these numbers of ids and of spans are equally likely.

    Spans alternate, the first is kept, the last is noise (so a single one is the end); `round(length * noise_density)` ids are
    noise, in `round(these / mean_noise_span_length)` spans, one at least of both.

    Args:
        length: int32 scalar, of the ids.
        noise_density: share of noise.
        seeds: [2, 2] int32.
        mean_noise_span_length: ids of a span.

    Returns:
        [length] bool.
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
    spans = tf.minimum(spans, length - noise_ids)  # where `t5` fails: much noise in short spans

    def segment_lengths(ids: Any, seed: Any) -> Any:
        """[spans] lengths of at least 1 that add up to `ids`."""
        starts = seqio.stateless_shuffle(tf.cast(tf.range(ids - 1) < spans - 1, tf.int32), seed)
        segment = tf.cumsum(tf.pad(starts, [[1, 0]]))
        return tf.math.segment_sum(tf.ones_like(segment), segment)

    noise, kept = (
        segment_lengths(noise_ids, seeds[0]),
        segment_lengths(length - noise_ids, seeds[1]),
    )
    lengths = tf.reshape(tf.stack([kept, noise], axis=1), [spans * 2])
    starts = tf.cumsum(lengths)[:-1]
    number = tf.cumsum(tf.math.unsorted_segment_sum(tf.ones_like(starts), starts, length))
    return (number % 2 == 1)[:kept_length]


def noise_span_to_unique_sentinel(ids: Any, noise: Any, vocab_size: int) -> Any:
    """Each run of noise becomes one sentinel: `vocab_size - 1`, `vocab_size - 2`, ... from the left.

    Args:
        ids: [length] int32.
        noise: [length] bool.
        vocab_size: of the vocabulary with its sentinels.

    Returns:
        [shorter] int32.
    """
    tf = tensorflow()
    before = tf.pad(noise[:-1], [[1, 0]])
    first = noise & ~before
    sentinels = vocab_size - tf.cumsum(tf.cast(first, ids.dtype))
    return tf.boolean_mask(tf.where(first, sentinels, ids), ~(noise & before))


def random_spans_helper(
    inputs_length: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
    """(ids of a segment that is `inputs_length` long once it is corrupted, longest targets).

    Both lengths with the end of sequence. `random_spans_helper(512, 0.15, 3.0)` is (568, 114).
    """

    def lengths(ids: int) -> tuple[int, int]:
        noise = round(ids * noise_density)
        spans = round(noise / mean_noise_span_length)
        return ids - noise + spans + 1, noise + spans + 1

    ids = inputs_length - 1
    while lengths(ids + 1)[0] <= inputs_length:
        ids += 1
    return ids, lengths(ids)[1]
