"""Tokens of examples, put into the rows of a batch where the packing says."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from stepdistill_jax.batches.packing import Packing
from stepdistill_jax.data.vocabulary import EOS_ID
from stepdistill_jax.tasks.token_store import TokenRows

# of each target token the encoder segment that it reads; without it that of its own number
DECODER_ENCODER_SEGMENTS = "decoder_encoder_segment_ids"


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """One objective of one store, with each row's length after cutting.

    Attributes:
        inputs, targets: uncut ids.
        input_lengths, target_lengths: [examples] int64 tokens that are used; target 0 is an absent
            row.
        inputs_cut, targets_cut: [examples] bool, longer than the configured length.
        prefix: [tokens] int32 of the objective's `decoder_prefix`.
        weights: [examples] float32 factor of each target token's loss.
        token_weights: [tokens] float32, another one of each of `targets.ids`; None is 1.
        store, objective: number of the store from 0, of the objective from 1.
        variant: which of an example's rationales, from 0.
    """

    inputs: TokenRows
    targets: TokenRows
    input_lengths: np.ndarray
    target_lengths: np.ndarray
    inputs_cut: np.ndarray
    targets_cut: np.ndarray
    prefix: np.ndarray
    weights: np.ndarray
    store: int
    objective: int
    variant: int = 0
    token_weights: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        rows,
        prefix,
        weights,
        input_length: int,
        target_length: int,
        *place: int,
        loss_mean: str = "token",
    ):
        """The table of a `TokenStore.rows` entry at the configured lengths, the prefix included.

        `place` is store, objective and variant. With `loss_mean` "example" the tokens of a target
        share its weight, so that the sums of the step are over targets: nothing else is compiled.
        """
        token_weights = rows.get("token_weights")
        inputs, targets = rows["inputs"], rows["targets"]
        target_length -= len(prefix)
        target_lengths = np.minimum(targets.lengths, target_length)
        if (
            token_weights is not None
        ):  # the end of sequence that a cut row keeps weighs 1, as others do
            cut = (targets.lengths > target_length) & (target_lengths > 0)
            token_weights = token_weights.copy()
            token_weights[targets.offsets[:-1][cut] + target_lengths[cut] - 1] = 1
        if loss_mean == "example":
            shares: np.ndarray = target_lengths
            if token_weights is not None:
                sums = np.concatenate([[0], np.cumsum(token_weights, dtype=np.float64)])
                first = targets.offsets[:-1]
                shares = sums[first + target_lengths] - sums[first]
            weights = np.divide(weights, shares, out=np.zeros(len(weights)), where=shares > 0)
            weights = weights.astype(np.float32)
        return cls(
            inputs,
            targets,
            np.minimum(inputs.lengths, input_length),
            target_lengths,
            inputs.lengths > input_length,
            targets.lengths > target_length,
            np.asarray(prefix, np.int32),
            weights,
            *place,
            token_weights=token_weights,
        )

    @functools.cached_property
    def decoder_lengths(self) -> np.ndarray:
        """[examples] int64 tokens of the decoder: prefix and target, 0 for an absent row."""
        return np.where(self.target_lengths > 0, len(self.prefix) + self.target_lengths, 0)


# (table, examples of it, their places in the step); a row of `[rows]` below is one of these examples
Rows = Sequence[tuple[TokenTable, np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Encodings:
    """Which targets read one encoding of an input, and how they lie side by side in the decoder.

    Attributes:
        of_row: [rows] int64 number of the encoding that a row reads, from 0.
        offset: [rows] int64 tokens of the decoder that come before it, of the same encoding.
        first: [encodings] int64 the first of its rows, whose inputs it has.
        places: [encodings] int64 its example's place in the step.
        sizes: [encodings, 2] int64 input length, and decoder lengths of all its rows together.
    """

    of_row: np.ndarray
    offset: np.ndarray
    first: np.ndarray
    places: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, rows: Rows, target_length: int, *, shared: bool) -> "Encodings":
        """One encoding for each row or, `shared`, one for all rows of an example.

        An example whose targets need more than `target_length` together is encoded again for those
        that no longer fit, so that no target is cut for the others' sake.
        """
        inputs = np.concatenate([table.input_lengths[e] for table, e, _ in rows])
        targets = np.concatenate([table.decoder_lengths[e] for table, e, _ in rows])
        places = np.concatenate([at for _, _, at in rows])
        if not shared:
            every = np.arange(len(targets))
            sizes = np.stack([inputs, targets], 1)
            return cls(every, np.zeros_like(every), every, places, sizes)
        count = int(places.max()) + 1
        again, used = np.zeros(count, np.int64), np.zeros(count, np.int64)
        keys, offsets = [], []
        for table, examples, at in rows:  # a place is in a table once
            lengths = table.decoder_lengths[examples]
            full = used[at] + lengths > target_length
            again[at] += full
            offsets.append(np.where(full, 0, used[at]))
            used[at] = offsets[-1] + lengths
            keys.append(again[at] * count + at)
        _, first, of_row = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
        sums = np.bincount(of_row, targets, minlength=len(first)).astype(np.int64)
        sizes = np.stack([inputs[first], sums], 1)
        return cls(of_row, np.concatenate(offsets), first, places[first], sizes)


def empty_group(
    count: int, input_length: int, target_length: int, *, shared: bool = False
) -> dict[str, np.ndarray]:
    """A group of `count` rows of padding, with all features.

    Where encodings are `shared`, a decoder segment says which encoder segment it reads.
    """
    group: dict[str, np.ndarray] = {
        name: np.zeros((count, input_length), np.int32)
        for name in ("encoder_input_tokens", "encoder_segment_ids")
    }
    for name in (
        "decoder_input_tokens",
        "decoder_target_tokens",
        "decoder_segment_ids",
        "decoder_objective_ids",
        *([DECODER_ENCODER_SEGMENTS] if shared else []),
    ):
        group[name] = np.zeros((count, target_length), np.int32)
    group["decoder_loss_weights"] = np.zeros((count, target_length), np.float32)
    return group


def place_tokens(
    group: dict[str, np.ndarray], rows: Rows, encodings: Encodings, packing: Packing | None
) -> None:
    """Writes rows into a group of padding; without a packing, each into the row of its place.

    The segments of the decoder are numbered from the left of each packed row; where every target
    has an encoding of its own these are the encoder's numbers, too.
    """
    if packing is None:
        start = np.zeros(len(encodings.places), np.int64)
        packing = Packing(encodings.places, start, start, start + 1, len(start))
    _place_inputs(group, rows, encodings, packing)
    of_row = encodings.of_row
    row, start = packing.row[of_row], packing.target_start[of_row] + encodings.offset
    examples = [(table, e) for table, e, _ in rows]
    lengths = np.concatenate([table.decoder_lengths[e] for table, e in examples])
    at = _cells(row, start, lengths, group["decoder_segment_ids"].shape[1])
    is_prefix, tokens = _decoder_tokens(rows, lengths)
    previous = np.concatenate([[0], tokens[:-1]])
    previous[np.cumsum(lengths) - lengths] = 0  # each segment starts with 0
    objectives = np.repeat([t.objective for t, _ in examples], [len(e) for _, e in examples])
    weights = np.repeat(np.concatenate([table.weights[e] for table, e in examples]), lengths)
    if any(table.token_weights is not None for table, _ in examples):
        weights[~is_prefix] *= np.concatenate([_token_weights(t, e) for t, e in examples])

    def put(name: str, values: np.ndarray) -> None:
        group[name].reshape(-1)[at] = values

    put("decoder_target_tokens", tokens)
    put("decoder_input_tokens", previous)
    put("decoder_segment_ids", np.repeat(_from_the_left(row, start), lengths))
    put("decoder_objective_ids", np.where(is_prefix, 0, np.repeat(objectives, lengths)))
    put("decoder_loss_weights", np.where(is_prefix, 0, weights))
    if DECODER_ENCODER_SEGMENTS in group:
        put(DECODER_ENCODER_SEGMENTS, np.repeat(packing.segment[of_row], lengths))


def _place_inputs(group, rows: Rows, encodings: Encodings, packing: Packing) -> None:
    """The tokens of each encoding, once, from the first row that reads it."""
    chosen = np.zeros(len(encodings.of_row), bool)
    chosen[encodings.first] = True
    ends = np.cumsum([len(e) for _, e, _ in rows])
    read = [
        (t, e[mine])
        for (t, e, _), mine in zip(rows, np.split(chosen, ends[:-1]), strict=True)
        if mine.any()
    ]
    of = encodings.of_row[chosen]  # the encodings in the order of `read`
    lengths = encodings.sizes[of, 0]
    width = group["encoder_segment_ids"].shape[1]
    at = _cells(packing.row[of], packing.input_start[of], lengths, width)
    tokens = [_tokens(t.inputs, e, t.input_lengths[e], t.inputs_cut[e]) for t, e in read]
    group["encoder_input_tokens"].reshape(-1)[at] = np.concatenate(tokens)
    group["encoder_segment_ids"].reshape(-1)[at] = np.repeat(packing.segment[of], lengths)


def _decoder_tokens(rows: Rows, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[tokens] which are of a decoder prefix, and the ids: prefix and target of each row."""
    targets = np.concatenate(
        [_tokens(t.targets, e, t.target_lengths[e], t.targets_cut[e]) for t, e, _ in rows]
    )
    if not any(len(t.prefix) for t, _, _ in rows):
        return np.zeros(len(targets), bool), targets
    prefixes = np.repeat([len(t.prefix) for t, _, _ in rows], [len(e) for _, e, _ in rows])
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    is_prefix = within < np.repeat(prefixes, lengths)
    tokens = np.empty(len(is_prefix), targets.dtype)
    tokens[~is_prefix] = targets
    tokens[is_prefix] = np.concatenate([np.tile(t.prefix, len(e)) for t, e, _ in rows])
    return is_prefix, tokens


