from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.protocol import Delivery
from service.worker.rate import Pace
from service.worker.scheduler import Scheduler
from tests.service.worker.work import delivery, draw


def admit_all(scheduler: Scheduler, now_ms: float, evaluations: int = 1) -> list[tuple[str, tuple[int, ...]]]:
    plan = scheduler.schedule(now_ms)
    for admission in plan.admissions:
        scheduler.admitted(admission.job, admission.slots, [evaluations] * len(admission.slots))
    return [(admission.job.attempt, admission.indices) for admission in plan.admissions]


def finish_all(scheduler: Scheduler) -> list[str]:
    scheduler.stepped(scheduler.batch())
    return [
        job.attempt
        for slots in scheduler.finished().values()
        for job in scheduler.collected(slots, [None] * len(slots))
    ]


arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # the tick it comes in
        st.integers(1, 9),  # rows
        st.integers(0, 4),  # evaluations at most
        st.integers(1, 5),  # the evaluation after which it needs no more
        st.integers(-1, 20) | st.just(10_000),  # ticks until its deadline
        st.none() | st.integers(0, 8),  # the tick in which its lease is lost
        st.booleans(),  # whether it runs alone
    ),
    max_size=12,
)


@given(capacity=st.integers(1, 6), arrivals=arrivals, pace=st.builds(Pace, st.floats(0, 3), st.floats(0, 0.2)))
def test_every_job_leaves_exactly_once_and_no_slot_is_shared(
    capacity: int, arrivals: list[tuple[int, int, int, int, int, int | None, bool]], pace: Pace
) -> None:
    scheduler = Scheduler(capacity)
    jobs: list[tuple[Delivery, int, int | None]] = []
    evaluations, enough = {}, {}
    for tick, rows, evals, early, deadline, lost, solo in arrivals:
        job = replace(delivery(draw(rows), deadline), solo=solo)
        jobs.append((job, tick, lost))
        evaluations[job.attempt], enough[job.attempt] = evals, early
    left: Counter[str] = Counter()
    held: dict[int, tuple[str, int]] = {}
    had: Counter[tuple[str, int]] = Counter()

    def empty(attempt: str) -> None:
        for slot in [slot for slot, row in held.items() if row[0] == attempt]:
            del held[slot]

    for tick in range(400):
        for job, arrival, lost in jobs:
            if arrival == tick:
                scheduler.add(job, tick, evaluations[job.attempt])
            if lost is not None and arrival + lost == tick and scheduler.drop(job.attempt):
                left[job.attempt] += 1
                empty(job.attempt)
        plan = scheduler.schedule(tick, pace)
        for gone in plan.expired + plan.hopeless:
            left[gone.attempt] += 1
            empty(gone.attempt)
        assert not any(row[0] == gone.attempt for gone in plan.hopeless for row in had)
        for admission in plan.admissions:
            for slot, index in zip(admission.slots, admission.indices, strict=True):
                assert slot not in held
                held[slot] = (admission.job.attempt, index)
            scheduler.admitted(
                admission.job, admission.slots, [evaluations[admission.job.attempt]] * len(admission.slots)
            )
        assert set(held) <= set(range(capacity))
        assert scheduler.busy_slots == len(held)
        sharing = {attempt for attempt, _ in held.values()}
        assert len(sharing) <= 1 or not any(job.solo for job, _, _ in jobs if job.attempt in sharing)
        batch = scheduler.batch()
        assert len(set(batch)) == len(batch)
        for slot in batch:
            had[held[slot]] += 1
        scheduler.stepped(batch, {slot for slot in batch if had[held[slot]] >= enough[held[slot][0]]})
        for slots in scheduler.finished().values():
            outputs = [held.pop(slot) for slot in slots]
            for done in scheduler.collected(slots, outputs):
                left[done.attempt] += 1
                rows = done.delivery.job.work.rows
                assert done.rows() == [(done.attempt, index) for index in range(rows)]
                needed = min(evaluations[done.attempt], enough[done.attempt])
                assert all(had[done.attempt, index] == needed for index in range(rows))
        assert scheduler.free_rows() <= capacity - len(held)
        if tick > 6 and not scheduler.jobs:
            break
    assert left == Counter({job.attempt: 1 for job, _, _ in jobs})
    assert scheduler.free_rows() == capacity
    assert scheduler.busy_slots == 0


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8, unique=True))
def test_least_slack_enters_first(budgets: list[int]) -> None:
    scheduler = Scheduler(1)
    jobs = [delivery(draw(), budget) for budget in budgets]
    for job in jobs:
        scheduler.add(job, 0)
    order = []
    while scheduler.jobs:
        admit_all(scheduler, 0)
        order += finish_all(scheduler)
    assert order == [job.attempt for job in sorted(jobs, key=lambda job: job.deadline_ms)]


