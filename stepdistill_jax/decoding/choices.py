"""Computes the exact log probability of each allowed answer of a row, with one encoding for all answers."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stepdistill_jax.data.vocabulary import PAD_ID
from stepdistill_jax.decoding.greedy import (
    bucket_length,
    call_over_rows,
    jit_over_rows,
    pipelined,
    rows_at_once,
)
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.encoder_decoder import (
    EncoderDecoder,
    OutputLayer,
    output_layer,
    start_cache,
)
from stepdistill_jax.models.sharding import batch_shards

WIDTHS = (
    8,
    16,
    24,
    32,
    48,
    64,
)  # tokens of a decoder row; an answer that is longer makes the decoder rows longer
CHUNK_TOKENS = 512  # number of tokens on a device for which logits exist at a time
Ids = Sequence[int]


class ChoiceScorer:
    """Scores given answers exactly, by the sum of the log probabilities of their ids under the model.

    The input is encoded once, and its keys and values are computed once. The answers of a row are packed
    into decoder rows of at most 64 tokens, where each answer is a segment, like targets in a training
    batch. Decoder rows are scored one after the other, and logits exist for 512 tokens at a time, so memory
    does not grow with the number of answers. A score does not depend on the other answers or on the other
    rows.

    The scorer keeps its compiled programs: one for each bucket of input lengths, width of decoder rows
    and, if a row has more than 64 tokens of answers, number of decoder rows.

    Example: `ChoiceScorer(config)(params, [[5, 7, 1]], [[[4, 1], [6, 8, 1]]])` is `[array([-2.1, -9.8])]`.
    """

    def __init__(
        self, config: ModelConfig, *, batch_size: int | None = None, mesh: Mesh | None = None
    ):
        """Compiles nothing yet.

        Args:
            config: configuration of the model; dropout is off.
            batch_size: number of inputs to score at once, as for `LabelDecoder`.
            mesh: holds `params` and cuts the inputs, as for `LabelDecoder`.
        """
        self.batch_size = rows_at_once(batch_size, mesh)
        self._mesh = mesh
        self._score = _jit_score(config, self.batch_size, mesh)

    def __call__(
        self,
        params: Any,
        rows: Sequence[Ids],
        answers: Sequence[Sequence[Ids]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """Returns the scores of each row's answers.

        Args:
            params: the model's parameters, placed by the mesh if there is one.
            rows: ids of each input with its end of sequence, without padding; none is empty.
            answers: for each row, the ids of each answer with its end of sequence; none is empty.
            on_progress: called with the number of rows of each finished batch.

        Returns:
            For each row, the natural log of the probability of each answer's ids, [answers] float32.

        Raises:
            ValueError: a row has no ids or no answers, or an answer has no ids.
        """
        if len(rows) != len(answers) or not all(map(len, rows)) or not all(map(len, answers)):
            raise ValueError("each row needs ids and at least one answer")
        if not all(all(map(len, of_row)) for of_row in answers):
            raise ValueError("each answer needs ids, at least its end of sequence")
        scores: list[np.ndarray] = [np.empty(0, np.float32)] * len(rows)

        def started():
            for places in _batches(rows, answers, self.batch_size):
                *batch, owners = _arrays(
                    [rows[i] for i in places], [answers[i] for i in places], self.batch_size
                )
                yield places, owners, call_over_rows(self._score, self._mesh, params, batch)

        for places, owners, log_probs in pipelined(started()):
            log_probs = np.asarray(log_probs, np.float64)
            # Adds up the log probabilities of each answer's ids: owners 1 1 2 0 give sums of padding (0), of
            # answer 1 and of answer 2.
            for i, place in enumerate(places):
                sums = np.bincount(owners[i].ravel(), log_probs[i].ravel())
                scores[place] = sums[1:].astype(np.float32)
            if on_progress:
                on_progress(len(places))
        return scores


@functools.lru_cache(maxsize=8)  # like `greedy._jit_decode`: compiled once in a process
def _jit_score(config: ModelConfig, batch_size: int, mesh: Mesh | None) -> Callable[..., jax.Array]:
    model = EncoderDecoder(config)
    rows_of_device = batch_size // (batch_shards(mesh) if mesh else 1)

    def score(params, arrays):
        """Returns the log probability of each token of [rows, decoder rows, width] targets."""
        inputs, targets, segments = arrays
        variables = {"params": params}
        present = (inputs != PAD_ID).astype(jnp.int32)
        encoded: Any = model.apply(variables, inputs, present, method="encode")
        cache = start_cache(params, encoded, config, targets.shape[-1])
        output = output_layer(params, config)
        # cast once, not in each chunk
        output = output.replace(weights=output.weights.astype(config.dtype))

        def one_decoder_row(_, of_row):
            targets, segments = of_row  # [rows, width]
            # teacher forcing: each answer starts with 0; segments 1 1 2 2 with targets 7 1 8 1 read 0 7 0 8
            begins = segments != _shifted(segments)
            ids = jnp.where(begins, PAD_ID, _shifted(targets))
            x: Any = model.apply(variables, ids, segments, cache, present, method="target_states")
            # 64 rows on a device: 8 tokens of each row at a time
            at_once = max(1, CHUNK_TOKENS // rows_of_device)
            return None, _log_probs(x, output, targets, at_once)

        _, found = jax.lax.scan(
            one_decoder_row, None, (targets.swapaxes(0, 1), segments.swapaxes(0, 1))
        )
        return found.swapaxes(0, 1)

    return jit_over_rows(score, mesh, config.dtype)


def _shifted(x: jax.Array) -> jax.Array:
    """Shifts rows to the right by one: `[[3, 4, 5]] -> [[0, 3, 4]]`."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def _log_probs(x: jax.Array, output: OutputLayer, targets: jax.Array, at_once: int) -> jax.Array:
    """Returns the log probabilities of ids [rows, width] from states [rows, width, embed]: [rows, width] float32.

    Logits exist for at most `at_once` tokens of each row at a time.
    """
    width = x.shape[1]
    # the chunks of a scan have one shape, so the size divides the width: width 48, at most 20 -> 16
    size = max(n for n in range(1, width + 1) if width % n == 0 and n <= at_once)

    def cut(x):  # [rows, width, ...] -> [width / size, rows, size, ...]
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def of_chunk(_, chunk):
        x, ids = chunk
        logits = output.logits(x)
        of_ids = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        return None, of_ids - jax.nn.logsumexp(logits, axis=-1)

    _, found = jax.lax.scan(of_chunk, None, (cut(x), cut(targets)))
    return found.swapaxes(0, 1).reshape(targets.shape)


