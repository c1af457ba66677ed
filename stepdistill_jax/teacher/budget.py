"""Counts the tokens and money of a run, and enforces its limits."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from stepdistill_jax.teacher.answers import Answer
from stepdistill_jax.teacher.prompts import estimate_tokens


class BudgetReached(Exception):
    """The next request might exceed a limit; the message names it."""


@dataclasses.dataclass
class Budget:
    """Tokens and money of one run.

    A request is sent only if it stays within the limits even with the longest answer, together with all
    requests in progress. Prompts count 4 characters per token, or the highest ratio of tokens to
    characters that the server has reported so far.

    Attributes:
        max_tokens, max_cost: limits; None means no limit.
        price_input, price_output: money per million tokens; None if unknown.
        prompt_tokens, completion_tokens: tokens used so far.
    """

    max_tokens: int | None = None
    max_cost: float | None = None
    price_input: float | None = None
    price_output: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self):
        """Initialises the record of requests in progress."""
        self._open: dict[int, tuple[int, int]] = {}  # reserved tokens by `id` of the reservation
        self._tokens_per_character = 0.0
        self._changed = asyncio.Condition()

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers used so far."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost(self) -> float | None:
        """Money used so far; None without prices."""
        return self.price(self.prompt_tokens, self.completion_tokens)

    def price(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Returns the price of tokens; None without prices.

        Example: at 2 and 10 per million, 500,000 and 100,000 tokens cost 2.0.
        """
        if self.price_input is None or self.price_output is None:
            return None
        return (prompt_tokens * self.price_input + completion_tokens * self.price_output) / 1e6

    @contextlib.asynccontextmanager
    async def request(self, prompt: str, longest_answer: int) -> AsyncIterator["Reservation"]:
        """Reserves the tokens of a request; waits until it fits, however long its answer is.

        Raises:
            BudgetReached: it does not fit, however little the requests in progress use.
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
        """Returns the most tokens that a request may use, as (prompt, answer)."""
        learned = int(self._tokens_per_character * len(prompt)) + 1
        return max(estimate_tokens(len(prompt)), learned), longest_answer

    async def _close(self, reservation: "Reservation") -> None:
        self._open.pop(id(reservation), None)
        async with self._changed:
            self._changed.notify_all()

    def _exceeded(self, prompt_tokens: int, completion_tokens: int) -> str | None:
        # used + reserved by requests in progress + this request. With a limit of 1,000 tokens, 300 used
        # and one reservation of 400, a request of at most 300 fits at once; one of 500 waits until the
        # reservation ends, and fits then if that request has used 200 or less.
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
    """Reserved tokens of one question, which may be sent more than once."""

    def __init__(self, budget: Budget, prompt: str, longest_answer: int):
        """Creates an empty reservation; `renew` reserves the tokens."""
        self._budget, self._prompt, self._longest = budget, prompt, longest_answer

    async def renew(self) -> None:
        """Reserves the tokens, again after a failed attempt; waits until the next attempt fits.

        Raises:
            BudgetReached: it does not fit, however little the requests in progress use.
        """
        budget = self._budget
        if (budget.max_tokens is None and budget.max_cost is None) or id(self) in budget._open:
            return
        async with budget._changed:
            # computed again after each wait: the ratio of tokens to characters may have risen
            while name := budget._exceeded(*budget._most(self._prompt, self._longest)):
                if not budget._open:
                    raise BudgetReached(name)
                await budget._changed.wait()
            budget._open[id(self)] = budget._most(self._prompt, self._longest)

    async def lose(self, used: tuple[int, int] | None) -> None:
        """Counts an attempt without an answer.

        Args:
            used: tokens of prompt and answer. None (unknown) counts all reserved tokens: the server may
                have produced an answer that we did not wait for.
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
