"""Predicts labels for a file of inputs; finished rows are kept, and a restart continues after them.

Several processes read the same input and decode each batch together; process 0 writes.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import jax

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import BadRow
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.accuracy import AccuracyCounts
from stepdistill_jax.inference.allowed_answers import Allowed, allow
from stepdistill_jax.inference.engines import Engine, open_engine
from stepdistill_jax.inference.input_rows import InputFile, next_window
from stepdistill_jax.inference.labels import explain_rows, label_rows
from stepdistill_jax.inference.options import decode_options
from stepdistill_jax.inference.prompting import (
    RATIONALE,
    Prompting,
    encode_input,
    prompting_for,
)
from stepdistill_jax.inference.skipped_rows import LIST, SkippedRows, skipped_of
from stepdistill_jax.runtime.checks import one_of
from stepdistill_jax.runtime.fingerprints import digest
from stepdistill_jax.runtime.on_processes import (
    on_all_processes,
    on_process_0,
    require_same,
    until_stopped,
)
from stepdistill_jax.runtime.overwriting import check_outputs
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.runtime.stores import local_path
from stepdistill_jax.runtime.streams import ResumableFile, outputs_of

# rows that are decoded together, then written and synced: a crash loses at most these
WINDOW_ROWS, WINDOW_BATCHES = 4096, 16  # the larger of the two applies
WINDOW_LABELS = 64  # a window is smaller if there are more labels to choose from
ON_ERROR = ("stop", "skip")


def predict(
    path: os.PathLike | str,
    input: os.PathLike | str,
    output: os.PathLike | str,
    *,
    task: str | None = None,
    with_rationale: bool = False,
    on_error: str = "stop",
    data_dir: os.PathLike | str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Decodes the label of each input row, in order, in memory that does not grow with the number of rows.

    Args:
        path: workdir or model directory, in Hugging Face's or CTranslate2's layout.
        input: a regular file of JSON lines, or of CSV or TSV by its suffix, with the fields of
            `prepare jsonl`: `input`, and if known `id`, `label`, `choices`. If `input` is empty, the
            model is given only the prefix. An input longer than in training is truncated and counted.
        output: JSON lines with `id`, `label`, `score` (natural log of the probability of the answer, its
            end of sequence included, rounded to 6 digits), and `rationale` if requested. With choices,
            also `probability` and `choices` (`inference.allowed_answers`). If the model writes more
            than a label, the label is parsed from its answer, and the other fields of the target are
            added (`prompting.read_answer`). The file is `.partial` until it is complete; only then does
            it replace a file of that name. A stopped run continues where it was. The result then has
            the same bytes, or, on other devices or in other batches, the same labels and scores within
            1e-5.
        task: prepared dataset that determines the metric and the possible labels; None means the
            model's own task.
        with_rationale: also decodes the objective `rationale`, for inspection; the label does not
            depend on it.
        on_error: `stop` at a bad row, or `skip` it. Skipped rows are counted in the result and listed
            with line and reason in OUTPUT.skipped.jsonl.
        data_dir: folder in which `task` is prepared.
        **options: fields of `DecodeOptions`.

    Returns:
        `rows`, `accuracy` and `majority_baseline` (only if rows have labels), `invalid_labels`,
        `unfinished` (rows that reached `max_decode_len` without an end of sequence), `rows_per_second`
        (compilation included), `collapsed`, `cut_inputs`, `skipped`; with choices and labels, also the
        keys of `Calibration.summary`; with rationales, `unfinished_rationales`. If the model writes
        more than a label, also `unparsed` (answers without a label). If it reads more than the input,
        `reads` (these fields) and `incomplete_inputs` (rows that lack one of them).

    Raises:
        InputError: an option or the model is bad; a row is bad (names file and line); the input changed
            in the meantime; or another run is writing the output. An older output is kept. An error on
            one of several processes is raised on all.
        SystemExit: with status 75, if one of several processes received a SIGTERM; a restart continues.
    """
    chosen = decode_options(predict, options)
    one_of("on_error", on_error, ON_ERROR)
    on_process_0(lambda: _check_output(output, local_path(input, "input"), chosen.choices, path))
    source = on_all_processes(lambda: InputFile(input, on_error))
    model = open_engine(path, chosen)
    prompting = on_all_processes(
        lambda: prompting_for(
            model, chosen, task=task, with_rationale=with_rationale, data_dir=data_dir
        )
    )
    allowed = on_all_processes(lambda: allow(chosen, prompting, model))
    check = allowed.check if allowed and not allowed.labels else None
    if check or prompting.reads:  # only the model tells which fields of a row it needs
        source = on_all_processes(lambda: InputFile(input, on_error, check, prompting.reads))
    asked = [dataclasses.asdict(prompting), chosen.num_beams, chosen.length_penalty]
    # The key leaves out the batch size and the number of devices: they change a score only in its last
    # digit, and a run that was preempted or ran out of memory may continue in smaller batches, on other
    # devices.
    key = {
        "model": model.identity,
        "input": source.digest,
        "options": digest(asked if allowed is None else [*asked, allowed.key]),
        "device": model.device,
    }
    require_same(key, "input or model")
    with (
        contextlib.closing(ResumableFile(output, key)) as shared,
        contextlib.closing(SkippedRows(output)) as skipped,
    ):
        result = _run(model, prompting, source, shared, skipped, allowed)
        _require_unchanged(source, shared, result["rows"])
        on_process_0(skipped.finish)
        shared.finish()
    return result


