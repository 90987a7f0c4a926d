from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.api import ClassifiedRow, ClassifyWork, ExitSchedule, Gear, GeneratedRow, GenerateWork, StepStats
from service.metrics import WorkerMetrics
from service.protocol import ClassifyJob, Delivery, GenerateJob
from service.worker import shadow as shadows
from service.worker.engine import Engine, Finished, Tick
from service.worker.gears import Governor
from service.worker.main import loop
from service.worker.shadow import KEPT, REST_S, Shadow, alone, apart, judge_of, pixel_gap
from tests.service.worker.test_engine import Clock
from tests.service.worker.toy import EARLY, FULL, ToyClassify, ToyGenerate, Trouble
from tests.service.worker.work import delivery, draw, judge

HALF = Gear("half", ExitSchedule((1.0,), (2,)), "ddim", 5, 1.0)
DARKER = 51  # a fifth of the range: what gear half does to every pixel
SEED = 20


class Painter(ToyGenerate):
    """A toy with two gears; `on_step` hears of every step."""

    def __init__(self, capacity: int = 4, at_once: int | None = None) -> None:
        super().__init__(capacity=capacity, at_once=at_once)
        self.info = replace(self.info, gears=(FULL, HALF))
        self.half: dict[int, bool] = {}
        self.on_step: Callable[[], None] = lambda: None
        self.broken = False

    def admit(self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        self.half |= dict.fromkeys(slots, work.gear == "half")
        return super().admit(work, indices, slots)

    def step(self, slots: Sequence[int]) -> StepStats:
        if self.broken:
            raise Trouble("step")
        stats = super().step(slots)
        self.on_step()
        return stats

    def collect(self, slots: Sequence[int]) -> Sequence[GeneratedRow]:
        rows = zip(super().collect(slots), slots, strict=True)
        return [replace(row, pixels=row.pixels - DARKER * self.half[slot]) for row, slot in rows]


class Critic(ToyClassify):
    """Surer of its answer by `ensemble` than by `single`; dark pictures are of the other class."""

    def __init__(self, like: ToyGenerate | None = None, border: int = 100) -> None:
        super().__init__()
        self.border, self.sure = border, dict[int, float]()
        self.info = replace(self.info, methods={"single": 1.0, "ensemble": 5.0})
        if like is not None:
            self.info = replace(self.info, labels=like.info.labels, image=like.info.image)

    def admit(self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        self.sure |= dict.fromkeys(slots, 0.9 if work.method == "ensemble" else 0.75)
        return super().admit(work, indices, slots)

    def collect(self, slots: Sequence[int]) -> Sequence[ClassifiedRow]:
        answers = [(self.sure[slot], 1 - self.sure[slot]) for slot in slots]
        dark = [self.rows[slot] < self.border for slot in slots]
        return [ClassifiedRow(p[::-1] if low else p, {}) for p, low in zip(answers, dark, strict=True)]


class Bench:
    """Engines in their second rung, and a shadow over them that keeps every downgraded job."""

    def __init__(self, *tasks: Any, share: float = 1.0) -> None:
        self.clock, self.metrics = Clock(), WorkerMetrics()
        for task in tasks:
            self.metrics.declare(task.info, "cpu")
        self.engines = [Engine(task, self.metrics, self.clock) for task in tasks]
        self.to_the_second_rung()
        self.shadow = Shadow(self.engines, self.metrics, share, self.clock, random.Random(0))

    def to_the_second_rung(self) -> None:
        for engine in self.engines:
            engine.gears._governor, engine._ended = Governor(2), self.clock()
            engine.gears._governor.rung = 1

    def serve(self, *jobs: Delivery) -> None:
        engine = self.engines[0]
        for job in jobs:
            engine.offer(job)
        while not engine.idle():
            self.shadow.seen(engine, engine.tick().finished)

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(name, {"model": self.engines[0].name, **labels})
        assert value is not None, name
        return value

    def runs(self) -> dict[str, float]:
        outcomes = ("compared", "abandoned", "failed", "dropped")
        counts = {name: self.value("offramp_shadow_runs_total", outcome=name) for name in outcomes}
        return {name: count for name, count in counts.items() if count}

    def gaps(self, kind: str) -> tuple[float, float]:
        """Sum and count."""
        return tuple(self.value(f"offramp_shadow_gap_{of}", kind=kind) for of in ("sum", "count"))  # type: ignore[return-value]

    def rest(self) -> None:
        self.clock.now += REST_S


def downgraded(rows: int = 1, steps: int = 3, seed: int = SEED, gears: tuple[str, ...] = ("full", "half")) -> Delivery:
    job = draw(rows=rows, steps=steps, seed=seed)
    return delivery(GenerateJob(id=job.id, cost=job.cost, work=replace(job.work, ladder=gears)))


def judged(*images: bytes) -> Delivery:
    job = judge(images)
    work = replace(job.work, method="ensemble", ladder=("ensemble", "single"))
    return delivery(ClassifyJob(id=job.id, cost=job.cost, work=work))


def test_a_downgraded_answer_is_made_again_in_the_best_gear_after_a_rest() -> None:
    bench = Bench(task := Painter())
    bench.serve(downgraded(rows=3))
    assert not bench.shadow.step()
    bench.rest()
    before = len(task.evaluated)
    verbs = 0
    while bench.shadow.step():
        verbs += 1
    assert bench.runs() == {"compared": 1}
    assert bench.gaps("pixels") == (pytest.approx(DARKER / 255), 1)
    assert verbs == 1 + 3 + 1  # admit, three evaluations, collect
    [(seed, _), *_] = again = task.evaluated[before:]
    assert again == [(seed, 0), (seed, 1), (seed, 2)]
    assert seed in range(SEED, SEED + 3)
    assert all(len(batch) == 1 for batch in task.batches[-3:])


def test_nothing_of_the_service_counts_a_shadow() -> None:
    bench = Bench(Painter())
    bench.serve(downgraded())
    engine = bench.engines[0]
    mine = {"offramp_shadow_runs", "offramp_shadow_gap"}

    def seen() -> tuple[Any, ...]:
        series = {
            (sample.name, *sample.labels.values()): sample.value
            for family in bench.metrics.registry.collect()
            if family.name not in mine
            for sample in family.samples
        }
        queue = (engine.free_rows(), engine.idle(), engine.ticks, engine._scheduler.drained)
        return series, queue, engine.rate.pace(), engine.rate.per_second(), engine.gears.rate(0)

    before = seen()
    bench.rest()
    while bench.shadow.step():
        assert seen() == before
    assert bench.runs() == {"compared": 1}
    assert seen() == before


def test_a_classifier_beside_it_says_whether_it_still_sees_the_same() -> None:
    """A row's pixels are 7 seed + steps; a fifth darker they cross one border and not the other."""
    for border, differ in ((130, 1.0), (200, 0.0)):
        painter = Painter()
        bench = Bench(painter, Critic(like=painter, border=border))
        bench.serve(downgraded())  # 143, served as 92
        bench.rest()
        while bench.shadow.step():
            pass
        assert bench.gaps("class") == (differ, 1)
        assert bench.gaps("probabilities") == (pytest.approx(differ / 2), 1)


def test_a_classifier_of_other_images_or_labels_judges_nothing() -> None:
    painter = Painter()
    assert judge_of(painter.info, [painter, ToyClassify()]) is None
    critic = Critic(like=painter)
    assert judge_of(painter.info, [painter, ToyClassify(), critic]) is critic
    critic.info = replace(critic.info, labels=tuple("abcdefghij"))
    assert judge_of(painter.info, [painter, critic]) is None


def test_a_classification_is_compared_with_what_the_best_rung_says() -> None:
    bench = Bench(Critic())
    bench.serve(judged(b"\1", b"\xc8"))
    bench.rest()
    while bench.shadow.step():
        pass
    assert bench.gaps("probabilities") == (pytest.approx(0.15), 1)
    assert bench.gaps("class") == (0.0, 1)


def test_a_shadow_is_let_go_for_work_and_begins_again() -> None:
    bench = Bench(task := Painter())
    bench.serve(downgraded())
    bench.rest()
    assert [bench.shadow.step() for _ in range(3)] == [True] * 3  # admitted and two evaluations
    bench.shadow.abandon()
    assert not bench.shadow.step()
    bench.rest()
    while bench.shadow.step():
        pass
    assert bench.runs() == {"abandoned": 1, "compared": 1}
    assert [at for _, at in task.evaluated[-5:]] == [0, 1, 0, 1, 2]


def test_work_that_waits_elsewhere_is_work() -> None:
    bench = Bench(Painter())
    bench.serve(downgraded())
    bench.rest()
    bench.engines[0].pressed = True
    assert not bench.shadow.step()
    bench.engines[0].pressed = False
    assert not bench.shadow.step()
    bench.rest()
    assert bench.shadow.step()


def test_only_answers_that_were_downgraded_are_sampled() -> None:
    bench = Bench(Painter())
    bench.serve(downgraded(gears=("full",)), delivery(draw()), downgraded(gears=("half",)))
    bench.shadow.seen(bench.engines[0], [Finished(downgraded(), "failed", receipt={"downgraded": True})])
    bench.rest()
    assert not bench.shadow.step()


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.3, 60, 130), (1.0, 300, 300)])
def test_a_share_of_them_is(monkeypatch: pytest.MonkeyPatch, share: float, least: int, most: int) -> None:
    monkeypatch.setattr(shadows, "KEPT", 1000)
    bench = Bench(Painter(), share=share)
    bench.serve(*(downgraded(steps=1, seed=seed) for seed in range(300)))
    assert least <= len(bench.shadow._kept) <= most


