"""Method exits: the source stage by stage, each with a light head; images that are sure enough leave early.

Confidence thresholds on the largest probability, after Teerapittayanon et al., "BranchyNet" (ICPR 2016); heads that
learned the ensemble's answers. The source's own answer comes with the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from models.api import ClassifiedRow
from models.methods.interface import Answer, Expected, Plain, Plan, Rows, Slots, exit_name, log_probabilities
from models.uncertainty.scores import describe, soften

if TYPE_CHECKING:
    from models.tasks.classifier import Classifier
    from models.tasks.contracts import Calibration
    from models.tasks.exits import EarlyExits


@dataclass(frozen=True)
class Stage:
    """Exit no. `index`, counted from 0: from pixels, or from what the exit before left, to its head's logits."""

    network: str
    index: int

    def run(self, pool: Rows, rows: Tensor, calls: Sequence[Self]) -> None:
        """See Call; rows at one exit share a batch."""
        given = pool.stages[self.index - 1] if self.index else pool.pixels
        left, pool.heads[rows], *far = pool.networks[self.network](given[rows])
        if far:
            pool.far[rows] = far[0]
        if self.index < len(pool.stages):
            pool.stages[self.index][rows] = left
        else:
            pool.logits[rows, 0] = left


def room(networks: Mapping[str, Any], plan: Plan | None, pixels: Tensor) -> list[Tensor]:
    """Zeros for what each exit but the last leaves to the next, a row a row of `pixels` (capacity, C, H, W)."""
    found, given = [], pixels[:1]
    for call in plan.calls[:-1] if plan else ():
        with torch.inference_mode():
            given = networks[call.network](given)[0]
        found.append(torch.zeros(len(pixels), *given.shape[1:], device=pixels.device))
    return found


class Exits(Plain):
    """What the first head that is sure enough says; the last one has to."""

    name = "exits"

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__(classifier, calibration)
        assert classifier.exits is not None
        self.exits: EarlyExits = classifier.exits
        self.expected = Expected(self.exits.expected_cost, math.ceil(self.exits.expected_calls))

    @classmethod
    def plan(cls, classifier: Classifier) -> Plan | None:
        """Every exit in turn, without the source's whole forward."""
        if classifier.exits is None:
            return None
        return Plan(tuple(Stage(exit_name(k), i) for i, k in enumerate(classifier.exits.stages)), source=False)

    def finished(self, pool: Rows, slots: Slots) -> Slots:
        """Rows that are sure enough at the exit where they are."""
        over = [slots[:0]]
        for i in range(len(self.exits.thresholds)):
            own = slots[pool.done[slots] == i + 1]
            over.append(own[self.exits.sure(log_probabilities(pool.heads[own]), i)])
        return np.concatenate(over)

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """By exit: the probabilities of its head, at its temperature."""
        parts = []
        for i, (stage, temperature) in enumerate(zip(self.exits.stages, self.exits.temperatures, strict=True)):
            if len(own := slots[pool.done[slots] == i + 1]):
                p = soften(log_probabilities(pool.heads[own]), temperature)
                parts.append(Answer(own, p, describe(p, temperature), exit=stage))
        return parts

    def paid(self, rows: Sequence[ClassifiedRow], max_cost: float | None) -> dict[str, Any]:
        """Of a receipt: the exit that answered each image, what each cost, their mean, and the mean on validation."""
        by_exit = dict(zip(self.exits.stages, self.exits.costs, strict=True))
        costs = [by_exit[row.exit] for row in rows]
        return {
            "cost_vs_single": float(np.mean(costs)),
            "expected_cost": self.expected.cost,
            "exits": [row.exit for row in rows],
            "image_costs": costs,
        }
