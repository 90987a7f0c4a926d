"""What a method's answers promise, fitted on validation: a decision and prediction sets. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from models.api import DecisionName, DecisionRule, SetRule
from models.uncertainty.conformal import Conformal, Rule, repeated_splits
from models.uncertainty.decision import DECISIONS, Target, Thresholds
from models.uncertainty.scores import as_uncertainty, entropy

Floats = NDArray[np.float64]
TARGET = Target("coverage_at_risk", 0.05)
ABSTAIN_SHARE = 0.01
RULES = (Rule(), Rule(penalty=0.01, free=2), Rule(penalty=0.05, free=2), Rule(penalty=0.2, free=2))
ALPHAS = (0.05, 0.1)
FOREIGN, FOREIGN_ABSTAIN = Target("escalate_share", 0.05), 0.01  # of images like the validation images


@dataclass(frozen=True, eq=False)
class Answers:
    """Calibrated probabilities (N, K) of labelled rows, and the draw (N,) that each image's bytes give.

    `familiar` (N,): rows that the rule on feature distance accepts; None where there is none.
    """

    p: Floats
    labels: NDArray[np.int64]
    u: Floats
    familiar: NDArray[np.bool_] | None = None

    @property
    def errors(self) -> NDArray[np.bool_]:
        """Rows (N,) whose likeliest class is wrong."""
        return np.asarray(self.p.argmax(-1) != self.labels)


@dataclass(frozen=True, eq=False)
class Contract:
    """One method's thresholds and calibrated sets, and the rule on feature distance, for rows that have one."""

    thresholds: Thresholds
    conformal: Conformal
    foreign: Thresholds | None = None

    @classmethod
    def fit(
        cls,
        selection: Answers,
        conformal: Answers,
        rule: Rule,
        target: Target = TARGET,
        abstain_share: float = ABSTAIN_SHARE,
        foreign: Thresholds | None = None,
    ) -> Contract:
        """Thresholds on entropy from the selection half of validation, sets from the conformal half."""
        return cls(
            choose_thresholds(selection, target, abstain_share),
            Conformal.calibrate(conformal.p, conformal.labels, rule, conformal.u if rule.randomised else None),
            foreign,
        )

    def decide(self, scores: Mapping[str, Floats]) -> list[DecisionName]:
        """A decision per row from its uncertainty arrays (N,): the worse of entropy's and, where known, distance's."""
        rules = [self.thresholds, *([self.foreign] if self.foreign and self.foreign.score in scores else [])]
        codes = [rule.decide(as_uncertainty(rule.score, scores[rule.score])) for rule in rules]
        return [cast(DecisionName, DECISIONS[code]) for code in np.max(codes, axis=0)]

    def sets(self, p: Floats, alpha: Floats, u: Floats) -> list[tuple[int, ...]]:
        """Class indices per row, likeliest first, at one alpha and draw per row (N,)."""
        return listed(self.conformal.sets(p, alpha, u if self.conformal.rule.randomised else None), p)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without `foreign`, which is one for all methods."""
        return {"decision": self.thresholds.to_json(), "sets": self.conformal.to_json()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any], foreign: Thresholds | None = None) -> Contract:
        """The inverse of `to_json`; UserError on what is not one."""
        return cls(Thresholds.from_json(found["decision"]), Conformal.from_json(found["sets"]), foreign)


def choose_thresholds(selection: Answers, target: Target, abstain_share: float) -> Thresholds:
    """Thresholds on entropy, which routes foreign images best of the scores that every method has.

    Fitted on familiar rows, so that what is said of accepted rows holds for those that both rules accept; `coverage` is
    of all rows.
    """
    scores, errors, familiar = entropy(selection.p), selection.errors, selection.familiar
    if familiar is None:
        return Thresholds.choose("entropy", scores, errors, target, abstain_share)
    found = Thresholds.choose("entropy", scores[familiar], errors[familiar], target, abstain_share)
    coverage = float(cast(float, found.shown["coverage"]) * familiar.mean())
    return replace(found, shown={**found.shown, "coverage": coverage})


def choose_foreign(distance: Floats, errors: NDArray[np.bool_]) -> Thresholds:
    """The rule on feature distances (N,) of validation rows, with the source's errors (N,) for what it shows.

    It is chosen by shares of validation rows alone, without any foreign image.
    """
    return Thresholds.choose("feature_distance", distance, errors, FOREIGN, FOREIGN_ABSTAIN)


def choose_rule(selection: Answers, rules: Sequence[Rule] = RULES) -> Rule:
    """The rule with the smallest sets over `ALPHAS`, from random halves of the selection rows."""
    half = len(selection.labels) // 2

    def size(rule: Rule) -> float:
        return sum(repeated_splits(selection.p, selection.labels, rule, alpha, half).size for alpha in ALPHAS)

    return min(rules, key=size)


def listed(sets: NDArray[np.bool_], p: Floats) -> list[tuple[int, ...]]:
    """Membership (N, K) as class indices, likeliest first, ties by index."""
    order = np.argsort(-p, axis=-1, kind="stable")
    return [tuple(int(k) for k in row if inside[k]) for row, inside in zip(order, sets, strict=True)]


def decision_rule(thresholds: Thresholds) -> DecisionRule:
    """Thresholds as the catalogue shows them: in the score's own direction, None for infinite ones."""
    shown: Any = thresholds.shown
    accept, abstain = (
        float(as_uncertainty(thresholds.score, np.float64(t))) if math.isfinite(t) else None  # type: ignore[arg-type]
        for t in (thresholds.accept, thresholds.abstain)
    )
    keys = ("target", "value", "confidence", "coverage", "risk", "bound")
    return DecisionRule(thresholds.score, accept, abstain, **{key: shown[key] for key in keys})


def set_rule(conformal: Conformal) -> SetRule:
    """A calibrated rule as the catalogue shows it."""
    return SetRule(conformal.rule.name, len(conformal.scores), conformal.smallest_alpha)
