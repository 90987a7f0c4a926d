"""Method distilled: one student of the whole ensemble, without the source (Hinton et al., 2015; Nam et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.methods.interface import STUDENT, Answer, Forward, Plain, Plan, Rows, Slots, log_probabilities
from models.uncertainty.scores import describe, soften

if TYPE_CHECKING:
    from models.tasks.classifier import Classifier
    from models.tasks.contracts import Calibration


class Distilled(Plain):
    """What the student says; it knows nothing of a source or of members."""

    name = "distilled"

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__(classifier, calibration)
        assert classifier.student is not None
        self.temperature = classifier.student.temperature

    @classmethod
    def plan(cls, classifier: Classifier) -> Plan | None:
        """The student's forward."""
        return Plan((Forward(STUDENT, 0),), source=False) if classifier.student else None

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The student's probabilities."""
        p = soften(log_probabilities(pool.logits[slots, 0]), self.temperature)
        return [Answer(slots, p, describe(p, self.temperature))]
