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
STEP = 0.85  # a rung of a classifier takes at most so much of the time of the one before
Work = GenerateWork | ClassifyWork


def rungs_of(info: ModelInfo) -> tuple[str, ...]:
    """The model's rungs. Of gears those that differ from the default gear by their exits alone, and nowhere run more
    blocks than the one before: a row may change from one to the next at any evaluation, and a floor holds at each.
    Of methods an ensemble for every image, for fewer and fewer of those that are flagged, for none; each cheaper.
    """
    return _methods(info) if info.task == "classify" else tuple(gear.name for gear in _gears(info))


def _gears(info: ModelInfo) -> list[Gear]:
    found = sorted(info.gears, key=lambda gear: (-_area(gear), gear.name))
    usual = next((gear for gear in found if gear.name == info.default_gear), found[0] if found else None)
    kept: list[Gear] = []
    for gear in found:
        if usual and _like(gear, usual) and (not kept or _under(gear, kept[-1])):
            kept.append(gear)
    return kept


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


def _methods(info: ModelInfo) -> tuple[str, ...]:
    points = [f"cascade@{math.ceil(1e4 * point.cost) / 1e4:.4f}" for point in reversed(info.cascade)]
    kept: list[str] = []
    for name in CLASSIFY:
        for rung in points or ["cascade"] if name == "cascade" else [name]:
            if name in info.methods and (not kept or method_time(rung, info) <= STEP * method_time(kept[-1], info)):
                kept.append(rung)
    return tuple(kept)


def method_time(rung: str, info: ModelInfo) -> float:
    """Time of a rung or method relative to `single`: measured, its cost where it was not, of a cascade that of its
    cheapest point and of the ensemble for its share of images."""
    name, _, most = rung.partition("@")
    if name != "cascade" or not most or not info.cascade:
        return info.times.get(name) or info.methods.get(name, 1.0)
    first = info.cascade[0].cost
    share = max(point.share for point in info.cascade if point.cost <= max(float(most), first))
    same = [method for method, cost in info.methods.items() if math.isclose(cost, first) and method != "cascade"]
    return (info.times.get(same[0], first) if same else first) + share * method_time("ensemble", info)


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
    """Where work with this ladder runs when its model is at rung `level`: there, at the next below that the ladder has,
    or at its last. A ladder of which the model knows nothing is that of another version: its first."""
    known = [rung for rung in ladder if rung in rungs] or ladder[:1]
    return next((rung for rung in known if rung in rungs and rungs.index(rung) >= level), known[-1])


def units(work: Work, info: ModelInfo) -> list[float]:
    """What each evaluation of one row takes: blocks x network rows, or a classification's time relative to `single`.

    None for a gear that the model does not have: whoever runs it says so.
    """
    if isinstance(work, GenerateWork):
        gears = [gear for gear in info.gears if gear.name == work.gear]
        return [
            float(blocks)
            for gear in gears
            for blocks in planned_blocks(gear, work.steps, work.guidance, work.solver, work.guidance_interval)
        ]
    rung = work.method if work.max_cost is None else f"{work.method}@{work.max_cost}"
    return [method_time(rung, info) * (work.purify or 1)]
