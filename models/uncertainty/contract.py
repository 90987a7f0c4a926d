"""What a method's answers promise, fitted on validation: a decision and prediction sets. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Answers:
    """Calibrated probabilities (N, K) of labelled rows, and the draw (N,) that each image's bytes give."""

    p: Floats
    labels: NDArray[np.int64]
    u: Floats

    @property
    def errors(self) -> NDArray[np.bool_]:
        """Rows (N,) whose likeliest class is wrong."""
        return np.asarray(self.p.argmax(-1) != self.labels)


@dataclass(frozen=True, eq=False)
class Contract:
    """One method's thresholds and calibrated sets."""

    thresholds: Thresholds
    conformal: Conformal

    @classmethod
    def fit(
        cls,
        selection: Answers,
        conformal: Answers,
        rule: Rule,
        target: Target = TARGET,
        abstain_share: float = ABSTAIN_SHARE,
    ) -> Contract:
        """Thresholds on entropy from the selection half of validation, sets from the conformal half."""
        return cls(
            choose_thresholds(selection, target, abstain_share),
            Conformal.calibrate(conformal.p, conformal.labels, rule, conformal.u if rule.randomised else None),
        )

    def decide(self, scores: Mapping[str, Floats]) -> list[DecisionName]:
        """A decision per row from its uncertainty arrays (N,)."""
        return decide(self.thresholds, scores)

    def sets(self, p: Floats, alpha: Floats, u: Floats) -> list[tuple[int, ...]]:
        """Class indices per row, likeliest first, at one alpha and draw per row (N,)."""
        return listed(self.conformal.sets(p, alpha, u if self.conformal.rule.randomised else None), p)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"decision": self.thresholds.to_json(), "sets": self.conformal.to_json()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Contract:
        """The inverse of `to_json`; UserError on what is not one."""
        return cls(Thresholds.from_json(found["decision"]), Conformal.from_json(found["sets"]))


def choose_thresholds(selection: Answers, target: Target, abstain_share: float) -> Thresholds:
    """Thresholds on entropy, which routes foreign images best of the scores that every method has."""
    return Thresholds.choose("entropy", entropy(selection.p), selection.errors, target, abstain_share)


def choose_rule(selection: Answers, rules: Sequence[Rule] = RULES) -> Rule:
    """The rule with the smallest sets over `ALPHAS`, from random halves of the selection rows."""
    half = len(selection.labels) // 2

    def size(rule: Rule) -> float:
        return sum(repeated_splits(selection.p, selection.labels, rule, alpha, half).size for alpha in ALPHAS)

    return min(rules, key=size)


def decide(thresholds: Thresholds, scores: Mapping[str, Floats]) -> list[DecisionName]:
    """Names of decisions, from uncertainty arrays (N,) that hold the thresholds' score."""
    codes = thresholds.decide(as_uncertainty(thresholds.score, scores[thresholds.score]))
    return [cast(DecisionName, DECISIONS[code]) for code in codes]


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
