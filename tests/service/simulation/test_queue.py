"""The simulated queue decides as the scripts do, on a real server."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import uuid4

from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from models.api import GenerateWork, Priority
from service.broker import keys
from service.broker.store import ALIVE_MS, SCRIPTS
from service.simulation.queue import Entry, SimQueue

CAPACITY, MOST = 6, 3000
rank = st.sampled_from(keys.RANKS)
limits = st.sampled_from([0.7, 0.95, 1.2])
submits = st.tuples(st.just("submit"), st.integers(1, 8), st.integers(1, 900), st.integers(200, 60_000), rank, limits)
takes = st.tuples(st.just("take"), st.integers(0, CAPACITY))
rates = st.lists(st.one_of(st.just(0.0), st.floats(0.01, 5000)), min_size=1, max_size=3)
announces = st.tuples(st.just("announce"), rates)
finishes = st.tuples(st.just("finish"))


def entry(number: int, rows: int, cost: int, budget_ms: int, rank: Priority, now_ms: int = 0) -> Entry:
    work = GenerateWork(
        model="m", labels=(0,) * rows, seeds=(0,) * rows, steps=1, solver="ddim", guidance=1.0, gear="full"
    )
    return Entry(number, work, cost, now_ms, now_ms + budget_ms, rank)


@dataclass
class Pair:
    """A server's queue and a simulated one that are told the same."""

    redis: Redis
    model: str = field(default_factory=lambda: f"sim-{uuid4().hex[:8]}")
    queue: SimQueue = field(default_factory=lambda: SimQueue(MOST))
    held: dict[int, tuple[Entry, list[bytes]]] = field(default_factory=dict)
    number: int = 0

    def run(self, script: str, *args: object) -> list:
        return self.redis.eval(SCRIPTS[script].text, 1, keys.prefix(self.model), *args)

    def announce(self, pressed: list[float]) -> None:
        now, self.queue.pressed = int(self.redis.time()[0]) * 1000, {}
        self.redis.delete(keys.workers(self.model), keys.pressed(self.model))
        for worker, rate in enumerate(pressed):
            self.redis.zadd(keys.workers(self.model), {f"w{worker}": now})
            self.redis.hset(keys.pressed(self.model), f"w{worker}", f"{rate:.6g}")
            self.queue.announce(worker, rate)

    def submit(self, rows: int, cost: int, budget_ms: int, rank: Priority, limit: float) -> None:
        self.number += 1
        said = self.run(
            *("submit", self.number, b"payload", rows, cost, budget_ms, MOST),
            *(rank, "", 0, "", "", "", ALIVE_MS, 0, limit),
        )
        verdict, foreseen_ms = self.queue.submit(entry(self.number, rows, cost, budget_ms, rank), limit)
        assert said[0].decode() == verdict
        assert said[4] == int(foreseen_ms) or verdict == "full"

    def take(self, free: int) -> None:
        full, _, jobs, ended, (backlog, asked, _) = self.run(
            "take", "w0", free, CAPACITY, 60_000, "t", 5, 60, 0, ALIVE_MS
        )
        taken = self.queue.take(0, free, CAPACITY)
        assert [int(job[0]) for job in jobs] == [one.number for one in taken.jobs]
        assert (bool(full), ended) == (taken.full, [])
        assert (backlog, asked) == (sum(self.queue.backlog.values()), self.queue.asked)
        self.held |= {one.number: (one, job) for one, job in zip(taken.jobs, jobs, strict=True)}

    def finish(self) -> None:
        if self.held:
            number = min(self.held)
            one, job = self.held.pop(number)
            self.run("finish", number, job[1], "ok", b"result", 60, job[4])
            self.queue.close(one)


@settings(max_examples=60)
@given(st.lists(st.one_of(submits, submits, submits, takes, announces, finishes), max_size=40))
def test_the_same_verdicts_and_the_same_order_as_the_scripts(valkey_url, steps):
    with Redis.from_url(valkey_url) as redis:
        pair = Pair(redis)
        for name in keys.RANKS:
            redis.xgroup_create(keys.queue(pair.model, name), keys.GROUP, id="0", mkstream=True)
        pair.announce([0.0])
        for verb, *args in steps:
            getattr(pair, verb)(*args)
        pair.take(CAPACITY)


def test_late_is_what_waits_too_long_at_the_announced_rates():
    queue = SimQueue(10_000)
    queue.announce(0, 100.0)
    assert queue.submit(entry(1, 1, 50, 1, "normal"))[0] == "accepted", "nothing ahead"
    assert queue.submit(entry(2, 1, 50, 1000, "normal"))[0] == "late"
    assert queue.submit(entry(3, 1, 50, 1500, "normal"))[0] == "accepted"
    assert queue.submit(entry(4, 1, 9950, 10_000_000, "normal"))[0] == "full"
    queue.announce(1, 0.0)
    assert queue.submit(entry(5, 1, 50, 1, "normal"))[0] == "accepted", "a worker has room"
    assert queue.submit(entry(6, 1, 50, 1, "normal"))[0] == "accepted"
    queue.announce(1, 100.0)
    assert queue.submit(entry(7, 1, 5000, 1000, "normal"))[0] == "late"
    assert queue.asked == 50 * 5 + 9950, "not what takes too long on an idle service"


def test_what_is_out_of_time_ends_on_the_way_and_pays_back():
    queue = SimQueue(10_000)
    for number, budget_ms in enumerate((10, 1000, 20)):
        queue.submit(entry(number, 1, 50, budget_ms, "normal"))
    taken = queue.take(15, 4, 4)
    assert [one.number for one in taken.ended] == [0]
    assert [one.number for one in taken.jobs] == [1, 2]
    assert queue.backlog["normal"] == 100
    queue.submit(entry(3, 1, 50, 10, "low"))
    assert [one.number for one in queue.expire(10)] == [3]
    assert (len(queue), queue.backlog["low"]) == (0, 0)
