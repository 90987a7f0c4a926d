"""What one may ask of a job, what attempts leave each other, and who is let in; against real servers."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from models.api import ClassifyWork
from service.broker import keys
from service.broker.connection import is_outage, refuse_unfit
from service.broker.letters import model_of, new_id
from service.broker.redis_streams import Broker
from service.errors import DeadlineExceeded, IdempotencyConflict, NoWorker, QuotaExceeded, RateLimited, Unavailable
from service.protocol import ClassifyJob, Failure, Result, Terms
from tests.service.broker.conftest import running, system_redis
from tests.service.broker.jobs import LONG, TTL_S, info, job, ok, put, take_one


async def serve_at(broker, model, rate, pressed=None, worker="w"):
    await broker.announce(worker, [info(model)], {model: (rate, rate if pressed is None else pressed)})


async def test_status_tells_place_and_wait(broker, model):
    await serve_at(broker, model, 5.0)
    running = await put(broker, model, cost=7)
    await take_one(broker, model)
    first, second = await put(broker, model, cost=10), await put(broker, model, cost=20, owner="k", deadline_ms=9000)
    await put(broker, model, cost=99, priority="low")
    assert (await broker.status(model, running.id)).state == "running"
    assert (await broker.status(model, running.id, place=True)).position is None
    assert (await broker.status(model, first.id)).position is None
    status = await broker.status(model, first.id, place=True)
    assert (status.state, status.position, status.eta_s, status.over) == ("queued", 0, 0, False)
    status = await broker.status(model, second.id, place=True)
    assert (status.position, status.eta_s, status.owner) == (1, 2.0, "k")
    assert status.deadline_ms - status.submitted_ms == 9000
    assert await broker.status(model, "unheard-of") is None


async def test_no_worker_no_estimate(broker, model):
    await put(broker, model)
    sent = await put(broker, model)
    status = await broker.status(model, sent.id, place=True)
    assert (status.position, status.eta_s) == (1, None)


async def test_places_are_counted_to_two_hundred(broker, model):
    await serve_at(broker, model, 100.0)
    for _ in range(220):
        sent = await put(broker, model, cost=1)
    status = await broker.status(model, sent.id, place=True)
    assert (status.position, status.eta_s) == (200, 2.0)


async def test_without_a_live_worker_a_job_is_refused(broker, model, server_url):
    with pytest.raises(NoWorker, match=model):
        await put(broker, model, need_worker=True)
    await serve_at(broker, model, 5.0)
    await put(broker, model, need_worker=True)
    async with Redis.from_url(server_url) as redis:
        await redis.zadd(keys.workers(model), {"w": 1})
    with pytest.raises(NoWorker):
        await put(broker, model, need_worker=True)
    assert (await broker.queue_stats(model)).ledger == {"accepted": 1}


async def test_what_cannot_be_met_at_the_rate_under_pressure_is_refused(broker, model):
    await serve_at(broker, model, 1.0, pressed=10.0)
    await put(broker, model, cost=10_000, deadline_ms=1000, need_worker=True, priority="low")
    await put(broker, model, cost=80, need_worker=True)
    with pytest.raises(DeadlineExceeded, match=r"10\.0 s") as late:
        await put(broker, model, cost=20, deadline_ms=9_900, need_worker=True)
    assert late.value.foreseen_ms == 12_000
    await put(broker, model, cost=20, deadline_ms=20_000, need_worker=True)
    await put(broker, model, cost=20, deadline_ms=1, need_worker=True, priority="high")


async def test_a_job_is_told_what_is_foreseen_and_refused_beyond_its_limit(broker, model):
    async def foreseen_ms(deadline_ms, limit):
        terms = Terms(1, deadline_ms, 10_000, need_worker=True, limit=limit)
        return (await broker.submit(job(model, 1, 10), terms)).foreseen_ms

    await serve_at(broker, model, 10.0)
    assert await foreseen_ms(1, 0.7) == 0, "nothing is ahead of it"
    assert await foreseen_ms(20_000, 0.7) == 2000
    with pytest.raises(DeadlineExceeded):
        await foreseen_ms(4000, 0.7)
    assert await foreseen_ms(4000, 0.8) == 3000
    await serve_at(broker, model, 10.0, pressed=0.0, worker="roomy")
    assert await foreseen_ms(1, 0.7) == 0, "it begins at once"


async def test_work_of_other_ranks_counts_by_its_share(broker, model):
    """High work does not stand before a normal job that nothing of its own rank is before of."""
    await serve_at(broker, model, 10.0)
    for _ in range(2):
        await put(broker, model, cost=400, deadline_ms=3_600_000, need_worker=True, priority="high")
    await put(broker, model, cost=10, deadline_ms=1000, need_worker=True)
    with pytest.raises(DeadlineExceeded, match="30 of work ahead"):
        await put(broker, model, cost=10, deadline_ms=4_600, need_worker=True)
    await put(broker, model, cost=10, deadline_ms=4_800, need_worker=True)


async def test_workers_rates_add_up(broker, model):
    for worker in "wv":
        await serve_at(broker, model, 10.0, worker=worker)
    await put(broker, model, cost=90, need_worker=True)
    await put(broker, model, cost=10, deadline_ms=7_300, need_worker=True)
    await broker.retire("v", [model])
    with pytest.raises(DeadlineExceeded):
        await put(broker, model, cost=10, deadline_ms=7_300, need_worker=True)


async def test_a_take_tells_how_the_queue_stands(broker, model):
    """Cost queued and running, cost that was asked for, live workers; also to a worker without room. Quotas and what
    no idle service could do are not asked of this one."""
    for worker in "wv":
        await serve_at(broker, model, 10.0, worker=worker)
    await put(broker, model, cost=40, need_worker=True)
    await put(broker, model, cost=20, owner="k", need_worker=True)
    with pytest.raises(QuotaExceeded):
        await put(broker, model, cost=20, owner="k", max_owed=30, need_worker=True)
    with pytest.raises(DeadlineExceeded):
        await put(broker, model, cost=10, deadline_ms=20, need_worker=True)
    taken = await broker.take(model, "w", 0, 4, LONG)
    assert (taken.deliveries, taken.backlog, taken.asked, taken.workers) == ([], 60, 60, 2)
    with pytest.raises(DeadlineExceeded):
        await put(broker, model, cost=10, deadline_ms=1000, need_worker=True)
    delivery, _ = (await broker.take(model, "w", 4, 4, LONG)).deliveries
    await broker.finish(model, delivery, ok(delivery), TTL_S)
    await broker.retire("v", [model])
    taken = await broker.take(model, "w", 0, 4, LONG)
    assert (taken.backlog, taken.asked, taken.workers) == (20, 70, 1)


async def test_nothing_is_too_late_while_a_worker_has_room(broker, model):
    await serve_at(broker, model, 10.0)
    await serve_at(broker, model, 10.0, pressed=0.0, worker="roomy")
    await put(broker, model, cost=10_000, need_worker=True)
    await put(broker, model, cost=10, deadline_ms=100, need_worker=True)


async def test_a_quota_is_of_cost_per_key_and_model(broker, model):
    await put(broker, model, cost=90, owner="k", max_owed=100)
    with pytest.raises(QuotaExceeded, match="90 of 100"):
        await put(broker, model, cost=20, owner="k", max_owed=100)
    await put(broker, model, cost=10, owner="k", max_owed=100)
    await put(broker, model, cost=500, owner="other", max_owed=100)
    await put(broker, model, cost=500, owner="k")


async def test_saved_rows_come_back_with_the_next_delivery(broker, model, server_url):
    sent = await put(broker, model, 3)
    first = await take_one(broker, model)
    assert first.states == {}
    assert await broker.checkpoint(model, first, {0: b"old", 2: b"\x00\xff"}, 5, 30, TTL_S)
    assert await broker.checkpoint(model, first, {0: b"new"}, 8, 30, TTL_S)
    status = await broker.status(model, sent.id)
    assert (status.done, status.of) == (8, 30)
    second = await take_one(broker, model, "v", 0)
    assert (second.states, second.deliveries) == ({0: b"new", 2: b"\x00\xff"}, 2)
    assert not await broker.checkpoint(model, first, {0: b"stale"}, 9, 30, TTL_S)
    third = await take_one(broker, model, "w", 0)
    assert third.states == {0: b"new", 2: b"\x00\xff"}
    await broker.finish(model, third, ok(third), TTL_S)
    async with Redis.from_url(server_url) as redis:
        assert not await redis.exists(keys.checkpoint(model, sent.id))


async def test_many_large_states_are_kept(broker, model):
    await put(broker, model)
    delivery = await take_one(broker, model)
    states = {i: bytes([i % 256]) * 1000 for i in range(6000)}
    assert await broker.checkpoint(model, delivery, states, 1, 2, TTL_S)
    assert (await take_one(broker, model, "v", 0)).states == states


async def test_a_huge_payload_goes_round(broker, model):
    work = ClassifyWork(model=model, images=(b"x" * 30_000_000,), method="single", top_k=1)
    sent = ClassifyJob(id=new_id(model), cost=1, work=work)
    await broker.submit(sent, Terms(1, 30_000, 100))
    delivery = await take_one(broker, model)
    assert delivery.job == sent
    big = Result(sent.id, "failed", failure=Failure("job_failed", "y" * 30_000_000))
    assert (await broker.finish(model, delivery, big, TTL_S)).gateways == ()
    assert await broker.result(model, sent.id) == big


async def test_a_lease_handed_back_is_taken_at_once_and_not_counted(broker, model):
    sent = await put(broker, model)
    first = await take_one(broker, model)
    await broker.checkpoint(model, first, {0: b"s"}, 5, 10, TTL_S)
    assert not await broker.release(model, "v", first)
    assert await broker.release(model, "w", first)
    assert await broker.release(model, "w", first)
    assert (await broker.status(model, sent.id)).state == "queued"
    assert not await broker.checkpoint(model, first, {0: b"late"}, 6, 10, TTL_S)
    again = await take_one(broker, model, "v")
    assert (again.deliveries, again.states) == (1, {0: b"s"})
    assert not await broker.release(model, "w", first)
    assert await broker.heartbeat(model, "w", [first.entry]) == [first.entry]


async def test_an_attempt_that_is_over_hands_nothing_back(broker, model):
    await put(broker, model)
    first = await take_one(broker, model)
    second = await take_one(broker, model, "w", 0)
    assert not await broker.release(model, "w", first)
    assert (await broker.take(model, "v", 4, 4, LONG)).deliveries == []
    assert await broker.release(model, "w", second)
    assert (await take_one(broker, model, "v")).deliveries == 2


async def test_hand_backs_do_not_bury(broker, model):
    await put(broker, model)
    for _ in range(6):
        delivery = await take_one(broker, model, max_deliveries=2)
        assert (delivery.deliveries, delivery.solo) == (1, False)
        await broker.release(model, "w", delivery)


async def test_events_tell_the_story_in_order(broker, model):
    sent = await put(broker, model, events=True)
    assert [event.name for event in await broker.events(model, sent.id)] == ["queued"]
    first = await take_one(broker, model)
    assert first.events
    await broker.checkpoint(model, first, {}, 1, 4, TTL_S, b'{"done": 1}', b"\x89PNG")
    again = await take_one(broker, model, "v", 0)
    await broker.checkpoint(model, first, {}, 3, 4, TTL_S, b"stale", b"stale")
    await broker.checkpoint(model, again, {}, 2, 4, TTL_S, b'{"done": 2}')
    await broker.finish(model, again, ok(again), TTL_S)
    story = await broker.events(model, sent.id)
    assert [(event.name, event.data) for event in story] == [
        ("queued", b""),
        ("started", b""),
        ("progress", b'{"done": 1}'),
        ("preview", b""),
        ("started", b""),
        ("progress", b'{"done": 2}'),
        ("completed", b"ok"),
    ]
    assert await broker.events(model, sent.id, story[4].id) == story[5:]
    assert await broker.events(model, sent.id, story[-1].id, 1) == []


async def test_of_previews_only_the_newest_is_kept_and_only_until_the_end(broker, model, server_url):
    sent = await put(broker, model, events=True)
    delivery = await take_one(broker, model)
    assert await broker.preview(model, sent.id) == b""
    for i in range(50):
        await broker.checkpoint(model, delivery, {}, i, 50, TTL_S, b"p", bytes([i]) * 100_000)
    assert await broker.preview(model, sent.id) == bytes([49]) * 100_000
    async with Redis.from_url(server_url) as redis:
        assert await redis.memory_usage(keys.events(model, sent.id), samples=0) < 50_000
        assert 0 < await redis.ttl(keys.preview(model, sent.id)) <= TTL_S
        await broker.finish(model, delivery, ok(delivery), TTL_S)
        assert not await redis.exists(keys.preview(model, sent.id))


async def test_a_job_that_nobody_follows_leaves_no_events(broker, model, server_url):
    await put(broker, model)
    delivery = await take_one(broker, model)
    assert not delivery.events
    await broker.checkpoint(model, delivery, {}, 1, 4, TTL_S, b"progress", b"preview")
    async with Redis.from_url(server_url) as redis:
        assert not await redis.exists(keys.events(model, delivery.job.id), keys.preview(model, delivery.job.id))


async def test_followers_hear_of_news_while_they_wait(broker, model):
    sent = await put(broker, model, events=True)
    [queued] = await broker.events(model, sent.id)
    waiting = asyncio.create_task(broker.events(model, sent.id, queued.id))
    await asyncio.sleep(0.05)
    await broker.cancel(model, sent.id, TTL_S)
    assert [(event.name, event.data) for event in await waiting] == [("completed", b"cancelled")]


async def test_a_webhook_is_due_once_at_a_time_until_it_is_over(broker, model, server_url):
    sent = await put(broker, model, webhook="https://x/")
    assert await broker.due_hooks(model, LONG) == []
    await broker.cancel(model, sent.id, TTL_S)
    [hook] = await broker.due_hooks(model, 1)
    assert (hook.id, hook.url, hook.outcome, hook.tries) == (sent.id, "https://x/", "cancelled", 1)
    await asyncio.sleep(0.01)
    assert [again.tries for again in await broker.due_hooks(model, LONG)] == [2]
    assert await broker.due_hooks(model, LONG) == []
    await broker.hook_again(model, sent.id, 0)
    assert [again.tries for again in await broker.due_hooks(model, LONG)] == [3]
    await broker.hook_again(model, sent.id, 60_000)
    assert await broker.due_hooks(model, LONG) == []
    await broker.hook_over(model, sent.id)
    await broker.hook_again(model, sent.id, 0)
    assert await broker.due_hooks(model, LONG) == []
    async with Redis.from_url(server_url) as redis:
        assert not await redis.exists(keys.hooks(model), keys.hook(model, sent.id))


async def test_due_hooks_come_in_portions(broker, model):
    for _ in range(5):
        await broker.cancel(model, (await put(broker, model, webhook="https://x/")).id, TTL_S)
    portions = [await broker.due_hooks(model, LONG, 2) for _ in range(4)]
    assert [len(portion) for portion in portions] == [2, 2, 1, 0]
    assert len({hook.id for portion in portions for hook in portion}) == 5


async def test_an_idempotency_key_stands_for_one_request(broker, model, server_url):
    key = f"d-{model}"
    await broker.remember(key, "body 1", 60)
    await broker.remember(key, "body 1", 60)
    with pytest.raises(IdempotencyConflict, match="new key") as refused:
        await broker.remember(key, "body 2", 60)
    assert refused.value.field == "Idempotency-Key"
    async with Redis.from_url(server_url) as redis:
        assert 0 < await redis.ttl(keys.idempotency(key)) <= 60
        await redis.delete(keys.idempotency(key))
    await broker.remember(key, "body 2", 60)


async def test_a_token_bucket_fills_again(broker, model, server_url):
    async with Redis.from_url(server_url) as redis:
        for _ in range(3):
            await broker.allow(model, 0.01, 3)
        with pytest.raises(RateLimited) as refused:
            await broker.allow(model, 0.01, 3)
        assert 90 <= refused.value.retry_after_s <= 100
        await broker.allow(f"{model}-other", 0.01, 3)
        earlier = float(await redis.hget(keys.bucket(model), "at")) - 100_000
        await redis.hset(keys.bucket(model), "at", earlier)
        await broker.allow(model, 0.01, 3)
        with pytest.raises(RateLimited):
            await broker.allow(model, 0.01, 3)
        later = float(await redis.hget(keys.bucket(model), "at")) + 3_600_000
        await redis.hset(keys.bucket(model), "at", later)
        with pytest.raises(RateLimited) as refused:
            await broker.allow(model, 0.01, 3)
        assert refused.value.retry_after_s <= 100
        assert 0 < await redis.pttl(keys.bucket(model)) <= 301_000


async def test_a_bucket_is_no_larger_than_its_burst(broker, model, server_url):
    await broker.allow(model, 1000.0, 2)
    async with Redis.from_url(server_url) as redis:
        await redis.hset(keys.bucket(model), "at", 0)
        await broker.allow(model, 1e-3, 2)
        assert float(await redis.hget(keys.bucket(model), "tokens")) == 1


def test_a_job_id_names_its_model():
    assert model_of(new_id("a.b-c")) == "a.b-c"
    assert model_of("no-model") == ""
    assert new_id("m") != new_id("m")


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({"redis_version": "6.0.16"}, "6.0.16; Redis >= 6.2"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.0"}, "Valkey >= 7.2"),
        ({"redis_version": "7.0.15", "maxmemory_policy": "allkeys-lfu", "maxmemory": 0}, "set it to noeviction"),
    ],
)
def test_servers_that_would_lose_work_are_refused(seen, said):
    with pytest.raises(Unavailable, match=said):
        refuse_unfit(seen)
    refuse_unfit({"redis_version": "6.2.0", "maxmemory_policy": "noeviction"})


async def test_a_server_without_a_needed_command_is_refused(tmp_path):
    with running(system_redis(), tmp_path, "--rename-command", "xautoclaim", "") as url:
        poor = Broker(url)
        with pytest.raises(Unavailable, match="lacks XAUTOCLAIM"):
            await poor.check()
        await poor.aclose()


@pytest.mark.parametrize("code", ["OOM", "READONLY", "MISCONF"])
def test_an_outage_within_a_script_of_redis_6_is_known_for_one(code):
    said = f"Error running script (call to f_0): @user_script:107: @user_script: 107: -{code} command not allowed"
    assert is_outage(ResponseError(said))
    assert not is_outage(ResponseError(said.replace(f"-{code}", "-WRONGTYPE")))
