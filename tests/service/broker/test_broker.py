"""The queue protocol against real servers: Valkey and Redis."""

from __future__ import annotations

import asyncio
import random

import pytest
from redis.asyncio import Redis

from service.broker import keys
from service.broker.fitness import refuse_unfit_store
from service.broker.jobs import Wake
from service.broker.redis_streams import Broker
from service.config import ConfigError
from service.errors import QueueFull, Unavailable, UnfitStore
from service.protocol import Result, Terms, encode
from tests.service.broker.jobs import info, job, ok

LONG, SHORT = 60_000, 150


async def put(broker, model, *rows, cost=10):
    made = [job(model, n, cost) for n in rows]
    for one in made:
        await broker.submit(one, Terms(one.work.rows, 30_000, 10_000))
    return made


async def test_a_job_goes_round(broker, model):
    [sent] = await put(broker, model, 2)
    taken = await broker.take(model, "w", 4, 4, LONG)
    [delivery] = taken.deliveries
    assert delivery.job == sent
    assert delivery.deliveries == 1
    assert 0 < delivery.deadline_ms - delivery.submitted_ms <= 30_000
    assert await broker.result(model, sent.id) is None
    assert await broker.finish(model, delivery, ok(delivery), 60) == Wake((), sent.id, encode(ok(delivery)))
    assert (await broker.result(model, sent.id)).outcome == "ok"
    stats = await broker.queue_stats(model)
    assert (stats.jobs, stats.backlog, stats.ledger) == (0, 0, {"accepted": 1, "ok": 1})


async def test_the_same_job_submitted_twice_is_queued_once(broker, model):
    sent = job(model)
    first = await broker.submit(sent, Terms(1, 1000, 100))
    again = await broker.submit(sent, Terms(1, 1000, 100))
    assert (again.entry, again.attached) == (first.entry, True)
    stats = await broker.queue_stats(model)
    assert (stats.jobs, stats.backlog, stats.ledger) == (1, 10, {"accepted": 1})


async def test_order_is_first_come(broker, model):
    sent = await put(broker, model, 1, 1, 1)
    taken = await broker.take(model, "w", 3, 3, LONG)
    assert [d.job.id for d in taken.deliveries] == [j.id for j in sent]


async def test_take_stops_at_the_first_job_that_does_not_fit_and_leaves_it(broker, model):
    sent = await put(broker, model, 2, 3, 1)
    taken = await broker.take(model, "w", 4, 4, LONG)
    assert [d.job.id for d in taken.deliveries] == [sent[0].id]
    assert taken.full
    other = await broker.take(model, "v", 4, 4, LONG)
    assert [d.job.id for d in other.deliveries] == [sent[1].id, sent[2].id]


async def test_a_job_larger_than_the_pool_needs_an_empty_pool(broker, model):
    [big] = await put(broker, model, 9)
    assert (await broker.take(model, "w", 3, 4, LONG)).deliveries == []
    taken = await broker.take(model, "w", 4, 4, LONG)
    assert [d.job.id for d in taken.deliveries] == [big.id]
    assert (await broker.take(model, "v", 4, 4, LONG)).deliveries == []


async def test_no_free_rows_takes_nothing(broker, model):
    await put(broker, model, 1)
    assert (await broker.take(model, "w", 0, 4, LONG)).deliveries == []
    assert len((await broker.take(model, "w", 1, 4, LONG)).deliveries) == 1


async def test_a_lease_that_runs_out_is_redelivered_first_and_not_before(broker, model):
    first, second = await put(broker, model, 1, 1)
    await broker.take(model, "w", 1, 4, SHORT)
    assert [d.job.id for d in (await broker.take(model, "v", 1, 4, LONG)).deliveries] == [second.id]
    await asyncio.sleep(0.2)
    [again] = (await broker.take(model, "v", 1, 4, SHORT)).deliveries
    assert (again.job.id, again.deliveries) == (first.id, 2)


