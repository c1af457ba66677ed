"""Asks a teacher for rationales and labels for the questions in a file."""

import asyncio
import contextlib
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import check_file
from stepdistill_jax.runtime.overwriting import Made, check_apart, check_outputs
from stepdistill_jax.runtime.progress import log, progress
from stepdistill_jax.runtime.stores import local_path
from stepdistill_jax.runtime.streams import StreamedFile
from stepdistill_jax.teacher.batch import read_batch, write_batch
from stepdistill_jax.teacher.budget import Budget
from stepdistill_jax.teacher.cache import AnswerCache
from stepdistill_jax.teacher.client import ChatClient, Teacher
from stepdistill_jax.teacher.prompting import Estimate, Prompting, load_prompting, unanswered
from stepdistill_jax.teacher.prompts import estimate_tokens
from stepdistill_jax.teacher.questions import check_questions, read_questions
from stepdistill_jax.teacher.run import Run, Stopped, run_until_signal
from stepdistill_jax.teacher.settings import LOCAL, Settings

CACHE_NAME = "teacher_cache.sqlite"
ROWS = Made("annotate", b'{"id": ', ("id", "input", "provenance"))
DEFECTS = Made("annotate", b'{"kind": "', ("kind", "row", "id", "sample", "text"))


def annotate(
    input: os.PathLike | str,
    output: os.PathLike | str,
    *,
    read: Sequence[os.PathLike | str] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Asks a teacher about each row, and writes the rows with the teacher's rationales, in input order.

    Complete, readable answers are saved at once in an SQLite file, the cache. A second run asks only for the
    missing answers.

    Args:
        input: path of a JSON-lines file. Each row has `input`, and optionally `id`, `label`, `choices`, ...
        output: path of the file to write, in the format that `prepare jsonl` reads, with the fields `rationale`,
            `rationales`, `llm_label` and `provenance`. It is named OUTPUT.partial until it is complete.
            `defects_of(output)` lists the defects of answers.
        read: files that must not be overwritten.
        settings: fields of `Settings`, among them `task`, and `model` or `teacher`.

    Returns:
        `rows`, `rows_per_second`: count and rate of rows written.
        `with_rationale`: count of rows with a usable answer.
        `requests`: count of answered requests.
        `to_ask`: count of answers that were missing from the cache at the start.
        `asked_again`: count of requests that repeated a question after an unreadable answer.
        `truncated`: count of answers that were truncated at the token limit.
        `prompt_tokens`, `completion_tokens`: counts of tokens used.
        `cost`: money spent; None if the prices are unknown.
        `defects`: {defect: count of answers}.
        `first_defects`: {defect: the first row with it}.
        `stopped`: why the run ended before the last row, or None.
        `with_label`: count of rows with a gold label that the teacher was not given. Absent if it is 0.
        `teacher_accuracy`: share of the rows `with_label` that the teacher labelled correctly. Rows without a
        usable answer count as wrong.
        With `dry_run`: `prompt` (of the first row), `first_prompt_tokens`, `parameters` and the entries of
        `estimated`.
        With `batch_file`: the entries of `write_batch` or `read_batch`.

    Raises:
        InputError: a setting or row is bad, the server refuses the request, or a limit is too low for a request.
        SystemExit: SIGTERM arrived. The status is 75.
        KeyboardInterrupt: as always, but with a message if answers are saved.
    """
    chosen = Settings(**settings)
    input, output = local_path(input, "input"), local_path(output, "output")
    check_file(input, "a JSON-lines file")
    cache_path = local_path(chosen.cache or output.parent / CACHE_NAME, "`cache`")
    action, *paths = map(str, chosen.batch_file or [""])
    inputs = [input, chosen.exemplars, *read, *(paths if action == "read" else ())]
    check_apart([cache_path, f"{cache_path}-wal", f"{cache_path}-shm"], inputs)
    inputs.append(cache_path)
    check_outputs({output: ROWS, defects_of(output): DEFECTS}, inputs)
    prompting = load_prompting(chosen)
    if chosen.dry_run:
        cache = AnswerCache(cache_path) if cache_path.exists() else None
        try:
            return _dry_run(prompting, input, cache)
        finally:
            if cache is not None:
                cache.close()
    cache = AnswerCache(cache_path)
    try:
        if chosen.batch_file:
            if action == "read":
                return read_batch(prompting, input, cache, paths)
            if len(paths) > 1:
                raise InputError(
                    f"`batch_file`: expected `write` and a single FILE, got {len(paths)} files"
                )
            return write_batch(prompting, input, cache, paths[0], inputs)
        return asyncio.run(_annotate(prompting, input, output, cache))
    finally:
        cache.close()


def defects_of(output: pathlib.Path) -> pathlib.Path:
    """Returns the path of the file that lists the defects of the answers for `output`."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.defects.jsonl")


