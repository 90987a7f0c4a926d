"""High, normal and low share a worker 8:4:1 by cost, and nobody starves; against real servers."""

from __future__ import annotations

from collections import Counter

import pytest

from service.broker import keys
from tests.service.broker.jobs import LONG, TTL_S, ok, put, take_one


async def serve(broker, model, rounds):
    """Take and finish one row at a time; the ids in order."""
    order = []
    for _ in range(rounds):
        taken = await broker.take(model, "w", 1, 1, LONG)
        for delivery in taken.deliveries:
            order.append(delivery)
            await broker.finish(model, delivery, ok(delivery), TTL_S)
    return order


def ranks(order):
    return [delivery.entry.partition(":")[0] for delivery in order]


async def test_backlogged_ranks_share_eight_to_four_to_one(broker, model):
    for rank in keys.RANKS:
        for _ in range(30):
            await put(broker, model, priority=rank)
    order = ranks(await serve(broker, model, 39))
    assert Counter(order) == {"high": 24, "normal": 12, "low": 3}
    assert Counter(order[:13]) == {"high": 8, "normal": 4, "low": 1}


async def test_shares_are_of_cost_not_of_jobs(broker, model):
    for _ in range(10):
        await put(broker, model, cost=40, priority="high")
    for _ in range(40):
        await put(broker, model, cost=5, priority="normal")
    cost = Counter()
    for delivery in await serve(broker, model, 27):
        cost[delivery.entry.partition(":")[0]] += delivery.job.cost
    assert cost["high"] / cost["normal"] == pytest.approx(2, rel=0.2)


async def test_the_lowest_rank_does_not_starve(broker, model):
    low = await put(broker, model, priority="low")
    for _ in range(20):
        await put(broker, model, priority="high")
    assert low.id in [delivery.job.id for delivery in await serve(broker, model, 10)]


async def test_a_rank_that_was_idle_has_saved_nothing_up(broker, model):
    for _ in range(50):
        await put(broker, model, priority="normal")
    await serve(broker, model, 26)
    for _ in range(24):
        await put(broker, model, priority="high")
    assert 7 <= ranks(await serve(broker, model, 12)).count("high") <= 9


async def test_a_rank_that_was_served_alone_owes_nothing_for_it(broker, model):
    for _ in range(30):
        await put(broker, model, priority="low")
    await serve(broker, model, 30)
    for rank in ("high", "low"):
        for _ in range(20):
            await put(broker, model, priority=rank)
    assert "low" in ranks(await serve(broker, model, 10))


async def test_a_worker_is_never_idle_while_a_rank_has_work(broker, model):
    for rank, count in (("low", 5), ("high", 1), ("normal", 3)):
        for _ in range(count):
            await put(broker, model, priority=rank)
    taken = await broker.take(model, "w", 9, 9, LONG)
    assert len(taken.deliveries) == 9
    assert taken.deliveries[0].entry.startswith("high:")
    assert not taken.full


async def test_order_within_a_rank_is_first_come(broker, model):
    sent = [await put(broker, model, cost=cost, priority="low") for cost in (50, 1, 9)]
    assert [d.job.id for d in await serve(broker, model, 3)] == [one.id for one in sent]


async def test_a_lease_that_ran_out_goes_first_whatever_its_rank(broker, model):
    low = await put(broker, model, priority="low")
    await take_one(broker, model)
    await put(broker, model, priority="high")
    assert [d.job.id for d in (await broker.take(model, "v", 1, 1, 0)).deliveries] == [low.id]


async def test_one_take_hands_an_entry_out_once(broker, model):
    sent = [await put(broker, model) for _ in range(2)]
    await broker.take(model, "w", 2, 2, LONG)
    again = await broker.take(model, "w", 9, 9, 0)
    assert [d.job.id for d in again.deliveries] == [one.id for one in sent]


async def test_wait_hears_every_rank(broker, model):
    for rank in keys.RANKS:
        cursors = (await broker.take(model, "w", 1, 1, LONG)).cursors
        sent = await put(broker, model, priority=rank)
        await broker.wait(model, cursors, 1000)
        assert (await take_one(broker, model)).job.id == sent.id


@pytest.mark.parametrize("name", ["a.b", "a:b", "m{x}", "naïve 模型", "a%*?[b]", "q:high"])
async def test_odd_model_names_are_told_apart(broker, name):
    other = f"{name}:job"
    for model in (name, other):
        await broker.ensure(model)
    theirs, sent = await put(broker, other), await put(broker, name)
    assert (await take_one(broker, name)).job.id == sent.id
    delivery = await take_one(broker, other)
    assert delivery.job.id == theirs.id
    await broker.finish(other, delivery, ok(delivery), TTL_S)
    assert await broker.result(name, theirs.id) is None
    assert (await broker.queue_stats(name)).jobs == 1
