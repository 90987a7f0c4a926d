"""The protocol against a model of it: random histories on a real server, and what must hold after every step.

`OFFRAMP_TEST_EXAMPLES` sets how many histories each server gets (the long form of `make chaos`).
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import msgspec
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from models.api import Priority
from service.broker import keys
from service.broker.redis_streams import Broker
from service.errors import QueueFull, QuotaExceeded
from service.protocol import ClassifyJob, Delivery, Failure, Result, Terms
from tests.service.broker.jobs import LONG, TTL_S, job, ok

EXAMPLES = int(os.environ.get("OFFRAMP_TEST_EXAMPLES", "60"))
STEPS, MOST, MAX_BACKLOG, MAX_OWED, SOLO = 50, 4, 60, 25, 2
CAPACITY = 4
HISTORIES = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
workers = st.sampled_from(["w1", "w2"])


@dataclass
class Known:
    """What the model knows of an accepted job."""

    job: ClassifyJob
    rank: Priority
    owner: str
    outcome: str | None = None
    result: Result | None = None
    finished_by: str | None = None
    deliveries: int = 0
    attempt: str | None = None
    worker: str | None = None
    running: bool = False
    states: dict[int, bytes] = field(default_factory=dict)
    doomed: bool = False


class Protocol(RuleBasedStateMachine):
    """One example: a model of its own on a server, kept beside `Known` jobs."""

    loop: asyncio.AbstractEventLoop
    broker: Broker
    redis: Redis
    deliveries = Bundle("deliveries")

    def __init__(self) -> None:
        super().__init__()
        self.model = f"h-{uuid4().hex[:12]}"
        self.jobs: dict[str, Known] = {}
        self.do(self.broker.ensure(self.model))

    def do(self, call: Any) -> Any:
        return self.loop.run_until_complete(call)

    def open(self) -> list[Known]:
        return [one for one in self.jobs.values() if one.outcome is None]

    def ended(self, known: Known, outcome: str) -> None:
        assert known.outcome is None, f"{known.job.id} ended twice: {known.outcome}, {outcome}"
        known.outcome, known.running = outcome, False

    # rules

    @rule(
        rows=st.sampled_from([1, 1, 1, 2, 3, 6]),
        cost=st.integers(0, 20),
        rank=st.sampled_from(keys.RANKS),
        owner=st.sampled_from(["", "k1", "k2"]),
        doomed=st.sampled_from([False] * 7 + [True]),
    )
    def submit(self, rows: int, cost: int, rank: Priority, owner: str, doomed: bool) -> None:
        sent = msgspec.structs.replace(job(self.model, rows, cost), id=f"{self.model}.{len(self.jobs)}")
        budget_ms = 0 if doomed else 600_000
        backlog = sum(one.job.cost for one in self.open())
        owed = sum(one.job.cost for one in self.open() if one.owner == owner)
        terms = Terms(rows, budget_ms, MAX_BACKLOG, priority=rank, owner=owner, max_owed=MAX_OWED if owner else 0)
        try:
            assert not self.do(self.broker.submit(sent, terms)).attached
        except QuotaExceeded:
            assert owner
            assert owed > 0
            assert owed + cost > MAX_OWED
        except QueueFull:
            assert backlog > 0
            assert backlog + cost > MAX_BACKLOG
        else:
            assert backlog == 0 or backlog + cost <= MAX_BACKLOG
            assert not owner or owed == 0 or owed + cost <= MAX_OWED
            self.jobs[sent.id] = Known(sent, rank, owner, doomed=doomed)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        known = self.jobs[data.draw(st.sampled_from(list(self.jobs)))]
        assert self.do(self.broker.submit(known.job, Terms(known.job.work.rows, 1, 1))).attached

    @rule(target=deliveries, worker=workers, free=st.sampled_from([CAPACITY] * 3 + [0, 1, 3]), lost=st.booleans())
    def take(self, worker: str, free: int, lost: bool) -> Any:
        """`lost`: every lease has run out, whoever held it. A worker that dies is one that is not heard of again."""
        taken = self.do(self.broker.take(self.model, worker, free, CAPACITY, 0 if lost else LONG, MOST, TTL_S))
        for wake, outcome in taken.ended:
            known = self.jobs[wake.id]
            self.ended(known, outcome)
            assert known.doomed if outcome == "expired" else (outcome == "dead" and known.deliveries == MOST)
        solo = [delivery for delivery in taken.deliveries if delivery.solo]
        rows = sum(len(delivery.job.work.images) for delivery in taken.deliveries)
        assert rows <= free or (free == CAPACITY and len(taken.deliveries) == 1)
        assert not solo or free == CAPACITY
        assert len({delivery.job.id for delivery in taken.deliveries}) == len(taken.deliveries)
        for delivery in taken.deliveries:
            known = self.jobs[delivery.job.id]
            assert known.outcome is None
            assert not known.doomed
            assert not known.running or lost
            assert (delivery.job, delivery.states) == (known.job, known.states)
            known.deliveries += 1
            assert delivery.deliveries == known.deliveries <= MOST
            assert delivery.solo == (known.deliveries > SOLO)
            assert delivery.attempt != known.attempt
            known.attempt, known.worker, known.running = delivery.attempt, worker, True
        return multiple(*((worker, delivery) for delivery in taken.deliveries))

    @rule(held=deliveries)
    def heartbeat(self, held: tuple[str, Delivery]) -> None:
        worker, delivery = held
        known = self.jobs[delivery.job.id]
        mine = known.outcome is None and known.worker == worker
        assert self.do(self.broker.heartbeat(self.model, worker, [delivery.entry])) == (
            [] if mine else [delivery.entry]
        )

    @rule(held=deliveries, row=st.integers(0, 5), state=st.binary(max_size=5))
    def checkpoint(self, held: tuple[str, Delivery], row: int, state: bytes) -> None:
        _, delivery = held
        known = self.jobs[delivery.job.id]
        kept = self.do(self.broker.checkpoint(self.model, delivery, {row: state}, 1, 2, TTL_S))
        assert kept == (known.running and known.attempt == delivery.attempt)
        if kept:
            known.states[row] = state

    @rule(held=deliveries)
    def release(self, held: tuple[str, Delivery]) -> None:
        worker, delivery = held
        known = self.jobs[delivery.job.id]
        done = self.do(self.broker.release(self.model, worker, delivery))
        assert done == (known.outcome is None and known.attempt == delivery.attempt)
        if done and known.running:
            known.running = False
            known.deliveries -= 1

    @rule(held=deliveries, outcome=st.sampled_from(["ok", "ok", "failed", "expired"]))
    def finish(self, held: tuple[str, Delivery], outcome: str) -> None:
        """By whoever ever had it, at any time, also again."""
        worker, delivery = held
        known = self.jobs[delivery.job.id]
        result = ok(delivery, worker)
        if outcome != "ok":
            result = Result(delivery.job.id, outcome, failure=Failure("job_failed", worker))
        won = self.do(self.broker.finish(self.model, delivery, result, TTL_S)) is not None
        if known.outcome is None:
            assert won == (outcome == "ok" or delivery.attempt == known.attempt)
            if won:
                self.ended(known, outcome)
                known.result, known.finished_by = result, delivery.attempt
        else:
            assert won == (delivery.attempt == known.finished_by)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        known = self.jobs[data.draw(st.sampled_from(list(self.jobs)))]
        done = self.do(self.broker.cancel(self.model, known.job.id, TTL_S))
        assert done == (known.outcome is None)
        if done:
            self.ended(known, "cancelled")

    @rule(lost=st.booleans())
    def expire(self, lost: bool) -> None:
        """A gateway looks for what is overdue."""
        over = self.do(self.broker.expire(self.model, 0 if lost else LONG, TTL_S, 0))
        assert sorted(over) == sorted(one.job.id for one in self.open() if one.doomed)
        for name in over:
            self.ended(self.jobs[name], "expired")

    # what holds

    @invariant()
    def books_are_right(self) -> None:
        stats, left = self.do(self.broker.queue_stats(self.model)), self.open()
        assert stats.ledger.pop("accepted", 0) == len(self.jobs)
        assert stats.ledger == Counter(one.outcome for one in self.jobs.values() if one.outcome)
        assert stats.jobs == len(left)
        assert stats.letters == stats.ledger.get("dead", 0)
        backlog, owed = (_numbers(self.redis.hgetall(key(self.model))) for key in (keys.backlog, keys.owed))
        assert +backlog == +_sum((one.rank, one.job.cost) for one in left)
        assert owed == +_sum((one.owner, one.job.cost) for one in left if one.owner)

    @invariant()
    def every_job_is_in_one_state(self) -> None:
        entries = {
            fields[b"id"].decode(): rank
            for rank in keys.RANKS
            for _, fields in self.redis.xrange(keys.queue(self.model, rank))
        }
        assert entries == {one.job.id: one.rank for one in self.open()}
        for name, known in self.jobs.items():
            status = self.do(self.broker.status(self.model, name))
            assert status.state == (known.outcome or ("running" if known.running else "queued"))
            result = self.do(self.broker.result(self.model, name))
            if known.outcome is None:
                assert result is None
                continue
            assert result.outcome == known.outcome
            known.result = known.result or result
            assert result == known.result
            assert not self.redis.exists(keys.checkpoint(self.model, name))

    def teardown(self) -> None:
        """Nothing was lost: whatever is left can be taken and finished, and the queue is empty."""
        while self.open():
            taken = self.do(self.broker.take(self.model, "last", CAPACITY, CAPACITY, 0, MOST, TTL_S))
            assert taken.deliveries or taken.ended
            for wake, outcome in taken.ended:
                self.ended(self.jobs[wake.id], outcome)
            for delivery in taken.deliveries:
                assert self.do(self.broker.finish(self.model, delivery, ok(delivery), TTL_S)) is not None
                self.ended(self.jobs[delivery.job.id], "ok")
        self.books_are_right()


def _numbers(found: dict[bytes, bytes]) -> Counter[str]:
    return Counter({key.decode(): int(value) for key, value in found.items()})


def _sum(pairs: Iterable[tuple[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for key, value in pairs:
        total[key] += value
    return total


def test_the_protocol_keeps_its_word(server_url):
    """No job is lost, none ends twice, every result stands, whatever happens in whichever order."""
    broker = Broker(server_url)
    with asyncio.Runner() as runner, Redis.from_url(server_url) as redis:
        here = {"loop": runner.get_loop(), "broker": broker, "redis": redis}
        try:
            run_state_machine_as_test(type("Here", (Protocol,), here), settings=HISTORIES)
        finally:
            runner.run(broker.aclose())
