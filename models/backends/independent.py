"""Backends for a model of several independent networks: a program for each of its parts, and a line that says why.

A backend that cannot work here, or that suits only diffusion backbones, leaves the networks as they are: /classify
never refuses to start for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean

import torch

from models.backends.auto import WORTH_IT
from models.backends.compiled import check_tools, compile_part
from models.backends.interface import TOLERANCE, BackendUnavailable, Place, relative_error
from models.backends.onnx import Exports
from models.backends.parts import Part, Program

RIVALS = ("onnx",)  # what `auto` compares with eager
ROWS = (1, 8, 32)
REPEATS = 7
log = logging.getLogger(__name__)


Programs = Mapping[str, Program]
Measure = Callable[[Program, Part, int], float]


def build(backend: str, parts: Sequence[Part], place: Place) -> tuple[Programs, str]:
    """Programs by the parts' names, and a note: what runs them, or why that is eager after all."""
    eager = {part.name: part.run for part in parts}
    if backend == "auto":
        return choose(eager, parts, place)
    try:
        return make(backend, parts, place)
    except BackendUnavailable as error:
        log.warning("backend %s is not used: %s", backend, error)
        return eager, f"eager: {backend} is not used: {error}"


def make(backend: str, parts: Sequence[Part], place: Place, deadline: float = math.inf) -> tuple[Programs, str]:
    """As the backend does it; BackendUnavailable with the reason where it cannot, or not by `time.monotonic()`."""
    began = time.monotonic()
    if backend == "eager":
        return {part.name: part.run for part in parts}, "eager: the networks op by op"
    if backend == "compiled":
        check_tools(place.device)
        programs = in_time(parts, compile_part, deadline)
        return programs, f"compiled: torch.compile, {len(parts)} networks in {time.monotonic() - began:.0f} s"
    if backend == "onnx":
        exports = Exports(place)
        programs = in_time(parts, exports.program, deadline)
        took = f"{len(parts)} networks ({exports.made} exported) in {time.monotonic() - began:.1f} s"
        return programs, f"onnx: {exports.provider[0]}, {took}"
    raise BackendUnavailable(f"{backend} runs diffusion backbones only")


def in_time(parts: Sequence[Part], make: Callable[[Part], Program], deadline: float) -> Programs:
    """Every part's program; exports that were made before the time was up are kept for the next start."""
    programs = dict[str, Program]()
    for part in parts:
        if time.monotonic() > deadline:
            raise BackendUnavailable(f"the time was up after {len(programs)} of {len(parts)} networks")
        programs[part.name] = make(part)
    return programs


def seconds(program: Program, part: Part, rows: int) -> float:
    """Wall time of one call."""
    given = part.example(rows)
    began = time.perf_counter()
    with torch.inference_mode():
        if (last := program(*given)[0]).is_cuda:
            torch.cuda.synchronize(last.device)
    return time.perf_counter() - began


def choose(eager: Programs, parts: Sequence[Part], place: Place, measure: Measure = seconds) -> tuple[Programs, str]:
    """The fastest that was slower than eager at no batch size, over all parts, and agreed with it; eager otherwise.

    One for all batch sizes and parts: a row's bits must not depend on how many rows share its batch.
    """
    best, gain, note, verdicts = eager, WORTH_IT, "eager: the networks op by op", []
    for name in RIVALS:
        try:
            programs, said = make(name, parts, place, time.monotonic() + place.budget_s)
            gains = compare(eager, programs, parts, place, measure)
        except Exception as error:  # a rival's trouble is never the model's
            verdicts.append(f"{name}: {error}")
            continue
        verdicts.append(f"{name}: " + ", ".join(f"{value:.2f}x at {rows} rows" for rows, value in gains.items()))
        if min(gains.values()) >= 1.0 and geometric_mean(gains.values()) >= gain:
            best, gain, note = programs, geometric_mean(gains.values()), said
    return best, f"{note}; picked by measurement against eager: {'; '.join(verdicts)}"


def compare(
    eager: Programs, rival: Programs, parts: Sequence[Part], place: Place, measure: Measure
) -> dict[int, float]:
    """Eager's time over the rival's by rows, all parts together, least of turns that alternate.

    Raises:
        BackendUnavailable: the rival's numbers differ.
    """
    gains = {}
    for rows in sorted({min(rows, place.rows) for rows in ROWS}):
        base = own = 0.0
        for part in parts:
            check(eager[part.name], rival[part.name], part, rows)
            turns = [
                (measure(eager[part.name], part, rows), measure(rival[part.name], part, rows)) for _ in range(REPEATS)
            ]
            base, own = base + min(turn[0] for turn in turns), own + min(turn[1] for turn in turns)
        gains[rows] = base / own
    return gains


def check(eager: Program, rival: Program, part: Part, rows: int) -> None:
    """Refuse a program that is off by more than TOLERANCE."""
    given = part.example(rows)
    with torch.inference_mode():
        off = max(map(relative_error, rival(*given), eager(*given)))
    if not off <= TOLERANCE:
        raise BackendUnavailable(f"{part.name} differs from eager by {off:.1e} at {rows} rows")
