"""What a backend is: its own way to run the pieces of a backbone, under the shared executor `sorted_prefix`.

Each backend is a module with `build(setup) -> Backend`, named in `models.registry.BACKENDS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.api import UserError
from models.backbones.interface import Backbone, Pieces, Segment, segments_between, sorted_prefix

TOLERANCE = 1e-4  # of float32
TOLERANCES = {"fp32": TOLERANCE, "bf16": 5e-2}  # eager bfloat16 is itself off by a hundredth


# Rows of every call of `condition` on a CPU, whatever the batch: a fixed shape keeps a row's bits its own.
CONDITION_BLOCK = 8


class BackendUnavailable(UserError):
    """A backend that cannot work here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and for what any model's parts are built.

    Attributes:
        weights: digest of the model's weights.
        rows: most network rows in a batch (a guided row is two).
        device: where the model is.
        cache: folder for what a backend makes from the weights; created when needed.
        budget_s: seconds that `auto` may spend on building and measuring.
    """

    weights: str
    rows: int
    device: torch.device
    cache: Path
    budget_s: float = 30.0


@dataclass(frozen=True)
class Setup(Place):
    """What a diffusion backend is built for.

    Attributes:
        backbone: in eval mode, on `device`.
        depths: every depth that a row may ask for; segments are cut at these.
        deadline: `time.monotonic()` by which a build must be done.
        precision: fp32 or bf16, what the backbone runs in.
    """

    backbone: Backbone
    depths: tuple[int, ...]
    deadline: float = math.inf
    precision: str = "fp32"

    @property
    def segments(self) -> list[Segment]:
        """The longest segments that serve every depth."""
        return segments_between(self.backbone, self.depths)

    @property
    def tolerance(self) -> float:
        """Largest relative error of a backend against the backbone op by op."""
        return TOLERANCES[self.precision]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


class Backend(Protocol):
    """How a forward is executed: within the setup's tolerance of the backbone itself.

    `note` is one line for the log and the catalogue: which backend, what it cost, why it was picked.
    """

    name: str
    note: str

    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """As `Backbone.condition`, for CONDITION_BLOCK rows on a CPU, elsewhere for any that a batch may have."""

    def __call__(self, x: Tensor, condition: Tensor, depths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """As `Backbone.forward`; the output is the caller's to keep."""


class Network(Pieces, Protocol):
    """The pieces and the one-token work before them."""

    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """As `Backbone.condition`."""


class Executor:
    """A backend made of pieces. `note` says what it is and what it cost; the name is put before it."""

    def __init__(
        self, name: str, note: str, setup: Setup, network: Network, segments: Sequence[Segment] | None = None
    ) -> None:
        self.name, self.note, self.network = name, f"{name}: {note}", network
        self.segments = segments or setup.segments
        self.depths = frozenset(setup.depths)

    @torch.inference_mode()
    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """See Backend."""
        return self.network.condition(t, label)

    @torch.inference_mode()
    def __call__(self, x: Tensor, condition: Tensor, depths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """See Backend; a depth that no segment ends at is a ValueError."""
        if not self.depths.issuperset(depths):
            raise ValueError(f"backend {self.name} was built for depths {sorted(self.depths)}, not {sorted(depths)}")
        return sorted_prefix(self.network, self.segments, x, condition, depths)
