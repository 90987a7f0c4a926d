"""What a tick takes, measured before there is work: a generator's, by the rows that it moves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from models.api import GenerateWork, Task
from service.ladders import rungs_of

BUDGET_S = 1.0
GOES = 3
log = logging.getLogger(__name__)


def tick_times(
    task: Task[Any, Any], budget_s: float = BUDGET_S, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[float, float]]:
    """(blocks x network rows, milliseconds) of ticks at 1, 2, 4 ... rows, the least of three; none for a classifier.

    Ends when the slots are full or `budget_s` is spent. Leaves the task as it was: its slots are free.
    """
    info = task.info
    if info.task != "generate" or not rungs_of(info):
        return []
    full = next(gear for gear in info.gears if gear.name == rungs_of(info)[0])
    points: list[tuple[float, float]] = []
    rows, started = 1, clock()
    while rows <= task.capacity and clock() - started < budget_s:
        slots = range(rows)
        work = GenerateWork(
            model=info.name,
            labels=(0,) * rows,
            seeds=tuple(slots),
            steps=max(full.steps, GOES + 1),
            solver=full.solver,
            guidance=full.guidance,
            gear=full.name,
            solver_options=full.solver_options,
            guidance_interval=full.guidance_interval,
        )
        try:
            units, ms = _tick(task, work, clock)
            points.append((units, max([ms, *(before for _, before in points[-1:])])))
        except Exception:  # memory that a splitter would have saved, say: what is known by now will do
            log.warning("ticks of %s rows cannot be timed", rows, exc_info=True, extra={"model": info.name})
            return points
        rows *= 2
    return points


def _tick(task: Task[Any, Any], work: GenerateWork, clock: Callable[[], float]) -> tuple[float, float]:
    """Units and the least milliseconds of the first ticks of some rows, but for the very first."""
    slots = range(work.rows)
    task.admit(work, slots, slots)
    seen = []
    for _ in range(GOES + 1):
        before = clock()
        done = task.step(slots).layer_evals
        seen.append((1000 * (clock() - before), float(done)))
    least, units = min(seen[1:])
    return units, least
