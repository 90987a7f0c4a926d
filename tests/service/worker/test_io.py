"""The io thread with a real broker: everything between a submitted job and its result key."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from service.broker.embedded import Embedded
from service.broker.redis_streams import Broker
from service.config import Settings
from service.metrics import WorkerMetrics
from service.protocol import Delivery, Job, Result, Terms
from service.worker import lane as lane_module
from service.worker.engine import Engine
from service.worker.io import WorkerIO
from service.worker.lane import Lane
from service.worker.main import loop
from service.worker.quarantine import Quarantine
from service.worker.shadow import Shadow
from tests.service.worker.toy import BAD_PIXELS, ToyClassify, ToyGenerate, pixels
from tests.service.worker.work import GATEWAY, draw, judge

PATIENCE_S = 30.0


@pytest.fixture
async def broker(valkey_url: str) -> AsyncIterator[Broker]:
    made = Broker(valkey_url)
    yield made
    await made.aclose()


@pytest.fixture
def model() -> str:
    """A model nobody else uses."""
    return f"toy-{uuid4().hex[:8]}"


@contextmanager
def serving(url: str, *tasks: Any, drain: bool = True, **settings: Any) -> Iterator[SimpleNamespace]:
    """A worker's threads inside this process; drained at the end."""
    metrics, wake = WorkerMetrics(), threading.Event()
    for task in tasks:
        metrics.declare(task.info, "cpu")
    engines = [Engine(task, metrics) for task in tasks]
    name = f"worker-{uuid4().hex[:6]}"
    io = WorkerIO(url, name, engines, Settings(redis_url=url, **settings), metrics, wake.set)
    stop = SimpleNamespace(asked=False)
    shadow = Shadow(engines, metrics, share=1.0)
    ticking = threading.Thread(target=loop, args=(engines, io, stop, wake, shadow), daemon=True)
    io.start()
    ticking.start()
    yield SimpleNamespace(io=io, metrics=metrics, name=name)
    stop.asked = True
    ticking.join(PATIENCE_S)
    assert not ticking.is_alive()
    assert io.error is None


async def until(what: str, look: Callable[[], Any]) -> Any:
    """The first truthy answer of the coroutine function `look`."""
    end = time.monotonic() + PATIENCE_S
    while True:
        if found := await look():
            return found
        assert time.monotonic() < end, what
        await asyncio.sleep(0.02)


async def submit(broker: Broker, job: Job, budget_ms: int = 60_000) -> Job:
    await broker.submit(job, Terms(job.work.rows, budget_ms, 10**9, reply_to=GATEWAY))
    return job


async def answer(broker: Broker, job: Job) -> Result:
    result = await until(f"result of {job.id}", lambda: broker.result(job.work.model, job.id))
    assert isinstance(result, Result)
    return result


async def test_what_is_taken_together_enters_together(broker: Broker, valkey_url: str, model: str) -> None:
    task = ToyGenerate(model, capacity=8)
    jobs = [await submit(broker, draw(model=model, seed=n)) for n in range(8)]
    with serving(valkey_url, task):
        for job in jobs:
            await answer(broker, job)
    assert len(task.batches[0]) == 8


