"""Batches that fail, memory that runs out, and who is to blame."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.api import GenerateWork, StepStats, UserError
from service.protocol import Failure
from service.worker.engine import Engine
from service.worker.splitting import CALM_RUNS, Splitter, is_lost, is_memory
from tests.service.worker.test_engine import make, run, sample
from tests.service.worker.toy import BAD_STEP, EARLY, ToyGenerate, Trouble
from tests.service.worker.work import delivery, draw

HUGE = 3  # a label


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's."""


class AcceleratorError(RuntimeError):
    """Named as PyTorch's."""


class Small(ToyGenerate):
    """Steps and admits no more than `fits` rows at once, and no HUGE row."""

    def __init__(self, capacity: int, fits: int, admits: int = 64) -> None:
        super().__init__(capacity=capacity)
        self.fits, self.admits = fits, admits
        self.asked: list[int] = []

    def admit(self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        if len(slots) > self.admits:
            raise MemoryError
        return super().admit(work, indices, slots)

    def step(self, slots: Sequence[int]) -> StepStats:
        self.asked.append(len(slots))
        if len(slots) > self.fits or any(self.rows[slot][1] == HUGE for slot in slots):
            raise OutOfMemoryError("tried to allocate")
        return super().step(slots)


class Picky(ToyGenerate):
    """A user's mistake that only a step finds."""

    def step(self, slots: Sequence[int]) -> StepStats:
        if any(self.rows[slot][1] == HUGE for slot in slots):
            raise UserError("too much guidance", "guidance")
        return super().step(slots)


def test_of_a_failing_batch_only_the_job_to_blame_fails() -> None:
    task = ToyGenerate(capacity=8)
    engine = make(task)
    good = [draw(rows=2, steps=2, seed=10), draw(rows=3, steps=2, seed=20)]
    bad = draw(rows=2, steps=2, seed=30, label=BAD_STEP)
    over = run(engine, good[0], bad, good[1])
    assert over[bad.id].failure == Failure("job_failed", "step: Trouble: step")
    for job in good:
        assert over[job.id].outcome == "ok"
        assert [row.exit_depths for row in over[job.id].rows] == [(4, 4)] * job.work.rows
    assert sorted(task.evaluated) == [(seed, e) for seed in (10, 11, 20, 21, 22) for e in range(2)]
    assert sample(engine, "offramp_layer_evals_total", kind="run") == sum(job.cost for job in good)
    assert sample(engine, "offramp_batch_rows_sum") == 10
    assert sample(engine, "offramp_batch_splits_total", reason="error") > 0
    assert sample(engine, "offramp_batch_splits_total", reason="memory") == 0
    assert engine.free_rows() == 8


def test_a_users_mistake_in_a_step_keeps_its_field() -> None:
    engine = make(Picky(capacity=4))
    bad, good = draw(label=HUGE), draw(rows=3, seed=9)
    over = run(engine, bad, good)
    assert over[bad.id].failure == Failure("bad_request", "too much guidance", field="guidance")
    assert over[good.id].outcome == "ok"


def test_memory_that_runs_out_makes_batches_smaller_for_a_while() -> None:
    task = Small(capacity=8, fits=3)
    engine = make(task)
    job = draw(rows=8, steps=4)
    assert run(engine, job)[job.id].outcome == "ok"
    assert task.asked[:3] == [8, 4, 2]
    assert task.asked[:7] == [8, 4, 2, 2, 4, 2, 2]
    assert set(task.asked[7:]) == {2}
    assert sample(engine, "offramp_batch_splits_total", reason="memory") == 3
    task.fits = 8
    later = draw(rows=8, steps=2 * CALM_RUNS)
    run(engine, later)
    assert max(task.asked) == task.asked[-1] == 8


def test_a_row_that_does_not_fit_alone_fails_by_itself_and_is_no_reason_for_small_batches() -> None:
    task = Small(capacity=8, fits=8)
    engine = make(task)
    bad, good = draw(label=HUGE), draw(rows=7, steps=3, seed=9)
    over = run(engine, bad, good)
    assert over[good.id].outcome == "ok"
    assert over[bad.id].failure == Failure(
        "job_failed", "step: out of memory with one row: OutOfMemoryError: tried to allocate"
    )
    assert task.asked[-1] == 7


def test_admission_is_halved_too_when_memory_runs_out() -> None:
    engine = make(Small(capacity=8, fits=8, admits=3))
    job = draw(rows=8, seed=5)
    done = run(engine, job)[job.id]
    assert [row.seed for row in done.rows] == list(range(5, 13))
    engine = make(Small(capacity=8, fits=8, admits=0))
    failure = run(engine, again := draw(rows=2))[again.id].failure
    assert failure is not None
    assert failure.message == "admit: out of memory with one row: MemoryError: "


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (OutOfMemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("shape"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error: Exception, memory: bool) -> None:
    assert is_memory(error) == memory
    assert not is_lost(error)


class Lost(Small):
    """A device that fails for good at its third step."""

    steps = 0

    def step(self, slots: Sequence[int]) -> StepStats:
        self.steps += 1
        if self.steps == 3:
            raise AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().step(slots)


def test_a_device_that_is_lost_is_nobody_s_fault() -> None:
    """No job is blamed: the error leaves the engine, and with it the worker."""
    engine = make(Lost(capacity=8, fits=8))
    engine.offer(delivery(draw(rows=4, steps=5)))
    assert is_lost(AcceleratorError("CUDA error: unspecified launch failure"))
    assert [engine.tick().finished for _ in range(2)] == [[], []]
    with pytest.raises(AcceleratorError, match="illegal memory access"):
        engine.tick()


@given(
    rows=st.lists(st.integers(1, 9), max_size=20),
    bad=st.sets(st.integers(0, 19)),
    fits=st.integers(1, 12),
    limit=st.integers(1, 20),
)
def test_every_row_is_called_once_or_blamed_and_all_that_fits_is(
    rows: list[int], bad: set[int], fits: int, limit: int
) -> None:
    splitter = Splitter(20, lambda reason: None)
    splitter.limit = limit
    called: list[int] = []
    blamed: list[int] = []

    def call(part: Sequence[int]) -> int:
        if bad & set(part):
            raise Trouble
        if len(part) > fits:
            raise MemoryError
        called.extend(part)
        return len(part)

    made = splitter.run(range(len(rows)), call, lambda row, error: blamed.append(row))
    assert sorted(called + blamed) == list(range(len(rows)))
    assert set(blamed) == bad & set(range(len(rows)))
    assert sum(made) == len(called)
    assert 1 <= splitter.limit <= limit


jobs_of_a_run = st.lists(
    st.tuples(
        st.integers(0, 5),  # the tick it comes in
        st.integers(1, 6),  # rows
        st.integers(1, 4),  # steps
        st.sampled_from([0, 0, EARLY, BAD_STEP, HUGE, 6, 7, 8]),  # label
        st.none() | st.integers(0, 6),  # the tick in which its lease is lost
    ),
    max_size=8,
)


@given(capacity=st.integers(1, 6), fits=st.integers(1, 6), plan=jobs_of_a_run, suspended=st.none() | st.integers(0, 8))
def test_every_job_leaves_an_engine_exactly_once(
    capacity: int, fits: int, plan: list[tuple[int, int, int, int, int | None]], suspended: int | None
) -> None:
    engine: Engine = make(Small(capacity, fits, admits=fits))
    jobs = [(tick, delivery(draw(rows, steps, label=label)), lost) for tick, rows, steps, label, lost in plan]
    left: list[str] = []
    for tick in range(300):
        for arrival, job, lost in jobs:
            if arrival == tick:
                engine.offer(job)
            if lost is not None and arrival <= tick and lost == tick and job.attempt not in left:
                engine.withdraw([job.attempt])
                left.append(job.attempt)
        if tick == suspended:
            engine.suspend()
        if engine.idle() and tick > 8:
            break
        news = engine.tick()
        left += [done.delivery.attempt for done in news.finished]
        left += [progress.delivery.attempt for progress in news.suspended]
        for done in news.finished:
            label = done.delivery.job.work.labels[0]
            assert (done.outcome == "ok") == (label in (0, EARLY))
    assert sorted(left) == sorted(job.attempt for _, job, _ in jobs)
    assert (engine.free_rows(), engine.idle()) == (capacity, True)