async def test_lapsed_leases_are_looked_for_only_when_asked(broker, model):
    [first] = await put(broker, model, 4)
    await broker.take(model, "w", 4, 4, LONG)
    [second] = await put(broker, model, 1)
    await asyncio.sleep(0.01)
    taken = await broker.take(model, "v", 2, 4, 1)
    assert (taken.deliveries, taken.full, taken.lapsed) == ([], True, True)
    taken = await broker.take(model, "v", 2, 4, 1, reclaim=False)
    assert [d.job.id for d in taken.deliveries] == [second.id]
    assert [d.job.id for d in (await broker.take(model, "v", 4, 4, LONG, reclaim=False)).deliveries] == []
    assert [d.job.id for d in (await broker.take(model, "v", 4, 4, 1)).deliveries] == [first.id]


async def test_what_waits_for_its_turn_is_full_but_not_lapsed(broker, model):
    await put(broker, model, 3)
    taken = await broker.take(model, "w", 2, 4, LONG)
    assert (taken.full, taken.lapsed) == (True, False)


async def test_heartbeat_keeps_a_lease_and_never_steals_one_back(broker, model):
    await put(broker, model, 1)
    [mine] = (await broker.take(model, "w", 1, 4, SHORT)).deliveries
    for _ in range(3):
        await asyncio.sleep(0.1)
        assert await broker.heartbeat(model, "w", [mine.entry]) == []
        assert (await broker.take(model, "v", 1, 4, SHORT)).deliveries == []
    await asyncio.sleep(0.2)
    [theirs] = (await broker.take(model, "v", 1, 4, SHORT)).deliveries
    assert theirs.deliveries == 2
    assert await broker.heartbeat(model, "w", [mine.entry]) == [mine.entry]
    assert await broker.heartbeat(model, "v", [mine.entry]) == []
    assert await broker.heartbeat(model, "v", []) == []


async def test_the_first_result_wins_and_the_ledger_counts_one(broker, model):
    [sent] = await put(broker, model, 1)
    [stale] = (await broker.take(model, "w", 1, 4, 1)).deliveries
    await asyncio.sleep(0.01)
    [fresh] = (await broker.take(model, "v", 1, 4, 1)).deliveries
    assert stale.attempt != fresh.attempt
    assert await broker.finish(model, stale, ok(stale, "w"), 60) is not None
    assert await broker.finish(model, fresh, ok(fresh, "v"), 60) is None
    assert (await broker.result(model, sent.id)).worker == "w"
    stats = await broker.queue_stats(model)
    assert (stats.jobs, stats.backlog, stats.ledger) == (0, 0, {"accepted": 1, "ok": 1})


async def test_a_full_backlog_refuses_and_says_when_to_come_back(broker, model):
    await broker.submit(job(model, cost=80), Terms(1, 1000, 100))
    with pytest.raises(QueueFull) as refused:
        await broker.submit(job(model, cost=30), Terms(1, 1000, 100))
    assert refused.value.retry_after_s == 5
    await broker.announce("w", [info(model)], {model: (5.0, 5.0)})
    with pytest.raises(QueueFull) as refused:
        await broker.submit(job(model, cost=30), Terms(1, 1000, 100))
    assert refused.value.retry_after_s == 2
    assert (await broker.queue_stats(model)).ledger == {"accepted": 1}


async def test_a_job_dearer_than_the_whole_budget_is_taken_when_nothing_waits(broker, model):
    await broker.submit(job(model, cost=500), Terms(1, 1000, 100))
    assert (await broker.queue_stats(model)).backlog == 500


async def test_catalogue_and_signs_of_life(broker, model):
    assert await broker.live_workers(model) == 0
    await broker.announce("w1", [info(model)], {})
    await broker.announce("w2", [info(model)], {})
    assert (await broker.catalogue())[model] == info(model)
    assert await broker.live_workers(model) == 2
    await broker.retire("w1", [model])
    assert await broker.live_workers(model) == 1


async def test_wait_wakes_on_a_new_entry_and_only_then(broker, model):
    cursor = (await broker.take(model, "w", 1, 1, LONG)).cursors
    waiting = asyncio.create_task(broker.wait(model, cursor, 10_000))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await put(broker, model, 1)
    async with asyncio.timeout(5):
        await waiting
    assert len((await broker.take(model, "w", 1, 1, LONG)).deliveries) == 1


