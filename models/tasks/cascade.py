"""Method cascade: the bridge first, the other members only for rows that the router finds urgent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from models.tasks.classifier import Classifier
from models.tasks.contracts import Calibration
from models.tasks.methods import Answer, Bridge, Ensemble, Rows, Slots
from models.uncertainty.router import Terms


class Cascade:
    """A bridge row that may go on: its evaluations are the bridge's, then, if urgent, one for each other member."""

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        assert calibration.router is not None
        self.router = calibration.router
        self.bridge, self.ensemble = Bridge(classifier, calibration), Ensemble(classifier, calibration)
        self.evaluations = self.bridge.evaluations + self.ensemble.evaluations

    def terms(self, max_cost: float | None) -> Terms:
        """The operating point that `max_cost` pays for; UserError naming max_cost when there is none."""
        return self.router.pick(max_cost)

    def step(self, pool: Rows, slots: Slots, done: Slots) -> Slots:
        """A bridge step or a member, each row what is due; returns rows whose bridge has arrived and that are calm."""
        first = self.bridge.evaluations
        bridged, gone = done < first, done >= first
        if bridged.any():
            self.bridge.step(pool, slots[bridged], done[bridged])
        if gone.any():
            self.ensemble.step(pool, slots[gone], done[gone] - first)
        arrived = slots[done == first - 1]
        least = np.array([pool.terms[slot].least for slot in arrived])
        return arrived[self.router.urgency(self.bridge.estimate(pool, arrived)) < least]

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The bridge's answer of calm rows, the ensemble's of urgent ones."""
        urgent = pool.done[slots] > self.bridge.evaluations
        parts: list[Answer] = []
        if not urgent.all():
            parts += self.bridge.answer(pool, slots[~urgent])
        if urgent.any():
            parts += [replace(part, escalated=True) for part in self.ensemble.answer(pool, slots[urgent])]
        return parts
