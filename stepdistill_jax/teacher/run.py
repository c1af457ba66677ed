"""Asks the teacher about many rows at once, and writes them in order.

The number of simultaneous requests and the number of rows in memory are limited.
"""

import asyncio
import collections
import dataclasses
from collections.abc import Iterator
from typing import Any, NoReturn

from stepdistill_jax.data.example import Example
from stepdistill_jax.data.text_metrics import metric_fn
from stepdistill_jax.errors import InputError
from stepdistill_jax.runtime.progress import Bar
from stepdistill_jax.runtime.signals import StopSignals, leave
from stepdistill_jax.runtime.streams import StreamedFile
from stepdistill_jax.teacher.answers import Answer, Reading, metric_name
from stepdistill_jax.teacher.budget import Budget, BudgetReached
from stepdistill_jax.teacher.cache import AnswerCache
from stepdistill_jax.teacher.client import ServerError, Teacher, now
from stepdistill_jax.teacher.prompting import Prompting
from stepdistill_jax.teacher.vote import Sample, output_row

FAILURES_IN_A_ROW = 10  # unanswered questions in a row after which the server counts as down
ANSWERS_BEFORE_RATE = 20  # answers needed to judge the share of unusable ones
DEFECT_TEXT = 200  # characters of an answer in the list of defects


class Stopped(Exception):
    """Raised when a run ends early. The answers are saved, and the same command continues the run.

    Attributes:
        hopeless: whether to cancel the requests in progress instead of waiting for them.
    """

    def __init__(self, reason: str, *, hopeless: bool = False):
        super().__init__(reason)
        self.hopeless = hopeless


@dataclasses.dataclass
class Counts:
    """Counts of a run.

    Attributes:
        rows: rows written.
        with_rationale: rows with a usable answer.
        with_label: rows with a gold label that the teacher was not given.
        right: rows in `with_label` that the teacher labelled correctly.
        requests: answered requests.
        truncated: answers truncated at the token limit.
        asked_again: repeated requests after an unreadable answer.
        defects: {defect: number of final answers with it}.
        first_defects: {defect: first row with it}.
    """

    rows: int = 0
    with_rationale: int = 0
    with_label: int = 0
    right: int = 0
    requests: int = 0
    truncated: int = 0
    asked_again: int = 0
    defects: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first_defects: dict[str, str] = dataclasses.field(default_factory=dict)


