"""What is asked for each row, and under which key its answers are kept."""

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
    """How the rows of one run are asked.

    Attributes:
        settings: the run's.
        prompter: writes the prompts.
        parameters: of each request.
        identity: what tells this teacher from another of the same name.
    """

    settings: Settings
    prompter: Prompter
    parameters: dict[str, Any]
    identity: Any = None

    def prompt(self, row: Example) -> str:
        """The text that the teacher reads."""
        return self.prompter.prompt(row)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The prompt as a chat's messages."""
        return [{"role": "user", "content": prompt}]

    def key(self, prompt: str, sample: int) -> str:
        """Of one answer: digest of prompt, model, parameters and the sample's number.

        The token limit is left out: a whole answer is the same under a higher one, and is not to be
        paid for again after the limit was raised.
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
        """Of all samples of a prompt."""
        return [self.key(prompt, i) for i in range(self.settings.samples)]

    def read(self, answer: Answer, row: Example) -> Reading:
        """What an answer says."""
        return read_answer(self.settings.task, answer, row, label_given=self.settings.label_given)

    def known(self, cache: AnswerCache, key: str, row: Example) -> tuple[Answer, Reading] | None:
        """A kept answer, if it is (still) one that can be read."""
        answer = cache.get(key)
        if answer is None:
            return None
        reading = self.read(answer, row)
        return (answer, reading) if reading.usable else None

    def provenance(self, prompt: str) -> dict[str, Any]:
        """Of a row: who was asked what; answers are added to it."""
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
    """What a file would cost, counted before the first answer is paid for.

    Attributes:
        rows: of the file.
        kept: answers in the cache, counted for each row that has them.
        answers: that are not in the cache.
        characters: of the prompts of these.
        first_prompt: of the first row.
    """

    rows: int = 0
    kept: int = 0
    answers: int = 0
    characters: int = 0
    first_prompt: str = ""


def load_prompting(settings: Settings) -> Prompting:
    """Template, exemplars and parameters of the settings.

    Raises:
        InputError: a flag that cannot be used.
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
    """Yields (row, prompt, key) of each answer that is not in the cache; counts into `estimate`.

    Two rows of one prompt share their answers, so a key is yielded once (32 bytes are kept of each).
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
