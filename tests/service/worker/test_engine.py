from __future__ import annotations

import numpy as np
import pytest

from service.metrics import WorkerMetrics
from service.protocol import Failure, Job
from service.worker.engine import Engine, Finished
from tests.service.worker.toy import BAD_ADMIT, BAD_COLLECT, EARLY, REFUSED, ToyClassify, ToyGenerate, pixels
from tests.service.worker.work import delivery, draw, judge


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(task: ToyGenerate | ToyClassify, clock: Clock | None = None) -> Engine:
    metrics = WorkerMetrics()
    metrics.declare(task.info, "cpu")
    return Engine(task, metrics, clock or Clock())


def run(engine: Engine, *jobs: Job) -> dict[str, Finished]:
    for job in jobs:
        engine.offer(delivery(job))
    over: dict[str, Finished] = {}
    for _ in range(200):
        for done in engine.tick().finished:
            assert done.delivery.job.id not in over
            over[done.delivery.job.id] = done
        if engine.idle():
            return over
    raise AssertionError("never idle")


def sample(engine: Engine, name: str, **labels: str) -> float:
    value = engine._metrics.registry.get_sample_value(name, {"model": engine.name, **labels})
    assert value is not None, name
    return value


def test_rows_of_many_jobs_share_batches_and_come_back_whole() -> None:
    task = ToyGenerate(capacity=6)
    engine = make(task)
    jobs = [draw(rows=n, steps=n + 1, seed=10 * n) for n in (1, 2, 3)]
    over = run(engine, *jobs)
    for job in jobs:
        done = over[job.id]
        assert done.outcome == "ok"
        assert [row.seed for row in done.rows] == list(job.work.seeds)
        for row in done.rows:
            np.testing.assert_array_equal(row.pixels, pixels(row.seed, job.work.steps))
        assert done.receipt["layer_evals"] == job.cost
    assert max(len(batch) for batch in task.batches) == 6
    assert sample(engine, "offramp_mixed_ticks_total") == 3
    assert sample(engine, "offramp_layer_evals_total", kind="run") == sum(job.cost for job in jobs)
    assert sample(engine, "offramp_tick_duration_seconds_count") == engine.ticks
    assert sample(engine, "offramp_run_seconds_count") == 3
    assert sample(engine, "offramp_queue_wait_seconds_count") == 3


def test_job_larger_than_the_pool_is_answered() -> None:
    engine = make(ToyGenerate(capacity=2))
    [done] = run(engine, job := draw(rows=5, seed=3)).values()
    assert [row.seed for row in done.rows] == list(job.work.seeds)


def test_rows_without_evaluations_are_answered_in_one_tick() -> None:
    engine = make(ToyClassify())
    engine.offer(delivery(judge((b"\0", b"\1"))))
    [done] = engine.tick().finished
    assert [row.probabilities for row in done.rows] == [(1.0, 0.0), (0.0, 1.0)]
    assert sample(engine, "offramp_tick_duration_seconds_count") == 1
    assert sample(engine, "offramp_batch_rows_sum") == 2


def test_new_job_joins_at_the_next_tick() -> None:
    task = ToyGenerate(capacity=4)
    engine = make(task)
    engine.offer(delivery(draw(steps=5)))
    engine.tick()
    engine.offer(delivery(draw(steps=5, seed=50)))
    engine.tick()
    assert [len(batch) for batch in task.batches] == [1, 2]


@pytest.mark.parametrize(("label", "verb"), [(BAD_ADMIT, "admit"), (BAD_COLLECT, "collect")])
def test_failure_of_one_job_leaves_the_others_alone(label: int, verb: str) -> None:
    engine = make(ToyGenerate())
    bad, good = draw(rows=2, label=label), draw(rows=2, seed=70)
    over = run(engine, bad, good)
    assert over[good.id].outcome == "ok"
    failure = over[bad.id].failure
    assert failure is not None
    assert (over[bad.id].outcome, failure.code, failure.message) == ("failed", "job_failed", f"{verb}: Trouble: {verb}")


def test_a_users_mistake_is_refused_by_field_and_leaves_the_others_alone() -> None:
    engine = make(ToyGenerate())
    bad, good = draw(label=REFUSED), draw(seed=70)
    over = run(engine, bad, good)
    assert over[good.id].outcome == "ok"
    assert over[bad.id].failure == Failure(
        "bad_request", "eta is not of this solver", retryable=False, field="solver_options.eta"
    )


def test_rows_that_wait_keep_their_evaluations() -> None:
    task = ToyGenerate(capacity=3, at_once=1)
    engine = make(task)
    job = draw(rows=3, steps=2, seed=40)
    done = run(engine, job)[job.id]
    assert [row.exit_depths for row in done.rows] == [(4, 4)] * 3
    assert [len(batch) for batch in task.batches] == [1] * 6


def test_rows_that_need_no_more_are_answered_at_once() -> None:
    task = ToyGenerate(capacity=4)
    engine = make(task)
    early, whole = draw(rows=2, steps=5, seed=1, label=EARLY), draw(rows=2, steps=5, seed=10)
    for job in (early, whole):
        engine.offer(delivery(job))
    [done] = engine.tick().finished
    assert done.delivery.job is early
    assert [row.exit_depths for row in done.rows] == [(4,), (4,)]
    assert engine.free_rows() == 2
    over = run(engine)
    assert [len(row.exit_depths) for row in over[whole.id].rows] == [5, 5]
    assert [len(batch) for batch in task.batches] == [4, 2, 2, 2, 2]


