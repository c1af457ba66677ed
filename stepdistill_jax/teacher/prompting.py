"""Makes the prompts of a run's rows, and the keys of their answers in the cache."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from stepdistill_jax.data.example import Example
from stepdistill_jax.runtime.fingerprints import digest, sha256_of
from stepdistill_jax.teacher.answers import Answer, Reading, read_answer
from stepdistill_jax.teacher.cache import AnswerCache
from stepdistill_jax.teacher.prompts import Prompter, load_prompter
from stepdistill_jax.teacher.settings import LOCAL, Settings

LIMITS = ("max_tokens", "max_completion_tokens")


@dataclasses.dataclass(frozen=True)
class Prompting:
    """Makes the prompts and keys of one run, and reads the answers.

    Attributes:
        parameters: additional fields of each request.
        identity: `fingerprint` of a local teacher's files, part of each key; None for a server.
    """

    settings: Settings
    prompter: Prompter
    parameters: dict[str, Any]
    identity: Any = None

    def prompt(self, row: Example) -> str:
        """Returns the complete text that the teacher reads for a row."""
        return self.prompter.prompt(row)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """Returns the prompt as the messages of a chat."""
        return [{"role": "user", "content": prompt}]

    def key(self, prompt: str, sample: int) -> str:
        """Returns the key of an answer: a digest of prompt, teacher, parameters and index of the sample.

        The token limit is left out, since a higher limit would not change a complete answer.
        """
        return digest(
            {
                "messages": self.messages(prompt),
                "model": self.settings.name,
                "identity": self.identity,
                "parameters": {k: v for k, v in self.parameters.items() if k not in LIMITS},
                "sample": sample,
            }
        )

    def keys(self, prompt: str) -> list[str]:
        """Returns the keys of all samples of a prompt."""
        return [self.key(prompt, i) for i in range(self.settings.samples)]

    def read(self, answer: Answer, row: Example) -> Reading:
        """Returns the rationale and label in an answer."""
        return read_answer(self.settings.task, answer, row, label_given=self.settings.label_given)

    def known(self, cache: AnswerCache, key: str, row: Example) -> tuple[Answer, Reading] | None:
        """Returns the cache's answer for a key, or None if it is missing or not usable for the row."""
        answer = cache.get(key)
        if answer is None:
            return None
        reading = self.read(answer, row)
        return (answer, reading) if reading.usable else None

    def provenance(self, prompt: str) -> dict[str, Any]:
        """Returns where a row's answers come from: teacher, task, and digest of the prompt."""
        found: dict[str, Any] = {
            "model": self.settings.name,
            "task": self.settings.task,
            "prompt_sha256": sha256_of(prompt),
        }
        if self.settings.label_given:
            found["label_given"] = True
        return found


@dataclasses.dataclass
class Estimate:
    """Counts of a file's rows and answers, made before the first answer is paid for.

    Attributes:
        kept: number of answers in the cache. An answer that several rows share counts once for each row.
        answers: number of answers missing from the cache.
        characters: number of characters in the prompts for the missing answers.
        first_prompt: prompt of the first row.
    """

    rows: int = 0
    kept: int = 0
    answers: int = 0
    characters: int = 0
    first_prompt: str = ""


def load_prompting(settings: Settings) -> Prompting:
    """Loads the template and the exemplars that the settings name, and returns the run's prompting.

    Raises:
        InputError: a setting cannot be used.
    """
    prompter = load_prompter(
        settings.task,
        exemplars=settings.exemplars,
        instructions=settings.instructions,
        choices=settings.choices,
        label_given=settings.label_given,
    )
    identity = None
    if settings.teacher is not None:
        from stepdistill_jax.teacher.local import fingerprint

        identity = fingerprint(settings.teacher.removeprefix(LOCAL))
    return Prompting(settings, prompter, settings.request_parameters(), identity)


def unanswered(
    prompting: Prompting, rows: Iterator[Example], cache: AnswerCache | None, estimate: Estimate
) -> Iterator[tuple[Example, str, str]]:
    """Yields (row, prompt, key) for each answer that is missing from the cache, and updates `estimate`.

    Rows with the same prompt share their answers, so each key is yielded only once.
    """
    seen: set[bytes] = set()
    for row in rows:
        prompt = prompting.prompt(row)
        estimate.rows += 1
        estimate.first_prompt = estimate.first_prompt or prompt
        for key in prompting.keys(prompt):
            if (packed := bytes.fromhex(key)) in seen:
                continue
            if cache is not None and prompting.known(cache, key, row):
                estimate.kept += 1
                continue
            seen.add(packed)
            estimate.answers += 1
            estimate.characters += len(prompt)
            yield row, prompt, key
