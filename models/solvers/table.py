"""The coefficient row that every solver fills: one per network evaluation, float64.

    net input  c_in x at time t;  o, v = net output, learned variance (if any)
    m  = clamp(c_x x + c_o o, -clip, clip)                 usually the denoised estimate
    y  = k_x x + k_m m + k_1 h1 + k_2 h2 + k_s s           corrector / re-anchoring
    x' = a_y y + a_o o + a_m m + a_1 h1 + a_2 h2 + a_s s + a_n exp((f lv1 + (1 - f) lv0) / 2) z
    (x, s, h1, h2) <- (x', y, m, h1)

f = (v + 1) / 2 places the log-variance between lv0 and lv1; without learned variance both are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models.solvers.base import Coefficients, Point, Process

FIELDS = (
    *("t", "c_in", "c_x", "c_o", "clip"),
    *("k_x", "k_m", "k_1", "k_2", "k_s"),
    *("a_y", "a_o", "a_m", "a_1", "a_2", "a_s", "a_n", "lv0", "lv1"),
)
INDEX = {name: i for i, name in enumerate(FIELDS)}
DEFAULTS = {"c_in": 1.0, "k_x": 1.0, "clip": math.inf}

STATES = ("x", "s", "h1", "h2")
READ_BY = {"s": ("k_s", "a_s"), "h1": ("k_1", "a_1"), "h2": ("k_2", "a_2")}

Table = NDArray[np.float64]  # (evaluations, len(FIELDS))


@dataclass(frozen=True)
class Trajectory:
    """A whole run of a solver, fixed at admission.

    Attributes:
        coef: coefficient rows, float64 (evaluations, len(FIELDS)); column `t` is the network's time.
        u: diffusion time in [0, 1] of each evaluation (evaluations,); exit schedules go by it.
        scale: standard deviation of the initial state.
        estimate: weights of the states (evaluations, len(STATES)) that sum to the estimate of x0 after an evaluation.
    """

    coef: Table
    u: NDArray[np.float64]
    scale: float
    estimate: NDArray[np.float64]

    @cached_property
    def reads(self) -> NDArray[np.bool_]:
        """Which states (evaluations + 1, len(STATES)) what is left of the run reads, after so many evaluations."""
        reads = np.zeros((len(self.u) + 1, len(STATES)), bool)
        reads[:, 0] = True
        for i, name in enumerate(STATES[1:], 1):
            reads[:-1, i] = self.coef[:, [INDEX[field] for field in READ_BY[name]]].any(1)
        reads[:-1, 2] |= reads[1:, 3]  # h1 is h2 one evaluation on
        return reads


def fill(rows: Sequence[Coefficients]) -> Table:
    """Coefficient dicts -> table (evaluations, fields); what a row does not name keeps its default."""
    table = np.zeros((len(rows), len(FIELDS)))
    for name, value in DEFAULTS.items():
        table[:, INDEX[name]] = value
    for i, row in enumerate(rows):
        for name, value in row.items():
            table[i, INDEX[name]] = value
    return table


def assemble(process: Process, evaluations: Sequence[tuple[Point, Coefficients]], scale: float) -> Trajectory:
    """Where the network is evaluated, and what follows, completed by the conversion of its output."""
    conversions = [process.denoise(point) for point, _ in evaluations]
    coef = fill([given | row for given, (_, row) in zip(conversions, evaluations, strict=True)])
    estimate = np.zeros((len(evaluations), len(STATES)))
    for i, (given, (_, row)) in enumerate(zip(conversions, evaluations, strict=True)):
        estimate[i, 1:3] = (given["c_x"], given["c_o"]) if "c_o" in row else (0.0, 1.0)  # there h1 is the bare output
    estimate[-1] = 1.0, 0.0, 0.0, 0.0
    return Trajectory(coef, np.array([point.u for point, _ in evaluations]), scale, estimate)


def transfer(here: Point, there: Point) -> Coefficients:
    """x' = alpha' m + sigma' (x - alpha m) / sigma: the same estimate and noise, at another time."""
    ratio = there.sigma / here.sigma
    return {"a_y": ratio, "a_m": there.alpha - here.alpha * ratio}
