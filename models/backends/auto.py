"""The fastest backend by measurement, one for all batch sizes, and none that was slower than eager at any it measured.

One for all, not one a batch size: a row's bits must not depend on how many rows happen to share its batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

import torch
from torch import Tensor

from models.backends.interface import CONDITION_BLOCK, Backend, BackendUnavailable, Setup, relative_error
from models.backends.parts import example_rows
from models.registry import BACKENDS, resolve

CANDIDATES = {"cpu": ("onnx", "compiled"), "cuda": ("cudagraph", "onnx", "compiled_cudagraph", "compiled")}
SLOW = {"compiled": 120.0, "compiled_cudagraph": 120.0}  # seconds of budget below which a build is not begun
BUILDING, MEASURING = 0.75, 0.25  # shares of the budget
ROWS = (1, 2, 8, 32)
REPEATS, ENOUGH = 15, 3
WORTH_IT = 1.05  # below this gain the network as it is stays


@dataclass(frozen=True)
class Probe:
    """The network's work in one tick: a block of conditions, and rows that take turns through the depths, sorted."""

    t: Tensor
    label: Tensor
    x: Tensor
    condition: Tensor
    depths: tuple[int, ...]

    @classmethod
    def make(cls, setup: Setup, rows: int) -> Probe:
        """Random inputs of `rows` rows; condition and network run on the eager backbone's condition."""
        x, t, label = example_rows(setup, rows)
        turns = sorted(setup.depths, reverse=True)
        depths = sorted((turns[i % len(turns)] for i in range(rows)), reverse=True)
        with torch.inference_mode():
            condition = setup.backbone.condition(t, label)
        block = example_rows(setup, CONDITION_BLOCK)
        return cls(block[1], block[2], x, condition, tuple(depths))

    def run(self, backend: Backend) -> tuple[Tensor, Tensor, list[int]]:
        """Condition of the block, output, and rows per block of the network; finished when this returns."""
        block = backend.condition(self.t, self.label)
        output, ran = backend(self.x, self.condition, self.depths)
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        return block, output, ran

    def alone(self, backend: Backend, row: int) -> Tensor:
        """Output (1, ...) of one row as a batch of its own."""
        only = slice(row, row + 1)
        return backend(self.x[only], self.condition[only], self.depths[only])[0]


Measure = Callable[[Backend, Probe], float]


def seconds(backend: Backend, probe: Probe) -> float:
    """Wall time of a probe."""
    began = time.perf_counter()
    probe.run(backend)
    return time.perf_counter() - began


def build(setup: Setup, candidates: Sequence[str] = (), measure: Measure = seconds) -> Backend:
    """The chosen backend, its `note` saying why; what `budget_s` leaves no time for is not used."""
    eager: Backend = resolve(BACKENDS, "eager")(setup)
    deadline = min(setup.deadline, time.monotonic() + BUILDING * setup.budget_s)
    rivals: list[Rival] = []
    refused = []
    for name in candidates or CANDIDATES.get(setup.device.type, ()):
        try:
            if setup.budget_s < SLOW.get(name, 0.0):
                raise BackendUnavailable(f"not tried with a budget below {SLOW[name]:.0f} s, it is slow to build")
            rivals.append(Rival(resolve(BACKENDS, name)(dataclasses.replace(setup, deadline=deadline))))
        except Exception as error:  # a rival's trouble is never the model's
            refused.append(f"{name}: {error}")
    compare(eager, rivals, setup, measure)
    good = [rival for rival in rivals if rival.gain >= WORTH_IT]
    best = max(good, key=lambda rival: rival.gain).backend if good else eager
    verdicts = [*(rival.verdict for rival in rivals), *refused] or ["no other for this device"]
    best.note = f"{best.note}; picked by measurement against eager: {'; '.join(verdicts)}"
    return best


class Rival:
    """A candidate with what was found about it: `gains` is eager's time over its own by rows, `fault` ends it."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.gains, self.fault = backend, dict[int, float](), ""

    @property
    def gain(self) -> float:
        """Geometric mean over the measured rows; 0 where it is not to be used."""
        if self.fault or not self.gains or min(self.gains.values()) < 1.0:
            return 0.0
        return geometric_mean(self.gains.values())

    @property
    def verdict(self) -> str:
        """In words."""
        found = ", ".join(f"{gain:.2f}x at {rows} rows" for rows, gain in self.gains.items())
        return f"{self.backend.name}: {self.fault or found or 'no time to measure it'}"


def compare(eager: Backend, rivals: Sequence[Rival], setup: Setup, measure: Measure) -> None:
    """Check and time rivals beside eager, repeats alternating, on ever more rows until the time is up."""
    deadline = time.monotonic() + MEASURING * setup.budget_s
    for rows in (rows for rows in ROWS if rows <= setup.rows):
        began = time.monotonic()
        probe = Probe.make(setup, rows)
        for rival in rivals:
            rival.fault = rival.fault or fault(rival.backend, eager, probe, setup.tolerance)
        left = {rival: list[float]() for rival in rivals if not rival.fault}
        for repeat in range(REPEATS if left else 0):
            if repeat >= ENOUGH and time.monotonic() > deadline:
                break
            base = measure(eager, probe)
            for rival, ratios in left.items():
                ratios.append(base / measure(rival.backend, probe))
        for rival, ratios in left.items():
            rival.gains[rows] = median(ratios)
        if time.monotonic() + (time.monotonic() - began) * 2 > deadline:
            break


def fault(backend: Backend, eager: Backend, probe: Probe, tolerance: float) -> str:
    """What the backend does worse than eager, or nothing: other numbers, or a row's bits changed by batch-mates."""
    rows = len(probe.depths)
    *expected, expected_ran = probe.run(eager)
    try:
        *found, ran = probe.run(backend)
    except Exception as error:
        return f"failed at {rows} rows: {error}"
    off = max(map(relative_error, found, expected))
    if not off <= tolerance or ran != expected_ran:
        return f"differs from eager by {off:.1e} at {rows} rows"
    for row in {0, rows - 1}:
        kept = torch.equal(probe.alone(eager, row), expected[1][row : row + 1])
        if kept and not torch.equal(probe.alone(backend, row), found[1][row : row + 1]):
            return f"a row's bits change with its batch at {rows} rows, eager's do not"
    return ""
