"""What a run has used, and what it may still use."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from stepdistill_jax.teacher.answers import Answer
from stepdistill_jax.teacher.prompts import estimate_tokens


class BudgetReached(Exception):
    """The next request might go over a cap; says which."""


@dataclasses.dataclass
class Budget:
    """Tokens and money of one run.

    A request is sent only if it stays within the caps even with the longest answer, so they hold
    while many are under way. Prompts are counted at 4 characters a token, or at the worst ratio
    that the server has reported so far.

    Attributes:
        max_tokens, max_cost: caps; None is no cap.
        price_input, price_output: per million tokens; None is not known.
        prompt_tokens, completion_tokens: used so far.
    """

    max_tokens: int | None = None
    max_cost: float | None = None
    price_input: float | None = None
    price_output: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self):
        """Nothing is under way."""
        self._open: dict[int, tuple[int, int]] = {}
        self._next = 0
        self._tokens_per_character = 0.0
        self._changed = asyncio.Condition()

    @property
    def tokens(self) -> int:
        """Used so far, prompts and answers."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost(self) -> float | None:
        """Money used so far; None without prices."""
        return self.price(self.prompt_tokens, self.completion_tokens)

    def price(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Of so many tokens; None without prices.

        Example: at 2 and 10 a million, 500,000 and 100,000 tokens cost 2.0.
        """
        if self.price_input is None or self.price_output is None:
            return None
        return (prompt_tokens * self.price_input + completion_tokens * self.price_output) / 1e6

    @contextlib.asynccontextmanager
    async def request(self, prompt: str, longest_answer: int) -> AsyncIterator[None]:
        """Around a request: waits until it is sure to fit.

        Raises:
            BudgetReached: it will not, whatever those that are under way use.
        """
        if self.max_tokens is None and self.max_cost is None:
            yield
            return
        prompt_tokens = estimate_tokens(len(prompt))
        prompt_tokens = max(prompt_tokens, int(self._tokens_per_character * len(prompt)) + 1)
        async with self._changed:
            while name := self._exceeded(prompt_tokens, longest_answer):
                if not self._open:
                    raise BudgetReached(name)
                await self._changed.wait()
            number, self._next = self._next, self._next + 1
            self._open[number] = (prompt_tokens, longest_answer)
        try:
            yield
        finally:
            del self._open[number]
            async with self._changed:
                self._changed.notify_all()

    def spend(self, prompt: str, answer: Answer) -> None:
        """Counts an answer, readable or not."""
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        ratio = answer.prompt_tokens / max(len(prompt), 1)
        self._tokens_per_character = max(self._tokens_per_character, ratio)

    def _exceeded(self, prompt_tokens: int, completion_tokens: int) -> str | None:
        prompts = self.prompt_tokens + prompt_tokens + sum(p for p, _ in self._open.values())
        answers = self.completion_tokens + completion_tokens
        answers += sum(c for _, c in self._open.values())
        if self.max_tokens is not None and prompts + answers > self.max_tokens:
            return f"--max-tokens-total {self.max_tokens}"
        cost = self.price(prompts, answers)
        if self.max_cost is not None and cost is not None and cost > self.max_cost:
            return f"--max-cost {self.max_cost:g}"
        return None
