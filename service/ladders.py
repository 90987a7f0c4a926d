"""Rungs: ways to answer that a model has, best and dearest first, and which of them a job may run in.

A rung is a gear of a generator, or a method of a classifier; `cascade@1.2` is method cascade with `max_cost` 1.2.
Pure; gateway and worker both go by it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import cast, overload

from models.api import ClassifyWork, Gear, GenerateWork, MethodName, ModelInfo, planned_blocks

CLASSIFY = ("ensemble", "cascade", "bridge", "single")
Work = GenerateWork | ClassifyWork


def rungs_of(info: ModelInfo) -> tuple[str, ...]:
    """The model's rungs. Of gears those that differ from the best by their exits alone, and nowhere run more blocks
    than the one before: a row may change from one to the next at any evaluation, and a floor holds at each.
    """
    if info.task == "classify":
        return _methods(info)
    kept: list[Gear] = []
    for gear in sorted(info.gears, key=lambda gear: (-_area(gear), gear.name)):
        if not kept or (_like(gear, kept[0]) and _under(gear, kept[-1])):
            kept.append(gear)
    return tuple(gear.name for gear in kept)


def _methods(info: ModelInfo) -> tuple[str, ...]:
    """An ensemble for every image, for fewer and fewer of those that are flagged, for none."""
    points = [f"cascade@{math.ceil(1e4 * point.cost) / 1e4}" for point in reversed(info.cascade)]  # never below
    found = {"cascade": points or ["cascade"]}
    return tuple(rung for name in CLASSIFY if name in info.methods for rung in found.get(name, [name]))


def _area(gear: Gear) -> float:
    """Mean blocks over diffusion time."""
    edges = (0.0, *gear.schedule.edges)
    return sum(depth * (b - a) for depth, (a, b) in zip(gear.schedule.depths, pairwise(edges), strict=True))


def _like(gear: Gear, other: Gear) -> bool:
    """Whether two gears have the same trajectory."""
    names = ("solver", "steps", "guidance", "solver_options", "guidance_interval")
    return all(getattr(gear, name) == getattr(other, name) for name in names)


def _under(gear: Gear, other: Gear) -> bool:
    """Whether `gear` nowhere runs more blocks than `other`."""
    starts = {0.0, *gear.schedule.edges[:-1], *other.schedule.edges[:-1]}
    return all(gear.schedule.depth(u) <= other.schedule.depth(u) for u in starts)


@overload
def moved(work: GenerateWork, rung: str) -> GenerateWork: ...
@overload
def moved(work: ClassifyWork, rung: str) -> ClassifyWork: ...
@overload
def moved(work: Work, rung: str) -> Work: ...
def moved(work: Work, rung: str) -> Work:
    """The work in another rung."""
    if isinstance(work, GenerateWork):
        return replace(work, gear=rung)
    name, _, cost = rung.partition("@")
    return replace(work, method=cast(MethodName, name), max_cost=float(cost) if cost else None)


@lru_cache(1024)
def rung_at(ladder: tuple[str, ...], rungs: tuple[str, ...], level: int) -> str:
    """Where work with this ladder runs when its model is at rung `level`: there, or as near above as it may go."""
    known = [rung for rung in ladder if rung in rungs] or ladder[:1]
    return next((rung for rung in known if rung in rungs and rungs.index(rung) >= level), known[-1])


def units(work: Work, info: ModelInfo) -> list[float]:
    """What each evaluation of one row takes: blocks x network rows, or a classification's time relative to `single`."""
    if isinstance(work, GenerateWork):
        gear = next(gear for gear in info.gears if gear.name == work.gear)
        blocks = planned_blocks(gear, work.steps, work.guidance, work.solver, work.guidance_interval)
        return [float(n) for n in blocks]
    time = info.times.get(work.method) or info.methods.get(work.method, 1.0)
    if work.method == "cascade" and work.max_cost is not None and (mean := info.methods.get("cascade")):
        time *= min(work.max_cost, info.cascade[-1].cost) / mean if info.cascade else 1.0
    return [time * (work.purify or 1)]
