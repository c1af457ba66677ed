"""Greedy decoding, and `LabelDecoder`, which decodes rows of any length in batches."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stepdistill_jax.data.vocabulary import EOS_ID
from stepdistill_jax.decoding.token_loop import decode_tokens
from stepdistill_jax.models.config import ModelConfig
from stepdistill_jax.models.cpu_speed import argmax
from stepdistill_jax.models.sharding import (
    BATCH_AXES,
    LOGICAL_AXIS_RULES,
    batch_shards,
    place_rows,
    replicated,
)
from stepdistill_jax.runtime.chips import chip_of

SMALLEST_BUCKET = 32
ROWS_PER_DEVICE, FEWEST_ON_GPU = 64, 8
# share of a device's memory that gathered parameters may take; the rest is for a training state, caches and
# logits
GATHERED = 1 / 3
T = TypeVar("T")


def greedy_decode(
    params: Any,
    config: ModelConfig,
    encoder_input_tokens: jax.Array,
    *,
    max_decode_len: int,
    decoder_prefix: Sequence[int] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes the most probable token at each step, until every row has ended or has `max_decode_len` tokens.

    Args:
        params: unboxed.
        encoder_input_tokens: [batch, length] int32; 0 is padding. A row of zeros has no answer.
        max_decode_len: largest number of answer tokens, the end of sequence included.
        decoder_prefix: ids that the decoder reads before the answer; not part of ids or scores.

    Returns:
        ids: [batch, max_decode_len] int32, 0 after the end of sequence.
        scores: [batch] float32, natural log of each answer's probability, including any end of sequence.
        finished: whether each answer has an end of sequence, [batch] bool.
    """
    return decode_tokens(
        params,
        config,
        encoder_input_tokens,
        lambda logits, *_: argmax(logits),
        max_decode_len=max_decode_len,
        decoder_prefix=decoder_prefix,
    )


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Decoded answers, in the order of the input rows.

    Attributes:
        ids: ids of each answer, including any end of sequence.
        scores: natural log of each answer's probability, [rows] float32.
        finished: whether each answer has an end of sequence, [rows] bool.
    """

    ids: list[list[int]]
    scores: np.ndarray
    finished: np.ndarray


def bucket_length(length: int) -> int:
    """Rounds a row's length up to its bucket: 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, ..."""
    # each bucket is a shape to compile: 21 up to length 1024; above 32, rounding adds at most 25%
    # four buckets between a power of 2 and the next: length 70 is above 64, so it is rounded up to a multiple
    # of 16, which gives 80
    power = SMALLEST_BUCKET
    while 2 * power < length:
        power *= 2
    return max(SMALLEST_BUCKET, -(-length // (power // 4)) * (power // 4))


def bucketed(
    rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yields batches of rows of similar length: (indices in `rows`, ids [batch_size, bucket] int32).

    The longest rows come first, so that a lack of memory shows at once. The last batch is filled up with rows of
    zeros.
    """
    # `sorted` is stable, so rows of equal length keep their order
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = np.zeros((batch_size, bucket_length(len(rows[places[0]]))), np.int32)
        for i, place in enumerate(places):
            batch[i, : len(rows[place])] = rows[place]
        yield places, batch


@functools.lru_cache(maxsize=8)
def _jit_decode(
    config: ModelConfig,
    max_decode_len: int,
    mesh: Mesh | None,
    decode_fn: Callable,
    decoder_prefix: tuple[int, ...],
) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns the compiled function of a `LabelDecoder`.

    Equal `LabelDecoder`s of a process share one function, so it is compiled only once.
    """
    options: dict[str, Any] = {"max_decode_len": max_decode_len}
    # passed only if there is a prefix, since a user's decode function need not have this argument
    if decoder_prefix:
        options["decoder_prefix"] = decoder_prefix

    def decode(params, encoder_input_tokens):
        return decode_fn(params, config, encoder_input_tokens, **options)

    return jit_over_rows(decode, mesh, config.dtype)


def jit_over_rows(fn: Callable, mesh: Mesh | None, dtype: str) -> Callable:
    """Compiles `fn(params, arrays)` for a tree of arrays [rows, ...]. Each device gets all results.

    Float32 matrices are cast to `dtype`.
    """
    cast = functools.partial(jax.tree_util.tree_map_with_path, functools.partial(_in_dtype, dtype))
    if mesh is None:
        return jax.jit(lambda params, arrays: fn(cast(params), arrays))
    own_rows = [axis for axis in BATCH_AXES if mesh.shape[axis] > 1]
    # inside `shard_map` the batch axes are sharded already; GSPMD still handles the tensor axis
    rules = [(name, axis) for name, axis in LOGICAL_AXIS_RULES if axis == "tensor"]

    def by_themselves(params, arrays):
        with nn.logical_axis_rules(rules if mesh.shape["tensor"] > 1 else []):
            return fn(params, arrays)

    def spread(params, arrays):
        params = cast(params)
        # With `fsdp`, rows and parameters are sharded over the same axis, so each device must gather all
        # parameters: once if they fit, and else at each token, in the program that GSPMD partitions.
        if not own_rows or (mesh.shape["fsdp"] > 1 and not _fits(params, mesh)):
            return fn(params, arrays)
        rows = PartitionSpec(tuple(own_rows))
        return jax.shard_map(
            by_themselves,
            mesh=mesh,
            in_specs=(PartitionSpec(), rows),
            out_specs=rows,
            axis_names=set(own_rows),
            check_vma=False,
        )(params, arrays)

    return jax.jit(spread, out_shardings=replicated(mesh))


def _in_dtype(dtype: str, path: tuple, x: jax.Array) -> jax.Array:
    """Casts a float32 matrix to `dtype`, since bfloat16 halves the bytes to read and to send."""
    # norm scales and position biases are used in float32
    is_matrix = path[-1].key.endswith(("kernel", "embedder")) and x.dtype == np.float32
    return x.astype(dtype) if is_matrix else x


def _fits(params: Any, mesh: Mesh) -> bool:
    """Returns whether all parameters, gathered, take less than a third of a device's memory.

    If the memory is unknown, the result is True on CPUs and False elsewhere.
    """
    device = mesh.devices.flat[0]
    # reads the memory from a table, not from the device, since all processes must trace the same program
    chip = chip_of(device.device_kind)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) / mesh.shape["tensor"]
    return device.platform == "cpu" if chip is None else size < GATHERED * chip.memory


def call_over_rows(fn: Callable, mesh: Mesh | None, params: Any, arrays: Any) -> Any:
    """Calls a function from `jit_over_rows`, without waiting for its results.

    `arrays` is a tree of NumPy arrays [rows, ...], which must be the same in each process.
    """
    if mesh is None:
        return fn(params, arrays)
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        return fn(params, place_rows(arrays, mesh))


def pipelined(started: Iterator[T], ahead: int = 1) -> Iterator[T]:
    """Yields the items of an iterator in order, but takes `ahead` further items before it yields one.

    Taking an item starts its computation, so the device need not wait for the host.
    """
    queue = collections.deque()
    for item in started:
        queue.append(item)
        if len(queue) > ahead:
            yield queue.popleft()
    while queue:
        yield queue.popleft()


def rows_at_once(batch_size: int | None, mesh: Mesh | None) -> int:
    """Returns the number of rows to decode at once, summed over all devices.

    If `batch_size` is None, each device along the mesh's batch axes gets 64 rows. Otherwise, `batch_size` is rounded
    up so that all these devices get the same number of rows. A GPU gets at least 8.
    """
    shards = batch_shards(mesh) if mesh else 1
    wanted = ROWS_PER_DEVICE * shards if batch_size is None else batch_size
    platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
    # on a GPU, fewer rows take more time
    fewest = FEWEST_ON_GPU if platform == "gpu" else 1
    return max(-(-wanted // shards), fewest) * shards


class LabelDecoder:
    """Decodes rows of ids of any length, greedily by default.

    A row's answer does not depend on the other rows. Rows are padded to a few lengths (see `bucket_length`), and
    the program is compiled once for each of these lengths.

    Example: `LabelDecoder(config, max_decode_len=8)(params, [[5, 7, 1], [9, 1]]).ids`. For beam search, add
    `decode_fn=functools.partial(beam_search, num_beams=4)`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_decode_len: int,
        batch_size: int | None = None,
        mesh: Mesh | None = None,
        decode_fn: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] = greedy_decode,
        decoder_prefix: Sequence[int] = (),
    ):
        """Prepares a decoder, without compiling it.

        Args:
            max_decode_len: maximum number of tokens of an answer, including the end of sequence.
            batch_size: see `rows_at_once`.
            mesh: mesh over which `params` are placed; None means the default device. All processes must pass the
                same rows, and each gets all answers.
            decode_fn: a function with the arguments and results of `greedy_decode`, traced by `jax.jit`.
            decoder_prefix: ids that the decoder reads before the answer; passed to `decode_fn` unless empty.
        """
        self.batch_size = rows_at_once(batch_size, mesh)
        self.max_decode_len = max_decode_len
        self._mesh = mesh
        self._decode = _jit_decode(config, max_decode_len, mesh, decode_fn, tuple(decoder_prefix))

    def __call__(
        self,
        params: Any,
        rows: Sequence[Sequence[int]],
        on_progress: Callable[[int], None] | None = None,
    ) -> Decoded:
        """Decodes `rows`.

        Args:
            params: placed over any mesh.
            rows: ids of each input, with end of sequence, without padding.
            on_progress: called after each batch with its number of rows.

        Raises:
            ValueError: a row has no ids.
        """
        if not all(map(len, rows)):
            raise ValueError(
                f"row {[len(r) for r in rows].index(0)} has no ids; an input needs at least one"
            )
        decoded = Decoded(
            [[] for _ in rows], np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
        )

        # a generator, so that `pipelined` starts the next batch before it waits for this one
        results = (
            (places, call_over_rows(self._decode, self._mesh, params, batch))
            for places, batch in bucketed(rows, self.batch_size)
        )
        for places, result in pipelined(results):
            ids, scores, finished = map(np.asarray, result)
            for i, place in enumerate(places):
                row = ids[i].tolist()
                decoded.ids[place] = row[: row.index(EOS_ID) + 1] if finished[i] else row
                decoded.scores[place], decoded.finished[place] = scores[i], finished[i]
            if on_progress:
                on_progress(len(places))
        return decoded
