"""Which rungs a request with gear or method `auto` leaves the service to choose from."""

from __future__ import annotations

import math
from dataclasses import replace

from models.api import (
    ClassifyParams,
    ExitSchedule,
    Gear,
    GenerateParams,
    GenerateWork,
    ModelInfo,
    planned_layer_evals,
)
from service.errors import BadRequest, UnknownName
from service.ladders import CLASSIFY, method_time, rungs_of

AUTO = "auto"


def gears_for(params: GenerateParams, info: ModelInfo, work: GenerateWork) -> tuple[str, ...]:
    """Gears of a request for `auto`, best first: those that keep `max_compute` and `floor`.

    `work` has the steps, solver and guidance that the request asks for, which decide what a gear takes.

    Raises:
        BadRequest, UnknownName: a floor that no gear has, or a `max_compute` that none keeps.
    """
    if params.floor is not None and not isinstance(params.floor, str) and work.overrides:
        other = " and ".join(work.overrides)
        raise BadRequest(f"no gear's class accuracy is known at other {other}: name a gear as floor", field="floor")
    rungs = [gear for name in rungs_of(info) for gear in info.gears if gear.name == name]
    return tuple(gear.name for gear in _above(params.floor, _within(params.max_compute, rungs, info, work), info))


def refuse_of_named(params: GenerateParams) -> None:
    """BadRequest for what only gear `auto` has."""
    for name in ("floor", "max_compute"):
        if getattr(params, name) is not None:
            raise BadRequest("a named gear is never changed: drop it, or ask for gear auto", field=name)


def _within(most: float | None, rungs: list[Gear], info: ModelInfo, work: GenerateWork) -> list[Gear]:
    if most is None:
        return rungs
    whole = _evals(replace(rungs[0], schedule=ExitSchedule((1.0,), (info.depth,))), work)
    shares = [_evals(gear, work) / whole for gear in rungs]
    if shares[-1] > most:
        least = math.ceil(100 * shares[-1]) / 100
        raise BadRequest(f"must be at least {least:g}, what gear {rungs[-1].name} takes", field="max_compute")
    return [gear for gear, share in zip(rungs, shares, strict=True) if share <= most]


def _evals(gear: Gear, work: GenerateWork) -> int:
    return planned_layer_evals(gear, work.steps, work.guidance, 1, work.solver, work.guidance_interval)


def _above(floor: str | float | None, rungs: list[Gear], info: ModelInfo) -> list[Gear]:
    """Without a floor that is the model's default gear, or the best where `max_compute` lies below it."""
    names = [gear.name for gear in rungs]
    if floor is None:
        return rungs[: names.index(info.default_gear) + 1] if info.default_gear in names else rungs[:1]
    if isinstance(floor, str):
        if floor in names:
            return rungs[: names.index(floor) + 1]
        known = rungs_of(info)
        if floor in known:
            raise BadRequest(f"gear {floor} takes more than max_compute allows: lower it", field="floor")
        raise UnknownName(f"unknown gear {floor!r}; a floor is one of {', '.join(known)}, or a number", field="floor")
    fit = [gear for gear in rungs if gear.class_accuracy is not None and gear.class_accuracy >= floor]
    if not fit:
        best = max((gear.class_accuracy or 0.0 for gear in rungs), default=0.0)
        raise BadRequest(f"no allowed gear has a class accuracy of {floor:g}; the best has {best:g}", field="floor")
    return fit


def methods_for(params: ClassifyParams, info: ModelInfo) -> tuple[str, ...]:
    """Rungs of a classification, best first, none cheaper than `floor`; none at all for a named method.

    Raises:
        BadRequest, UnknownName: a floor that the model does not have, or an option that only a named method has.
    """
    if params.method != AUTO:
        if params.floor is not None:
            raise BadRequest("a named method is never changed: drop floor, or ask for method auto", field="floor")
        return ()
    for name in ("purify", "max_cost"):
        if getattr(params, name) is not None:
            raise BadRequest(f"{name} is of a named method: drop it, or name the method", field=name)
    rungs = rungs_of(info)
    if not rungs:
        raise BadRequest(f"{info.name} has none of {', '.join(CLASSIFY)}: name a method", field="method")
    if params.alpha is not None:
        rungs = tuple(rung for rung in rungs if rung.partition("@")[0] in info.sets)
        if not rungs:
            raise BadRequest(f"{info.name} has no calibrated prediction sets", field="alpha")
    if params.floor is None:
        return rungs
    if params.floor not in info.methods:
        raise UnknownName(
            f"{info.name} has no method {params.floor!r}; known: {', '.join(info.methods)}", field="floor"
        )
    least = method_time(params.floor, info)
    return tuple(rung for rung in rungs if method_time(rung, info) >= least) or rungs[:1]