def test_the_newest_are_kept_and_they_come_first() -> None:
    bench = Bench(task := Painter())
    bench.serve(*(downgraded(seed=100 * n) for n in range(KEPT + 3)))
    bench.rest()
    while bench.shadow.step():
        pass
    assert bench.runs() == {"compared": KEPT, "dropped": 3}
    again = [seed for seed, at in task.evaluated[-3 * KEPT :] if at == 0]
    assert again == [100 * n for n in range(KEPT + 2, 2, -1)]


def test_what_is_kept_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadows, "MOST_BYTES", 15)  # two pictures of six bytes
    bench = Bench(Painter())
    bench.serve(*(downgraded(seed=n) for n in range(5)))
    assert sum(one.size for one in bench.shadow._kept) == 12
    assert bench.runs() == {"dropped": 3}


def test_a_shadow_that_fails_is_counted_and_forgotten() -> None:
    bench = Bench(task := Painter())
    bench.serve(downgraded())
    bench.rest()
    task.broken = True
    while bench.shadow.step():
        pass
    assert bench.runs() == {"failed": 1}
    task.broken = False
    bench.to_the_second_rung()
    bench.serve(downgraded())
    bench.rest()
    while bench.shadow.step():
        pass
    assert bench.runs() == {"failed": 1, "compared": 1}