def _check_output(output: os.PathLike | str, *inputs: Any) -> None:
    made, known = outputs_of(output)
    files = [path for path in inputs if isinstance(path, os.PathLike | str)]
    check_outputs(made | {skipped_of(output): LIST}, files, known=known)


def _run(
    model: Engine,
    prompting: Prompting,
    source: InputFile,
    shared: ResumableFile,
    skipped: SkippedRows,
    allowed: Allowed | None,
) -> dict[str, Any]:
    accuracy = AccuracyCounts(
        prompting.metric, prompting.labels, allowed.temperature if allowed else 1.0
    )
    names = ["unfinished", "cut_inputs"]
    names += ["unfinished_rationales"] if len(prompting.objectives) > 1 else []
    names += ["unparsed" for o in prompting.objectives[:1] if o.writes_more]
    names += ["incomplete_inputs"] if prompting.reads else []
    counts = {name: shared.state.get(name, 0) for name in names}
    rows = _good_rows(source, skipped)
    done = shared.state["rows"]
    if done and jax.process_index() == 0:
        log(f"{shared.path}: continuing after the {done} rows that are done")

    def count_earlier() -> None:
        earlier = shared.rows()  # all rows on process 0, which counts; none on the others
        for row in itertools.islice(rows, done):
            if answer := next(earlier, None):
                accuracy.add(answer["label"], row.label, row.choices, answer.get("choices"))

    on_all_processes(count_earlier)
    most = window_rows(model, allowed)
    start = time.perf_counter()
    with until_stopped(
        source.total,
        f"predict {pathlib.Path(source.path).name}",
        kept=lambda: shared.state["rows"],
    ) as update:
        while window := on_all_processes(lambda: next_window(rows, most)):
            require_same([row.texts for row in window], "input")
            answers = decode_window(model, prompting, window, counts, update, allowed)
            _require_unchanged(source, shared)  # the kept rows were made from this input
            shared.append(answers, **counts)
            for row, answer in zip(window, answers, strict=True):
                accuracy.add(answer["label"], row.label, row.choices, answer.get("choices"))
    seconds = time.perf_counter() - start
    new = accuracy.rows - done
    return on_process_0(
        lambda: {
            **accuracy.summary(),
            **counts,
            **({"reads": list(prompting.reads)} if prompting.reads else {}),
            "skipped": skipped.count,
            "rows_per_second": round(new / seconds, 3) if new else 0.0,
        }
    )


def _require_unchanged(source: InputFile, shared: ResumableFile, rows: int | None = None) -> None:
    try:
        on_all_processes(lambda: source.check(rows))
    except InputError:
        shared.discard()
        raise


def _good_rows(source: InputFile, skipped: SkippedRows) -> Iterator[Example]:
    for row in source.rows():  # with `stop`, `InputFile` has checked that all rows are good
        if isinstance(row, BadRow):
            skipped.add(row)
        else:
            yield row


def window_rows(model: Engine, allowed: Allowed | None) -> int:
    """Returns the number of rows to decode together."""
    most = max(WINDOW_ROWS, WINDOW_BATCHES * model.batch_size)
    if allowed and len(allowed.labels) > WINDOW_LABELS:  # a window holds a number for each choice
        most = max(1, most * WINDOW_LABELS // len(allowed.labels))
    return most


def decode_window(
    model: Engine,
    prompting: Prompting,
    window: list[Example],
    counts: MutableMapping[str, int],
    update: Callable[[int], None] | None,
    allowed: Allowed | None,
) -> list[dict[str, Any]]:
    """Returns the output fields of each row of a window, and adds to the summary's counts.

    Args:
        model: engine opened by `open_engine`.
        prompting: result of `prompting_for`.
        window: the rows.
        counts: counts by name (`cut_inputs`, `unfinished`, ...); `unparsed` is counted only if present.
        update: called with the number of rows of each batch whose labels are decoded.
        allowed: result of `allow`.

    Raises:
        NotFinite: the model gives NaN.
    """
    answers: list[dict[str, Any]] = [{"id": row.id} for row in window]
    if prompting.reads:
        counts["incomplete_inputs"] += sum(bool(prompting.lacks(row)) for row in window)
    prompts = zip(*map(prompting.prompts, window), strict=True)
    for i, texts in enumerate(prompts):
        encoded = [
            encode_input(
                model.vocabulary, text, prompting.input_length, prompting.input_pair_of(row)
            )
            for text, row in zip(texts, window, strict=True)
        ]
        inputs = [ids for ids, _ in encoded]
        if i == 0:
            counts["cut_inputs"] += sum(cut for _, cut in encoded)
            found = label_rows(model, prompting, allowed, window, inputs, update)
            for answer, label in zip(answers, found.answers, strict=True):
                answer |= label
            counts["unfinished"] += found.unfinished
            if "unparsed" in counts:
                counts["unparsed"] += found.unparsed
            continue
        rationales, unfinished = explain_rows(model, prompting, i, inputs)
        for answer, rationale in zip(answers, rationales, strict=True):
            answer[RATIONALE] = rationale
        counts["unfinished_rationales"] += unfinished
    return answers
