from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from models.api import ExitSchedule, Gear, ModelInfo, StepStats
from service.metrics import WorkerMetrics
from service.protocol import GenerateJob
from service.worker.engine import Engine, Finished
from service.worker.gears import Queue
from service.worker.warmup import tick_times
from tests.service.worker.test_engine import Clock
from tests.service.worker.toy import DEPTH, FULL, ToyClassify, ToyGenerate
from tests.service.worker.work import delivery, draw, judge

FULL10 = replace(FULL, steps=10)
HALF = Gear("half", ExitSchedule((1.0,), (2,)), "ddim", 10, 1.0)
BLOCK_S = 0.001


class Timed(ToyGenerate):
    """A tick takes BLOCK_S for each block of each row in its gear, on a clock of its own."""

    def __init__(self, clock: Clock, capacity: int = 8) -> None:
        super().__init__(capacity=capacity)
        self.info = replace(self.info, gears=(FULL10, HALF))
        self.clock, self.gear = clock, dict[int, str]()

    def admit(self, work, indices, slots):  # type: ignore[no-untyped-def]
        self.gear |= dict.fromkeys(slots, work.gear)
        return super().admit(work, indices, slots)

    def shift(self, work, slots):  # type: ignore[no-untyped-def]
        super().shift(work, slots)
        self.gear |= dict.fromkeys(slots, work.gear)

    def step(self, slots: Sequence[int]) -> StepStats:
        stats = super().step(slots)
        blocks = sum(DEPTH if self.gear[slot] == "full" else 2 for slot in slots)
        self.clock.now += BLOCK_S * blocks
        return replace(stats, layer_evals=blocks)


def auto(seed: int = 0, ladder: tuple[str, ...] = ("full", "half"), rows: int = 1) -> GenerateJob:
    job = draw(rows=rows, steps=10, seed=seed)
    return GenerateJob(id=job.id, cost=job.cost, work=replace(job.work, ladder=ladder))


def made(clock: Clock, points: Sequence[tuple[float, float]] = ((4, 4.0), (8, 8.0)), **more: bool) -> Engine:
    task, metrics = Timed(clock), WorkerMetrics()
    metrics.declare(task.info, "cpu")
    return Engine(task, metrics, clock, points=points, **more)


def to_the_end(engine: Engine, limit: int = 500) -> dict[str, Finished]:
    over: dict[str, Finished] = {}
    for _ in range(limit):
        over |= {done.delivery.job.id: done for done in engine.tick().finished}
        if engine.idle():
            return over
    raise AssertionError("never idle")


def test_alone_auto_is_the_best() -> None:
    engine, job = made(Clock()), auto()
    engine.offer(delivery(job, budget_ms=200))
    done = to_the_end(engine)[job.id]
    assert (done.receipt["gear"], done.receipt["requested"], done.receipt["downgraded"]) == ("full", "auto", False)
    assert "why" not in done.receipt


@pytest.mark.parametrize("budget_ms", [60, 79, 200])
def test_a_job_that_is_its_own_backlog_is_no_load(budget_ms: int) -> None:
    engine, job = made(Clock()), auto()
    engine.gears.queue = Queue(backlog=job.cost, asked=job.cost)
    engine.offer(delivery(job, budget_ms=budget_ms))
    assert to_the_end(engine)[job.id].receipt["gear"] == "full"


def test_a_row_that_cannot_make_it_takes_no_quality_from_others() -> None:
    engine, late, job = made(Clock()), draw(steps=10, seed=3), auto()
    engine.offer(delivery(late, budget_ms=25))
    engine.offer(delivery(job, budget_ms=100_000))
    over = to_the_end(engine)
    assert (over[late.id].outcome, over[job.id].receipt["gear"]) == ("expired", "full")


@pytest.mark.parametrize("ladder", [("gone",), ("gone", "half")])
def test_a_gear_of_another_version_fails_no_neighbour(ladder: tuple[str, ...]) -> None:
    engine, job = made(Clock()), auto(1)
    strange = auto(0, ladder=ladder)
    strange = GenerateJob(id=strange.id, cost=strange.cost, work=replace(strange.work, gear="gone"))
    for one in (strange, job):
        engine.offer(delivery(one, budget_ms=1000))
    assert to_the_end(engine)[job.id].outcome == "ok"


def test_a_queue_that_is_too_long_makes_work_cheaper_but_never_below_its_floor() -> None:
    engine = made(Clock())
    engine.gears.queue = Queue(backlog=4000.0)  # 100 jobs, 4 s of full
    jobs = [auto(0), auto(1, ladder=("full",)), draw(steps=10, seed=2)]
    for job in jobs:
        engine.offer(delivery(job, budget_ms=1000))
    over = to_the_end(engine)
    low, floored, named = (over[job.id].receipt for job in jobs)
    assert (low["gear"], low["downgraded"], low["why"]) == ("half", True, "load")
    assert (floored["gear"], floored["requested"], floored["downgraded"]) == ("full", "auto", False)
    assert (named["gear"], named["downgraded"], "requested" in named) == ("full", False, False)


