"""Saved rows, restored rows, progress and suspension; pace and jobs that cannot be met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from models.api import StepStats
from service.metrics import WorkerMetrics
from service.worker.engine import Engine
from service.worker.rate import SETTLED, WINDOW, DrainRate, Least
from tests.service.worker.test_engine import Clock, make, run, sample
from tests.service.worker.toy import ToyClassify, ToyGenerate, Trouble, pixels
from tests.service.worker.work import delivery, draw, judge


class Slow(ToyGenerate):
    """Every step takes 100 ms of a clock."""

    def __init__(self, clock: Clock, capacity: int = 4) -> None:
        super().__init__(capacity=capacity)
        self.clock = clock

    def step(self, slots: Sequence[int]) -> StepStats:
        self.clock.now += 0.1
        return super().step(slots)


class Forgetful(ToyGenerate):
    """Cannot save, nor show."""

    def save(self, slots: Sequence[int]) -> Sequence[bytes]:
        raise Trouble("save")

    def preview(self, slots: Sequence[int]) -> Sequence[None]:
        raise Trouble("preview")


def engine_of(task: ToyGenerate | ToyClassify, clock: Clock | None = None, ticks: int = 3) -> Engine:
    metrics = WorkerMetrics()
    metrics.declare(task.info, "cpu")
    return Engine(task, metrics, clock or Clock(), checkpoint_ticks=ticks)


def test_running_rows_are_saved_every_few_ticks_and_go_on_elsewhere() -> None:
    engine = engine_of(ToyGenerate(capacity=2))
    job = delivery(draw(rows=3, steps=5, seed=7))
    engine.offer(job)
    news = [engine.tick().progress for _ in range(5)]
    assert [len(told) for told in news] == [0, 0, 1, 0, 0]
    [progress] = news[2]
    assert (progress.delivery, progress.done, progress.of) == (job, 6, 15)
    assert (sorted(progress.states), progress.previews) == ([0, 1], {})

    task = ToyGenerate(capacity=4)
    other = make(task)
    other.offer(replace(delivery(job.job, deliveries=2), states=progress.states))
    over = [done for _ in range(5) for done in other.tick().finished]
    assert [row.seed for row in over[0].rows] == [7, 8, 9]
    for row in over[0].rows:
        np.testing.assert_array_equal(row.pixels, pixels(row.seed, 5))
    assert sorted(task.evaluated) == [(7, 3), (7, 4), (8, 3), (8, 4), *((9, e) for e in range(5))]
    assert sample(other, "offramp_rows_restored_total") == 2


def test_progress_goes_on_from_what_was_saved() -> None:
    first = engine_of(ToyGenerate())
    job = draw(rows=2, steps=8)
    first.offer(delivery(job))
    [saved] = [told for _ in range(3) for told in first.tick().progress]
    second = engine_of(ToyGenerate())
    second.offer(replace(delivery(job, deliveries=2), states=saved.states))
    [progress] = [told for _ in range(3) for told in second.tick().progress]
    assert (progress.done, progress.of) == (12, 16)


def test_a_state_that_cannot_be_restored_is_begun_again() -> None:
    task = ToyGenerate()
    engine = make(task)
    engine.offer(replace(delivery(draw(steps=2)), states={0: b"torn"}))
    [done] = [done for _ in range(3) for done in engine.tick().finished]
    assert done.outcome == "ok"
    assert task.evaluated == [(0, 0), (0, 1)]
    assert sample(engine, "offramp_rows_restored_total") == 0


@pytest.mark.parametrize("ticks", [0, 1])
def test_rows_that_are_not_worth_it_are_not_saved(ticks: int) -> None:
    engine = engine_of(ToyClassify(), ticks=ticks)
    engine.offer(delivery(judge()))
    assert engine.tick().progress == []
    engine = engine_of(ToyGenerate(), ticks=0)
    engine.offer(delivery(draw(steps=40)))
    assert [engine.tick().progress for _ in range(39)] == [[]] * 39


def test_a_followed_job_tells_at_its_start_and_twice_a_second_with_previews() -> None:
    engine = engine_of(Slow(Clock(), capacity=6), ticks=0)
    clock = engine.task.clock
    engine = Engine(engine.task, engine._metrics, clock, checkpoint_ticks=0, progress_s=0.45)
    engine.offer(replace(delivery(draw(rows=6, steps=12)), events=True))
    news = [engine.tick().progress for _ in range(11)]
    assert [len(told) for told in news] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    [progress] = news[5]
    assert (progress.done, progress.of, progress.states) == (36, 72, {})
    assert list(progress.previews) == [0, 1, 2, 3]
    np.testing.assert_array_equal(progress.previews[3], pixels(3, 6))


def test_trouble_with_saves_and_previews_costs_no_job() -> None:
    engine = engine_of(Forgetful(), ticks=1)
    job = replace(delivery(draw(steps=3)), events=True)
    engine.offer(job)
    news = [engine.tick() for _ in range(3)]
    assert [told.previews for tick in news for told in tick.progress] == [{}]
    assert news[2].finished[0].outcome == "ok"


def test_suspended_jobs_are_let_go_with_their_states() -> None:
    task = ToyGenerate(capacity=2)
    engine = make(task)
    running, waiting = delivery(draw(rows=2, steps=9)), delivery(draw(seed=50))
    engine.offer(running)
    engine.tick()
    engine.suspend()
    engine.offer(waiting)
    news = engine.tick()
    assert (news.finished, news.progress) == ([], [])
    assert [(told.delivery, sorted(told.states), told.done) for told in news.suspended] == [
        (running, [0, 1], 2),
        (waiting, [], 0),
    ]
    assert (engine.idle(), engine.free_rows(), len(task.evaluated)) == (True, 2, 2)
    assert run(engine, again := draw())[again.id].outcome == "ok"


def test_nothing_is_taken_beside_a_job_that_runs_alone() -> None:
    engine = make(ToyGenerate(capacity=4))
    engine.offer(replace(delivery(draw()), solo=True))
    assert engine.free_rows() == 0
    engine.tick()
    assert engine.free_rows() == 0
    run(engine)
    assert engine.free_rows() == 4


def test_a_job_that_cannot_be_met_is_not_begun_once_the_pace_is_known() -> None:
    task = Slow(Clock())
    engine = make(task, task.clock)
    unknown = draw(steps=30)  # a tenth of a second each
    engine.offer(delivery(unknown, budget_ms=950))
    [late] = [done for _ in range(20) for done in engine.tick().finished]
    assert (late.failure is not None, len(task.evaluated)) == (True, 10)
    run(engine, draw(steps=SETTLED))
    before = len(task.evaluated)
    engine.offer(delivery(draw(steps=30), budget_ms=1000))
    engine.offer(delivery(met := draw(steps=5), budget_ms=1000))
    [hopeless] = engine.tick().finished
    assert hopeless.outcome == "expired"
    assert hopeless.failure is not None
    assert "cannot be met" in hopeless.failure.message
    assert run(engine)[met.id].outcome == "ok"
    assert len(task.evaluated) == before + 5
    assert sample(engine, "offramp_deadline_missed_total", when="hopeless") == 1


def test_models_that_take_turns_drain_at_the_rate_that_they_have_together() -> None:
    clock = Clock()
    engines = [Engine(Slow(clock), WorkerMetrics(), clock) for _ in range(2)]
    for engine in engines:
        engine._metrics.declare(engine.task.info, "cpu")
        engine.offer(delivery(draw(steps=500)))
    for _ in range(400):
        for engine in engines:
            engine.tick()
    for engine in engines:
        assert engine.rate.per_second() == pytest.approx(20.0, rel=0.01)
        assert engine.rate.pace().ms_per_tick == pytest.approx(200.0, rel=0.01)
        assert engine.rate.pressed_per_second() == 0.0


def test_idle_time_leaves_the_rate_as_it_was() -> None:
    task = Slow(Clock())
    engine = make(task, task.clock)
    run(engine, draw(steps=20))
    task.clock.now += 3600
    run(engine, draw(steps=20))
    assert engine.rate.per_second() == pytest.approx(40.0, rel=0.01)


def test_drain_rate_follows_recent_work() -> None:
    rate = DrainRate(memory_s=10.0)
    assert rate.per_second() == 0.0
    for _ in range(50):
        rate.add(100.0, 1.0)
    assert rate.per_second() == pytest.approx(100.0)
    for _ in range(50):
        rate.add(10.0, 1.0)
    assert 10.0 < rate.per_second() < 12.0


def test_the_least_of_late_is_known_after_some_and_forgotten_after_many() -> None:
    least = Least()
    for n in range(SETTLED):
        assert least.value() == 0.0
        least.add(5.0 + n)
    assert least.value() == 5.0
    for _ in range(2 * WINDOW):
        least.add(30.0)
    assert least.value() == 30.0