def _token_weights(table: TokenTable, examples: np.ndarray) -> np.ndarray:
    """[tokens] factors of the targets of these examples, without their prefixes."""
    lengths = table.target_lengths[examples]
    if table.token_weights is None:
        return np.ones(lengths.sum(), np.float32)
    return table.token_weights[_places(table.targets, examples, lengths)]


def _from_the_left(row: np.ndarray, start: np.ndarray) -> np.ndarray:
    """[rows] the number of each in its packed row, from 1."""
    order = np.lexsort((start, row))
    firsts = np.flatnonzero(np.diff(row[order], prepend=-1))
    number = np.empty_like(row)
    counts = np.diff(firsts, append=len(row))
    number[order] = np.arange(len(row)) - np.repeat(firsts, counts) + 1
    return number


def _cells(row: np.ndarray, start: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """[tokens] flat index of each token of each row in a [rows, width] array."""
    ends = np.cumsum(lengths)
    return np.repeat(row * width + start - (ends - lengths), lengths) + np.arange(ends[-1])


def _tokens(
    rows: TokenRows, examples: np.ndarray, lengths: np.ndarray, cut: np.ndarray
) -> np.ndarray:
    """[tokens] the first `lengths` ids of each row; a cut row keeps its end of sequence."""
    ends = np.cumsum(lengths)
    tokens = rows.ids[_places(rows, examples, lengths)]
    if cut.any():
        last = rows.ids[rows.offsets[examples[cut] + 1] - 1]
        at = ends[cut] - 1
        tokens[at] = np.where(last == EOS_ID, EOS_ID, tokens[at])
    return tokens


def _places(rows: TokenRows, examples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[tokens] where the first `lengths` ids of each row stand in `rows.ids`."""
    ends = np.cumsum(lengths)
    first = rows.offsets[examples] - (ends - lengths)
    return np.repeat(first, lengths) + np.arange(ends[-1])