async def test_replies_arrive_in_order_and_a_quiet_stream_is_no_error(broker, model):
    gateway = f"g-{model}"
    assert await broker.replies(gateway, "0") == ([], "0")
    small, large = Result("a", "ok"), Result("b", "ok", worker="w" * 5000)
    await broker.notify([Wake((gateway,), "a", encode(small)), Wake((gateway,), "b", encode(large))])
    entries, last = await broker.replies(gateway, "0")
    assert entries == [("a", small), ("b", None)]
    assert await broker.replies(gateway, last) == ([], last)


async def test_an_entry_whose_job_is_gone_is_cleared(broker, model, server_url):
    sent, kept = await put(broker, model, 1, 1)
    async with Redis.from_url(server_url) as redis:
        await redis.delete(keys.job(model, sent.id))
        assert [d.job.id for d in (await broker.take(model, "w", 4, 4, LONG)).deliveries] == [kept.id]
        assert await redis.xlen(keys.queue(model)) == 1


async def test_a_lost_group_is_made_again(broker, model, server_url):
    async with Redis.from_url(server_url) as redis:
        await redis.delete(keys.queue(model))
    assert (await broker.take(model, "w", 1, 1, LONG)).deliveries == []
    await put(broker, model, 1)
    assert len((await broker.take(model, "w", 1, 1, LONG)).deliveries) == 1


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_a_server_that_may_evict_is_refused_whatever_its_maxmemory(broker, server_url, policy):
    async with Redis.from_url(server_url) as redis:
        await redis.config_set("maxmemory-policy", policy)
        try:
            with pytest.raises(UnfitStore, match=f"{policy}.*noeviction"):
                await broker.check()
            with pytest.raises(ConfigError, match=f"OFFRAMP_REDIS_URL: .*{policy}"):
                await asyncio.to_thread(refuse_unfit_store, server_url)
        finally:
            await redis.config_set("maxmemory-policy", "noeviction")
    await broker.check()
    await asyncio.to_thread(refuse_unfit_store, server_url)


async def test_a_server_that_is_away_does_not_keep_a_process_from_starting():
    await asyncio.to_thread(refuse_unfit_store, "unix:///nonexistent/valkey.sock")


async def test_no_server_is_unavailable():
    broker = Broker("unix:///nonexistent/valkey.sock")
    with pytest.raises(Unavailable, match="Redis does not answer"):
        await broker.check()
    await broker.aclose()


@pytest.mark.parametrize("seed", range(3))
async def test_accepted_equals_outcomes_plus_what_is_left(broker, model, seed):
    rng = random.Random(seed)
    held = {"w": [], "v": []}
    for _ in range(120):
        worker = rng.choice(["w", "v"])
        match rng.choice(["submit", "submit", "take", "take", "finish", "finish", "twice", "expire"]):
            case "submit":
                try:
                    await broker.submit(job(model, rng.randint(1, 6), rng.randint(1, 9)), Terms(1, 1000, 150))
                except QueueFull:
                    assert (await broker.queue_stats(model)).backlog > 150 - 10
            case "take":
                held[worker] += (await broker.take(model, worker, rng.randint(0, 4), 4, LONG)).deliveries
            case "expire":
                held[worker] += (await broker.take(model, worker, 4, 4, 0)).deliveries
            case "finish" | "twice" as how if held[worker]:
                delivery = held[worker][0] if how == "twice" else held[worker].pop(0)
                await broker.finish(model, delivery, ok(delivery), 60)
        stats = await broker.queue_stats(model)
        ended = sum(n for outcome, n in stats.ledger.items() if outcome != "accepted")
        assert stats.ledger.get("accepted", 0) == ended + stats.jobs
    while (await broker.queue_stats(model)).jobs:
        for delivery in (await broker.take(model, "w", 4, 4, 0)).deliveries:
            await broker.finish(model, delivery, ok(delivery), 60)
    assert (await broker.queue_stats(model)).backlog == 0