def test_job_larger_than_the_pool_enters_as_slots_free() -> None:
    scheduler = Scheduler(2)
    job = delivery(draw(rows=5))
    scheduler.add(job, 0)
    entered = []
    for _ in range(3):
        assert len(scheduler.jobs) == 1
        entered += [indices for _, indices in admit_all(scheduler, 0)]
        done = finish_all(scheduler)
    assert entered == [(0, 1), (2, 3), (4,)]
    assert done == [job.attempt]


def test_free_rows_count_what_waits() -> None:
    scheduler = Scheduler(4)
    scheduler.add(delivery(draw(rows=3)), 0)
    assert scheduler.free_rows() == 1
    scheduler.add(delivery(draw(rows=6)), 0)
    assert scheduler.free_rows() == 0


def test_new_rows_join_rows_in_mid_run() -> None:
    scheduler = Scheduler(4)
    scheduler.add(delivery(draw(rows=2)), 0)
    admit_all(scheduler, 0, evaluations=3)
    scheduler.stepped(scheduler.batch())
    scheduler.add(delivery(draw(rows=1)), 0)
    admit_all(scheduler, 0, evaluations=1)
    assert scheduler.batch() == [0, 1, 2]
    assert len(scheduler.owners([0, 1, 2])) == 2


def test_a_row_that_finishes_early_leaves_its_job_and_its_slot_at_once() -> None:
    scheduler = Scheduler(3)
    scheduler.add(delivery(draw(rows=3)), 0)
    admit_all(scheduler, 0, evaluations=4)
    scheduler.stepped(scheduler.batch(), {1})
    [slots] = scheduler.finished().values()
    assert slots == [1]
    assert scheduler.collected(slots, ["early"]) == []
    assert (scheduler.batch(), scheduler.free_rows()) == ([0, 2], 1)


def test_expired_job_gives_its_slots_back_in_the_same_tick() -> None:
    scheduler = Scheduler(2)
    late, patient = delivery(draw(rows=2), budget_ms=10), delivery(draw(rows=2), budget_ms=99)
    scheduler.add(late, 0)
    admit_all(scheduler, 0, evaluations=50)
    scheduler.add(patient, 5)
    plan = scheduler.schedule(10)
    assert [job.attempt for job in plan.expired] == [late.attempt]
    assert [(a.job.attempt, a.slots) for a in plan.admissions] == [(patient.attempt, (0, 1))]


def test_deadline_is_carried_over_to_our_clock() -> None:
    scheduler = Scheduler(1)
    scheduler.add(delivery(draw(), budget_ms=50), now_ms=7000)
    assert not scheduler.schedule(7049).expired
    assert len(scheduler.schedule(7050).expired) == 1


def test_redelivered_entry_is_another_job() -> None:
    scheduler = Scheduler(4)
    job = draw()
    first, again = delivery(job), delivery(job, deliveries=2)
    scheduler.add(first, 0)
    scheduler.add(again, 0)
    admit_all(scheduler, 0, evaluations=2)
    assert scheduler.drop(first.attempt) is not None
    assert scheduler.drop(first.attempt) is None
    done = [attempt for _ in range(2) for attempt in finish_all(scheduler)]
    assert done == [again.attempt]


def test_slots_are_used_again() -> None:
    scheduler = Scheduler(2)
    seen = []
    for _ in range(5):
        scheduler.add(delivery(draw(rows=2)), 0)
        admit_all(scheduler, 0)
        seen.append(scheduler.batch())
        finish_all(scheduler)
    assert seen == [[0, 1]] * 5


