"""What each solver takes: a decorator that checks the request before any row is filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from models.api import SolverOptions, UserError
from models.solvers.base import Process
from models.solvers.table import Trajectory

Fill = Callable[[Process, int, SolverOptions], Trajectory]


class SolverError(UserError):
    """A solver, step count or option that makes no sense here; `field` names it as the request spells it."""


@dataclass(frozen=True)
class Solver:
    """A solver as the registry knows it: called with (process, steps, options), it gives a Trajectory.

    Attributes:
        kinds: kinds of process that it fits.
        options: its options beside `grid`, each with the values that it takes (empty: any).
    """

    fill: Fill
    name: str
    kinds: frozenset[str]
    options: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def fits(self, process: Process) -> bool:
        """Whether it can sample this process."""
        return process.kind in self.kinds

    def __call__(self, process: Process, steps: int, options: SolverOptions) -> Trajectory:
        """The whole run; SolverError where the request makes no sense."""
        if not self.fits(process):
            fit = ", ".join(sorted(self.kinds))
            raise SolverError(f"{self.name} does not fit the {process.kind} process; it fits: {fit}", "solver")
        if steps < 1:
            raise SolverError(f"steps must be at least 1, got {steps}", "steps")
        for name, value in options.given().items():
            where = f"solver_options.{name}"
            if name != "grid" and name not in self.options:
                known = ", ".join(("grid", *self.options))
                raise SolverError(f"{self.name} has no option {name}; it has: {known}", where)
            values = self.options.get(name)
            if values and value not in values:
                raise SolverError(f"{name} of {self.name} is {' or '.join(map(str, values))}, not {value}", where)
        return self.fill(process, steps, options)


def solver(kinds: str, **options: tuple[object, ...]) -> Callable[[Fill], Solver]:
    """Declare a solver: the kinds of process that it fits (space separated), its options and their values."""

    def declare(fill: Fill) -> Solver:
        return Solver(fill, fill.__module__.rpartition(".")[2], frozenset(kinds.split()), options)

    return declare
