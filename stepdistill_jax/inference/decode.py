"""Greedy decoding with a key-value cache, and the batching of rows of any length around it."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stepdistill_jax.models.config import T5Config
from stepdistill_jax.models.t5 import T5, start_cache
from stepdistill_jax.sharding import (
    LOGICAL_AXIS_RULES,
    batch_shards,
    place_rows,
    replicated,
)
from stepdistill_jax.text.vocabulary import EOS_ID, PAD_ID

SMALLEST_BUCKET = 32


def greedy_decode(
    params: Any, config: T5Config, encoder_input_tokens: jax.Array, *, max_decode_len: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The most probable next token, again and again, until each row has said its end.

    Args:
        params: parameters of a `T5` (unboxed).
        config: its configuration.
        encoder_input_tokens: [batch, length] int32, 0 is padding. A row of zeros only fills the
            batch: it is done from the start.
        max_decode_len: most tokens of an answer, the end of sequence included.

    Returns:
        ids [batch, max_decode_len] int32, 0 after the end of sequence; scores [batch] float32, the
        natural log of the probability of those ids, the end of sequence included; finished [batch]
        bool, false where `max_decode_len` ids came without an end (and in rows of zeros).
    """
    model, batch = T5(config), encoder_input_tokens.shape[0]
    segments = (encoder_input_tokens != PAD_ID).astype(jnp.int32)
    filler = jnp.sum(segments, axis=-1) == 0
    encoded: Any = model.apply({"params": params}, encoder_input_tokens, segments, method="encode")
    cache = start_cache(params, encoded, config, max_decode_len)
    cross = {name: cache.pop(name) for name in ("cross_key", "cross_value")}
    state = {
        "index": jnp.int32(0),
        "last": jnp.full((batch, 1), PAD_ID, jnp.int32),
        "done": filler,
        "ids": jnp.full((batch, max_decode_len), PAD_ID, jnp.int32),
        "scores": jnp.zeros(batch, jnp.float32),
        "cache": cache,
    }

    def body(state):
        logits, cache = model.apply(
            {"params": params},
            state["last"],
            {**state["cache"], **cross},  # the cross part never changes, so it is no loop state
            segments,
            state["index"],
            method="decode_step",
        )
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        log_prob = jnp.max(nn.log_softmax(logits, axis=-1), axis=-1)
        ids = jnp.where(state["done"], PAD_ID, best)
        return {
            "index": state["index"] + 1,
            "last": ids[:, None],
            "done": state["done"] | (ids == EOS_ID),
            "ids": jax.lax.dynamic_update_slice_in_dim(
                state["ids"], ids[:, None], state["index"], axis=1
            ),
            "scores": state["scores"] + jnp.where(state["done"], 0.0, log_prob),
            "cache": {name: cache[name] for name in state["cache"]},
        }

    def unfinished(state):
        return (state["index"] < max_decode_len) & ~jnp.all(state["done"])

    state = jax.lax.while_loop(unfinished, body, state)
    return state["ids"], state["scores"], state["done"] & ~filler


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Answers, in the order of the rows asked.

    Attributes:
        ids: of each row, up to and with the end of sequence where there is one.
        scores: [rows] float32, natural log of the probability of `ids`.
        finished: [rows] bool, whether the end of sequence was reached.
    """

    ids: list[list[int]]
    scores: np.ndarray
    finished: np.ndarray


def bucket_length(length: int) -> int:
    """The padded length of a row: 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, ...

    Few values, so few shapes compile (10 up to 1024); at most a third of a batch is padding that
    its longest row did not need, apart from the shortest rows.
    """
    power = SMALLEST_BUCKET
    while power < length:
        if power > SMALLEST_BUCKET and power * 3 // 2 >= length:
            return power * 3 // 2
        power *= 2
    return power


def bucketed(
    rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Batches of rows of like length: (places in `rows`, [batch_size, bucket] int32).

    The longest come first, so that memory runs out early if it does; the last batch is filled up
    with rows of zeros.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # stable: equal lengths in order
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = np.zeros((batch_size, bucket_length(len(rows[places[0]]))), np.int32)
        for i, place in enumerate(places):
            batch[i, : len(rows[place])] = rows[place]
        yield places, batch


class LabelDecoder:
    """Greedy answers to rows of ids, whatever their number, lengths and order.

    Keeps its compiled functions: one per bucket of input lengths. A row's answer does not depend on
    the rows beside it.

    Example: `LabelDecoder(config, max_decode_len=8)(params, [[5, 7, 1], [9, 1]]).ids`.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        max_decode_len: int,
        batch_size: int = 64,
        mesh: Mesh | None = None,
    ):
        """Compiles nothing yet.

        Args:
            config: of the model; dropout is off.
            max_decode_len: most tokens of an answer, the end of sequence included.
            batch_size: rows decoded at once; under a mesh rounded up to fill its batch axes.
            mesh: where `params` live and rows are spread; None is the default device. On several
                processes each must ask for the same rows, and each gets all answers.
        """
        shards = batch_shards(mesh) if mesh else 1
        self.batch_size = -(-batch_size // shards) * shards
        self.max_decode_len = max_decode_len
        self._mesh = mesh
        self._decode = jax.jit(
            functools.partial(_decode_batch, config=config, max_decode_len=max_decode_len),
            out_shardings=replicated(mesh) if mesh else None,
        )

    def __call__(
        self,
        params: Any,
        rows: Sequence[Sequence[int]],
        on_progress: Callable[[int], None] | None = None,
    ) -> Decoded:
        """Answers of `rows`.

        Args:
            params: parameters of a `T5`, placed by the mesh if there is one.
            rows: ids of each input with its end of sequence, without padding; none is empty.
            on_progress: called with the number of rows of each batch that is done.

        Raises:
            ValueError: a row without ids.
        """
        if not all(map(len, rows)):
            raise ValueError(f"row {[len(r) for r in rows].index(0)} has no ids to decode from")
        decoded = Decoded(
            [[] for _ in rows], np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
        )

        def collect(places, result):
            ids, scores, finished = map(np.asarray, result)
            for i, place in enumerate(places):
                row = ids[i].tolist()
                decoded.ids[place] = row[: row.index(EOS_ID) + 1] if finished[i] else row
                decoded.scores[place], decoded.finished[place] = scores[i], finished[i]
            if on_progress:
                on_progress(len(places))

        # one batch is always queued behind the one that runs, so the device does not wait for us
        queued = collections.deque()
        for places, batch in bucketed(rows, self.batch_size):
            with self._context():
                placed = place_rows(batch, self._mesh) if self._mesh else batch
                queued.append((places, self._decode(params, placed)))
            if len(queued) > 1:
                collect(*queued.popleft())
        while queued:
            collect(*queued.popleft())
        return decoded

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        if not self._mesh:
            yield
            return
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
            yield


def _decode_batch(params, encoder_input_tokens, *, config, max_decode_len):
    return greedy_decode(params, config, encoder_input_tokens, max_decode_len=max_decode_len)
