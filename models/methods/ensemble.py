"""Method ensemble: every member, one call each (Lakshminarayanan et al., NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.methods.interface import Answer, Forward, Plain, Plan, Rows, Slots, log_probabilities, member_name
from models.uncertainty.scores import against_source, among_members, describe, mean_log_probability, soften

if TYPE_CHECKING:
    from models.tasks.classifier import Classifier
    from models.tasks.contracts import Calibration


class Ensemble(Plain):
    """The mean probability of any number of members."""

    name = "ensemble"

    def __init__(self, classifier: Classifier, calibration: Calibration) -> None:
        super().__init__(classifier, calibration)
        self.temperature = classifier.temperatures["ensemble"]
        self.source_temperature = classifier.temperatures["single"]

    @classmethod
    def plan(cls, classifier: Classifier) -> Plan:
        """The members after the source."""
        return Plan(tuple(Forward(member_name(i), i) for i in range(1, len(classifier.members))))

    def answer(self, pool: Rows, slots: Slots) -> Sequence[Answer]:
        """The mean probability, and how the members spread."""
        members = log_probabilities(pool.logits[slots])
        p = soften(mean_log_probability(members), self.temperature)
        source_p = soften(members[:, 0], self.source_temperature)
        scores = describe(p, self.temperature) | against_source(p, source_p) | among_members(members)
        return [Answer(slots, p, scores)]
