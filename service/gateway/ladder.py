"""Which rungs a request with gear or method `auto` leaves the service to choose from."""

from __future__ import annotations

import math

from models.api import ClassifyParams, Gear, GenerateParams, ModelInfo, planned_layer_evals
from service.errors import BadRequest, UnknownName
from service.ladders import CLASSIFY, rungs_of

AUTO = "auto"


def gears_for(params: GenerateParams, info: ModelInfo) -> tuple[str, ...]:
    """Gears of a request, best first: those that keep `max_compute` and `floor`; none for a named gear.

    Raises:
        BadRequest, UnknownName: a floor that no gear has, a `max_compute` that none keeps, or either of a named gear.
    """
    if params.gear != AUTO:
        for name in ("floor", "max_compute"):
            if getattr(params, name) is not None:
                raise BadRequest("a named gear is never changed: drop it, or ask for gear auto", field=name)
        return ()
    gears = {gear.name: gear for gear in info.gears}
    rungs = [gears[name] for name in rungs_of(info)]
    return tuple(gear.name for gear in _above(params.floor, _within(params.max_compute, rungs), info))


def _within(most: float | None, rungs: list[Gear]) -> list[Gear]:
    if most is None:
        return rungs
    whole = _evals(rungs[0])
    kept = [gear for gear in rungs if _evals(gear) <= most * whole]
    if not kept:
        least = math.ceil(100 * _evals(rungs[-1]) / whole) / 100
        raise BadRequest(f"must be at least {least:g}, what gear {rungs[-1].name} takes", field="max_compute")
    return kept


def _evals(gear: Gear) -> int:
    return planned_layer_evals(gear, 100, 1.0, 1)


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
            raise BadRequest(
                f"gear {floor} takes more than max_compute allows: raise it, or lower the floor", field="floor"
            )
        raise UnknownName(f"unknown gear {floor!r}; a floor is one of {', '.join(known)}, or a number", field="floor")
    fit = [gear for gear in rungs if gear.class_accuracy is not None and gear.class_accuracy >= floor]
    if not fit:
        best = max((gear.class_accuracy or 0.0 for gear in rungs), default=0.0)
        raise BadRequest(
            f"no gear that is allowed has a class accuracy of {floor:g}; the best has {best:g}", field="floor"
        )
    return rungs[: rungs.index(fit[-1]) + 1]


def methods_for(params: ClassifyParams, info: ModelInfo) -> tuple[str, ...]:
    """Rungs of a classification, best first; none for a named method.

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
        rungs = tuple(rung for rung in rungs if _method(rung) in info.sets)
        if not rungs:
            raise BadRequest(f"{info.name} has no calibrated prediction sets", field="alpha")
    if params.floor is None:
        return rungs
    kept = [i for i, rung in enumerate(rungs) if _method(rung) == params.floor]
    if not kept:
        known = ", ".join(dict.fromkeys(map(_method, rungs)))
        raise UnknownName(f"{params.floor!r} is no floor of {info.name}; known: {known}", field="floor")
    return rungs[: kept[-1] + 1]


def _method(rung: str) -> str:
    return rung.partition("@")[0]
