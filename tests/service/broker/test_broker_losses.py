"""What the broker does when something is missing, stale, full or too much at once; against real servers."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from service.broker import keys
from service.broker.redis_streams import START, Broker
from service.errors import QueueFull, Unavailable
from service.protocol import Failure, Result, Terms
from tests.service.broker.jobs import info, job, ok

LONG = 60_000


async def put(broker, model, cost=10):
    sent = job(model, 1, cost)
    await broker.submit(sent, Terms(1, 30_000, 10_000))
    return sent


async def take_one(broker, model, worker="w", lease_ms=LONG):
    [delivery] = (await broker.take(model, worker, 4, 4, lease_ms)).deliveries
    return delivery


async def books(broker, model):
    """(accepted - outcomes - entries, backlog): (0, 0) when all is told and nothing is left."""
    stats = await broker.queue_stats(model)
    ended = sum(count for state, count in stats.ledger.items() if state != "accepted")
    return stats.ledger["accepted"] - ended - stats.jobs, stats.backlog


async def test_an_entry_whose_job_is_gone_is_a_failure_in_the_books(broker, model, server_url):
    sent = await put(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.delete(keys.job(model, sent.id))
    assert (await broker.take(model, "w", 4, 4, LONG)).deliveries == []
    assert (await broker.queue_stats(model)).ledger == {"accepted": 1, "failed": 1}
    assert await books(broker, model) == (0, 0)


async def test_a_job_that_vanished_while_it_ran_still_gets_its_result(broker, model, server_url):
    sent = await put(broker, model)
    delivery = await take_one(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.delete(keys.job(model, sent.id))
    assert await broker.finish(model, delivery, ok(delivery), 60) is not None
    assert await broker.result(model, sent.id) == ok(delivery)
    assert await books(broker, model) == (0, 0)
    assert await broker.finish(model, delivery, ok(delivery, "again"), 60) is None


async def test_a_result_finds_its_way_after_the_server_lost_everything(broker, model, server_url):
    await put(broker, model)
    delivery = await take_one(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.delete(*[key async for key in redis.scan_iter(f"*{model}*")])
    assert await broker.heartbeat(model, "w", [delivery.entry]) == [delivery.entry]
    assert await broker.finish(model, delivery, ok(delivery), 60) is not None
    assert await broker.result(model, delivery.job.id) == ok(delivery)
    stats = await broker.queue_stats(model)
    assert (stats.jobs, stats.backlog, stats.ledger) == (0, 0, {})


@pytest.mark.parametrize("outcome", ["failed", "expired"])
async def test_a_failure_of_a_worker_that_lost_its_lease_is_not_heard(broker, model, outcome):
    sent = await put(broker, model)
    stale = await take_one(broker, model, "w")
    await asyncio.sleep(0.02)
    fresh = await take_one(broker, model, "v", lease_ms=10)
    bad = Result(sent.id, outcome, failure=Failure("job_failed", "it broke"))
    assert await broker.finish(model, stale, bad, 60) is None
    assert await broker.heartbeat(model, "v", [fresh.entry]) == []
    assert await broker.finish(model, fresh, ok(fresh), 60) is not None
    assert (await broker.result(model, sent.id)).outcome == "ok"
    assert (await broker.queue_stats(model)).ledger == {"accepted": 1, "ok": 1}


async def test_a_job_that_cannot_be_read_fails_and_the_next_is_taken(broker, model, server_url):
    strange, good = await put(broker, model), await put(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.hset(keys.job(model, strange.id), "payload", b"\xc1")
    assert (await take_one(broker, model)).job == good
    assert (await broker.result(model, strange.id)).failure.code == "job_failed"
    assert (await broker.queue_stats(model)).ledger == {"accepted": 2, "failed": 1}


async def test_dead_workers_drain_nothing(broker, model, server_url):
    await broker.announce("alive", [info(model)], {model: (5.0, 5.0)})
    await broker.announce("dead", [info(model)], {model: (2000.0, 2000.0)})
    async with Redis.from_url(server_url) as redis:
        await redis.zadd(keys.workers(model), {"dead": 1})
    await put(broker, model, cost=80)
    with pytest.raises(QueueFull) as refused:
        await broker.submit(job(model, cost=30), Terms(1, 1000, 100))
    assert refused.value.retry_after_s == 2


async def test_more_callers_than_connections_take_turns(broker, model):
    await asyncio.gather(*(put(broker, model, cost=1) for _ in range(300)))
    assert (await broker.queue_stats(model)).backlog == 300


async def test_jobs_that_are_submitted_together_have_their_own_verdicts_and_what_is_left_of_their_time(
    broker, model, server_url
):
    """The server hangs while they wait for the first of them."""
    first = await put(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.client_pause(400, all=True)
        jobs = [job(model, cost=cost) for cost in (10, 1000, 10, 10)]
        others = [asyncio.create_task(broker.submit(jobs[0], Terms(1, 5000, 35)))]
        await asyncio.sleep(0.02)
        others += [asyncio.create_task(broker.submit(made, Terms(1, 5000, 35))) for made in jobs[1:]]
        await asyncio.gather(*others, return_exceptions=True)
        verdicts = [task.exception() for task in others]
        assert [isinstance(verdict, QueueFull) for verdict in verdicts] == [False, True, False, True]
        submitted = [await redis.hmget(keys.job(model, jobs[n].id), "submitted_ms", "deadline_ms") for n in (0, 2)]
    left_first, left_third = (int(deadline) - int(since) for since, deadline in submitted)
    assert left_third <= 5000 - 300, "it waited for the first one's round trip"
    assert left_third < left_first
    taken = [delivery.job for delivery in (await broker.take(model, "w", 4, 4, LONG)).deliveries]
    assert taken == [first, jobs[0], jobs[2]]


async def test_scripts_that_the_server_forgot_are_sent_again_for_all(broker, model, server_url):
    await put(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.script_flush()
    await asyncio.gather(*(put(broker, model) for _ in range(5)))
    assert (await broker.queue_stats(model)).ledger == {"accepted": 6}


async def test_a_full_server_is_unavailable(broker, model, server_url):
    async with Redis.from_url(server_url) as redis:
        await redis.config_set("maxmemory", "1")
        try:
            with pytest.raises(Unavailable, match="Redis does not answer"):
                await put(broker, model)
        finally:
            await redis.config_set("maxmemory", "0")


async def test_a_full_server_takes_what_frees_it(broker, model, server_url):
    """Taken before it was full: the answer is stored, and the job leaves, though nothing new is let in."""
    sent = await put(broker, model)
    delivery = await take_one(broker, model)
    other = await put(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.config_set("maxmemory", "1")
        try:
            assert await broker.finish(model, delivery, ok(delivery), 60) is not None
            assert await broker.cancel(model, other.id, 60)
        finally:
            await redis.config_set("maxmemory", "0")
    assert (await broker.result(model, sent.id)).outcome == "ok"
    assert await books(broker, model) == (0, 0)


async def test_an_error_of_ours_is_not_taken_for_an_outage(broker, model, server_url):
    async with Redis.from_url(server_url) as redis:
        await redis.set(keys.ledger(model), "no hash")
    with pytest.raises(Exception, match="WRONGTYPE"):
        await broker.queue_stats(model)


async def test_waiting_no_time_returns(broker, model):
    async with asyncio.timeout(3):
        await broker.wait(model, START, 0)


async def test_blocking_reads_outlive_a_timeout_in_the_url(server_url):
    broker = Broker(f"{server_url}?socket_timeout=0.3")
    assert await broker.replies("nobody", "0") == ([], "0")
    await broker.aclose()
