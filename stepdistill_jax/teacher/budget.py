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
        self._open: dict[int, tuple[int, int]] = {}  # by the reservation's identity
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
    async def request(self, prompt: str, longest_answer: int) -> AsyncIterator["Reservation"]:
        """Around a request: waits until it is sure to fit.

        Raises:
            BudgetReached: it will not, whatever those that are under way use.
        """
        reservation = Reservation(self, prompt, longest_answer)
        await reservation.renew()
        try:
            yield reservation
        finally:
            await self._close(reservation)

    def spend(self, prompt: str, answer: Answer) -> None:
        """Counts an answer, readable or not."""
        self._count(prompt, answer.prompt_tokens, answer.completion_tokens)

    def _count(self, prompt: str, prompt_tokens: int, completion_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        ratio = prompt_tokens / max(len(prompt), 1)
        self._tokens_per_character = max(self._tokens_per_character, ratio)

    def _most(self, prompt: str, longest_answer: int) -> tuple[int, int]:
        """The most tokens of prompt and answer that a request may use."""
        learned = int(self._tokens_per_character * len(prompt)) + 1
        return max(estimate_tokens(len(prompt)), learned), longest_answer

    async def _close(self, reservation: "Reservation") -> None:
        self._open.pop(id(reservation), None)
        async with self._changed:
            self._changed.notify_all()

    def _exceeded(self, prompt_tokens: int, completion_tokens: int) -> str | None:
        prompts = self.prompt_tokens + prompt_tokens + sum(p for p, _ in self._open.values())
        answers = self.completion_tokens + completion_tokens
        answers += sum(c for _, c in self._open.values())
        if self.max_tokens is not None and prompts + answers > self.max_tokens:
            return f"`max_tokens_total={self.max_tokens}`"
        cost = self.price(prompts, answers)
        if self.max_cost is not None and cost is not None and cost > self.max_cost:
            return f"`max_cost={self.max_cost:g}`"
        return None


class Reservation:
    """Room in a budget for one question, which may be sent more than once."""

    def __init__(self, budget: Budget, prompt: str, longest_answer: int):
        """Nothing is reserved before `renew`."""
        self._budget, self._prompt, self._longest = budget, prompt, longest_answer

    async def renew(self) -> None:
        """Before each attempt: waits until it is sure to fit, if its room was used up.

        Raises:
            BudgetReached: it will not, whatever those that are under way use.
        """
        budget = self._budget
        if (budget.max_tokens is None and budget.max_cost is None) or id(self) in budget._open:
            return
        async with budget._changed:
            # once more after each wait: the estimate may have learned
            while name := budget._exceeded(*budget._most(self._prompt, self._longest)):
                if not budget._open:
                    raise BudgetReached(name)
                await budget._changed.wait()
            budget._open[id(self)] = budget._most(self._prompt, self._longest)

    async def lose(self, used: tuple[int, int] | None) -> None:
        """Counts an attempt that gave no answer.

        Args:
            used: tokens of prompt and answer; None, where nobody knows, counts all that was
                reserved: a server may have worked on an answer that we gave up.
        """
        budget = self._budget
        if used == (0, 0):
            return
        if used is None:
            most = budget._open.get(id(self)) or budget._most(self._prompt, self._longest)
            budget.prompt_tokens += most[0]
            budget.completion_tokens += most[1]
        else:
            budget._count(self._prompt, *used)
        await budget._close(self)
