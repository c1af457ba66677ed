"""Computes the exact log probability of each given answer, and encodes each input only once."""

import dataclasses
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
)  # possible widths of a decoder row in tokens; a longer answer makes the decoder rows of its batch wider
CHUNK_TOKENS = 512  # number of tokens for which a device keeps logits at a time
Ids = Sequence[int]


class ChoiceScorer:
    """Computes the log probability that the model gives to each of a row's allowed answers.

    A score does not depend on the other answers or inputs.

    Example: `ChoiceScorer(config)(params, [[5, 7, 1]], [[[4, 1], [6, 8, 1]]])` is `[array([-2.1, -9.8])]`.
    """

    def __init__(
        self, config: ModelConfig, *, batch_size: int | None = None, mesh: Mesh | None = None
    ):
        """Prepares a scorer. Programs are compiled only when the scorer is called.

        Args:
            batch_size: number of inputs to score at once, as for `LabelDecoder`.
            mesh: as for `LabelDecoder`.
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
            params: placed over any mesh.
            rows: ids of each input, with end of sequence, without padding.
            answers: ids of each row's answers, with end of sequence.
            on_progress: called after each batch with its number of rows.

        Returns:
            For each row, the natural log of each answer's probability, [answers] float32.

        Raises:
            ValueError: `rows` and `answers` differ in length, or a row or an answer is empty.
        """
        if len(rows) != len(answers) or not all(map(len, rows)) or not all(map(len, answers)):
            raise ValueError(
                "`rows` and `answers` need equal lengths, and each row needs ids and at least one answer"
            )
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
            # Adds up the log probabilities of each answer's ids. Owners 1 1 2 0 give three sums: of padding
            # (0), of answer 1 and of answer 2.
            for i, place in enumerate(places):
                sums = np.bincount(owners[i].ravel(), log_probs[i].ravel())
                scores[place] = sums[1:].astype(np.float32)
            if on_progress:
                on_progress(len(places))
        return scores


@functools.lru_cache(maxsize=8)  # like `greedy._jit_decode`: compiled once in a process
def _jit_score(config: ModelConfig, batch_size: int, mesh: Mesh | None) -> Callable[..., jax.Array]:
    # one program for each combination of input bucket, decoder row width, and number of decoder rows of an input
    model = EncoderDecoder(config)
    rows_of_device = batch_size // (batch_shards(mesh) if mesh else 1)

    def score(params, arrays):
        """Returns the log probability of each target token, [inputs, decoder rows per input, width] float32."""
        inputs, targets, segments = arrays
        variables = {"params": params}
        present = (inputs != PAD_ID).astype(jnp.int32)
        encoded: Any = model.apply(variables, inputs, present, method="encode")
        cache = start_cache(params, encoded, config, targets.shape[-1])
        output = output_layer(params, config)
        # cast once, not in each chunk
        output = dataclasses.replace(output, weights=output.weights.astype(config.dtype))

        def one_decoder_row(_, of_row):
            targets, segments = of_row  # [rows, width]
            # teacher forcing: the decoder reads 0 at the start of each answer, so segments 1 1 2 2 with
            # targets 7 1 8 1 read 0 7 0 8
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
    """Returns the log probability of each target id [rows, width].

    Logits exist for at most `at_once` tokens of a row at a time.
    """
    width = x.shape[1]
    # all chunks of a scan have the same size, so it must divide the width: width 48, at most 20 -> 16
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
    """Yields the indices of each batch's rows, which have inputs and answers of similar lengths."""
    tokens = [sum(map(len, of_row)) for of_row in answers]

    # negative, so that the largest batch comes first and a lack of memory shows in the first batch
    def size(i: int) -> tuple[int, int, int]:
        return -(tokens[i] // WIDTHS[-1]), -bucket_length(len(rows[i])), -tokens[i]

    order = sorted(range(len(rows)), key=size)  # stable: equal rows keep their order
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _arrays(
    rows: list[Ids], answers: list[Sequence[Ids]], batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the arrays (inputs, targets, segments, owners) of one batch, filled up with rows of zeros.

    Inputs are [batch_size, bucket] int32, and the others [batch_size, decoder rows, width] int32. 0 is padding.

    Segments number the answers within a decoder row, and owners number all answers of an input, both from 1.

    Example, with decoder rows shortened to 8 tokens: an input's first decoder row has the answers 7 1 and 8 9 1.
    Its targets are 7 1 8 9 1 0 0 0, and its segments and owners are both 1 1 2 2 2 0 0 0. The input's third answer,
    at the start of the second decoder row, has segment 1 and owner 3.
    """
    # the narrowest width into which the longest answer fits and, up to 64 tokens, all answers of an input
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
    """Packs answers of these lengths, in order, into decoder rows of `width` tokens.

    Returns the indices of the answers in each decoder row. Example: `_pack([3, 4, 2], 8)` is [[0, 1], [2]].
    """
    decoder_rows, used = [[]], 0
    for number, length in enumerate(lengths):
        if used + length > width:
            decoder_rows.append([])
            used = 0
        decoder_rows[-1].append(number)
        used += length
    return decoder_rows


def _rounded(count: int) -> int:
    """Rounds `count` up to one of 1, 2, 3, 4, 6, 8, 12, 16, ..., so that few shapes are compiled."""
    power = 1
    while power < count:
        if power > 1 and power * 3 // 2 >= count:
            return power * 3 // 2
        power *= 2
    return power
