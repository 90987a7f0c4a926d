"""Method cascade: a cheap method first, the other members only for rows that the router finds urgent.

The cheap one is `exits`, or else `bridge`. Nothing is computed twice: an urgent row does not leave early, so that the
last stage gives the source's answer, the first member's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from models.api import ClassifiedRow
from models.methods.ensemble import Ensemble
from models.methods.interface import Answer, Expected, Method, Plan, Rows, Slots
from models.registry import METHODS, resolve
from models.uncertainty.router import Terms

if TYPE_CHECKING:
    from models.tasks.classifier import Classifier
    from models.tasks.contracts import Calibration


class Cascade:
    """A row of the cheap method that may go on: its calls are that method's, then one for each other member."""

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        assert classifier.cheap is not None
        assert calibration.router is not None
        cheap, self.router = resolve(METHODS, classifier.cheap), calibration.router
        self.cheap: Method = cheap(classifier, calibration)
        self.ensemble = Ensemble(classifier, calibration)
        self.first = len(cheap.plan(classifier).calls)
        self.costs, self.exits = classifier.cascade_costs(), classifier.exits
        plan, point, least = self.plan(classifier), self.terms(None), self.cheap.expected.calls
        assert plan is not None
        self.expected = Expected(point.cost, math.ceil(least + point.share * (len(plan.networks) - least)))

    @classmethod
    def plan(cls, classifier: Classifier) -> Plan | None:
        """The cheap method's calls and the members'."""
        if classifier.cheap is None:
            return None
        cheap: Plan = resolve(METHODS, classifier.cheap).plan(classifier)
        return replace(cheap, calls=cheap.calls + Ensemble.plan(classifier).calls)

    def terms(self, max_cost: float | None) -> Terms:
        """The operating point that `max_cost` pays for; UserError naming max_cost when there is none."""
        return self.router.pick(max_cost)

    def finished(self, pool: Rows, slots: Slots) -> Slots:
        """Rows that have just got their cheap answer and are calm; the others are marked urgent."""
        open = slots[~pool.urgent[slots]]
        arrived = np.union1d(self.cheap.finished(pool, open), open[pool.done[open] == self.first])
        for part in self.cheap.answer(pool, arrived) if len(arrived) else []:
            least = np.array([pool.terms[slot].least for slot in part.slots])
            pool.urgent[part.slots] = self.router.urgency(part.p) >= least
        return arrived[~pool.urgent[arrived]]

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The cheap answer of calm rows, the ensemble's of urgent ones."""
        urgent = pool.urgent[slots]
        parts: list[Answer] = []
        if not urgent.all():
            parts += self.cheap.answer(pool, slots[~urgent])
        if urgent.any():
            parts += [replace(part, escalated=True) for part in self.ensemble.answer(pool, slots[urgent])]
        return parts

    def paid(self, rows: Sequence[ClassifiedRow], max_cost: float | None) -> dict[str, Any]:
        """Of a receipt: who was escalated, what each image cost, their mean, and the mean on validation.

        With exits also the exit of each image, 0 where it was escalated.
        """
        prices = {0: self.costs.cheap}
        if self.exits is not None:
            prices = dict(zip(self.exits.stages, self.exits.costs, strict=True))
        dear = self.costs.cheap + self.costs.extra
        costs = [dear if row.escalated else prices[row.exit] for row in rows]
        found = {
            "cost_vs_single": float(np.mean(costs)),
            "expected_cost": self.terms(max_cost).cost,
            "escalated": [i for i, row in enumerate(rows) if row.escalated],
            "image_costs": costs,
        }
        return found | ({"exits": [row.exit for row in rows]} if self.exits is not None else {})
