"""Classify methods: how many network calls follow the source's, and what one call does.

Every method's admission is the source's forward (tap and logits), batched over methods by the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.api import UserError
from models.bridge.process import posterior_mean, source
from models.tasks.classifier import Classifier
from models.tasks.contracts import Calibration
from models.uncertainty.router import Terms
from models.uncertainty.scores import (
    against_source,
    among_members,
    describe,
    log_softmax,
    mean_log_probability,
    soften,
)

Floats = NDArray[np.float64]
Slots = NDArray[np.int64]
NONE: Slots = np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Answer:
    """Rows that know the same: calibrated probabilities (N, K) and uncertainty arrays (N,) of `slots` (N,)."""

    slots: Slots
    p: Floats
    scores: dict[str, Floats]
    escalated: bool = False


class Rows(Protocol):
    """What a method may touch; first axis slots. `done` are calls made, `terms` what each row runs under."""

    pixels: Tensor
    taps: Tensor
    logits: Tensor
    z: Tensor
    done: Slots
    terms: list[Terms]


class Method(Protocol):
    """One way to answer, made from a Classifier and its Calibration; at most `evaluations` calls after the source's."""

    evaluations: int

    def terms(self, max_cost: float | None) -> Terms:
        """What a row runs under; UserError naming max_cost when it cannot be kept."""

    def step(self, pool: Rows, slots: Slots, done: Slots) -> Slots:
        """Advance rows in `slots`, of which row i has made done[i] of its calls; returns those that need no more."""

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """Finished rows, in parts that know the same."""


def log_probabilities(z: Tensor) -> Floats:
    """Logits (..., K) on any device -> float64 log probabilities."""
    return log_softmax(z.double().cpu().numpy())


class Plain:
    """A method without a choice of cost: one set of terms for every row."""

    def __init__(self, name: str, calibration: Calibration) -> None:
        self._terms = Terms(calibration.methods.get(name))

    def terms(self, max_cost: float | None) -> Terms:
        """The only ones; a max_cost is refused."""
        if max_cost is not None:
            raise UserError("only method cascade chooses what to spend: drop max_cost, or ask for cascade", "max_cost")
        return self._terms


class Single(Plain):
    """The source alone, at its temperature."""

    evaluations = 0

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__("single", calibration)
        self.temperature = classifier.temperatures["single"]

    def step(self, pool: Rows, slots: Slots, done: Slots) -> Slots:
        """Nothing is left to run after admission."""
        return NONE

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The source's probabilities."""
        p = soften(log_probabilities(pool.logits[slots, 0]), self.temperature)
        return [Answer(slots, p, describe(p, self.temperature))]


class Ensemble(Plain):
    """Every member, one call each."""

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__("ensemble", calibration)
        self.members, self.temperature = classifier.members, classifier.temperatures["ensemble"]
        self.source_temperature = classifier.temperatures["single"]
        self.evaluations = len(self.members) - 1

    def step(self, pool: Rows, slots: Slots, done: Slots) -> Slots:
        """Run each row's next member; rows at the same member share a batch."""
        for index in np.unique(done):
            rows = torch.as_tensor(slots[done == index], device=pool.pixels.device)
            pool.logits[rows, index + 1] = self.members[index + 1](pool.pixels[rows])
        return NONE

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The mean probability, and how the members spread."""
        members = log_probabilities(pool.logits[slots])
        p = soften(mean_log_probability(members), self.temperature)
        source_p = soften(members[:, 0], self.source_temperature)
        scores = describe(p, self.temperature) | against_source(p, source_p) | among_members(members)
        return [Answer(slots, p, scores)]


class Bridge(Plain):
    """The source and a light network that carries its logits to the ensemble's."""

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__("bridge", calibration)
        assert classifier.bridge is not None
        self.bridge = classifier.bridge
        self.source_temperature = classifier.temperatures["single"]
        self.evaluations = self.bridge.evaluations

    def step(self, pool: Rows, slots: Slots, done: Slots) -> Slots:
        """One bridge step for every row, each at its own n."""
        rows = torch.as_tensor(slots, device=pool.z.device)
        network, total = self.bridge.network, self.bridge.network.config.steps
        fresh = torch.as_tensor(slots[done == 0], device=pool.z.device)
        pool.z[fresh] = source(pool.logits[fresh, 0], self.bridge.softening)
        n = torch.as_tensor(total - done, device=pool.z.device)
        z = pool.z[rows]
        u = network(pool.taps[rows], z, n)
        pool.z[rows] = z - u if self.evaluations == 1 else posterior_mean(z, u, n[:, None].float(), total)
        return NONE

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The estimate of the ensemble, and how it differs from the source."""
        p = self.estimate(pool, slots)
        source_p = soften(log_probabilities(pool.logits[slots, 0]), self.source_temperature)
        return [Answer(slots, p, describe(p, self.bridge.temperature) | against_source(p, source_p))]

    def estimate(self, pool: Rows, slots: Slots) -> Floats:
        """Calibrated probabilities (N, K) of rows whose bridge has arrived."""
        return soften(log_probabilities(pool.z[slots]), self.bridge.temperature)
