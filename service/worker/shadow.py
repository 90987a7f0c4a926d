"""Shadow quality: a sample of downgraded answers is made again in the best gear, when nothing else is due.

A shadow is one row that runs by itself in a slot of a task at rest, a verb at a time, and is let go for any real work.
Scheduler, rate, controller and ledger never see it, and nobody is answered.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.api import ClassifiedRow, ClassifyWork, GenerateWork, ModelInfo, Task
from service.ladders import Work
from service.metrics import WorkerMetrics
from service.worker.engine import Engine
from service.worker.outcomes import Finished
from service.worker.splitting import is_lost

SLOT = 0
REST_S = 1.0  # without work in this process before a shadow begins
KEPT = 8
MOST_BYTES = 2**24  # of the images kept
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A row of a downgraded answer: where it ran, what was served, and the work that makes it in the best gear."""

    engine: Engine
    work: Work
    served: NDArray[np.uint8] | tuple[float, ...]
    size: int


class Shadow:
    """Candidates, newest first, and the comparison in progress. Belongs to the thread of the engines.

    Args:
        share: of the downgraded jobs that become candidates, drawn by `draw`.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        metrics: WorkerMetrics,
        share: float,
        clock: Callable[[], float] = time.monotonic,
        draw: random.Random | None = None,
    ) -> None:
        self._engines, self._metrics, self._share = engines, metrics, share
        self._clock, self._draw = clock, draw or random.Random()
        self._kept: deque[Candidate] = deque()
        self._current: Candidate | None = None
        self._running: Generator[None, None, None] | None = None
        self._quiet_since = clock()

    def seen(self, engine: Engine, finished: Sequence[Finished]) -> None:
        """Jobs that are over, to sample from."""
        for done in finished:
            downgraded = done.outcome == "ok" and done.receipt.get("downgraded")
            if downgraded and self._draw.random() < self._share:
                self._keep(candidate(engine, done, self._draw.randrange(len(done.rows))))

    def abandon(self) -> None:
        """There is work: let the shadow go; it begins again after a rest."""
        self._quiet_since = self._clock()
        if self._current is not None:
            again = self._current
            self._over("abandoned")
            self._keep(again)

    def step(self) -> bool:
        """One verb for one row; whether there was anything to do."""
        if any(engine.pressed for engine in self._engines):
            self.abandon()
        if self._clock() - self._quiet_since < REST_S:
            return False
        if self._running is None:
            if not self._kept:
                return False
            self._current = self._kept.pop()
            self._running = self._compare(self._current)
        try:
            next(self._running)
        except StopIteration:
            self._over("compared")
        except Exception as error:
            if is_lost(error):
                raise
            log.exception("no comparison", extra={"model": self._current.engine.name if self._current else ""})
            self._over("failed")
        return True

    def _over(self, outcome: str) -> None:
        if self._current is not None:
            self._metrics.shadow_runs.labels(self._current.engine.name, outcome).inc()
        self._current = self._running = None

    def _keep(self, one: Candidate) -> None:
        self._kept.append(one)
        while len(self._kept) > KEPT or sum(kept.size for kept in self._kept) > MOST_BYTES:
            self._metrics.shadow_runs.labels(self._kept.popleft().engine.name, "dropped").inc()

    def _compare(self, one: Candidate) -> Generator[None, None, None]:
        info = one.engine.task.info
        best = yield from alone(one.engine.task, one.work)
        if isinstance(best, ClassifiedRow):
            gaps = apart(one.served, best.probabilities)
        else:
            gaps = {"pixels": pixel_gap(one.served, best.pixels)}
            if judge := judge_of(info, [engine.task for engine in self._engines]):
                served = yield from judged(judge, one.served)
                whole = yield from judged(judge, best.pixels)
                gaps |= apart(served, whole)
        for kind, gap in gaps.items():
            self._metrics.shadow_gap.labels(info.name, kind).observe(gap)


def candidate(engine: Engine, done: Finished, index: int) -> Candidate:
    """Row `index` of a downgraded job, whose work came in the best gear of its ladder."""
    work, row = done.delivery.job.work, done.rows[index]
    if isinstance(work, GenerateWork):
        pixels = np.array(row.pixels)  # not a view, which would keep a whole batch
        one = replace(work, labels=(work.labels[index],), seeds=(work.seeds[index],))
        return Candidate(engine, one, pixels, pixels.nbytes)
    image = work.images[index]
    return Candidate(engine, replace(work, images=(image,)), row.probabilities, len(image))


def alone(task: Task[Any, Any], work: Work) -> Generator[None, None, Any]:
    """Run one row on a task at rest, a verb at a time; returns its output."""
    [left] = task.admit(work, (0,), (SLOT,))
    yield
    while left > 0:
        stats = task.step((SLOT,))
        if SLOT not in stats.waiting:
            left = 0 if SLOT in stats.finished else left - 1
        if left > 0:
            task.save((SLOT,))  # waits for a device that computes behind the host's back
        yield
    [row] = task.collect((SLOT,))
    return row


def judge_of(info: ModelInfo, tasks: Sequence[Task[Any, Any]]) -> Task[Any, Any] | None:
    """A classifier served beside a generator, of the same images and labels; None where there is none."""
    for task in tasks:
        same = (task.info.image, task.info.labels) == (info.image, info.labels)
        if same and "single" in task.info.methods:
            return task
    return None


def judged(judge: Task[Any, Any], pixels: Any) -> Generator[None, None, tuple[float, ...]]:
    """What the judge's source says of an image: calibrated probabilities."""
    work = ClassifyWork(
        model=judge.info.name, images=(np.ascontiguousarray(pixels).tobytes(),), method="single", top_k=1
    )
    row: ClassifiedRow = yield from alone(judge, work)
    return row.probabilities


def pixel_gap(a: Any, b: Any) -> float:
    """Root mean square of the difference of two uint8 images, over the whole range: in [0, 1]."""
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return float(np.sqrt(np.mean(difference**2)) / 255)


def apart(p: Any, q: Any) -> dict[str, float]:
    """Total variation of two distributions over classes, in [0, 1], and whether their likeliest classes differ."""
    a, b = np.asarray(p, np.float64), np.asarray(q, np.float64)
    return {"probabilities": float(np.abs(a - b).sum() / 2), "class": float(a.argmax() != b.argmax())}
