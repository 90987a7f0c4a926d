"""A torch-free Task: a row's pixels depend on its seed and on the evaluations it had, and on nothing else.

A row labelled EARLY needs one evaluation, whatever it was admitted with. Labels make trouble: REFUSED is
a user's mistake; BAD_ADMIT, BAD_STEP, BAD_COLLECT raise in that verb, BAD_PIXELS cannot be encoded. A row that had an
evaluation can be saved and restored and has a preview.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.api import (
    ClassifiedRow,
    ClassifyWork,
    ExitSchedule,
    Gear,
    GeneratedRow,
    GenerateWork,
    ModelInfo,
    Runtime,
    StepStats,
    UserError,
    planned_layer_evals,
)

DEPTH = 4
EARLY = 4
REFUSED, BAD_ADMIT, BAD_STEP, BAD_COLLECT, BAD_PIXELS = 5, 6, 7, 8, 9
FULL = Gear("full", ExitSchedule((1.0,), (DEPTH,)), "ddim", 5, 1.0)


def pixels(seed: int, steps: int) -> NDArray[np.uint8]:
    """What a row looks like after `steps` evaluations."""
    return np.full((2, 3, 1), (seed * 7 + steps) % 256, np.uint8)


class Trouble(RuntimeError):
    """What bad labels raise."""


class ToyGenerate:
    """Every evaluation adds one; `step_s` makes it slow, `evaluated` lists every (seed, evaluation).

    No more than `at_once` rows move in a step; the others wait.
    """

    def __init__(self, name: str = "toy", capacity: int = 4, step_s: float = 0.0, at_once: int | None = None) -> None:
        self.info = ModelInfo(
            name=name,
            task="generate",
            labels=tuple("0123456789"),
            image=(2, 3, 1),
            weights="feed",
            depth=DEPTH,
            gears=(FULL,),
            default_gear="full",
        )
        self.capacity, self.step_s, self.at_once = capacity, step_s, capacity if at_once is None else at_once
        self.rows: dict[int, tuple[int, int, int]] = {}
        self.batches: list[list[int]] = []
        self.evaluated: list[tuple[int, int]] = []
        self.shifted: list[tuple[str, tuple[int, ...]]] = []

    def admit(self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        if work.labels[0] == REFUSED:
            raise UserError("eta is not of this solver", "solver_options.eta")
        if work.labels[0] == BAD_ADMIT:
            raise Trouble("admit")
        for index, slot in zip(indices, slots, strict=True):
            self.rows[slot] = (work.seeds[index], work.labels[index], 0)
        return [work.steps] * len(slots)

    def step(self, slots: Sequence[int]) -> StepStats:
        time.sleep(self.step_s)
        waiting = frozenset(slots[self.at_once :])
        slots = slots[: self.at_once]
        self.batches.append(list(slots))
        if any(self.rows[slot][1] == BAD_STEP for slot in slots):
            raise Trouble("step")
        for slot in slots:
            seed, label, done = self.rows[slot]
            self.rows[slot] = (seed, label, done + 1)
            self.evaluated.append((seed, done))
        rows, early = len(slots), frozenset(slot for slot in slots if self.rows[slot][1] == EARLY)
        return StepStats(rows, 0, waiting, early, rows * DEPTH, rows * DEPTH, {(0, DEPTH): rows})

    def collect(self, slots: Sequence[int]) -> Sequence[GeneratedRow]:
        return [self._row(slot) for slot in slots]

    def save(self, slots: Sequence[int]) -> Sequence[bytes]:
        return [json.dumps(self.rows[slot]).encode() if self.rows[slot][2] else b"" for slot in slots]

    def restore(
        self, work: GenerateWork, indices: Sequence[int], slots: Sequence[int], states: Sequence[bytes]
    ) -> Sequence[int]:
        rows = [(int(seed), int(label), int(done)) for seed, label, done in map(json.loads, states)]
        for index, (seed, label, done) in zip(indices, rows, strict=True):
            if (seed, label) != (work.seeds[index], work.labels[index]) or not 0 < done <= work.steps:
                raise ValueError("a state of another row")
        self.rows |= dict(zip(slots, rows, strict=True))
        return [work.steps - done for _, _, done in rows]

    def shift(self, work: GenerateWork, slots: Sequence[int]) -> None:
        self.shifted.append((work.gear, tuple(slots)))

    def preview(self, slots: Sequence[int]) -> Sequence[NDArray[np.uint8] | None]:
        rows = [self.rows[slot] for slot in slots]
        return [pixels(seed, done) if done else None for seed, _, done in rows]

    def _row(self, slot: int) -> GeneratedRow:
        seed, label, done = self.rows[slot]
        if label == BAD_COLLECT:
            raise Trouble("collect")
        image: Any = pixels(seed, done) if label != BAD_PIXELS else pixels(seed, done).astype(float)
        return GeneratedRow(image, label, seed, (DEPTH,) * done, DEPTH * done, DEPTH * done)

    def price(self, work: GenerateWork) -> int:
        return planned_layer_evals(FULL, work.steps, work.guidance, work.rows)

    def receipt(self, work: GenerateWork, rows: Sequence[GeneratedRow]) -> dict[str, Any]:
        ran = sum(row.layer_evals for row in rows)
        return {
            "gear": work.gear,
            "solver": work.solver,
            "steps": work.steps,
            "guidance": work.guidance,
            "overrides": list(work.overrides),
            "depth": DEPTH,
            "exit_depths": list(rows[0].exit_depths),
            "layer_evals": ran,
            "layer_evals_full": ran,
            "compute_saved": 0.0,
        }


class ToyClassify:
    """Answers at admission (no evaluation): the class is the image's first byte."""

    def __init__(self, name: str = "judge", capacity: int = 4) -> None:
        self.info = ModelInfo(
            name=name,
            task="classify",
            labels=("a", "b"),
            image=(1, 1, 1),
            weights="beef",
            methods={"single": 1.0},
            calls={"single": 1},
            default_method="single",
        )
        self.capacity = capacity
        self.rows: dict[int, int] = {}

    def admit(self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        for index, slot in zip(indices, slots, strict=True):
            self.rows[slot] = work.images[index][0]
        return [0] * len(slots)

    def step(self, slots: Sequence[int]) -> StepStats:
        raise Trouble("nothing to step")

    def collect(self, slots: Sequence[int]) -> Sequence[ClassifiedRow]:
        uncertainty = {"entropy": 0.1, "disagreement_source_vs_estimate": 0.2}
        return [ClassifiedRow(tuple(float(k == self.rows[slot]) for k in range(2)), uncertainty) for slot in slots]

    def save(self, slots: Sequence[int]) -> Sequence[bytes]:
        return [b""] * len(slots)

    def restore(
        self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int], states: Sequence[bytes]
    ) -> Sequence[int]:
        raise ValueError("nothing was saved")

    def shift(self, work: ClassifyWork, slots: Sequence[int]) -> None:
        """Rows go on as they began."""

    def preview(self, slots: Sequence[int]) -> Sequence[None]:
        return [None] * len(slots)

    def price(self, work: ClassifyWork) -> int:
        return work.rows

    def receipt(self, work: ClassifyWork, rows: Sequence[ClassifiedRow]) -> dict[str, Any]:
        return {"method": work.method, "cost_vs_single": 1.0}


def load_generate(folder: Path, slots: int, device: str, runtime: Runtime) -> ToyGenerate:
    name = json.loads((folder / "config.json").read_text())["name"]
    return ToyGenerate(name, slots, float(os.environ.get("TOY_STEP_S", "0")))


def load_classify(folder: Path, slots: int, device: str, runtime: Runtime) -> ToyClassify:
    return ToyClassify(json.loads((folder / "config.json").read_text())["name"], slots)
