"""Which fixed schedule is best at a budget: candidates from two cost tables, judged by what they sample."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.api import ExitSchedule, Gear
from models.evaluation import generate
from models.evaluation.generate import Judge
from models.exits.optimise import equal_edges, greedy, optimise, to_schedule, uniform_times, visits
from models.exits.plan import make, plan
from models.tasks.gears import read_gears, write_gears
from models.tasks.generator import load_model
from models.training.data import Images, Splits
from models.training.diffusion import Batches
from models.training.exits import error_table

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Screen:
    """How candidates are sampled: images each, first seed, bfloat16 networks, engines at a time."""

    n: int
    seed: int = 0
    bf16: bool = True
    workers: int = 1


@dataclass(frozen=True)
class Found:
    """A candidate and its quality. `deviation`: mean squared difference from the full-depth images, in [-1, 1]."""

    gear: Gear
    layer_evals_ratio: float
    frechet: float
    class_accuracy: float
    deviation: float


def draw(folder: Path, gears: Sequence[Gear], screen: Screen) -> dict[str, tuple[Images, float]]:
    """As `generate.draw`, of gears that the folder does not have."""
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / folder.name
        shutil.copytree(folder, copy)
        entries = [
            {
                "name": gear.name,
                "schedule": {"edges": gear.schedule.edges, "depths": gear.schedule.depths},
                "solver": gear.solver,
                "steps": gear.steps,
                "guidance": gear.guidance,
                "solver_options": gear.solver_options.given(),
                "guidance_interval": list(gear.guidance_interval),
            }
            for gear in gears
        ]
        write_gears(copy, entries, "full")
        return generate.draw(copy, screen.n, screen.seed, bf16=screen.bf16, workers=screen.workers)


def deviation(a: Images, b: Images) -> float:
    """Mean squared difference of uint8 images, on the scale [-1, 1]."""
    return float(np.square((a.astype(np.float64) - b) / 127.5).mean())


def sensitivity(folder: Path, full: Gear, depths: Sequence[int], bins: int, screen: Screen) -> Floats:
    """Deviation of the final image when one bin alone runs a shallower exit, (len(depths), bins), same noise.

    The last of `depths` is full depth, whose row is 0.
    """
    whole = depths[-1]
    gears = [full]
    for depth in depths[:-1]:
        for b in range(bins):
            per_bin = tuple(depth if i == b else whole for i in range(bins))
            schedule = ExitSchedule(equal_edges(bins), per_bin)
            gears.append(dataclasses.replace(full, name=f"{depth}@{b}", schedule=schedule))
    drawn = draw(folder, gears, screen)
    costs = [deviation(drawn[gear.name][0], drawn[full.name][0]) for gear in gears[1:]]
    return np.array([*costs, *[0.0] * bins]).reshape(len(depths), bins)


def calibrate(
    folder: Path, splits: Splits, shallowest: int, bins: int, screen: Screen
) -> tuple[list[int], Floats, Floats]:
    """Exits, their v errors on the selection images, and their sensitivities."""
    model, _, _ = load_model(folder)
    full = next(gear for gear in read_gears(folder, model.depth)[0] if gear.name == "full")
    depths = list(range(shallowest, model.depth + 1))
    batches = Batches(splits.selection.images, splits.selection.labels, model.null_label, 0.1)
    return depths, error_table(model, batches, depths, bins), sensitivity(folder, full, depths, bins, screen)


def candidates(
    full: Gear, depths: Sequence[int], errors: Floats, costs: Floats, drops: Sequence[float], shares: Sequence[float]
) -> list[Gear]:
    """At the budget of each ASE list: the list, greed and dynamic programming; at each share: the latter alone."""
    depth, bins = depths[-1], errors.shape[1]
    times = uniform_times(full.steps)
    evaluations = visits(times, bins)

    def gear(name: str, schedule: ExitSchedule) -> Gear:
        return dataclasses.replace(full, name=name, schedule=schedule)

    made = [full]
    for drop in drops:
        hand = make({"exit": "ase", "drop": drop}, depth)
        budget = sum(plan(hand, times))
        made.append(gear(f"ase {drop:g}", hand))
        made.append(gear(f"greedy {drop:g}", to_schedule(greedy(errors, depths, evaluations, budget))))
        made.append(gear(f"dp error {drop:g}", to_schedule(optimise(errors, depths, evaluations, budget))))
        made.append(gear(f"dp final {drop:g}", to_schedule(optimise(costs, depths, evaluations, budget))))
        free = optimise(costs, depths, evaluations, budget, falling=False)
        made.append(gear(f"dp final, free {drop:g}", to_schedule(free)))
    for share in shares:
        budget = round(share * depth * len(times))
        made.append(gear(f"dp error {share:.0%}", to_schedule(optimise(errors, depths, evaluations, budget))))
        made.append(gear(f"dp final {share:.0%}", to_schedule(optimise(costs, depths, evaluations, budget))))
    return made


def compare(folder: Path, judge: Judge, gears: Sequence[Gear], screen: Screen) -> list[Found]:
    """Sample every candidate with the same noise; the first is full depth."""
    drawn = draw(folder, gears, screen)
    whole, blocks = drawn[gears[0].name]
    found = []
    for gear in gears:
        images, layer_evals = drawn[gear.name]
        score = judge.score(images)
        ratio = layer_evals / blocks
        found.append(Found(gear, ratio, score.frechet, score.class_accuracy, deviation(images, whole)))
    return found


def rows(found: Sequence[Found], bins: int) -> list[list[Any]]:
    """Table rows: name, depth per bin, saved, Frechet distance, its ratio to full depth, agreement, deviation."""
    middles = [edge - 0.5 / bins for edge in equal_edges(bins)]
    return [
        [
            f.gear.name,
            " ".join(str(d) for d in plan(f.gear.schedule, middles)),
            f"{1 - f.layer_evals_ratio:.1%}",
            f"{f.frechet:.4f}",
            f"{f.frechet / found[0].frechet:.3f}",
            f"{f.class_accuracy:.1%}",
            f"{f.deviation:.5f}",
        ]
        for f in found
    ]