class Run:
    """Asks the teacher about the rows of one run."""

    def __init__(
        self,
        prompting: Prompting,
        teacher: Teacher | None,
        cache: AnswerCache,
        budget: Budget,
        output: StreamedFile,
        defects: StreamedFile,
        bar: Bar,
        *,
        kept: int = 0,
    ):
        """Prepares a run without sending anything.

        Args:
            teacher: None if all answers are in the cache.
            output: file for the rows.
            defects: file for the list of defects.
            kept: number of answers already in the cache. The limit `max_truncated` counts them as usable.
        """
        self._prompting, self._settings = prompting, prompting.settings
        self._teacher, self._cache, self._budget = teacher, cache, budget
        self._output, self._defects, self._bar = output, defects, bar
        self._slots = asyncio.Semaphore(self._settings.concurrency)
        self._under_way: dict[str, asyncio.Task[Sample]] = {}
        self._stop: Exception | None = None
        self._failures = 0
        self._probe: asyncio.Event | None = None  # set when the first question is done
        self._questions, self._unusable, self._kept = 0, 0, kept
        self._problems: collections.Counter[str] = collections.Counter()  # of unusable answers
        self.counts = Counts()

    @property
    def saved(self) -> int:
        """Number of answers in the cache that this run can use."""
        return self._kept + self._questions - self._unusable

    async def all(self, rows: Iterator[Example]) -> None:
        """Asks about every row, and writes the rows in order.

        Raises:
            Stopped: a limit was reached, or the server is down. At a limit, the answers to requests in progress
                are saved first.
            InputError: the server refuses a request, or too many answers are unusable.
        """
        # rows in progress at once: more than requests, so that a slow answer does not block the others
        most = max(64, 4 * self._settings.concurrency)
        window: collections.deque[tuple[Example, str, asyncio.Task | list[Sample]]] = (
            collections.deque()
        )
        try:
            for row in rows:
                window.append((row, *self._begin(row)))
                # rows are written in order: take the first one when it is done or the window is full
                while window and (len(window) >= most or self._is_done(window[0][2])):
                    await self._write(*window.popleft())
                if self._stop is not None:
                    break
            while window:
                await self._write(*window.popleft())
        except (Stopped, InputError) as error:
            # requests in progress are paid for, so wait for them; tasks that wait for a slot see `_stop`
            tasks = [work for _, _, work in window if isinstance(work, asyncio.Task)]
            if isinstance(error, Stopped) and error.hopeless:
                for task in (*tasks, *self._under_way.values()):
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        if self._stop is not None:
            raise self._stop

    @staticmethod
    def _is_done(work: asyncio.Task | list[Sample]) -> bool:
        return not isinstance(work, asyncio.Task) or work.done()

    def _begin(self, row: Example) -> tuple[str, asyncio.Task | list[Sample]]:
        prompt = self._prompting.prompt(row)
        keys = self._prompting.keys(prompt)
        known = [self._prompting.known(self._cache, key, row) for key in keys]
        found = [sample for sample in known if sample is not None]
        if len(found) == len(keys):  # all samples are in the cache: no task
            self._bar.update(1)
            return prompt, found
        return prompt, asyncio.create_task(self._samples(row, prompt, keys, known))

    async def _samples(
        self, row: Example, prompt: str, keys: list[str], known: list[Sample | None]
    ) -> list[Sample]:
        work = [
            _ready(sample) if sample is not None else self._shared(key, row, prompt)
            for key, sample in zip(keys, known, strict=True)
        ]
        samples = await asyncio.gather(*work, return_exceptions=True)
        for sample in samples:
            if isinstance(sample, BaseException):
                raise sample
        cost = self._budget.cost
        values = {"tokens": self._budget.tokens} | ({} if cost is None else {"cost": cost})
        self._bar.update(1, **values)
        return samples  # type: ignore[return-value]

    async def _shared(self, key: str, row: Example, prompt: str) -> Sample:
        """Returns the sample with the cache key `key`. Rows that need the same key share one request."""
        task = self._under_way.get(key)
        if task is None:
            # another row with this prompt may have got the answer since `_begin` looked
            known = self._prompting.known(self._cache, key, row)
            if known is not None:
                return known
            task = asyncio.create_task(self._ask(key, row, prompt))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return await task

    async def _ask(self, key: str, row: Example, prompt: str) -> Sample:
        """Asks a question. The run's first question is sent alone, to find errors that all questions would get."""
        if self._probe is not None:
            await self._probe.wait()
            return await self._answer(key, row, prompt)
        self._probe = asyncio.Event()
        try:
            return await self._answer(key, row, prompt)
        finally:
            self._probe.set()

    async def _answer(self, key: str, row: Example, prompt: str) -> Sample:
        answer, reading = Answer(""), Reading()
        for attempt in range(1 + self._settings.retries):
            try:
                answer = await self._one(prompt)
            except ServerError as error:
                self._failed(error)
                answer = Answer(str(error), "error", time=now())
                return answer, Reading(problems=("server_error",))
            reading = self._prompting.read(answer, row)
            if reading.usable:
                self._questions += 1
                try:
                    return self._cache.put(key, self._settings.name, answer), reading
                except InputError as error:  # do not pay for answers that cannot be saved
                    self._end(error)
            self.counts.truncated += "truncated" in reading.problems
            # the same question would be truncated or filtered again
            if {"truncated", "filtered"} & set(reading.problems):
                break
            # do not pay a teacher twice per question before its first usable answer
            if self._questions and self._questions == self._unusable:
                break
            self.counts.asked_again += attempt < self._settings.retries
        self._count_unusable(row, answer, reading)
        return answer, reading

    async def _one(self, prompt: str) -> Answer:
        async with self._slots:
            self._check_stop()
            if self._teacher is None:  # all answers were in the cache when the file was counted
                self._end(InputError("the input file changed while it was being read; start again"))
            try:
                request = self._budget.request(prompt, self._settings.max_tokens)
                async with request as reservation:
                    self._check_stop()
                    answer = await self._teacher.ask(
                        prompt, self._prompting.parameters, reservation
                    )
                    self._budget.spend(prompt, answer)
            except BudgetReached as error:
                self._end(Stopped(str(error)))
            except InputError as error:
                self._end(error)
        self.counts.requests += 1
        self._failures = 0
        return answer

    def _check_stop(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _end(self, reason: Exception) -> NoReturn:
        self._stop = self._stop or reason
        raise self._stop

    def _failed(self, error: ServerError) -> None:
        self._failures += 1
        if self._failures >= FAILURES_IN_A_ROW:
            reason = f"{self._failures} consecutive requests failed; the last: {error}"
            self._end(Stopped(reason, hopeless=True))

    def _count_unusable(self, row: Example, answer: Answer, reading: Reading) -> None:
        self._questions += 1
        self._unusable += 1
        self._problems.update(reading.problems)
        most, answers = self._settings.max_truncated, self._questions + self._kept
        if self._questions < ANSWERS_BEFORE_RATE or self._unusable <= most * answers:
            return
        if 2 * self._problems["truncated"] >= self._unusable:
            advice = (
                f"`max_tokens={self._settings.max_tokens}` truncates answers: allow more tokens, or lower the"
                " `reasoning_effort` of a reasoning model"
            )
        else:
            advice = f"the last unusable answer, to row {row.id!r}, is {' '.join(answer.text.split())[:80]!r}"
        kinds = ", ".join(f"{kind} {count}" for kind, count in self._problems.most_common())
        self._end(
            InputError(
                f"{self._unusable} of {self._questions} answers were unusable ({kinds}), more than"
                f" `max_truncated={most:g}` allows; {advice}; usable answers are saved"
            )
        )

    async def _write(self, row: Example, prompt: str, work: asyncio.Task | list[Sample]) -> None:
        samples = await work if isinstance(work, asyncio.Task) else work
        settings = self._settings
        result = output_row(
            row,
            samples,
            task=settings.task,
            source=settings.source,
            label_given=settings.label_given,
            provenance=self._prompting.provenance(prompt),
        )
        self._output.add(result)
        self._count(row, samples, result)
        if self.counts.rows % 256 == 0:
            await asyncio.sleep(0)  # lets signals in if all answers come from the cache

    def _count(self, row: Example, samples: list[Sample], result: dict[str, Any]) -> None:
        counts = self.counts
        counts.rows += 1
        answered = any(reading.usable for _, reading in samples)
        counts.with_rationale += answered
        if row.label and not self._settings.label_given:
            counts.with_label += 1
            matches = metric_fn(metric_name(self._settings.task))
            # without a usable answer, `llm_label` is the row's earlier one
            counts.right += answered and matches(result["llm_label"], row.label)
        for i, (answer, reading) in enumerate(samples):
            for kind in reading.problems:
                counts.defects[kind] += 1
                counts.first_defects.setdefault(kind, f"row {counts.rows}")
                text = " ".join(answer.text.split())[:DEFECT_TEXT]
                self._defects.add(
                    {"kind": kind, "row": counts.rows, "id": row.id, "sample": i, "text": text}
                )


async def _ready(sample: Sample) -> Sample:
    return sample


async def run_until_signal(run: Run, rows: Iterator[Example]) -> None:
    """Asks about every row, and stops at a SIGTERM or Ctrl-C.

    Raises:
        SystemExit: SIGTERM arrived. The exit status is 75.
        KeyboardInterrupt: Ctrl-C. It has a message if answers are saved.
    """
    task, loop = asyncio.ensure_future(run.all(rows)), asyncio.get_running_loop()
    with StopSignals(lambda _: loop.call_soon_threadsafe(task.cancel)) as stop:
        try:
            await task
        except asyncio.CancelledError:
            if stop.received == "SIGTERM":
                leave(stop.received, "stopped; the answers are saved" if run.saved else "stopped")
            if not stop.received:
                raise
            told = "the answers are saved; run the same command again to continue"
            raise KeyboardInterrupt(*([told] if run.saved else ())) from None
