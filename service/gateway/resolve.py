"""From what was asked to what will be done: names checked against the catalogue, defaults filled in. Pure."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from models.api import (
    SEED_LIMIT,
    ClassifyParams,
    ClassifyWork,
    Gear,
    GenerateParams,
    GenerateWork,
    ImageFormat,
    MethodName,
    ModelInfo,
    SolverName,
    SolverOptions,
)
from service.errors import BadRequest, NoWorker, UnknownName
from service.gateway.ladder import AUTO, gears_for, methods_for, refuse_of_named
from service.ladders import moved, rungs_of

_MASK = 2**64 - 1


def pick_model(infos: Mapping[str, ModelInfo], name: str | None, task: Literal["generate", "classify"]) -> ModelInfo:
    """The named model of this task, or the first by name; NoWorker when there is none at all."""
    served = {key: infos[key] for key in sorted(infos) if infos[key].task == task}
    if not served:
        raise NoWorker(f"no worker advertises a model for /{task} now")
    if name is None:
        return next(iter(served.values()))
    if name not in served:
        raise unknown("model", name, served)
    return served[name]


def generate_work(params: GenerateParams, info: ModelInfo, image_format: ImageFormat) -> GenerateWork:
    """Every choice of a generate job made.

    Explicit steps, solver and guidance that differ from the gear's replace them and are listed in
    `overrides`. Image i has seed (seed + i) mod 2^53 and, where no label was asked for, the label
    that this seed hashes to: one image's label never depends on its neighbours.
    """
    if params.gear != AUTO:
        refuse_of_named(params)
    gear = pick_gear(info, next(iter(rungs_of(info)), AUTO) if params.gear == AUTO else params.gear)
    solver = pick_solver(info, params.solver or gear.solver)
    mine = gear.solver_options if solver == gear.solver else SolverOptions()
    asked: dict[str, Any] = {
        "solver": solver,
        "steps": params.steps,
        "solver_options": mine if params.solver_options is None else merged(mine, params.solver_options),
        "guidance": params.guidance,
        "guidance_interval": pick_interval(params.guidance_interval),
    }
    chosen = {key: getattr(gear, key) if value is None else value for key, value in asked.items()}
    base = secrets.randbelow(SEED_LIMIT) if params.seed is None else params.seed
    seeds = tuple((base + i) % SEED_LIMIT for i in range(params.n))
    label = None if params.label is None else pick_label(info.labels, params.label)
    work = GenerateWork(
        model=info.name,
        labels=tuple(splitmix64(seed) % len(info.labels) if label is None else label for seed in seeds),
        seeds=seeds,
        gear=gear.name,
        overrides=tuple(key for key, value in chosen.items() if value != getattr(gear, key)),
        format=image_format,
        **chosen,
    )
    if params.gear != AUTO:
        return work
    ladder = gears_for(params, info, work)
    return replace(work, gear=ladder[0], ladder=ladder)


def classify_work(params: ClassifyParams, info: ModelInfo, images: Sequence[bytes]) -> ClassifyWork:
    """A classify job; `images` are already uint8 HWC bytes of the model's shape."""
    ladder = methods_for(params, info)
    method = ladder[0].partition("@")[0] if ladder else params.method or default_method(params, info)
    if method not in info.methods:
        raise unknown("method", method, (AUTO, *info.methods))
    check_purify(params, method, info)
    if params.alpha is not None and method not in info.sets:
        raise BadRequest(f"{info.name} has no calibrated prediction sets for {method}", field="alpha")
    check_cost(params.max_cost, method, info)
    work = ClassifyWork(
        model=info.name,
        images=tuple(images),
        method=cast(MethodName, method),
        top_k=min(params.top_k, len(info.labels)),
        alpha=params.alpha,
        max_cost=params.max_cost,
        purify=params.purify,
        ladder=ladder,
    )
    return moved(work, ladder[0]) if ladder else work


def default_method(params: ClassifyParams, info: ModelInfo) -> str:
    """The model's own, unless an option asks for one that has it."""
    if params.max_cost is not None and info.cascade:
        return "cascade"
    if params.purify is not None and info.purifier is not None and info.default_method not in info.purifier.methods:
        return info.purifier.methods[0]
    return info.default_method


def check_purify(params: ClassifyParams, method: str, info: ModelInfo) -> None:
    """Refuse to purify where the model or the method cannot, and to promise sets that do not hold then."""
    if params.purify is None:
        return
    if info.purifier is None:
        raise BadRequest(f"{info.name} has no purifier: drop purify", field="purify")
    if method not in info.purifier.methods:
        known = ", ".join(info.purifier.methods)
        raise BadRequest(f"{method} does not answer purified images; these do: {known}", field="purify")
    if params.alpha is not None:
        raise BadRequest("sets were calibrated on images that are not purified: drop alpha, or purify", field="alpha")


def check_cost(max_cost: float | None, method: str, info: ModelInfo) -> None:
    """Refuse a max_cost that `method` cannot keep."""
    if max_cost is None:
        return
    if method != "cascade":
        raise BadRequest("only method cascade chooses what to spend: drop max_cost, or ask for it", field="max_cost")
    if max_cost < info.cascade[0].cost:
        least = math.ceil(100 * info.cascade[0].cost) / 100
        raise BadRequest(f"must be at least {least}, what the cheapest answer costs, got {max_cost}", field="max_cost")


def pick_gear(info: ModelInfo, name: str) -> Gear:
    """The gear called `name`."""
    gears = {gear.name: gear for gear in info.gears}
    if name not in gears:
        raise unknown("gear", name, (AUTO, *gears))
    return gears[name]


def pick_solver(info: ModelInfo, name: SolverName) -> SolverName:
    """The solver, if it fits the model's diffusion process."""
    if info.solvers and name not in info.solvers:
        raise unknown("solver", name, info.solvers)
    return name


def merged(base: SolverOptions, given: SolverOptions) -> SolverOptions:
    """`base` with what `given` sets."""
    return replace(base, **given.given())  # type: ignore[arg-type]


def pick_interval(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """The guidance interval, its ends in order."""
    if interval is not None and interval[0] > interval[1]:
        raise BadRequest(
            f"from {interval[0]} to {interval[1]} falls: give the lower end first", field="guidance_interval"
        )
    return interval


def pick_label(labels: Sequence[str], label: int | str) -> int:
    """Index of a class given by index or, whatever its case, by name."""
    if isinstance(label, int):
        if 0 <= label < len(labels):
            return label
        raise UnknownName(f"label {label} is not below {len(labels)}, the number of classes", field="label")
    names = {name.casefold(): index for index, name in enumerate(labels)}
    if label.casefold() not in names:
        raise unknown("label", label, labels)
    return names[label.casefold()]


def splitmix64(x: int) -> int:
    """The first output of splitmix64 seeded with `x` (Steele, Lea, Flood 2014): 64 well-mixed bits."""
    z = (x + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def unknown(field: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error that names the field and lists what is known."""
    return UnknownName(f"unknown {field} {name!r}; known: {', '.join(known)}", field=field)
