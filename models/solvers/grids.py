"""Where a solver evaluates the network: `steps` points from noise to data, and the point that the run ends at.

Discrete processes follow diffusers (`set_timesteps`), whose spacing depends on the family of the solver:

- `index`: DDPM, DDIM. Whole trained times.
- `level`: Euler, Heun. `linspace` keeps fractional times.
- `multistep`: DPM-Solver++, UniPC. linspace and leading divide [0, T) in steps + 1 and leave the last out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.api import GridName, SolverOptions
from models.solvers.base import DATA, Point, Process
from models.solvers.edm import EDM
from models.solvers.flow import Flow
from models.solvers.options import SolverError
from models.solvers.vp import Continuous, Discrete

Family = Literal["index", "level", "multistep"]
Times = NDArray[np.float64]

BY_LEVEL: tuple[GridName, ...] = ("karras", "exponential", "logsnr")


@dataclass(frozen=True)
class Route:
    """Points (steps + 1) of falling noise, the last without evaluation; `scale`: std of the initial state."""

    points: tuple[Point, ...]
    scale: float

    def steps(self) -> Iterator[tuple[Point, Point]]:
        """(from, to) of each step."""
        return pairwise(self.points)


def path(process: Process, steps: int, options: SolverOptions, family: Family) -> Route:
    """The points of a run.

    Raises:
        SolverError: a grid that the process or the solver's family does not have; more steps than it has room for.
    """
    grid = choose(process, options.grid, family)
    if isinstance(process, Discrete) and steps > process.timesteps:
        raise SolverError(f"the process has {process.timesteps} times; ask for as many steps at most", "steps")
    to_floor = options.final_sigma == "sigma_min"
    if grid in BY_LEVEL:  # diffusers repeats the least level with sigma_min; here the last step ends at it
        points = by_level(process, grid, steps + to_floor, family)
    else:
        points = by_time(process, grid, steps, family) + [process.lowest] * to_floor
    if not to_floor:
        points.append(DATA)
    if any(there.ratio > here.ratio * (1.0 - 1e-9) for here, there in pairwise(points)):
        raise SolverError(f"the {grid} grid has no room for {steps} separate steps; ask for fewer", "steps")
    return Route(tuple(points), process.initial(points[0], grid, family == "level"))


def choose(process: Process, asked: GridName | None, family: Family) -> GridName:
    """The grid asked for, else the model's own where it fits, else the first that does."""
    known = grids_for(process, family)
    if asked is None:
        return process.grid if process.grid in known else known[0]
    if asked not in known:
        message = f"no {asked} grid for this solver on the {process.kind} process; it has {', '.join(known)}"
        raise SolverError(message, "solver_options.grid")
    return asked


def grids_for(process: Process, family: Family) -> tuple[GridName, ...]:
    """Grids that make sense: noise levels between trained times need a solver that can go there, `leading` needs
    trained times (in continuous time it would evaluate at the data), and EDM has no time but its noise level."""
    if isinstance(process, EDM):
        return BY_LEVEL
    if isinstance(process, Discrete):
        by_time: tuple[GridName, ...] = ("linspace", "leading", "trailing")
        return by_time if family == "index" else by_time + BY_LEVEL
    return ("linspace", "trailing", *BY_LEVEL)


def by_time(process: Process, grid: GridName, steps: int, family: Family) -> list[Point]:
    """linspace, leading, trailing: even in the process's time."""
    if isinstance(process, Discrete):
        times = trained_times(process, grid, steps, family)
        if family == "index":
            return [process.at_index(int(t)) for t in times]
        return [process.at_level(t, r) for t, r in zip(times.tolist(), _interpolated(process, times), strict=True)]
    if isinstance(process, Flow):
        return [process.at(sigma) for sigma in flow_sigmas(process, grid, steps, family).tolist()]
    assert isinstance(process, Continuous)
    return [process.at(u) for u in (1.0 - np.arange(steps) / steps).tolist()]


def trained_times(process: Discrete, grid: GridName, steps: int, family: Family) -> Times:
    """Network times (steps,), falling; whole numbers but for the `level` family's linspace."""
    total = process.timesteps
    if grid == "trailing":
        return (np.round(total - np.arange(steps) * (total / steps)) - 1.0).astype(np.float64)
    extra = family == "multistep"
    if grid == "leading":
        times = np.arange(steps + extra)[::-1] * float(total // (steps + extra)) + process.steps_offset
        if times[0] >= total:
            raise SolverError(f"the leading grid starts past the last trained time; use fewer than {steps}", "steps")
    else:
        times = np.linspace(0.0, total - 1.0, max(2, steps + extra))[::-1]  # one step begins at noise, too
        if family != "level":
            times = np.round(times)
    return times[:steps].astype(np.float64)


def flow_sigmas(process: Flow, grid: GridName, steps: int, family: Family) -> Times:
    """sigma (steps,), falling: trailing from 1 evenly to 0; linspace as diffusers' flow schedulers have it."""
    if grid == "trailing":
        even = 1.0 - np.arange(steps) / steps
    elif family == "multistep":
        even = np.linspace(1.0 - 1.0 / process.timesteps, 0.0, steps + 1)[:-1]
    else:
        even = np.linspace(1.0, process.shifted(1.0 / process.timesteps), steps)
    return np.array([process.shifted(sigma) for sigma in even.tolist()])


def by_level(process: Process, grid: GridName, count: int, family: Family) -> list[Point]:
    """karras, exponential, logsnr: `count` noise levels from the highest to the lowest, both included."""
    if isinstance(process, Flow) and grid != "logsnr":
        return [process.at(sigma) for sigma in levels(grid, 1.0, process.lowest.sigma, count).tolist()]
    rho = process.rho if isinstance(process, EDM) else 7.0
    ratios = levels(grid, process.highest.ratio, process.lowest.ratio, count, rho).tolist()
    points = [process.at_ratio(ratio) for ratio in ratios]
    if family == "multistep" and isinstance(process, Discrete):  # diffusers gives the network whole times here
        whole = np.trunc if grid == "exponential" else np.round
        return [process.at_level(float(whole(p.t)), r) for p, r in zip(points, ratios, strict=True)]
    return points


def levels(grid: GridName, highest: float, lowest: float, count: int, rho: float = 7.0) -> Times:
    """Noise levels (count,), falling: Karras et al. (2022) equation 5, or evenly in the logarithm.

    Even in log(sigma / alpha) is even in log-SNR: `logsnr` differs from `exponential` only where sigma / alpha is
    not the noise level (flow) and in the rounding of trained times.
    """
    if grid != "karras":
        return np.geomspace(highest, lowest, count) if count > 1 else np.array([highest])
    return np.power(np.linspace(highest ** (1 / rho), lowest ** (1 / rho), count), rho)


def _interpolated(process: Discrete, times: Times) -> list[float]:
    return [float(r) for r in np.interp(times, np.arange(process.timesteps), process.ratios)]
