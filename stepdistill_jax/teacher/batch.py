"""Writes requests in OpenAI's batch format, and saves the results of a batch in the cache."""

import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from stepdistill_jax.data.rows import JsonRow
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.files import atomic_write, read_jsonl
from stepdistill_jax.runtime.overwriting import Made, check_outputs
from stepdistill_jax.runtime.progress import log
from stepdistill_jax.teacher.answers import Answer
from stepdistill_jax.teacher.cache import AnswerCache
from stepdistill_jax.teacher.client import completion, now, token_count
from stepdistill_jax.teacher.prompting import Estimate, Prompting, unanswered
from stepdistill_jax.teacher.questions import check_questions

REQUESTS = Made("annotate", b'{"custom_id": "', ("custom_id", "method", "body"))
# OpenAI's limits per file; https://platform.openai.com/docs/guides/batch
MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000


def write_batch(
    prompting: Prompting,
    input: os.PathLike | str,
    cache: AnswerCache,
    path: os.PathLike | str,
    inputs: Sequence[os.PathLike | str | None] = (),
) -> dict[str, Any]:
    """Writes a request for each answer that is missing from the cache.

    Args:
        input: file of questions.
        path: first file of requests. Requests that do not fit go into further files (`numbered`).
        inputs: files that must not be overwritten.

    Returns:
        `rows`: count of questions.
        `requests`: count of requests.
        `files`: paths of the files written.
    """
    estimate = Estimate()
    rows = check_questions(
        input, prompting.settings.choices, label_given=prompting.settings.label_given
    )
    lines = (_request(prompting, prompt, key) for _, prompt, key in
             unanswered(prompting, rows, cache, estimate))  # fmt: skip
    files = []
    line = next(lines, None)  # the line that did not fit into a file begins the next one
    while line is not None:
        name = numbered(pathlib.Path(path), len(files) + 1)
        check_outputs({name: REQUESTS}, inputs, "`batch_file`")
        count = size = 0
        with atomic_write(name, "wb") as f:
            while line and count < MOST_REQUESTS and size + len(line) <= MOST_BYTES:
                f.write(line)
                count, size = count + 1, size + len(line)
                line = next(lines, None)
            if not count:
                raise InputError(
                    f"{input}: a request of {len(line or b'')} bytes is too long for a batch; shorten the row"
                )
        files.append(str(name))
    return {"rows": estimate.rows, "requests": estimate.answers, "files": files}


def numbered(path: pathlib.Path, number: int) -> pathlib.Path:
    """Returns the path of file `number`, counted from 1: `requests.jsonl`, `requests-2.jsonl`, ..."""
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def _request(prompting: Prompting, prompt: str, key: str) -> bytes:
    body = {
        "model": prompting.settings.model,
        "messages": prompting.messages(prompt),
        **prompting.parameters,
    }
    request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(request, ensure_ascii=False).encode() + b"\n"


def read_batch(
    prompting: Prompting, input: os.PathLike | str, cache: AnswerCache, paths: list[str]
) -> dict[str, Any]:
    """Reads the results of a batch, and saves the usable answers in the cache.

    Args:
        prompting: the same as for `write_batch`; it determines the keys of answers.
        input: file of questions.
        paths: files of results.

    Returns:
        `results`: count of results in the files.
        `failed`: count of results without an answer.
        `kept`: count of usable answers that this call saved.
        `other`: count of results whose question is not in `input`, or already has an answer in the cache.
        `defects`: {defect: count of answers}.
    """
    failed: list[str] = []
    results = cache.fetch(
        itertools.chain.from_iterable(_results(p, prompting, failed) for p in paths)
    )
    kept, matched = 0, 0
    defects: dict[str, int] = {}
    rows = check_questions(
        input, prompting.settings.choices, label_given=prompting.settings.label_given
    )
    for row, _, key in unanswered(prompting, rows, cache, Estimate()):
        answer = cache.fetched(key)
        if answer is None:
            continue
        matched += 1
        reading = prompting.read(answer, row)
        for kind in reading.problems:
            defects[kind] = defects.get(kind, 0) + 1
        if reading.usable:
            cache.put(key, prompting.settings.name, answer)
            kept += 1
    for message in failed[:3]:
        log(f"failed: {message}")
    return {
        "results": results + len(failed),
        "failed": len(failed),
        "kept": kept,
        "other": results - matched,
        "defects": defects,
    }


def _results(path: str, prompting: Prompting, failed: list[str]) -> Iterator[tuple[str, Answer]]:
    for line, row in read_jsonl(path):
        where = f"{path}:{line}"
        response, key = row.get("response") or {}, row.get("custom_id")
        if not isinstance(key, str) or "response" not in row:
            raise InputError(
                f"{where}: expected a result of a batch, with `custom_id` and `response`, got"
                f" {JsonRow(row, where).names}"
            )
        try:
            if row.get("error") or response["status_code"] != 200:
                message = row.get("error") or response.get("body")
                failed.append(f"{where}: {' '.join(str(message).split())[:200]}")
                continue
            text, reason, usage = completion(response["body"])
            key.encode()  # raises for an unpaired surrogate, which cannot be saved
            used = [token_count(usage.get(f"{n}_tokens"), 0) for n in ("prompt", "completion")]
            answer = Answer(text, reason, used[0], used[1], now(), prompting.parameters)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            failed.append(f"{where}: no completion in its response")
            continue
        yield key, answer