def test_slack_counts_the_evaluations_to_come() -> None:
    scheduler = Scheduler(1)
    short, long = delivery(draw(), 1000), delivery(draw(), 1500)
    scheduler.add(short, 0, evaluations=2)
    scheduler.add(long, 0, evaluations=80)
    [admission] = scheduler.schedule(0, Pace(ms_per_tick=10.0)).admissions
    assert admission.job.attempt == long.attempt


def test_a_job_that_cannot_be_met_leaves_before_it_runs() -> None:
    scheduler = Scheduler(4)
    job = draw(rows=2, steps=5)  # costs 40
    scheduler.add(delivery(job, budget_ms=100), 0, evaluations=5)
    assert not scheduler.schedule(0, Pace(ms_per_cost=0.0)).hopeless
    scheduler.add(delivery(job, budget_ms=100), 0, evaluations=5)
    plan = scheduler.schedule(0, Pace(ms_per_cost=5.0))
    assert [gone.delivery.deadline_ms for gone in plan.hopeless] == [1_000_100]
    assert len(scheduler.jobs) == 1


@pytest.mark.parametrize(("beside", "hopeless"), [(0, 0), (3, 1)])
def test_rows_beside_it_count_for_as_long_as_they_run(beside: int, hopeless: int) -> None:
    scheduler = Scheduler(4)
    for seed in range(beside):
        scheduler.add(delivery(draw(steps=5, seed=seed)), 0, evaluations=5)
    for admission in scheduler.schedule(0).admissions:
        scheduler.admitted(admission.job, admission.slots, [5])
    scheduler.add(delivery(draw(steps=5), budget_ms=40), 0, evaluations=5)
    assert len(scheduler.schedule(0, Pace(ms_per_cost=1.0)).hopeless) == hopeless


def test_what_was_saved_need_not_be_done_again() -> None:
    scheduler = Scheduler(4)
    saved = replace(delivery(draw(steps=5), budget_ms=1), states={0: b"state"})
    scheduler.add(saved, 0, evaluations=5)
    assert len(scheduler.schedule(0, Pace(ms_per_cost=9.0)).admissions) == 1


def test_a_solo_job_waits_for_an_empty_pool_and_keeps_it() -> None:
    scheduler = Scheduler(3)
    first, alone, later = delivery(draw()), replace(delivery(draw(), 10), solo=True), delivery(draw(rows=2))
    scheduler.add(first, 0)
    admit_all(scheduler, 0, evaluations=2)
    scheduler.add(alone, 0)
    assert scheduler.free_rows() == 0
    assert admit_all(scheduler, 0) == []
    scheduler.stepped(scheduler.batch())
    assert finish_all(scheduler) == [first.attempt]
    assert admit_all(scheduler, 0) == [(alone.attempt, (0,))]
    scheduler.add(later, 0)
    assert (admit_all(scheduler, 0), scheduler.free_rows()) == ([], 0)
    assert finish_all(scheduler) == [alone.attempt]
    assert admit_all(scheduler, 0) == [(later.attempt, (0, 1))]


def test_progress_counts_what_restored_rows_had() -> None:
    scheduler = Scheduler(2)
    scheduler.add(delivery(draw(rows=3)), 0, evaluations=5)
    [admission] = scheduler.schedule(0).admissions
    scheduler.admitted(admission.job, admission.slots[:1], [2])
    scheduler.admitted(admission.job, admission.slots[1:], [5])
    assert scheduler.progress(admission.job) == (3, 15)
    scheduler.stepped(scheduler.batch(), {1})
    assert scheduler.progress(admission.job) == (9, 15)


def test_all_of_a_jobs_cost_drains_whether_or_not_it_ends_early() -> None:
    scheduler = Scheduler(2)
    scheduler.add(delivery(job := draw(rows=2)), 0)
    admit_all(scheduler, 0, evaluations=3)
    scheduler.stepped(scheduler.batch(), {0})
    scheduler.stepped([1])
    scheduler.stepped([1])
    assert scheduler.drained == pytest.approx(job.cost)
