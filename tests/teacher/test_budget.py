import asyncio

import pytest

from stepdistill_jax.teacher.answers import Answer
from stepdistill_jax.teacher.budget import Budget, BudgetReached


def test_money_is_tokens_times_the_price_per_million():
    budget = Budget(price_input=2.0, price_output=10.0)
    budget.spend("p", Answer("a", prompt_tokens=500_000, completion_tokens=100_000))
    assert budget.cost == pytest.approx(2.0)
    assert Budget().cost is None


def test_a_request_waits_while_one_under_way_might_use_up_the_cap():
    """Cap 30; each request may use 1 + 20: two fit only after the first used less than its most."""

    async def go():
        budget, order = Budget(max_tokens=30), []

        async def request(name, used):
            async with budget.request("abcd", 20):
                order.append(f"{name} in")
                await asyncio.sleep(0)
                budget.spend("abcd", Answer("", prompt_tokens=1, completion_tokens=used))
                order.append(f"{name} out")

        await asyncio.gather(request("a", 5), request("b", 10))
        with pytest.raises(BudgetReached, match="`max_tokens_total=30`"):
            await request("c", 1)
        return order, budget.tokens

    order, tokens = asyncio.run(go())
    assert order == ["a in", "a out", "b in", "b out"]
    assert tokens == 17


def test_a_further_attempt_waits_for_others_before_it_gives_up():
    """Cap 60, each 2 + 20: after a loss of 20, the second attempt fits once the other is done."""

    async def go():
        budget, order = Budget(max_tokens=60), []

        async def retried():
            async with budget.request("abcd", 20) as reservation:
                await reservation.lose((1, 19))
                await reservation.renew()
                order.append("again")
                await reservation.lose(None)
                with pytest.raises(BudgetReached, match="`max_tokens_total=60`"):
                    await reservation.renew()

        async def other():
            async with budget.request("abcd", 20):
                await asyncio.sleep(0.01)
                order.append("other")
                budget.spend("abcd", Answer("", prompt_tokens=1, completion_tokens=5))

        await asyncio.gather(other(), retried())
        return order, budget.tokens

    assert asyncio.run(go()) == (["other", "again"], 20 + 6 + 22)


def test_the_prompt_estimate_learns_from_what_the_server_counts():
    async def go():
        budget = Budget(max_tokens=100)
        async with budget.request("x" * 40, 10):
            budget.spend("x" * 40, Answer("", prompt_tokens=40, completion_tokens=0))
        with pytest.raises(BudgetReached):  # 4 characters a token would say 15 + 10
            async with budget.request("x" * 60, 10):
                pass

    asyncio.run(go())