def test_running_rows_shift_when_others_join_them_and_their_deadline_would_pass() -> None:
    clock = Clock()
    engine = made(clock)
    task: Timed = engine.task  # type: ignore[assignment]
    first = auto(0)
    engine.offer(delivery(first, budget_ms=100))  # alone 40 ms
    for _ in range(3):
        engine.tick()
    assert task.shifted == []
    others = [auto(i + 1) for i in range(3)]
    for job in others:
        engine.offer(delivery(job, budget_ms=170))
    over = to_the_end(engine)
    assert {job.id: over[job.id].outcome for job in (first, *others)} == dict.fromkeys(
        (first.id, *(job.id for job in others)), "ok"
    )
    assert task.shifted
    assert over[first.id].receipt["gear"] == "half"
    assert over[first.id].receipt["why"] == "deadline"
    assert clock.now - 100.0 < 0.2


def test_with_adapt_off_auto_stays_the_best_under_any_load() -> None:
    engine, job = made(Clock(), adapt=False), auto()
    engine.gears.queue = Queue(backlog=1e9)
    engine.offer(delivery(job, budget_ms=50))
    done = to_the_end(engine)[job.id]
    assert (done.receipt["gear"], done.receipt["downgraded"]) == ("full", False)


def test_after_a_rest_work_is_back_at_the_best() -> None:
    clock = Clock()
    engine = made(clock)
    engine.gears.queue = Queue(backlog=4000.0)
    engine.offer(delivery(auto(0), budget_ms=1000))
    to_the_end(engine)
    assert engine.gears.rung == 1
    engine.gears.queue, job = Queue(), auto(1)
    clock.now += 60.0
    engine.offer(delivery(job, budget_ms=1000))
    assert to_the_end(engine)[job.id].receipt["gear"] == "full"


def test_admission_goes_by_the_cheapest_gear_that_the_usual_work_allows() -> None:
    """Blocks of 1 ms: 1000 of nominal cost a second at full, twice that at half."""
    engine = made(Clock())
    assert engine.admission_rate() == 0.0, "no job yet"
    engine.offer(delivery(auto(), budget_ms=1000))
    to_the_end(engine)
    assert engine.admission_rate() == pytest.approx(2000.0, rel=0.15)
    engine = made(Clock())
    engine.offer(delivery(draw(steps=10), budget_ms=1000))
    to_the_end(engine)
    assert engine.admission_rate() == pytest.approx(1000.0, rel=0.15)


def test_ticks_are_measured_before_there_is_work() -> None:
    clock = Clock()
    task = Timed(clock, capacity=6)
    points = tick_times(task, clock=clock)
    assert points == [(4.0, pytest.approx(4.0)), (8.0, pytest.approx(8.0)), (16.0, pytest.approx(16.0))]
    assert tick_times(task, budget_s=0.001, clock=clock) == points[:1], "no longer than its budget"
    assert tick_times(ToyClassify(), clock=clock) == []


def test_a_larger_tick_that_was_quicker_took_no_less_than_the_smaller_one() -> None:
    """Where ticks are flat, noise turns neighbours round; a curve rises."""

    class Flat(Timed):
        def step(self, slots: Sequence[int]) -> StepStats:
            before = self.clock.now
            stats = super().step(slots)
            self.clock.now = before + {1: 0.006, 2: 0.005, 4: 0.007}[len(slots)]
            return stats

    clock = Clock()
    points = tick_times(Flat(clock, capacity=4), clock=clock)
    assert points == [(4.0, pytest.approx(6.0)), (8.0, pytest.approx(6.0)), (16.0, pytest.approx(7.0))]


JUDGE = ModelInfo(
    "judge", "classify", ("a", "b"), (1, 1, 1), "w",
    methods={"single": 1.0, "ensemble": 5.0}, times={"single": 1.0, "ensemble": 5.0},
)  # fmt: skip


def test_classifications_move_along_their_methods() -> None:
    task, metrics, clock = ToyClassify(), WorkerMetrics(), Clock()
    task.info = replace(JUDGE, name=task.info.name)
    metrics.declare(task.info, "cpu")
    engine, receipts = Engine(task, metrics, clock), []
    for i, backlog in enumerate((0.0, 0.0, 1e6)):
        job = judge((bytes([i]),), model=task.info.name)
        job = replace_work(job, method="ensemble", ladder=("ensemble", "single"))
        engine.gears.queue = Queue(backlog=backlog)
        clock.now += 0.01
        engine.offer(delivery(job, budget_ms=1000))
        engine.gears.time.measured(5.0, 10.0)
        receipts.append(to_the_end(engine)[job.id].receipt)
    assert [receipt["downgraded"] for receipt in receipts] == [False, False, True]


def test_the_images_of_a_classification_all_get_its_method() -> None:
    """Though the load changes while some of them wait for a slot."""
    task, metrics, clock = ToyClassify(capacity=2), WorkerMetrics(), Clock()
    task.info = replace(JUDGE, name=task.info.name)
    metrics.declare(task.info, "cpu")
    engine = Engine(task, metrics, clock)
    job = judge((b"\1", b"\2", b"\3", b"\4"), model=task.info.name)
    job = replace_work(job, method="ensemble", ladder=("ensemble", "single"))
    engine.offer(delivery(job, budget_ms=1000))
    over = {}
    for _ in range(20):
        engine.gears.time.measured(5.0, 10.0)
        over |= {done.delivery.job.id: done for done in engine.tick().finished}
        engine.gears.queue = Queue(backlog=1e6)
        clock.now += 0.02
    assert engine.gears.rung == 1
    assert over[job.id].receipt["downgraded"] is False


def replace_work(job, **changes):  # type: ignore[no-untyped-def]
    return type(job)(id=job.id, cost=job.cost, work=replace(job.work, **changes))
