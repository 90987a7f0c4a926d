"""Classify methods: how many network calls follow the source's, and what one call does.

Every method's admission is the source's forward (tap and logits), batched over methods by the task.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bridge.process import posterior_mean, source
from models.tasks.classifier import Classifier
from models.uncertainty.scores import (
    against_source,
    among_members,
    describe,
    log_softmax,
    mean_log_probability,
    soften,
)

Floats = NDArray[np.float64]
Answer = tuple[Floats, dict[str, Floats]]


class Rows(Protocol):
    """The pools that a method may touch; first axis slots."""

    pixels: Tensor
    taps: Tensor
    logits: Tensor
    z: Tensor


class Method(Protocol):
    """One way to answer; `evaluations` network calls after the source's."""

    evaluations: int

    def step(self, pool: Rows, slots: NDArray[np.int64], done: NDArray[np.int64]) -> None:
        """Advance rows in `slots`, of which row i has made done[i] of its calls."""

    def answer(self, pool: Rows, slots: NDArray[np.int64]) -> Answer:
        """Calibrated probabilities (N, K) and uncertainty arrays (N,) of finished rows."""


def log_probabilities(z: Tensor) -> Floats:
    """Logits (..., K) on any device -> float64 log probabilities."""
    return log_softmax(z.double().cpu().numpy())


class Single:
    """The source alone, at its temperature."""

    evaluations = 0

    def __init__(self, classifier: Classifier) -> None:
        self.temperature = classifier.temperatures["single"]

    def step(self, pool: Rows, slots: NDArray[np.int64], done: NDArray[np.int64]) -> None:
        """Nothing is left to run after admission."""

    def answer(self, pool: Rows, slots: NDArray[np.int64]) -> Answer:
        """The source's probabilities."""
        p = soften(log_probabilities(pool.logits[slots, 0]), self.temperature)
        return p, describe(p, self.temperature)


class Ensemble:
    """Every member, one call each."""

    def __init__(self, classifier: Classifier) -> None:
        self.members, self.temperature = classifier.members, classifier.temperatures["ensemble"]
        self.source_temperature = classifier.temperatures["single"]
        self.evaluations = len(self.members) - 1

    def step(self, pool: Rows, slots: NDArray[np.int64], done: NDArray[np.int64]) -> None:
        """Run each row's next member; rows at the same member share a batch."""
        for index in np.unique(done):
            rows = torch.as_tensor(slots[done == index], device=pool.pixels.device)
            pool.logits[rows, index + 1] = self.members[index + 1](pool.pixels[rows])

    def answer(self, pool: Rows, slots: NDArray[np.int64]) -> Answer:
        """The mean probability, and how the members spread."""
        members = log_probabilities(pool.logits[slots])
        p = soften(mean_log_probability(members), self.temperature)
        source_p = soften(members[:, 0], self.source_temperature)
        return p, describe(p, self.temperature) | against_source(p, source_p) | among_members(members)


class Bridge:
    """The source and a light network that carries its logits to the ensemble's."""

    def __init__(self, classifier: Classifier) -> None:
        assert classifier.bridge is not None
        self.bridge = classifier.bridge
        self.source_temperature = classifier.temperatures["single"]
        self.evaluations = self.bridge.evaluations

    def step(self, pool: Rows, slots: NDArray[np.int64], done: NDArray[np.int64]) -> None:
        """One bridge step for every row, each at its own n."""
        rows = torch.as_tensor(slots, device=pool.z.device)
        network, total = self.bridge.network, self.bridge.network.config.steps
        fresh = torch.as_tensor(slots[done == 0], device=pool.z.device)
        pool.z[fresh] = source(pool.logits[fresh, 0], self.bridge.softening)
        n = torch.as_tensor(total - done, device=pool.z.device)
        z = pool.z[rows]
        u = network(pool.taps[rows], z, n)
        pool.z[rows] = z - u if self.evaluations == 1 else posterior_mean(z, u, n[:, None].float(), total)

    def answer(self, pool: Rows, slots: NDArray[np.int64]) -> Answer:
        """The estimate of the ensemble, and how it differs from the source."""
        p = soften(log_probabilities(pool.z[slots]), self.bridge.temperature)
        source_p = soften(log_probabilities(pool.logits[slots, 0]), self.source_temperature)
        return p, describe(p, self.bridge.temperature) | against_source(p, source_p)