async def test_what_follows_is_taken_before_the_tick_ends_that_makes_room(
    broker: Broker, valkey_url: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, offer = [], Engine.offer

    def watched(engine: Engine, *deliveries: Delivery) -> None:
        ahead.append(engine._began is not None)
        offer(engine, *deliveries)

    monkeypatch.setattr(Engine, "offer", watched)
    monkeypatch.setattr(lane_module, "LEAD_S", 0.04)
    jobs = [await submit(broker, draw(model=model, steps=1, seed=n)) for n in range(10)]
    with serving(valkey_url, ToyGenerate(model, capacity=1, step_s=0.06)):
        for job in jobs:
            await answer(broker, job)
    assert len(ahead) == 10
    assert any(ahead)


async def test_mixed_jobs_are_each_answered_once(broker: Broker, valkey_url: str, model: str) -> None:
    rng = random.Random(2)
    jobs = [draw(rng.randint(1, 6), rng.randint(1, 7), seed=100 * i, model=model) for i in range(32)]
    task = ToyGenerate(model, capacity=4, step_s=0.001)
    for job in jobs[:16]:
        await submit(broker, job)
    with serving(valkey_url, task) as worker:
        for job in jobs[16:]:
            await submit(broker, job)
        for job in jobs:
            result = await answer(broker, job)
            assert result.outcome == "ok"
            assert result.worker == worker.name
            assert [image.seed for image in result.images] == list(job.work.seeds)
            for image in result.images:
                assert pixels(image.seed, job.work.steps).tobytes() in image.data
    stats = await broker.queue_stats(model)
    assert stats.ledger == {"accepted": 32, "ok": 32}
    assert (stats.jobs, stats.backlog, stats.workers) == (0, 0, 0)
    assert len(task.evaluated) == sum(job.work.rows * job.work.steps for job in jobs)
    assert len(set(task.evaluated)) == len(task.evaluated)
    woken: list[str] = []
    after = "0"
    while len(set(woken) & {job.id for job in jobs}) < 32:
        entries, after = await broker.replies(GATEWAY, after)
        assert entries
        woken += [job_id for job_id, _ in entries]


async def test_two_models_are_announced_and_served_at_once(broker: Broker, valkey_url: str, model: str) -> None:
    other = f"{model}-judge"
    with serving(valkey_url, ToyGenerate(model), ToyClassify(other)) as worker:
        await until("both announced", lambda: broker.live_workers(other))
        assert {model, other} <= set(await broker.catalogue())
        drawn, judged = await submit(broker, draw(model=model)), await submit(broker, judge(model=other))
        assert (await answer(broker, judged)).predictions[0].probabilities == (0.0, 1.0)
        assert (await answer(broker, drawn)).outcome == "ok"
    assert await broker.live_workers(model) == 0
    count = worker.metrics.registry.get_sample_value("offramp_jobs_total", {"model": other, "outcome": "ok"})
    assert count == 1


async def test_drain_rate_is_published(broker: Broker, valkey_url: str, model: str) -> None:
    with serving(valkey_url, ToyGenerate(model, step_s=0.002)):
        await answer(broker, await submit(broker, draw(rows=4, steps=5, model=model)))

        async def rate() -> bool:
            rates = await broker._redis.hvals(f"offramp:{{m:{model}}}:rates")
            return any(float(rate) > 0 for rate in rates)

        await until("a drain rate", rate)


async def test_job_larger_than_the_pool_completes(broker: Broker, valkey_url: str, model: str) -> None:
    with serving(valkey_url, ToyGenerate(model, capacity=3)):
        small, large = await submit(broker, draw(model=model)), await submit(broker, draw(rows=11, seed=5, model=model))
        assert len((await answer(broker, large)).images) == 11
        assert len((await answer(broker, small)).images) == 1


async def test_expired_job_costs_no_step(broker: Broker, valkey_url: str, model: str) -> None:
    task = ToyGenerate(model)
    late = await submit(broker, draw(model=model), budget_ms=1)
    await asyncio.sleep(0.01)
    with serving(valkey_url, task) as worker:
        result = await answer(broker, late)
    assert result.outcome == "expired"
    count = worker.metrics.registry.get_sample_value
    assert count("offramp_deadline_missed_total", {"model": model, "when": "waiting"}) == 1
    assert result.failure is not None
    assert result.failure.code == "deadline_exceeded"
    assert task.evaluated == []
    assert (await broker.queue_stats(model)).ledger == {"accepted": 1, "expired": 1}


async def test_answer_that_cannot_be_encoded_fails_its_job_only(broker: Broker, valkey_url: str, model: str) -> None:
    with serving(valkey_url, ToyGenerate(model)):
        bad = await submit(broker, draw(label=BAD_PIXELS, model=model))
        good = await submit(broker, draw(model=model))
        failure = (await answer(broker, bad)).failure
        assert failure is not None
        assert failure.code == "job_failed"
        assert (await answer(broker, good)).outcome == "ok"


async def test_job_delivered_too_often_is_given_up(broker: Broker, valkey_url: str, model: str) -> None:
    await broker.ensure(model)
    job = await submit(broker, draw(model=model))
    assert (await broker.take(model, "gone", 4, 4, 1000)).deliveries
    task = ToyGenerate(model)
    with serving(valkey_url, task, lease_s=1.0, max_deliveries=1):
        result = await answer(broker, job)
    assert result.outcome == "dead"
    assert result.failure is not None
    assert "1 deliveries" in result.failure.message
    assert task.evaluated == []
    assert (await broker.queue_stats(model)).ledger == {"accepted": 1, "dead": 1}
    assert [letter.id async for letter in broker.letters(model)] == [job.id]


async def test_drain_finishes_what_was_taken_and_leaves_the_rest(broker: Broker, valkey_url: str, model: str) -> None:
    task = ToyGenerate(model, capacity=1, step_s=0.01)
    first, second = [await submit(broker, draw(steps=20, seed=seed, model=model)) for seed in (0, 1)]
    with serving(valkey_url, task):

        async def begun() -> bool:
            return bool(task.evaluated)

        await until("first evaluation", begun)
    assert (await answer(broker, first)).outcome == "ok"
    assert await broker.result(model, second.id) is None
    assert {seed for seed, _ in task.evaluated} == {0}


async def test_server_that_is_killed_and_comes_back_loses_nothing(tmp_path: Path, model: str) -> None:
    server = Embedded(tmp_path)
    server.start()
    broker = Broker(server.url)
    try:
        with serving(server.url, ToyGenerate(model, step_s=0.05)):
            await until("announced", lambda: broker.live_workers(model))
            job = await submit(broker, draw(steps=20, model=model))
            await asyncio.sleep(1.2)  # appendfsync everysec
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.sleep(0.3)
            assert not server.alive()
            server.start()
            assert (await answer(broker, job)).outcome == "ok"
            await broker._redis.flushall()
            await until("announced again", lambda: broker.live_workers(model))
            assert (await answer(broker, await submit(broker, draw(model=model)))).outcome == "ok"
    finally:
        await broker.aclose()
        server.stop()


@asynccontextmanager
async def hand_cranked(broker: Broker, task: ToyGenerate, lease_s: float = 1.0) -> AsyncIterator[SimpleNamespace]:
    """A lane whose engine ticks only when the test says so."""
    metrics = WorkerMetrics()
    metrics.declare(task.info, "cpu")
    engine = Engine(task, metrics)
    running: set[asyncio.Task[None]] = set()

    def spawn(work: Any) -> None:
        running.add(asyncio.create_task(work))

    lane = Lane(engine, broker, "cranked", Settings(lease_s=lease_s), metrics, lambda: None, spawn, Quarantine())
    spawn(lane.take())
    spawn(lane.beat())
    yield SimpleNamespace(engine=engine, lane=lane, running=running)
    for one in running:
        one.cancel()
    await asyncio.wait(running)


async def test_hung_engine_loses_its_lease_and_drops_the_job(broker: Broker, valkey_url: str, model: str) -> None:
    job = await submit(broker, draw(steps=1, model=model))
    other = Broker(valkey_url)
    async with hand_cranked(broker, ToyGenerate(model)) as worker:

        async def held() -> bool:
            return bool(worker.lane.hand)

        async def stolen() -> Any:
            return (await other.take(model, "second", 4, 4, 1000)).deliveries

        await until("taken", held)
        [again] = await until("redelivered to another worker", stolen)
        assert (again.job.id, again.deliveries) == (job.id, 2)
        assert worker.lane.stalled
        await until("lease seen lost", lambda: _tick_without_finishing(worker))
        count = worker.engine._metrics.registry.get_sample_value
        assert count("offramp_leases_lost_total", {"model": model}) == 1
        worker.engine.tick()
        assert worker.engine.idle()
        assert await broker.result(model, job.id) is None
    await other.aclose()


async def _tick_without_finishing(worker: SimpleNamespace) -> bool:
    """Progress without stepping the job to its end: count ticks as a live engine does."""
    worker.engine.ticks += 1
    return not worker.lane.hand


async def test_heartbeat_keeps_the_lease_of_an_engine_that_ticks(broker: Broker, valkey_url: str, model: str) -> None:
    await submit(broker, draw(steps=10_000, model=model))
    other = Broker(valkey_url)
    async with hand_cranked(broker, ToyGenerate(model)) as worker:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            worker.engine.tick()
            if worker.lane.hand:
                assert not (await other.take(model, "second", 4, 4, 1000)).deliveries
            await asyncio.sleep(0.02)
        assert worker.lane.hand
    await other.aclose()


async def test_lapsed_leases_are_not_looked_for_at_every_take(
    broker: Broker, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []
    real = broker.take

    async def take(*args: Any) -> Any:
        looked.append(args[-1])
        return await real(*args)

    monkeypatch.setattr(broker, "take", take)
    monkeypatch.setattr(lane_module, "RECLAIM_S", 1000.0)
    async with hand_cranked(broker, ToyGenerate(model), lease_s=100.0) as worker:
        for held in range(1, 4):
            await submit(broker, draw(steps=1000, model=model))
            await until("taken", lambda held=held: _holds(worker, held))  # type: ignore[misc]
        worker.lane.ready = False  # as after an outage
        await submit(broker, draw(steps=1000, model=model))
        await until("taken", lambda: _holds(worker, 4))
    assert looked[0]
    assert looked.count(True) == 2
    assert looked.count(False) >= 2


async def _holds(worker: SimpleNamespace, jobs: int) -> bool:
    return len(worker.lane.hand) == jobs


async def test_result_is_written_in_npy_as_asked(broker: Broker, valkey_url: str, model: str) -> None:
    with serving(valkey_url, ToyGenerate(model)):
        result = await answer(broker, await submit(broker, draw(seed=4, steps=2, model=model)))
    header = np.lib.format.magic(1, 0)
    assert result.images[0].data.startswith(header)
    assert (result.images[0].label, result.images[0].seed) == (0, 4)


async def test_a_cancelled_job_leaves_within_a_tick_and_its_answer_is_not_heard(
    broker: Broker, valkey_url: str, model: str
) -> None:
    task = ToyGenerate(model, capacity=1, step_s=0.01)
    with serving(valkey_url, task):
        job = await submit(broker, draw(steps=10_000, model=model))

        async def begun() -> bool:
            return bool(task.evaluated)

        await until("first evaluation", begun)
        assert await broker.cancel(model, job.id, 60)
        following = await submit(broker, draw(seed=7, model=model))
        assert (await answer(broker, following)).outcome == "ok"
    assert len(task.evaluated) < 5_000
    assert (await answer(broker, job)).outcome == "cancelled"
    assert (await broker.queue_stats(model)).ledger == {"accepted": 2, "cancelled": 1, "ok": 1}
    assert not await broker.cancel(model, job.id, 60)


async def test_a_drained_worker_hands_its_rows_on_and_none_is_run_twice(
    broker: Broker, valkey_url: str, model: str
) -> None:
    first, second = ToyGenerate(model, capacity=2, step_s=0.01), ToyGenerate(model, capacity=2)
    job = await submit(broker, draw(rows=2, steps=200, model=model))
    with serving(valkey_url, first, drain_s=0.1):

        async def begun() -> bool:
            return len(first.evaluated) > 20

        await until("some evaluations", begun)
    assert await broker.result(model, job.id) is None
    with serving(valkey_url, second):
        result = await answer(broker, job)
    assert [pixels(i, 200).tobytes() in image.data for i, image in enumerate(result.images)] == [True, True]
    assert len(first.evaluated) + len(second.evaluated) == 400
    assert len(set(first.evaluated) | set(second.evaluated)) == 400


async def test_what_a_dead_worker_saved_is_not_run_again(broker: Broker, valkey_url: str, model: str) -> None:
    await broker.ensure(model)
    job = await submit(broker, draw(rows=1, steps=50, model=model))
    dead = ToyGenerate(model)
    [delivery] = (await broker.take(model, "dead", 4, 4, 1000)).deliveries
    dead.admit(delivery.job.work, [0], [0])
    for _ in range(30):
        dead.step([0])
    assert await broker.checkpoint(model, delivery, dict(enumerate(dead.save([0]))), 30, 50, 60)
    task = ToyGenerate(model)
    with serving(valkey_url, task, lease_s=1.0):
        assert pixels(0, 50).tobytes() in (await answer(broker, job)).images[0].data
    assert [evaluation for _, evaluation in task.evaluated] == list(range(30, 50))


async def test_a_job_that_may_kill_runs_with_nothing_beside_it(broker: Broker, valkey_url: str, model: str) -> None:
    other = f"{model}-other"
    suspect, bystander = ToyGenerate(model, step_s=0.002), ToyGenerate(other, step_s=0.002)
    await broker.ensure(model)
    killer = await submit(broker, draw(steps=40, model=model))
    for _ in range(2):
        assert (await broker.take(model, "gone", 4, 4, 0)).deliveries
    with serving(valkey_url, suspect, bystander, lease_s=1.0):
        jobs = [await submit(broker, draw(steps=30, seed=seed, model=other)) for seed in range(12)]

        async def begun() -> bool:
            return bool(suspect.evaluated)

        await until("the suspect runs", begun)
        before = len(bystander.evaluated)
        await until("the suspect is half way", lambda: asyncio.sleep(0, len(suspect.evaluated) >= 20))
        assert len(bystander.evaluated) == before
        for job in [killer, *jobs]:
            assert (await answer(broker, job)).outcome == "ok"