def test_expired_job_costs_no_step() -> None:
    task = ToyGenerate()
    engine = make(task)
    engine.offer(delivery(draw(), budget_ms=0))
    [done] = engine.tick().finished
    assert done.outcome == "expired"
    assert done.failure is not None
    assert (done.failure.code, done.failure.retryable) == ("deadline_exceeded", True)
    assert task.rows == {}
    assert task.batches == []
    assert engine.idle()


def test_running_job_expires_and_frees_its_slots() -> None:
    clock = Clock()
    engine = make(ToyGenerate(capacity=2), clock)
    engine.offer(delivery(draw(rows=2, steps=50), budget_ms=1000))
    assert engine.tick().finished == []
    clock.now += 1.0
    [done] = engine.tick().finished
    assert done.outcome == "expired"
    assert (engine.free_rows(), engine.idle()) == (2, True)


def test_withdrawn_job_is_never_answered() -> None:
    task = ToyGenerate(capacity=2)
    engine = make(task)
    lost, kept = delivery(draw(rows=2, steps=5)), delivery(draw(rows=2, seed=40))
    engine.offer(lost)
    engine.tick()
    engine.withdraw([lost.attempt])
    engine.offer(kept)
    over = [done for _ in range(10) for done in engine.tick().finished]
    assert [done.delivery for done in over] == [kept]
    assert sum(seed < 2 for seed, _ in task.evaluated) == 2


def test_free_rows_fall_when_a_job_is_offered_and_rise_when_it_is_over() -> None:
    engine = make(ToyGenerate(capacity=4))
    assert (engine.free_rows(), engine.idle()) == (4, True)
    engine.offer(delivery(draw(rows=3, steps=1)))
    assert (engine.free_rows(), engine.idle()) == (1, False)
    engine.tick()
    assert (engine.free_rows(), engine.idle()) == (4, True)


def test_queue_time_includes_the_time_before_it_was_taken() -> None:
    clock = Clock()
    engine = make(ToyGenerate(capacity=1), clock)
    engine.offer(delivery(draw(steps=2), waited_ms=500))
    engine.tick()
    clock.now += 2.0
    [done] = engine.tick().finished
    assert (done.queue_s, done.run_s) == (0.5, 2.0)


def test_redelivery_is_counted() -> None:
    engine = make(ToyGenerate())
    engine.offer(delivery(draw(), deliveries=2))
    engine.tick()
    assert sample(engine, "offramp_redeliveries_total") == 1


def test_late_jobs_are_counted_by_where_they_were() -> None:
    clock = Clock()
    engine = make(ToyGenerate(capacity=1), clock)
    engine.offer(delivery(draw(steps=50), budget_ms=1000))
    engine.tick()
    engine.offer(delivery(draw(), budget_ms=1000))
    clock.now += 2.0
    assert len(engine.tick().finished) == 2
    assert [sample(engine, "offramp_deadline_missed_total", when=when) for when in ("running", "waiting")] == [1, 1]
    assert sample(engine, "offramp_deadline_slack_seconds_sum") == pytest.approx(1.0)


def test_slots_of_rows_that_end_with_the_running_tick_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    task = ToyGenerate(capacity=4)
    engine, step, seen = make(task), task.step, []

    def watched(slots: list[int]) -> object:
        seen.append(engine.free_rows())
        if len(seen) == 1:
            engine.offer(delivery(draw(rows=2, steps=1, seed=7)))
            seen.append(engine.free_rows())
        return step(slots)

    monkeypatch.setattr(task, "step", watched)
    engine.offer(delivery(draw(rows=2, steps=2)), delivery(draw(rows=1, steps=1, seed=5)))
    engine.tick()
    assert seen == [2, 0], "one slot is free and one will be; then both are spoken for"
    engine.tick()
    assert seen[2] == 4, "all rows end with the second tick"
    assert engine.idle()


def test_rows_that_wait_for_each_other_are_not_all_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    task = ToyGenerate(capacity=4, at_once=1)
    engine, step, seen = make(task), task.step, []
    monkeypatch.setattr(task, "step", lambda slots: seen.append(engine.free_rows()) or step(slots))
    run(engine, draw(rows=4, steps=1))
    assert seen[1:] == [2, 3, 4], "one slot more with every tick"


def test_the_next_tick_is_foreseen_from_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, task = Clock(), ToyGenerate(capacity=1)
    engine, step, seen = make(task, clock), task.step, []

    def watched(slots: list[int]) -> object:
        seen.append(engine.until_next_s())
        clock.now += 0.03
        seen.append(engine.until_next_s())
        clock.now += 0.02
        return step(slots)

    monkeypatch.setattr(task, "step", watched)
    assert engine.until_next_s() == 0.0, "nothing is in hand"
    run(engine, draw(steps=4))
    engine.offer(delivery(draw(steps=1)))
    assert engine.until_next_s() == pytest.approx(0.05), "a tick is about to begin"
    engine.tick()
    assert seen[:2] == [0.0, 0.0], "nothing was measured"
    assert seen[-2:] == [pytest.approx(0.05), pytest.approx(0.02)]
    assert engine.until_next_s() == 0.0