def estimated(prompting: Prompting, estimate: Estimate) -> dict[str, Any]:
    """Estimates the tokens and the cost of the answers that are missing from the cache.

    Returns:
        `rows`: count of rows.
        `answers`: count of missing answers.
        `prompt_tokens`: estimate at 4 characters per token.
        `completion_tokens`, `cost`: estimates for answers as long as the exemplars'.
        `most_completion_tokens`, `most_cost`: estimates for answers of `max_tokens` tokens.
        The costs are None if the prices are unknown.
    """
    settings = prompting.settings
    budget = Budget(price_input=settings.price_input, price_output=settings.price_output)
    prompt_tokens = estimate_tokens(estimate.characters)
    answer = min(prompting.prompter.answer_tokens, settings.max_tokens)
    completion_tokens = estimate.answers * answer
    most = estimate.answers * settings.max_tokens
    return {
        "rows": estimate.rows,
        "answers": estimate.answers,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "cost": budget.price(prompt_tokens, completion_tokens),
        "most_completion_tokens": most,
        "most_cost": budget.price(prompt_tokens, most),
    }


def in_words(estimate: dict[str, Any]) -> str:
    """Returns the estimate as a line, such as `200 rows, 150 answers to request, about 61,200 tokens, ...`."""
    tokens = estimate["prompt_tokens"] + estimate["completion_tokens"]
    line = (
        f"{estimate['rows']} rows, {estimate['answers']} answers to request, about {tokens:,} tokens"
        " (at 4 characters per token)"
    )
    if estimate["cost"] is not None:
        line += f", cost about {estimate['cost']:.4g}, at most {estimate['most_cost']:.4g}"
    return line


def _estimate(prompting: Prompting, input: pathlib.Path, cache: AnswerCache | None) -> Estimate:
    """Counts a file's rows and answers. Reads all rows, so that a bad one is found before any answer is paid for."""
    settings, estimate = prompting.settings, Estimate()
    rows = check_questions(input, settings.choices, label_given=settings.label_given)
    for _ in unanswered(prompting, rows, cache, estimate):
        pass
    return estimate


def _dry_run(
    prompting: Prompting, input: pathlib.Path, cache: AnswerCache | None
) -> dict[str, Any]:
    estimate = _estimate(prompting, input, cache)
    first = estimate.first_prompt
    return {
        "prompt": first,
        "first_prompt_tokens": estimate_tokens(len(first)),
        "parameters": prompting.parameters,
        **estimated(prompting, estimate),
    }


async def _annotate(
    prompting: Prompting, input: pathlib.Path, output: pathlib.Path, cache: AnswerCache
) -> dict[str, Any]:
    settings = prompting.settings
    with (
        contextlib.closing(StreamedFile(output)) as rows_file,
        contextlib.closing(StreamedFile(defects_of(output))) as defects_file,
    ):
        read = _estimate(prompting, input, cache)
        estimate = estimated(prompting, read)
        log(f"annotate: {in_words(estimate)}")
        budget = Budget(
            settings.max_tokens_total,
            settings.max_cost,
            settings.price_input,
            settings.price_output,
        )
        # if all answers are in the cache, neither server nor key is needed
        teacher = _teacher(settings) if estimate["answers"] else None
        stopped, start = None, time.perf_counter()
        with progress(estimate["rows"], f"annotate {input.name}") as bar:
            run = Run(
                prompting, teacher, cache, budget, rows_file, defects_file, bar, kept=read.kept
            )
            try:
                await run_until_signal(run, read_questions(input, settings.choices))
                if run.counts.rows != estimate["rows"]:
                    raise InputError(
                        f"{input}: the file changed while it was read (it had {estimate['rows']} rows at"
                        f" first, then {run.counts.rows}); start again when the file is complete"
                    )
                if not run.counts.with_rationale:
                    answers = "a usable answer" if run.counts.requests else "an answer"
                    raise Stopped(
                        f"none of the {run.counts.rows} rows got {answers}; see"
                        f" {defects_file.partial}"
                    )
            except Stopped as error:
                stopped = f"{error}"
            finally:
                if teacher is not None:
                    await teacher.close()
        seconds = time.perf_counter() - start
        if stopped is None:
            defects_file.finish()
            rows_file.finish()
    return _result(run, budget, estimate, seconds, stopped)


def _teacher(settings: Settings) -> Teacher:
    if settings.teacher is None:
        return ChatClient(settings)
    from stepdistill_jax.teacher.local import LocalTeacher

    return LocalTeacher(settings.teacher.removeprefix(LOCAL), settings.concurrency)


def _result(
    run: Run, budget: Budget, estimate: dict[str, Any], seconds: float, stopped: str | None
) -> dict[str, Any]:
    counts = run.counts
    result: dict[str, Any] = {"rows": counts.rows, "with_rationale": counts.with_rationale}
    if counts.with_label:
        result["with_label"] = counts.with_label
        result["teacher_accuracy"] = counts.right / counts.with_label
    return result | {
        "requests": counts.requests,
        "to_ask": estimate["answers"],
        "asked_again": counts.asked_again,
        "truncated": counts.truncated,
        "prompt_tokens": budget.prompt_tokens,
        "completion_tokens": budget.completion_tokens,
        "cost": budget.cost,
        "defects": dict(counts.defects.most_common()),
        "first_defects": counts.first_defects,
        "rows_per_second": round(counts.rows / seconds, 3) if seconds else 0.0,
        "stopped": stopped,
    }
