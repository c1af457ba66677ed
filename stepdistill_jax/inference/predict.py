"""Predicts labels for a file of inputs. A restarted run continues after the finished rows.

If there are several processes, all read the same input and decode together, and process 0 writes.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import jax

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.rows import BadRow, check_field_map
from stepdistill_jax.errors import InputError
from stepdistill_jax.inference.accuracy import AccuracyCounts
from stepdistill_jax.inference.allowed_answers import OTHER_CHOICES, Allowed, allow
from stepdistill_jax.inference.engines import Engine, open_engine
from stepdistill_jax.inference.input_rows import KNOWN_FIELDS, InputFile, next_window
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
    field_map: Mapping[str, str] | None = None,
    data_dir: os.PathLike | str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Decodes the label of each input row, in order and in bounded memory.

    Each output line has `id`, `label` and `score`. The score is the natural log of the answer's probability,
    including its end of sequence, rounded to 6 decimals. With `choices`, the line also has `probability` and
    `choices` (`Allowed.answer`). If the model writes more than a label, the line also has the other fields that it
    writes (`prompting.read_answer`).

    A restarted run continues after the finished rows, and writes the same bytes. With other devices or batch sizes,
    the labels are the same, and scores differ by at most 1e-5.

    Args:
        path: workdir or model directory, in Hugging Face's or CTranslate2's layout.
        input: a .csv or .tsv file; any other file is read as JSON lines. Each row has the field `input`, and
            optionally `id`, `label` and `choices`. Long inputs are truncated as in training.
        output: JSON lines to write, named OUTPUT.partial until complete. Only a complete output replaces an older one.
        task: prepared dataset that determines metric and labels; None means the model's own task.
        with_rationale: also writes `rationale`. The label does not depend on it.
        on_error: what to do at a bad row: `stop`, or `skip` and list the row in OUTPUT.skipped.jsonl.
        field_map: {our field: the input's field}, such as {"input": "question"}.
        data_dir: folder in which `task` is prepared.
        **options: fields of `DecodeOptions`.

    Returns:
        The keys of `AccuracyCounts.summary`, and:
        `unfinished`: number of answers without an end of sequence.
        `cut_inputs`: number of truncated inputs.
        `skipped`: number of skipped rows.
        `rows_per_second`: rows that this call answered per second, compilation included.
        `unfinished_rationales`: the same as `unfinished` for rationales, if they are decoded separately.
        `unparsed`: number of answers without a label, if the model writes more than a label.
        `reads`: names of the fields that the model reads in addition to the input; absent if none.
        `incomplete_inputs`: number of rows that lack one of `reads`; absent without `reads`.

    Raises:
        InputError: an option, the model or a row is bad; the input has changed; or another run is writing the
            output. An error on one process is raised on all.
        SystemExit: one of several processes received a SIGTERM. The status is 75.
        KeyboardInterrupt: as always, but with a message that says how many rows are kept.
    """
    chosen = decode_options(predict, options)
    one_of("on_error", on_error, ON_ERROR)
    on_process_0(lambda: _check_output(output, local_path(input, "input"), chosen.choices, path))
    names = dict(field_map or {})
    source = on_all_processes(lambda: InputFile(input, on_error, field_map=names))
    model = open_engine(path, chosen)
    prompting = on_all_processes(
        lambda: prompting_for(
            model, chosen, task=task, with_rationale=with_rationale, data_dir=data_dir
        )
    )
    known = (*KNOWN_FIELDS, *prompting.reads)
    on_all_processes(lambda: check_field_map(names, known))
    allowed = on_all_processes(lambda: allow(chosen, prompting, model))
    check = allowed.check if allowed and not allowed.labels else None
    if check or prompting.reads:  # only the model tells which fields of a row it needs
        if check:
            on_all_processes(lambda: _require_choices(source))
        source = on_all_processes(lambda: InputFile(input, on_error, check, prompting.reads, names))
    asked = [dataclasses.asdict(prompting), chosen.num_beams, chosen.length_penalty]
    asked += [sorted(names.items())] if names else []
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
        try:
            result = _run(model, prompting, source, shared, skipped, allowed)
        except KeyboardInterrupt:
            if not (rows := shared.state["rows"]):
                raise
            raise KeyboardInterrupt(
                f"{rows} finished rows are kept in {shared.partial}; run the same command again to continue"
            ) from None
        _require_unchanged(source, shared, result["rows"])
        on_process_0(skipped.finish)
        shared.finish()
    return result


def _require_choices(source: InputFile) -> None:
    """Raises InputError if none of a file's rows has choices, since all rows would be skipped."""
    if source.total and not source.with_choices:
        raise InputError(
            f"{source.path}: no row has choices, which `choices=row` needs; {OTHER_CHOICES}"
        )


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
    """Returns the count of rows that are decoded together."""
    most = max(WINDOW_ROWS, WINDOW_BATCHES * model.batch_size)
    if allowed and len(allowed.labels) > WINDOW_LABELS:  # each choice of each row has a score
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
    """Returns the output fields of each row of a window.

    Args:
        counts: {name: count}, which this function increases. It counts `unparsed` only if `counts` has this key.
        update: called with the row count of each finished batch.

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
