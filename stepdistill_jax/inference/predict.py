"""Labels for a file of inputs, streamed: what is done is kept, and a second start goes on from there."""

import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from stepdistill_jax.data.prepared import open_prepared
from stepdistill_jax.errors import InputError
from stepdistill_jax.files import digest, sha256
from stepdistill_jax.inference.beam import search
from stepdistill_jax.inference.decode import LabelDecoder
from stepdistill_jax.inference.model import LoadedModel, load_model, params_fingerprint
from stepdistill_jax.inference.output import PartialOutput
from stepdistill_jax.inference.rows import Row, count_rows, read_rows
from stepdistill_jax.inference.tally import Tally
from stepdistill_jax.objectives import LABEL_INPUT, RATIONALE_INPUT, Objective
from stepdistill_jax.progress import log, progress
from stepdistill_jax.text.vocabulary import EOS_ID, Vocabulary

WINDOW_ROWS = 4096  # decoded together, then written and synced: what a crash costs at most
ON_ERROR = ("stop", "skip")
RATIONALE = "rationale"
# for a directory that does not say: the paper's prefixes and lengths
BARE_OBJECTIVES = (
    Objective("label", LABEL_INPUT, "{label}"),
    Objective(RATIONALE, RATIONALE_INPUT, "{rationale}"),
)
BARE_INPUT_LENGTH, BARE_LABEL_LENGTH, BARE_RATIONALE_LENGTH = 1024, 64, 256


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a model is asked.

    Attributes:
        objectives: the label's, and the rationale's where it is wanted, too.
        prefix: replaces the label objective's template by this text and the input.
        input_length: most ids of an input, the end of sequence included; longer ones are cut.
        decode_lengths: most ids of an answer, per objective.
        metric, labels: the task's.
    """

    objectives: tuple[Objective, ...]
    prefix: str | None
    input_length: int
    decode_lengths: tuple[int, ...]
    metric: str
    labels: tuple[str, ...]

    def prompts(self, row: Row) -> list[str]:
        """One text per objective."""
        texts = [objective.render(row.fields)[0] for objective in self.objectives]
        if self.prefix is not None:
            texts[0] = self.prefix + row.fields["input"]
        return texts


def predict(
    path: os.PathLike | str,
    input: os.PathLike | str,
    output: os.PathLike | str,
    *,
    task: str | None = None,
    step: str | int = "best",
    batch_size: int = 64,
    max_decode_len: int | None = None,
    num_beams: int = 1,
    length_penalty: float | None = None,
    with_rationale: bool = False,
    prefix: str | None = None,
    on_error: str = "stop",
    data_dir: os.PathLike | str | None = None,
) -> dict[str, Any]:
    """Decodes the label of each input row, in order.

    Args:
        path: workdir or model directory.
        input: JSON lines in a regular file, with the fields of `prepare jsonl`: `input`, and if
            known `id`, `label`, `choices`. An empty `input` is asked as the prefix alone; one that
            is longer than in training is cut and counted.
        output: JSON lines `id`, `label`, `score` (natural log of the probability of the label, its
            end of sequence included, 6 digits), and `rationale` if asked for. It gets its name when
            it is whole; a file of that name is replaced only then. A run that was stopped goes on
            where it was, with the same bytes in the end.
        task: prepared dataset that says how labels are compared and which there are; None is the
            model's own.
        step: of a workdir: `best`, `last` or a number.
        batch_size: rows decoded at once.
        max_decode_len: most ids of a label; None is what training found enough (64 where the
            directory does not say).
        num_beams: answers pursued at once (`inference.beam_search`); 1 takes the likeliest token each
            time.
        length_penalty: with beams, the power of an answer's length that its score is divided by;
            None is 1.
        with_rationale: also decodes the objective `rationale`, for looking; the label does not
            depend on it.
        prefix: text before the input instead of the model's own template.
        on_error: `stop` at a bad row, or `skip` it (counted in the result).
        data_dir: where `task` is prepared.

    Returns:
        `rows`, `accuracy` and `majority_baseline` (only where rows have labels), `invalid_labels`,
        `unfinished` (rows that reached `max_decode_len` without an end), `rows_per_second`
        (compilation included), `collapsed`, `cut_inputs`, `skipped`.

    Raises:
        InputError: bad options, model, or row (file and line), an input that changed in the
            meantime, or an output that another run is writing; a former output is left as it was.
    """
    _check_options(input, output, batch_size, max_decode_len, on_error)
    decode_fn = search(num_beams, length_penalty)
    total = count_rows(input, on_error)
    model = load_model(path, step)
    asking = how_to_ask(
        model,
        task=task,
        max_decode_len=max_decode_len,
        with_rationale=with_rationale,
        prefix=prefix,
        data_dir=data_dir,
    )
    before = sha256(input)
    key = digest(
        {
            "params": params_fingerprint(model.params),
            "vocabulary": model.vocabulary.fingerprint,
            "asking": dataclasses.asdict(asking),
            "batch_size": batch_size,
            "search": [num_beams, length_penalty],
            "input": before,
            "device": jax.devices()[0].device_kind,
        }
    )
    partial = PartialOutput(output, key)
    try:
        result = _run(model, asking, input, partial, total, batch_size, decode_fn)
        if result["rows"] != total or _digest_or_none(input) != before:
            partial.discard()
            raise InputError(
                f"{input}: it changed while it was read ({total} good rows at first, then"
                f" {result['rows']}); start again when it is whole"
            )
        partial.finish()
    finally:
        partial.close()
    return result


def _check_options(input, output, batch_size, max_decode_len, on_error) -> None:
    for flag, value in (("--batch-size", batch_size), ("--max-decode-len", max_decode_len)):
        if value is not None and (isinstance(value, bool) or value != int(value) or value < 1):
            raise InputError(f"{flag}: a whole number above 0 is wanted, got {value!r}")
    if on_error not in ON_ERROR:
        raise InputError(f"--on-error: {' or '.join(ON_ERROR)} is wanted, got {on_error!r}")
    if pathlib.Path(input).resolve() == pathlib.Path(output).resolve():
        raise InputError(f"{output}: input and output are the same file")


def how_to_ask(
    model: LoadedModel,
    *,
    task: str | None = None,
    max_decode_len: int | None = None,
    with_rationale: bool = False,
    prefix: str | None = None,
    data_dir: os.PathLike | str | None = None,
) -> Asking:
    """What the model's `stepdistill.json` says, or the paper's habits where it has none.

    Raises:
        InputError: an unprepared `task`, or a rationale of a model that was not trained to give one.
    """
    info = model.task_info
    objectives = info.objectives if info else BARE_OBJECTIVES
    lengths = [info.max_decode_len if info else BARE_LABEL_LENGTH]
    if max_decode_len is not None:
        lengths = [max_decode_len]
    chosen = [objectives[0]]
    if with_rationale:
        found = [o for o in objectives[1:] if o.name == RATIONALE]
        if not found:
            raise InputError(
                f"--with-rationale: {model.path} has no objective named {RATIONALE!r}"
                f" (it has {', '.join(o.name for o in objectives)})"
            )
        chosen += found
        lengths.append(info.target_length if info else BARE_RATIONALE_LENGTH)
    metric, labels = (info.metric, info.labels) if info else ("text_match", ())
    if task is not None:
        dataset = open_prepared(task, data_dir)
        metric, labels = dataset.metric, dataset.labels
    return Asking(
        tuple(chosen),
        prefix,
        info.input_length if info else BARE_INPUT_LENGTH,
        tuple(lengths),
        metric,
        labels,
    )


def encode_input(vocabulary: Vocabulary, text: str, input_length: int) -> tuple[list[int], bool]:
    """(ids with their end of sequence, whether they were cut), as training batches cut them."""
    ids = [*vocabulary.encode(text), EOS_ID]
    return cut_ids(ids, input_length), len(ids) > input_length


def cut_ids(ids: Sequence[int], length: int) -> list[int]:
    """At most `length` ids, the last one still the end of sequence: `[5, 6, 7, 1]` -> `[5, 6, 1]`."""
    return list(ids) if len(ids) <= length else [*ids[: length - 1], EOS_ID]


def _run(
    model: LoadedModel,
    asking: Asking,
    input: os.PathLike | str,
    partial: PartialOutput,
    total: int,
    batch_size: int,
    decode_fn: Callable,
) -> dict[str, Any]:
    tally = Tally(asking.metric, asking.labels)
    counts = {name: partial.state.get(name, 0) for name in ("unfinished", "cut_inputs")}
    skipped = []
    rows = _good_rows(input, skipped)
    earlier = partial.rows()
    if earlier:
        log(f"{partial.path}: {len(earlier)} rows are done, going on from there")
    # not strict: fewer rows than before are found by the caller, who counts them
    for row, done in zip(itertools.islice(rows, len(earlier)), earlier, strict=False):
        tally.add(row, done["label"])
    decoders = [
        LabelDecoder(
            model.config, max_decode_len=length, batch_size=batch_size, decode_fn=decode_fn
        )
        for length in asking.decode_lengths
    ]
    start = time.perf_counter()
    description = f"predict {pathlib.Path(input).name}"
    with progress(total, description, done=len(earlier)) as bar:
        while window := list(itertools.islice(rows, WINDOW_ROWS)):
            answers = _decode_window(model, asking, decoders, window, counts, bar.update)
            partial.append(answers, **counts)
            for row, answer in zip(window, answers, strict=True):
                tally.add(row, answer["label"])
    seconds = time.perf_counter() - start
    new = tally.rows - len(earlier)
    return {
        **tally.summary(),
        **counts,
        "skipped": len(skipped),
        "rows_per_second": round(new / seconds, 3) if new else 0.0,
    }


def _digest_or_none(path: os.PathLike | str) -> str | None:
    try:
        return sha256(path)
    except OSError:  # it has been removed
        return None


def _good_rows(input: os.PathLike | str, skipped: list[InputError]) -> Iterator[Row]:
    for row in read_rows(input):  # under `stop`, `count_rows` has found that all are good
        if isinstance(row, Row):
            yield row
        else:
            log(f"skipped: {row}")
            skipped.append(row)


def _decode_window(
    model: LoadedModel,
    asking: Asking,
    decoders: list[LabelDecoder],
    window: list[Row],
    counts: dict[str, int],
    update: Callable[[int], None],
) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = [{"id": row.id} for row in window]
    prompts = zip(*map(asking.prompts, window), strict=True)
    for i, (decoder, texts) in enumerate(zip(decoders, prompts, strict=True)):
        encoded = [encode_input(model.vocabulary, text, asking.input_length) for text in texts]
        decoded = decoder(model.params, [ids for ids, _ in encoded], update if i == 0 else None)
        if not np.isfinite(decoded.scores).all():
            raise InputError(f"{model.path}: the model gives NaN; its weights are damaged")
        for answer, ids, score in zip(answers, decoded.ids, decoded.scores, strict=True):
            text = model.vocabulary.decode(ids)
            if i == 0:
                # + 0.0: a rounded -0.0 would be written as such
                answer |= {"label": text, "score": round(float(score), 6) + 0.0}
            else:
                answer[RATIONALE] = text
        if i == 0:
            counts["unfinished"] += int((~decoded.finished).sum())
            counts["cut_inputs"] += sum(cut for _, cut in encoded)
    return answers