def finished(run: Generator[None, None, Any]) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def test_a_row_that_waits_has_all_its_evaluations() -> None:
    task, waits = Painter(), iter([True, False, True, False, False])
    step = task.step
    task.step = lambda slots: replace(step(()), waiting=frozenset(slots)) if next(waits) else step(slots)  # type: ignore[method-assign]
    row = finished(alone(task, draw(steps=3).work))
    assert len(row.exit_depths) == 3
    assert next(waits, None) is None


def test_a_row_that_needs_no_more_is_over() -> None:
    row = finished(alone(Painter(), draw(steps=5, label=EARLY).work))
    assert len(row.exit_depths) == 1


class Io:
    """Stands for the io thread: alive for so many passes of the loop, keeps what it is told."""

    def __init__(self, passes: int) -> None:
        self.passes, self.told, self.draining = passes, list[Finished](), False

    def alive(self) -> bool:
        self.passes -= 1
        return self.passes >= 0

    def report(self, engine: Engine, tick: Tick) -> None:
        self.told += tick.finished

    def drain(self) -> None:
        self.draining = True


def looped(bench: Bench, passes: int, stopping: bool = False) -> Io:
    """The worker's loop; a pass without anything to do ends with the rest that a shadow needs."""
    io, wake = Io(passes), threading.Event()
    wake.wait = lambda timeout=None: bool(bench.rest())  # type: ignore[method-assign, assignment]
    loop(bench.engines, io, SimpleNamespace(asked=stopping), wake, bench.shadow)  # type: ignore[arg-type]
    return io


def test_real_work_goes_before_a_shadow_that_runs() -> None:
    """A job that comes amid a shadow's second evaluation has the next tick, and all of them until it is over."""
    bench = Bench(task := Painter())
    bench.serve(downgraded(steps=4))
    before = len(task.evaluated)
    real = delivery(draw(rows=4, steps=2, seed=500))

    def arrives() -> None:
        if len(task.evaluated) == before + 2:
            bench.engines[0].offer(real)

    task.on_step = arrives
    io = looped(bench, passes=20)
    assert [(done.delivery, done.outcome) for done in io.told] == [(real, "ok")]
    assert [row.pixels[0, 0, 0] for row in io.told[0].rows] == [(seed * 7 + 2) % 256 for seed in range(500, 504)]
    after = task.evaluated[before:]
    assert after[:2] == [(SEED, 0), (SEED, 1)]
    assert {seed for seed, _ in after[2:10]} == {500, 501, 502, 503}
    assert after[10:] == [(SEED, at) for at in range(4)]
    assert bench.runs() == {"abandoned": 1, "compared": 1}
    assert bench.value("offramp_layer_evals_total", kind="run") == 4 * 4 + 4 * 2 * 4


def test_a_worker_that_drains_runs_no_shadow() -> None:
    bench = Bench(task := Painter())
    bench.serve(downgraded())
    before = len(task.evaluated)
    assert looped(bench, passes=10, stopping=True).draining
    assert len(task.evaluated) == before
    assert bench.runs() == {}


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=30))
def test_the_pixel_gap_is_a_root_mean_square_over_the_range(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(side, np.uint8).reshape(-1, 1, 1) for side in zip(*pairs, strict=True))
    expected = (sum((x - y) ** 2 for x, y in pairs) / len(pairs)) ** 0.5 / 255
    assert pixel_gap(a, b) == pytest.approx(expected)
    assert pixel_gap(a, b) == pixel_gap(b, a)
    assert 0 <= pixel_gap(a, b) <= 1


def test_distributions_apart() -> None:
    assert apart((0.5, 0.3, 0.2), (0.5, 0.3, 0.2)) == {"probabilities": 0.0, "class": 0.0}
    assert apart((1.0, 0.0), (0.0, 1.0)) == {"probabilities": 1.0, "class": 1.0}
    assert apart((0.6, 0.4, 0.0), (0.5, 0.3, 0.2)) == {"probabilities": pytest.approx(0.2), "class": 0.0}
