"""What a classify method is: a plan of network calls, fixed at admission, and an answer from what they left behind.

The task runs the calls. Rows whose next calls are of the same network share its batch, whatever their methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.api import ClassifiedRow, UserError
from models.uncertainty.router import Terms
from models.uncertainty.scores import log_softmax

if TYPE_CHECKING:
    from models.tasks.classifier import Classifier
    from models.tasks.contracts import Calibration
    from models.tasks.device import Uplink

Floats = NDArray[np.float64]
Slots = NDArray[np.int64]
SOURCE, STUDENT = "source", "student"


def member_name(index: int) -> str:
    """Network of the ensemble's member `index`, counted from 0; the source is no. 0."""
    return f"member-{index + 1}"


def bridge_name(name: str) -> str:
    """Network of a bridge folder."""
    return f"bridge-{name}"


def exit_name(stage: int) -> str:
    """Network of the exit after the source's stage `stage`, counted from 1."""
    return f"exit-{stage}"


@dataclass(frozen=True, eq=False)
class Answer:
    """Rows that know the same: calibrated probabilities (N, K) and uncertainty arrays (N,) of `slots` (N,).

    `exit`: the stage of the source that they left after, counted from 1; 0 where they did not leave early.
    """

    slots: Slots
    p: Floats
    scores: dict[str, Floats]
    escalated: bool = False
    exit: int = 0


class Rows(Protocol):
    """What calls and answers work on; first axis slots.

    The source fills `taps` (C, H, W), `features` (F,), `logits[:, 0]` (K,) and every column of `z` (columns, K), its
    own logits softened. `logits` is (M, K), one row a member. `far` is the feature distance, from the source or a first
    exit that sees its tap, NaN where it was not measured. `stages` is what each early exit leaves to the next one,
    `heads` (K,) what the head of the last one said. `done` counts calls, `terms` are what a row runs under, `urgent`
    that a cascade asks the members; `networks` are those of the classifier by name. What a call has on the host goes to
    the device by `uplink`.
    """

    pixels: Tensor
    taps: Tensor
    features: Tensor
    logits: Tensor
    z: Tensor
    stages: list[Tensor]
    heads: Tensor
    far: Tensor
    done: Slots
    urgent: NDArray[np.bool_]
    terms: list[Terms]
    networks: Mapping[str, Callable[..., Sequence[Tensor]]]
    uplink: Uplink


class Call(Protocol):
    """One network call of a row's plan."""

    @property
    def network(self) -> str:
        """Which one; calls of one network are of one class, and share its batch."""

    def run(self, pool: Rows, rows: Tensor, calls: Sequence[Self]) -> None:
        """Make `calls`, one a row, of the slots `rows` (N,) int64, in one batch. `self` is the first of them."""


@dataclass(frozen=True)
class Forward:
    """A network from pixels to logits, kept in `logits[:, column]`."""

    network: str
    column: int

    def run(self, pool: Rows, rows: Tensor, calls: Sequence[Self]) -> None:
        """See Call."""
        [columns] = pool.uplink.send(np.array([call.column for call in calls]))
        (pool.logits[rows, columns],) = pool.networks[self.network](pool.pixels[rows])


@dataclass(frozen=True)
class Plan:
    """The source's forward, where `source`, in the tick of the first of `calls`, which are one a tick at most."""

    calls: tuple[Call, ...] = ()
    source: bool = True

    @property
    def networks(self) -> list[str]:
        """Of every network call, in order."""
        return [*([SOURCE] if self.source else []), *(call.network for call in self.calls)]

    def cost(self, macs: Mapping[str, int]) -> float:
        """Multiply-accumulates of all calls relative to the source's, from those of each network."""
        return sum(macs[network] for network in self.networks) / macs[SOURCE]


@dataclass(frozen=True)
class Expected:
    """Of an image like the validation images: multiply-accumulates relative to `single`, and network calls."""

    cost: float
    calls: int


class Method(Protocol):
    """One way to answer, made from a Classifier and its Calibration."""

    @property
    def expected(self) -> Expected:
        """What is advertised; admission counts on `calls`."""

    @classmethod
    def plan(cls, classifier: Classifier) -> Plan | None:
        """What a row runs, at most; None where the classifier lacks a network."""

    def terms(self, max_cost: float | None) -> Terms:
        """What a row runs under; UserError naming max_cost when it cannot be kept."""

    def finished(self, pool: Rows, slots: Slots) -> Slots:
        """Of rows that have just made call no. `pool.done`, those that need no more of their plan."""

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """Finished rows, in parts that know the same."""

    def paid(self, rows: Sequence[ClassifiedRow], max_cost: float | None) -> dict[str, Any]:
        """Of a receipt: `cost_vs_single`, the mean over `rows` as they ran; where they may differ `image_costs` too."""


class Plain:
    """A method that runs its whole plan under one set of terms. `name` is its key in METHODS.

    One that leaves its plan early has its own `finished`, `expected` and `paid`.
    """

    name: str

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        plan = classifier.plans()[self.name]
        self._terms = Terms(calibration.methods.get(self.name))
        self.expected = Expected(plan.cost(classifier.macs), len(plan.networks))

    def terms(self, max_cost: float | None) -> Terms:
        """The only ones; a max_cost is refused."""
        if max_cost is not None:
            raise UserError("only method cascade chooses what to spend: drop max_cost, or ask for cascade", "max_cost")
        return self._terms

    def finished(self, pool: Rows, slots: Slots) -> Slots:
        """None before its plan ends."""
        return slots[:0]

    def paid(self, rows: Sequence[ClassifiedRow], max_cost: float | None) -> dict[str, Any]:
        """Every image costs the whole plan."""
        return {"cost_vs_single": self.expected.cost}


def log_probabilities(z: Tensor) -> Floats:
    """Logits (..., K) on any device -> float64 log probabilities."""
    return log_softmax(z.double().cpu().numpy())