def _batches(
    rows: Sequence[Ids], answers: Sequence[Sequence[Ids]], batch_size: int
) -> Iterator[list[int]]:
    """Yields the places of rows with similar numbers of decoder rows, input buckets, and answer tokens."""
    tokens = [sum(map(len, of_row)) for of_row in answers]

    # negative, so that the largest batch comes first and a lack of memory shows early
    def size(i: int) -> tuple[int, int, int]:
        return -(tokens[i] // WIDTHS[-1]), -bucket_length(len(rows[i])), -tokens[i]

    order = sorted(range(len(rows)), key=size)  # stable: equal rows keep their order
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _arrays(
    rows: list[Ids], answers: list[Sequence[Ids]], batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns one batch, filled up with rows of zeros.

    Two answers 7 1 and 8 9 1 in one decoder row of 8 have targets 7 1 8 9 1 0 0 0, and segments and owners
    1 1 2 2 2 0 0 0. In a second decoder row, segments start again at 1, and owners continue.

    Returns:
        inputs [batch_size, bucket]; targets, segments and owners [batch_size, decoder rows, width],
        all int32: ids, number of the id's answer in its decoder row, and number among the row's answers.
    """
    # the narrowest width that holds the longest answer and, up to 64 tokens, all answers of a row
    longest = max(len(ids) for of_row in answers for ids in of_row)
    most = max(sum(map(len, of_row)) for of_row in answers)
    needed = max(longest, min(most, WIDTHS[-1]))
    width = next((w for w in WIDTHS if w >= needed), bucket_length(needed))
    packed = [_pack([len(ids) for ids in of_row], width) for of_row in answers]
    shape = batch_size, _rounded(max(map(len, packed))), width
    inputs = np.zeros((batch_size, bucket_length(max(map(len, rows)))), np.int32)
    targets, segments, owners = (np.zeros(shape, np.int32) for _ in range(3))
    for i, (row, of_row, decoder_rows) in enumerate(zip(rows, answers, packed, strict=True)):
        inputs[i, : len(row)] = row
        for j, numbers in enumerate(decoder_rows):
            start = 0
            for segment, number in enumerate(numbers, 1):
                place = i, j, slice(start, start + len(of_row[number]))
                targets[place], segments[place] = of_row[number], segment
                owners[place] = number + 1
                start += len(of_row[number])
    return inputs, targets, segments, owners


def _pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Packs answers into decoder rows, in order: `_pack([3, 4, 2], 8)` is [[0, 1], [2]]."""
    decoder_rows, used = [[]], 0
    for number, length in enumerate(lengths):
        if used + length > width:
            decoder_rows.append([])
            used = 0
        decoder_rows[-1].append(number)
        used += length
    return decoder_rows


def _rounded(count: int) -> int:
    """Rounds up to 1, 2, 3, 4, 6, 8, 12, 16, ..., so that few shapes are compiled."""
    power = 1
    while power < count:
        if power > 1 and power * 3 // 2 >= count:
            return power * 3 // 2
        power *= 2
    return power
