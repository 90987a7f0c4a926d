"""A generator that takes the time a curve says, and makes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from models.api import ExitSchedule, Gear, GenerateWork, ModelInfo, SolverName, StepStats, planned_blocks


@dataclass
class Clock:
    """Simulated seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@dataclass
class SimRow:
    """A row: units of each evaluation as planned and at full depth, and of those that it had."""

    plan: tuple[float, ...]
    full: tuple[float, ...]
    ran: list[float] = field(default_factory=list)


class SimTask:
    """models.api.Task: rows of the gears of `info`, whose evaluations only pass time.

    Args:
        tick_ms: milliseconds of a tick with so many units (blocks x network rows).
        noise: standard deviation of the logarithm of a tick's time, over draws from `seed`.
    """

    def __init__(
        self,
        info: ModelInfo,
        capacity: int,
        clock: Clock,
        tick_ms: Callable[[float], float],
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.info, self.capacity = info, capacity
        self._clock, self._tick_ms = clock, tick_ms
        self._noise, self._draw = noise, random.Random(seed)
        self._rows: dict[int, SimRow] = {}
        self._gears = {gear.name: gear for gear in info.gears}
        self._plan = lru_cache(256)(self._planned)

    def admit(self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        """Place rows."""
        plan, full = self._plan(*_shape(work)), self._plan("", *_shape(work)[1:])
        for slot in slots:
            self._rows[slot] = SimRow(plan, full)
        return [len(plan)] * len(slots)

    def step(self, slots: Sequence[int]) -> StepStats:
        """Let a tick's time pass."""
        units = full = 0.0
        for slot in slots:
            row = self._rows[slot]
            at = len(row.ran)
            row.ran.append(row.plan[at])
            units += row.plan[at]
            full += row.full[at]
        luck = self._draw.lognormvariate(0.0, self._noise) if self._noise else 1.0
        self._clock.now += luck * self._tick_ms(units) / 1000
        return StepStats(rows=len(slots), layer_evals=int(units), layer_evals_full=int(full))

    def collect(self, slots: Sequence[int]) -> Sequence[SimRow]:
        """The rows, as they ran."""
        return [self._rows[slot] for slot in slots]

    def receipt(self, work: GenerateWork, rows: Sequence[SimRow]) -> dict[str, Any]:
        """The cheapest gear that shows, units that ran and those at full depth; whether an evaluation had less than in
        the lowest gear allowed."""
        ladder = work.ladder or (work.gear,)
        plans = [self._plan(gear, *_shape(work)[1:]) for gear in ladder]
        shown = [better for better, plan in enumerate(plans[:-1]) if any(_less(row, plan) for row in rows)]
        return {
            "gear": ladder[shown[-1] + 1] if shown else ladder[0],
            "layer_evals": sum(sum(row.ran) for row in rows),
            "layer_evals_full": sum(sum(row.full) for row in rows),
            "floor_broken": any(_less(row, plans[-1]) for row in rows),
        }

    def shift(self, work: GenerateWork, slots: Sequence[int]) -> None:
        """Run what is left of rows in another gear."""
        for slot in slots:
            self._rows[slot].plan = self._plan(*_shape(work))

    def save(self, slots: Sequence[int]) -> Sequence[bytes]:
        """Nothing: no worker dies here."""
        return [b""] * len(slots)

    def restore(self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int], states: Sequence[bytes]) -> Any:
        """ValueError: nothing is ever saved, so every state is another task's; the engine begins such rows again."""
        raise ValueError("a simulated row has no saved state")

    def preview(self, slots: Sequence[int]) -> Sequence[None]:
        """Nothing to see."""
        return [None] * len(slots)

    def _planned(
        self, gear: str, steps: int, guidance: float, solver: SolverName, interval: tuple[float, float]
    ) -> tuple[float, ...]:
        """Units of each evaluation of a row; at full depth for the gear without a name."""
        whole = Gear("", ExitSchedule((1.0,), (self.info.depth,)), solver, steps, guidance)
        chosen = self._gears[gear] if gear else whole
        return tuple(map(float, planned_blocks(chosen, steps, guidance, solver, interval)))


def _less(row: SimRow, plan: Sequence[float]) -> bool:
    """Whether an evaluation of a row had less than planned."""
    return any(ran < planned for ran, planned in zip(row.ran, plan, strict=True))


def _shape(work: GenerateWork) -> tuple[str, int, float, SolverName, tuple[float, float]]:
    return work.gear, work.steps, work.guidance, work.solver, work.guidance_interval
