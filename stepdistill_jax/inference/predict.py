"""Labels for a file of inputs, streamed: what is done is kept, and a second start goes on from there.

Several processes read the same input and decode each batch together; process 0 writes.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import BadRow
from stepdistill_jax.decoding.beam import search
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.allowed import Allowed, allow, check_choices, choose
from stepdistill_jax.inference.counts import Tally
from stepdistill_jax.inference.engines import Engine, open_engine, require_finite
from stepdistill_jax.inference.prompting import (
    RATIONALE,
    Asking,
    encode_input,
    how_to_ask,
    scored_answer,
)
from stepdistill_jax.inference.rows import InputFile, next_window
from stepdistill_jax.inference.skipped import LIST, SkippedRows, skipped_of
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.runtime.files import digest, local_path
from stepdistill_jax.runtime.on_processes import (
    everywhere,
    is_first,
    on_first,
    require_same,
    until_stopped,
)
from stepdistill_jax.runtime.overwriting import check_outputs
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.streams import SharedOutput, outputs_of

# decoded together, then written and synced: what a crash costs at most
WINDOW_ROWS, WINDOW_BATCHES = 4096, 16  # the larger one counts
WINDOW_LABELS = 64  # more choices than these make it smaller
ON_ERROR = ("stop", "skip")


def predict(
    path: os.PathLike | str,
    input: os.PathLike | str,
    output: os.PathLike | str,
    *,
    task: str | None = None,
    step: str | int = "best",
    batch_size: int | None = None,
    layout: str | Layout = "data",
    max_decode_len: int | None = None,
    num_beams: int = 1,
    length_penalty: float | None = None,
    choices: os.PathLike | str | Sequence[str] | None = None,
    choices_temperature: float = 1.0,
    with_rationale: bool = False,
    prefix: str | None = None,
    on_error: str = "stop",
    engine: str | None = None,
    quantization: str | None = None,
    data_dir: os.PathLike | str | None = None,
) -> dict[str, Any]:
    """Decodes the label of each input row, in order, in memory that does not grow with the rows.

    Args:
        path: workdir or model directory, of Hugging Face's layout or CTranslate2's.
        input: JSON lines in a regular file, with the fields of `prepare jsonl`: `input`, and if
            known `id`, `label`, `choices`. An empty `input` is asked as the prefix alone; one that
            is longer than in training is cut and counted.
        output: JSON lines `id`, `label`, `score` (natural log of the probability of the answer, its
            end of sequence included, 6 digits), and `rationale` if asked for. Where the model writes
            more than a label, that is parsed out of its answer, and the other fields of the target
            are there, too (`asking.read_answer`). It gets its name when
            it is whole; a file of that name is replaced only then. A run that was stopped goes on
            where it was: with the same bytes in the end, or, on other devices or in other batches,
            with the same labels and scores within 1e-5.
        task: prepared dataset that says how labels are compared and which there are; None is the
            model's own.
        step: of a workdir: `best`, `last` or a number.
        batch_size: rows decoded at once, on all devices together; None is 64 for each device that
            has rows of its own.
        layout: how the devices of all processes share the work (`sharding.LAYOUTS`): `data` gives
            each the whole model and rows of its own, `tensor` cuts a model that one cannot hold.
        max_decode_len: most ids of a label; None is what training found enough (64 where the
            directory does not say).
        num_beams: answers pursued at once (`inference.beam_search`); 1 takes the likeliest token each
            time.
        length_penalty: with beams, the power of an answer's length that its score is divided by;
            None is 1.
        choices: the answers that are allowed: `row` (each row's `choices`), `labels` (the task's), a
            file of them, or a list. Instead of decoding, each is scored, exactly, and the likeliest is
            the label; rows get `probability` and `choices`, too (`inference.allowed`). A rationale is
            decoded as ever.
        choices_temperature: of these probabilities; `best_temperature` of a validation split, say.
        with_rationale: also decodes the objective `rationale`, for looking; the label does not
            depend on it.
        prefix: text before the input instead of the model's own template.
        on_error: `stop` at a bad row, or `skip` it: counted in the result, and listed with line and
            reason in OUTPUT.skipped.jsonl.
        engine: `jax` or `ctranslate2` (`inference.engines`); None is what the directory is for.
        quantization: `int8` keeps the JAX engine's kernels in memory as int8 with a scale for each
            output (`models.quantized`); None as float32.
        data_dir: where `task` is prepared.

    Returns:
        `rows`, `accuracy` and `majority_baseline` (only where rows have labels), `invalid_labels`,
        `unfinished` (rows that reached `max_decode_len` without an end), `rows_per_second`
        (compilation included), `collapsed`, `cut_inputs`, `skipped`; with choices and labels also
        what `Calibration.summary` has; with rationales `unfinished_rationales`. Of a model that
        writes more than a label also `unparsed` (answers without one), and of one that reads more
        than the input `reads` (these fields) and `incomplete_inputs` (rows without one of them).

    Raises:
        InputError: bad options, model, or row (file and line), an input that changed in the
            meantime, or an output that another run is writing; a former output is left as it was.
            One that only one of several processes meets is raised on all.
        SystemExit: with 75, one of several processes got a SIGTERM; started again, it goes on.
    """
    _check_options(batch_size, max_decode_len, on_error)
    on_first(lambda: _check_output(output, local_path(input, "input"), choices, path))
    search(num_beams, length_penalty)  # a bad value is said before anything is read
    check_choices(choices, choices_temperature, num_beams, max_decode_len)
    source = everywhere(lambda: InputFile(input, on_error))
    model = open_engine(
        path,
        engine,
        step=step,
        batch_size=batch_size,
        layout=layout,
        num_beams=num_beams,
        length_penalty=length_penalty,
        quantization=quantization,
    )
    asking = everywhere(
        lambda: how_to_ask(
            model,
            task=task,
            max_decode_len=max_decode_len,
            with_rationale=with_rationale,
            prefix=prefix,
            data_dir=data_dir,
        )
    )
    allowed = check = None
    if choices is not None:
        allowed = everywhere(lambda: allow(choices, asking, model, choices_temperature))
        check = None if allowed.labels else allowed.check
    if check or asking.reads:  # what the model wants of a row is known only now
        source = everywhere(lambda: InputFile(input, on_error, check, asking.reads))
    options = [dataclasses.asdict(asking), num_beams, length_penalty]
    # not the batch size and the number of devices: they move a score by its last digit, and who was
    # preempted or out of memory wants to go on in smaller batches, on whatever devices there are
    key = {
        "model": model.identity,
        "input": source.digest,
        "options": digest(options if allowed is None else [*options, allowed.key]),
        "device": model.device,
    }
    require_same(key, "input or model")
    with (
        contextlib.closing(SharedOutput(output, key)) as shared,
        contextlib.closing(SkippedRows(output)) as skipped,
    ):
        result = _run(model, asking, source, shared, skipped, allowed)
        _require_unchanged(source, shared, result["rows"])
        on_first(skipped.finish)
        shared.finish()
    return result


def _check_options(batch_size, max_decode_len, on_error) -> None:
    for flag, value in (("--batch-size", batch_size), ("--max-decode-len", max_decode_len)):
        if value is not None and (isinstance(value, bool) or value != int(value) or value < 1):
            raise InputError(f"{flag}: a whole number above 0 is wanted, got {value!r}")
    if on_error not in ON_ERROR:
        raise InputError(f"--on-error: {' or '.join(ON_ERROR)} is wanted, got {on_error!r}")


def _check_output(output: os.PathLike | str, *inputs: Any) -> None:
    made, known = outputs_of(output)
    files = [path for path in inputs if isinstance(path, os.PathLike | str)]
    check_outputs(made | {skipped_of(output): LIST}, files, known=known)


def _run(
    model: Engine,
    asking: Asking,
    source: InputFile,
    shared: SharedOutput,
    skipped: SkippedRows,
    allowed: Allowed | None,
) -> dict[str, Any]:
    tally = Tally(asking.metric, asking.labels, allowed.temperature if allowed else 1.0)
    names = ["unfinished", "cut_inputs"]
    names += ["unfinished_rationales"] if len(asking.objectives) > 1 else []
    names += ["unparsed" for o in asking.objectives[:1] if o.writes_more]
    names += ["incomplete_inputs"] if asking.reads else []
    counts = {name: shared.state.get(name, 0) for name in names}
    rows = _good_rows(source, skipped)
    done = shared.state["rows"]
    if done and is_first():
        log(f"{shared.path}: {done} rows are done, going on from there")

    def count_earlier() -> None:
        earlier = shared.rows()  # all are there, or none: only the process that writes counts
        for row in itertools.islice(rows, done):
            if answer := next(earlier, None):
                tally.add(row, answer["label"], answer.get("choices"))

    everywhere(count_earlier)
    window_rows = max(WINDOW_ROWS, WINDOW_BATCHES * model.batch_size)
    if allowed and len(allowed.labels) > WINDOW_LABELS:  # a window holds a number for each
        window_rows = max(1, window_rows * WINDOW_LABELS // len(allowed.labels))
    start = time.perf_counter()
    with until_stopped(
        source.total,
        f"predict {pathlib.Path(source.path).name}",
        kept=lambda: shared.state["rows"],
    ) as update:
        while window := everywhere(lambda: next_window(rows, window_rows)):
            require_same([row.texts for row in window], "input")
            answers = _decode_window(model, asking, window, counts, update, allowed)
            _require_unchanged(source, shared)  # what has been kept was made from this input
            shared.append(answers, **counts)
            for row, answer in zip(window, answers, strict=True):
                tally.add(row, answer["label"], answer.get("choices"))
    seconds = time.perf_counter() - start
    new = tally.rows - done
    return on_first(
        lambda: {
            **tally.summary(),
            **counts,
            **({"reads": list(asking.reads)} if asking.reads else {}),
            "skipped": skipped.count,
            "rows_per_second": round(new / seconds, 3) if new else 0.0,
        }
    )


def _require_unchanged(source: InputFile, shared: SharedOutput, rows: int | None = None) -> None:
    try:
        everywhere(lambda: source.check(rows))
    except InputError:
        shared.discard()
        raise


def _good_rows(source: InputFile, skipped: SkippedRows) -> Iterator[Example]:
    for row in source.rows():  # under `stop`, `InputFile` has found that all are good
        if isinstance(row, BadRow):
            skipped.add(row)
        else:
            yield row


def _decode_window(
    model: Engine,
    asking: Asking,
    window: list[Example],
    counts: dict[str, int],
    update: Callable[[int], None],
    allowed: Allowed | None,
) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = [{"id": row.id} for row in window]
    if asking.reads:
        counts["incomplete_inputs"] += sum(bool(asking.lacks(row)) for row in window)
    prompts = zip(*map(asking.prompts, window), strict=True)
    for i, (length, texts) in enumerate(zip(asking.decode_lengths, prompts, strict=True)):
        encoded = [encode_input(model.vocabulary, text, asking.input_length) for text in texts]
        if i == 0:
            counts["cut_inputs"] += sum(cut for _, cut in encoded)
            if allowed is not None:
                rows = [ids for ids, _ in encoded]
                for answer, chosen in zip(
                    answers, choose(model, rows, window, allowed, update), strict=True
                ):
                    answer |= chosen
                continue
        prefix = asking.objectives[i].decoder_prefix
        given = {"decoder_prefix": model.vocabulary.encode(prefix)} if prefix else {}
        decoded = model.decode(
            [ids for ids, _ in encoded], length, update if i == 0 else None, **given
        )
        require_finite(model, decoded.scores)
        for answer, ids, score in zip(answers, decoded.ids, decoded.scores, strict=True):
            text = model.vocabulary.decode(ids)
            if i == 0:
                found, parsed = scored_answer(asking.objectives[0], text, score)
                answer |= found
                if not parsed:
                    counts["unparsed"] += 1
            else:
                answer[RATIONALE] = text
        counts["unfinished" if i == 0 else "unfinished_rationales"] += int(
            (~decoded.finished).sum()
        )
    return answers
