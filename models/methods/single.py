"""Method single: the source alone, at its temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.methods.interface import Answer, Plain, Plan, Rows, Slots, log_probabilities
from models.uncertainty.scores import describe, soften

if TYPE_CHECKING:
    from models.tasks.classifier import Classifier
    from models.tasks.contracts import Calibration


class Single(Plain):
    """What the source says."""

    name = "single"

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__(classifier, calibration)
        self.temperature = classifier.temperatures["single"]

    @classmethod
    def plan(cls, classifier: Classifier) -> Plan:
        """The source's forward is all."""
        return Plan()

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The source's probabilities."""
        p = soften(log_probabilities(pool.logits[slots, 0]), self.temperature)
        return [Answer(slots, p, describe(p, self.temperature))]
