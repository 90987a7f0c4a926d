"""Every way that a job ends: its cost goes back, its outcome is counted, its result says so; against real servers."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from redis.asyncio import Redis

from service.broker import keys
from service.broker.jobs import Wake
from service.errors import QuotaExceeded
from service.protocol import Failure, Result, Terms
from tests.service.broker.jobs import LONG, TTL_S, books, info, job, ok, put, take_one


async def end(how, broker, model, sent):
    """End a queued job one way."""
    match how:
        case "cancelled":
            assert await broker.cancel(model, sent.id, TTL_S)
        case "dead":
            for _ in range(3):
                taken = await broker.take(model, "w", 4, 4, 0, max_deliveries=2)
            assert [(wake.id, outcome) for wake, outcome in taken.ended] == [(sent.id, "dead")]
        case "expired":
            await asyncio.sleep(0.06)
            taken = await broker.take(model, "w", 4, 4, LONG)
            assert [(wake.id, outcome) for wake, outcome in taken.ended] == [(sent.id, "expired")]
        case _:
            delivery = await take_one(broker, model)
            failure = None if how == "ok" else Failure("job_failed", "it broke")
            assert await broker.finish(model, delivery, Result(sent.id, how, failure=failure), TTL_S) is not None


@pytest.mark.parametrize("how", ["ok", "failed", "cancelled", "dead", "expired"])
async def test_the_end_pays_back_and_is_told_once(broker, model, server_url, how):
    deadline_ms = 50 if how == "expired" else 30_000
    terms = {"owner": "k", "max_owed": 10, "events": True, "webhook": "https://x/", "reply_to": "g1"}
    sent = await put(broker, model, deadline_ms=deadline_ms, priority="low", **terms)
    with pytest.raises(QuotaExceeded, match="10 of 10"):
        await broker.submit(job(model), Terms(1, 1000, 100, owner="k", max_owed=10))
    await broker.cancel(model, (await put(broker, model, owner="other", max_owed=10)).id, TTL_S)

    await end(how, broker, model, sent)

    stats = await broker.queue_stats(model)
    assert stats.ledger == {"accepted": 2, **Counter(["cancelled", how])}
    assert await books(broker, model) == (0, 0)
    assert (await broker.result(model, sent.id)).outcome == how
    status = await broker.status(model, sent.id)
    assert (status.state, status.over, status.owner, status.position) == (how, True, "k", None)
    assert [event.name for event in await broker.events(model, sent.id)][-1:] == ["completed"]
    assert [(hook.id, hook.outcome) for hook in await broker.due_hooks(model, LONG)] == [(sent.id, how)]
    async with Redis.from_url(server_url) as redis:
        assert await redis.hgetall(keys.owed(model)) == {}
    await broker.submit(job(model), Terms(1, 1000, 100, owner="k", max_owed=10))


async def test_when_all_has_ended_only_the_books_remain(broker, model, server_url):
    for how in ("ok", "failed", "cancelled", "dead", "expired"):
        more = {"events": True, "owner": "k", "webhook": "https://x/"}
        sent = await put(broker, model, deadline_ms=50 if how == "expired" else 30_000, **more)
        if how == "failed":
            delivery = await take_one(broker, model)
            assert await broker.checkpoint(model, delivery, {0: b"s"}, 1, 2, TTL_S)
            await broker.release(model, "w", delivery)
        await end(how, broker, model, sent)
        await broker.hook_over(model, sent.id)
    async for letter in broker.letters(model):
        await broker.purge(model, letter.entry)
    known = {keys.queue(model, rank) for rank in keys.RANKS}
    known |= {keys.ledger(model), keys.backlog(model), keys.turns(model)}
    async with Redis.from_url(server_url) as redis:
        left = {key.decode() async for key in redis.scan_iter(f"{keys.prefix(model)}*")}
        fading = {key for key in left if 0 < await redis.ttl(key) <= 600}
        kinds = {key.removeprefix(keys.prefix(model)).partition(":")[0] for key in fading}
        assert kinds == {"job", "res", "ev"}
        assert left - fading - {keys.letters(model)} == known
        assert await redis.xlen(keys.letters(model)) == 0
        assert set(await redis.hvals(keys.backlog(model))) == {b"0"}


async def test_without_a_worker_a_gateway_ends_what_is_overdue(broker, model):
    terms = {"owner": "k", "events": True, "webhook": "https://x/", "reply_to": "g1"}
    silent = await put(broker, model, deadline_ms=400, priority="low", **terms)
    await take_one(broker, model)
    handed_back = await put(broker, model, deadline_ms=400)
    await broker.release(model, "w", await take_one(broker, model))
    held = await put(broker, model, deadline_ms=400)
    [holding] = (await broker.take(model, "v", 1, 4, LONG, reclaim=False)).deliveries
    young = await put(broker, model)
    overdue = [await put(broker, model, deadline_ms=1, priority=rank, **terms) for rank in keys.RANKS]
    await asyncio.sleep(0.5)

    assert await broker.expire(model, LONG, TTL_S, grace_ms=LONG) == []
    ended = await broker.expire(model, LONG, TTL_S, grace_ms=0)
    assert set(ended) == {one.id for one in (handed_back, *overdue)}
    await broker.heartbeat(model, "v", [holding.entry])
    assert await broker.expire(model, 400, TTL_S, grace_ms=0) == [silent.id]
    assert await broker.expire(model, 400, TTL_S, grace_ms=0) == []

    assert {(await broker.result(model, name)).outcome for name in (*ended, silent.id)} == {"expired"}
    assert (await broker.queue_stats(model)).ledger == {"accepted": 7, "expired": 5}
    assert await books(broker, model) == (0, 20)
    wakes, _ = await broker.replies("g1", "0")
    assert {name for name, _ in wakes} >= {one.id for one in (silent, *overdue)}
    assert [event.name for event in await broker.events(model, silent.id)][-1] == "completed"
    assert {hook.id for hook in await broker.due_hooks(model, LONG)} == {one.id for one in (silent, *overdue)}
    assert (await broker.finish(model, holding, ok(holding), TTL_S)) is not None
    assert (await take_one(broker, model)).job.id == young.id
    assert held.id == holding.job.id


async def test_what_is_overdue_ends_in_portions_even_behind_what_runs(broker, model, server_url):
    for _ in range(230):
        await put(broker, model, cost=1, deadline_ms=1)
    async with Redis.from_url(server_url) as redis:
        await redis.xreadgroup(keys.GROUP, "w", {keys.queue(model): ">"}, 110)  # as if taken before their deadlines
    await asyncio.sleep(1.0)
    sizes = [len(await broker.expire(model, LONG, TTL_S, grace_ms=900)) for _ in range(4)]
    assert sizes == [0, 90, 30, 0]
    assert (await books(broker, model))[0] == 0


async def test_delivered_too_often_it_becomes_a_dead_letter(broker, model):
    sent = await put(broker, model, 2, 30, priority="high", owner="k", reply_to="g1")
    assert (await take_one(broker, model, "w1", max_deliveries=2)).deliveries == 1
    assert (await take_one(broker, model, "w2", 0, max_deliveries=2)).deliveries == 2
    taken = await broker.take(model, "w3", 4, 4, 0, max_deliveries=2)
    assert taken.deliveries == []
    assert taken.ended == [(Wake(("g1",), sent.id), "dead")]
    [letter] = [letter async for letter in broker.letters(model)]
    assert letter == await broker.letter(model, sent.id)
    assert (letter.id, letter.rank, letter.rows, letter.cost, letter.owner) == (sent.id, "high", 2, 30, "k")
    assert (letter.attempts, letter.worker, letter.error) == (2, "w2", "worker w2 went silent in delivery 2")
    assert letter.submitted_ms <= letter.dead_ms
    assert letter.job("new").work == sent.work
    failure = (await broker.result(model, sent.id)).failure
    assert failure == Failure("job_failed", "given up after 2 deliveries: the worker went away")
    assert (await broker.queue_stats(model)).letters == 1
    assert await broker.purge(model, letter.entry)
    assert not await broker.purge(model, letter.entry)
    assert await broker.letter(model, sent.id) is None


async def test_letters_come_in_pages_oldest_first(broker, model):
    sent = [await put(broker, model) for _ in range(7)]
    await broker.take(model, "w", 9, 9, LONG, max_deliveries=1)
    await broker.take(model, "w", 9, 9, 0, max_deliveries=1)
    assert [letter.id async for letter in broker.letters(model, count=3)] == [one.id for one in sent]


async def test_a_job_that_may_kill_runs_alone(broker, model):
    killer, mate = await put(broker, model), await put(broker, model)
    for _ in range(2):
        taken = await broker.take(model, "w", 2, 4, 0)
        assert [(d.job.id, d.solo) for d in taken.deliveries] == [(killer.id, False), (mate.id, False)]
    await broker.finish(model, taken.deliveries[1], ok(taken.deliveries[1]), TTL_S)
    late = await put(broker, model)
    busy = await broker.take(model, "w", 3, 4, 0)
    assert (busy.deliveries, busy.full) == ([], True)
    alone = await broker.take(model, "w", 4, 4, 0)
    assert [(d.job.id, d.deliveries, d.solo) for d in alone.deliveries] == [(killer.id, 3, True)]
    assert (await take_one(broker, model, "v")).job.id == late.id


async def test_the_fleet_does_not_drain_for_a_suspect_at_once(broker, model, server_url):
    """A lapsed job that has to run alone is passed by until it was idle for three leases."""
    await put(broker, model)
    for _ in range(3):
        suspect = await take_one(broker, model, lease_ms=0)
    _, _, entry = suspect.entry.partition(":")

    async def idle_for(ms):
        async with Redis.from_url(server_url) as redis:
            await redis.xclaim(keys.queue(model), keys.GROUP, "w", 0, [entry], idle=ms, justid=True)
        taken = await broker.take(model, "v", 2, 4, 10_000)
        return [d.job.id for d in taken.deliveries], taken.full, taken.lapsed

    late = [await put(broker, model), await put(broker, model)]
    assert await idle_for(20_000) == ([one.id for one in late], False, False)
    late = await put(broker, model)
    assert await idle_for(31_000) == ([], True, True)
    assert await broker.release(model, "w", suspect)  # freed just now
    assert [d.job.id for d in (await broker.take(model, "v", 2, 4, 10_000)).deliveries] == [late.id]


async def test_suspects_that_are_passed_by_hide_nothing_that_fits(broker, model):
    """Not even when the server reads past many of them in one call; one that is free runs the first of them."""
    suspects = [await put(broker, model) for _ in range(15)]
    for _ in range(2):
        await broker.take(model, "w", 16, 16, 0)
    late = await put(broker, model)
    await asyncio.sleep(0.01)
    taken = await broker.take(model, "v", 3, 4, 5_000)
    assert [d.job.id for d in taken.deliveries] == [late.id]
    [alone] = (await broker.take(model, "v", 4, 4, 1)).deliveries
    assert (alone.solo, alone.job.id) == (True, suspects[0].id)


@pytest.mark.parametrize("end", ["deadline", "deliveries"])
async def test_what_cannot_run_any_more_holds_nobody_up(broker, model, end):
    """A large job that is out of time, or was delivered too often, ends though there is no room for it."""
    big = await put(broker, model, 9, deadline_ms=60)
    more = {}
    if end == "deliveries":
        await broker.cancel(model, big.id, TTL_S)
        big = await put(broker, model, 9)
        await broker.take(model, "w", 4, 4, LONG, max_deliveries=1)
        more = {"max_deliveries": 1}
    small = await put(broker, model)
    await asyncio.sleep(0.08)
    taken = await broker.take(model, "v", 1, 4, 0 if more else LONG, **more)
    assert [wake.id for wake, _ in taken.ended] == [big.id]
    assert [d.job.id for d in taken.deliveries] == [small.id]


async def test_a_flood_of_expired_jobs_ends_in_portions(broker, model):
    await asyncio.gather(*(put(broker, model, deadline_ms=1) for _ in range(130)))
    last = await put(broker, model)
    first = await broker.take(model, "w", 1, 1, LONG)
    assert (len(first.ended), first.deliveries) == (100, [])
    async with asyncio.timeout(0.9):
        await broker.wait(model, first.cursors, 1000)
    second = await broker.take(model, "w", 1, 1, LONG)
    assert (len(second.ended), second.deliveries[0].job.id) == (30, last.id)


async def test_cancel_of_a_queued_job(broker, model):
    sent = await put(broker, model, reply_to="gone")
    gateway = f"g-{model}"
    await broker.submit(sent, Terms(1, 1000, 100, reply_to=gateway))
    assert await broker.cancel(model, sent.id, TTL_S)
    assert (await broker.replies(gateway, "0"))[0] == [(sent.id, None)]
    assert (await broker.take(model, "w", 4, 4, LONG)).deliveries == []
    assert (await broker.result(model, sent.id)).failure.code == "cancelled"
    assert not await broker.cancel(model, sent.id, TTL_S)
    assert not await broker.cancel(model, "unheard-of", TTL_S)
    assert await books(broker, model) == (0, 0)


async def test_cancel_of_a_running_job_reaches_its_worker_and_fences_it(broker, model):
    sent, worker = await put(broker, model), f"w-{model}"
    delivery = await take_one(broker, model, worker)
    assert (await broker.controls(worker, "0"))[0] == []
    assert await broker.cancel(model, sent.id, TTL_S)
    told, last = await broker.controls(worker, "0")
    assert told == [(model, delivery.entry)]
    assert await broker.controls(worker, last) == ([], last)
    assert not await broker.checkpoint(model, delivery, {0: b"s"}, 1, 2, TTL_S)
    assert not await broker.release(model, worker, delivery)
    assert await broker.heartbeat(model, worker, [delivery.entry]) == [delivery.entry]
    assert await broker.finish(model, delivery, ok(delivery), TTL_S) is None
    assert (await broker.result(model, sent.id)).outcome == "cancelled"
    assert (await broker.queue_stats(model)).ledger == {"accepted": 1, "cancelled": 1}


async def test_cancel_after_the_end_changes_nothing(broker, model):
    sent = await put(broker, model)
    delivery = await take_one(broker, model)
    await broker.finish(model, delivery, ok(delivery), TTL_S)
    assert not await broker.cancel(model, sent.id, TTL_S)
    assert (await broker.result(model, sent.id)).outcome == "ok"


async def test_every_gateway_that_attached_is_told(broker, model):
    sent = await put(broker, model, reply_to="g1")
    for gateway in ("g2", "g1", "", "g2", "g"):
        assert (await broker.submit(sent, Terms(1, 1000, 100, reply_to=gateway))).attached
    delivery = await take_one(broker, model)
    for _ in range(2):
        assert (await broker.finish(model, delivery, ok(delivery), TTL_S)).gateways == ("g1", "g2", "g")
    assert (await broker.submit(sent, Terms(1, 1000, 100, reply_to="g3"))).attached
    assert (await broker.result(model, sent.id)).outcome == "ok"
    assert (await broker.queue_stats(model)).ledger == {"accepted": 1, "ok": 1}


async def test_a_result_is_kept_though_somebody_deleted_the_stream(broker, model, server_url):
    sent = await put(broker, model, reply_to="g1")
    delivery = await take_one(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.delete(keys.queue(model))
    assert (await broker.status(model, sent.id)).state == "running"
    assert not await broker.release(model, "w", delivery)
    assert await broker.heartbeat(model, "w", [delivery.entry]) == [delivery.entry]
    for _ in range(2):
        assert (await broker.finish(model, delivery, ok(delivery), TTL_S)).gateways == ("g1",)
    assert (await broker.result(model, sent.id)).outcome == "ok"
    assert (await broker.status(model, sent.id)).state == "ok"


async def test_the_status_of_a_queued_job_survives_a_deleted_stream(broker, model, server_url):
    sent = await put(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.delete(keys.queue(model))
    assert (await broker.status(model, sent.id, place=True)).position == 0


async def test_workers_go_on_after_everything_was_flushed(broker, model, server_url):
    await broker.announce("w", [info(model)], {})
    sent = await put(broker, model, events=True)
    delivery = await take_one(broker, model)
    async with Redis.from_url(server_url) as redis:
        await redis.delete(*[key async for key in redis.scan_iter(f"*{model}*")])
        await redis.script_flush()
    assert not await broker.checkpoint(model, delivery, {0: b"s"}, 1, 2, TTL_S, b"{}")
    assert not await broker.release(model, "w", delivery)
    assert not await broker.cancel(model, sent.id, TTL_S)
    assert await broker.status(model, sent.id) is None
    assert (await broker.take(model, "w", 4, 4, LONG)).deliveries == []
    again = await put(broker, model)
    assert (await take_one(broker, model)).job.id == again.id
    assert (await broker.queue_stats(model)).ledger == {"accepted": 1}
