"""Counts the tokens and money that a run uses, and enforces the run's limits."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from stepdistill_jax.errors import InputError
from stepdistill_jax.teacher.answers import Answer
from stepdistill_jax.teacher.prompts import estimate_tokens


class BudgetReached(Exception):
    """Raised when the next request might exceed a limit. The message says what it needs, and names the limit."""


@dataclasses.dataclass
class Budget:
    """The tokens and money that one run uses, and its limits.

    A request first reserves the most tokens that it may use. It is sent only if all used and reserved tokens
    are within the limits.

    Attributes:
        max_tokens, max_cost: limits; None means no limit.
        price_input: price of a million prompt tokens; None if unknown.
        price_output: price of a million answer tokens; None if unknown.
        prompt_tokens, completion_tokens: counts of tokens used so far.
    """

    max_tokens: int | None = None
    max_cost: float | None = None
    price_input: float | None = None
    price_output: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self):
        self._open: dict[int, tuple[int, int]] = {}  # reserved tokens by `id` of the reservation
        self._tokens_per_character = 0.0
        self._changed = asyncio.Condition()

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers used so far."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost(self) -> float | None:
        """Money spent so far; None if the prices are unknown."""
        return self.price(self.prompt_tokens, self.completion_tokens)

    def price(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Returns the price of tokens; None if the prices are unknown.

        Example: with prices of 2 and 10 per million tokens, 500,000 prompt tokens and 100,000 answer tokens
        cost 2.0.
        """
        if self.price_input is None or self.price_output is None:
            return None
        return (prompt_tokens * self.price_input + completion_tokens * self.price_output) / 1e6

    @contextlib.asynccontextmanager
    async def request(self, prompt: str, longest_answer: int) -> AsyncIterator["Reservation"]:
        """An async context that reserves as many tokens as a request may use.

        On entry, waits for other requests to end if a limit would be exceeded.

        Raises:
            BudgetReached, InputError: see `Reservation.renew`.
        """
        reservation = Reservation(self, prompt, longest_answer)
        await reservation.renew()
        try:
            yield reservation
        finally:
            await self._close(reservation)

    def spend(self, prompt: str, answer: Answer) -> None:
        """Adds the tokens of an answer, even an unreadable one, to the tokens used."""
        self._count(prompt, answer.prompt_tokens, answer.completion_tokens)

    def _count(self, prompt: str, prompt_tokens: int, completion_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        ratio = prompt_tokens / max(len(prompt), 1)
        self._tokens_per_character = max(self._tokens_per_character, ratio)

    def _most(self, prompt: str, longest_answer: int) -> tuple[int, int]:
        """Returns the largest number of prompt tokens and of answer tokens that a request may use."""
        # a token per 4 characters, or more if the server has reported a higher ratio
        learned = int(self._tokens_per_character * len(prompt)) + 1
        return max(estimate_tokens(len(prompt)), learned), longest_answer

    async def _close(self, reservation: "Reservation") -> None:
        self._open.pop(id(reservation), None)
        async with self._changed:
            self._changed.notify_all()

    def _refusal(self, prompt_tokens: int, completion_tokens: int) -> Exception | None:
        """Returns the error to raise if a request might exceed a limit, else None."""
        # used + reserved by requests in progress + this request. With a limit of 1,000 tokens, 300 used
        # and one reservation of 400, a request of at most 300 fits at once; one of 500 waits until the
        # reservation ends, and fits then if that request has used 200 or less.
        prompts = self.prompt_tokens + prompt_tokens + sum(p for p, _ in self._open.values())
        answers = self.completion_tokens + completion_tokens
        answers += sum(c for _, c in self._open.values())
        tokens, cost = prompt_tokens + completion_tokens, self.price(prompts, answers)
        if self.max_tokens is not None and prompts + answers > self.max_tokens:
            limit, needs = f"`max_tokens_total={self.max_tokens}`", f"may need {tokens:,} tokens"
            fits = tokens <= self.max_tokens
        elif self.max_cost is not None and cost is not None and cost > self.max_cost:
            price = self.price(prompt_tokens, completion_tokens) or 0.0
            limit, needs = f"`max_cost={self.max_cost:g}`", f"may cost {price:.4g}"
            fits = price <= self.max_cost
        else:
            return None
        if not fits:  # not in a new run either
            return InputError(
                f"{limit}: the next request {needs}; raise the limit, or lower `max_tokens`"
            )
        return BudgetReached(f"the next request {needs}, more than this run has left of {limit}")


class Reservation:
    """The tokens that are reserved for the current attempt to get an answer to one question."""

    def __init__(self, budget: Budget, prompt: str, longest_answer: int):
        """Creates a reservation without tokens. `renew` reserves the tokens."""
        self._budget, self._prompt, self._longest = budget, prompt, longest_answer

    async def renew(self) -> None:
        """Reserves the tokens for the next attempt, unless they are still reserved.

        Waits for other requests to end if a limit would be exceeded.

        Raises:
            BudgetReached: a limit would be exceeded, and no other request is in progress.
            InputError: the request alone would exceed a limit, and no other request is in progress.
        """
        budget = self._budget
        if (budget.max_tokens is None and budget.max_cost is None) or id(self) in budget._open:
            return
        async with budget._changed:
            # computed again after each wait: the ratio of tokens to characters may have risen
            while error := budget._refusal(*budget._most(self._prompt, self._longest)):
                if not budget._open:
                    raise error
                await budget._changed.wait()
            budget._open[id(self)] = budget._most(self._prompt, self._longest)

    async def lose(self, used: tuple[int, int] | None) -> None:
        """Counts the tokens of an attempt that gave no answer, and ends the reservation.

        Args:
            used: (prompt tokens, answer tokens). None means unknown: all reserved tokens are counted. After (0, 0),
                the tokens stay reserved for the next attempt.
        """
        budget = self._budget
        if used == (0, 0):
            return
        if used is None:  # the server may have written an answer that did not arrive
            most = budget._open.get(id(self)) or budget._most(self._prompt, self._longest)
            budget.prompt_tokens += most[0]
            budget.completion_tokens += most[1]
        else:
            budget._count(self._prompt, *used)
        await budget._close(self)
