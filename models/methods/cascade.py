"""Method cascade: the bridge first, the other members only for rows that the router finds urgent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from models.methods.bridge import Bridge
from models.methods.ensemble import Ensemble
from models.methods.interface import Answer, Plan, Rows, Slots
from models.uncertainty.router import Terms

if TYPE_CHECKING:
    from models.tasks.classifier import Classifier
    from models.tasks.contracts import Calibration


class Cascade:
    """A bridge row that may go on: its calls are the bridge's, then, if urgent, one for each other member."""

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        assert calibration.router is not None
        self.router = calibration.router
        self.bridge, self.ensemble = Bridge(classifier, calibration), Ensemble(classifier, calibration)
        plan = Bridge.plan(classifier)
        assert plan is not None
        self.first = len(plan.calls)

    @classmethod
    def plan(cls, classifier: Classifier) -> Plan | None:
        """The bridge's calls and the members'."""
        bridge = Bridge.plan(classifier)
        return Plan(bridge.calls + Ensemble.plan(classifier).calls) if bridge else None

    def terms(self, max_cost: float | None) -> Terms:
        """The operating point that `max_cost` pays for; UserError naming max_cost when there is none."""
        return self.router.pick(max_cost)

    def finished(self, pool: Rows, slots: Slots) -> Slots:
        """Rows whose bridge has just arrived and that are calm."""
        arrived = slots[pool.done[slots] == self.first]
        least = np.array([pool.terms[slot].least for slot in arrived])
        return arrived[self.router.urgency(self.bridge.estimate(pool, arrived)) < least]

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The bridge's answer of calm rows, the ensemble's of urgent ones."""
        urgent = pool.done[slots] > self.first
        parts: list[Answer] = []
        if not urgent.all():
            parts += self.bridge.answer(pool, slots[~urgent])
        if urgent.any():
            parts += [replace(part, escalated=True) for part in self.ensemble.answer(pool, slots[urgent])]
        return parts
