"""accept | escalate | abstain from one score, by thresholds that validation chose for a stated target. Numpy only.

Scores are uncertainties: more is more uncertain (`scores.as_uncertainty` turns the others round).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from models.api import UserError
from models.uncertainty.scores import DIRECTION

Floats = NDArray[np.float64]
Codes = NDArray[np.int8]
DECISIONS = ("accept", "escalate", "abstain")
ACCEPT, ESCALATE, ABSTAIN = range(3)


def clopper_pearson(errors: int, trials: int, miss: float) -> float:
    """Exact upper bound of a binomial rate that is too low with probability at most `miss` (Biometrika, 1934).

    The rate at which `errors` or fewer among `trials` have probability `miss`, by bisection.
    """
    if errors >= trials:
        return 1.0
    i = np.arange(errors + 1)
    steps = np.log(trials - i[:-1]) - np.log(i[:-1] + 1.0)
    ways = np.concatenate([[0.0], np.cumsum(steps)])
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        rate = 0.5 * (low + high)
        tail = np.exp(ways + i * math.log(rate) + (trials - i) * math.log1p(-rate)).sum()
        low, high = (rate, high) if tail > miss else (low, rate)
    return high


@dataclass(frozen=True)
class Cut:
    """One threshold and what validation showed below it.

    Attributes:
        threshold: scores up to it are taken; -inf when the target cannot be attained.
        coverage: share of validation rows taken.
        risk: their error rate (NaN if none).
        bound: upper bound of their error rate on new rows, at the confidence asked for.
    """

    threshold: float
    coverage: float
    risk: float
    bound: float

    @property
    def attained(self) -> bool:
        """False when no threshold met the target."""
        return self.threshold > -math.inf


def _check(scores: Floats, errors: NDArray[np.bool_]) -> None:
    if scores.ndim != 1 or scores.shape != errors.shape or not len(scores) or not np.isfinite(scores).all():
        raise ValueError("thresholds need finite scores and errors, both (N,), at least one row")


def _share(name: str, value: float) -> float:
    if not 0.0 < value < 1.0:
        raise UserError(f"{name} must lie strictly between 0 and 1, got {value}", name)
    return value


def _cut(scores: Floats, errors: NDArray[np.bool_], threshold: float, miss: float) -> Cut:
    """Measure a threshold that is one of the scores: given its value the other rows below it are independent draws,
    hence one trial fewer."""
    taken = scores <= threshold
    wrong, n = int(errors[taken].sum()), int(taken.sum())
    return Cut(threshold, n / len(scores), wrong / n, clopper_pearson(wrong, n - 1, miss))


def at_coverage(scores: Floats, errors: NDArray[np.bool_], coverage: float, confidence: float = 0.95) -> Cut:
    """Risk at coverage: take the surest `coverage` of rows, say how often they err and the bound of it.

    `escalate` a share s of rows by coverage 1 - s. With tied scores more than asked may be taken.

    Raises:
        UserError: coverage or confidence outside (0, 1).
    """
    _check(scores, errors)
    k = math.ceil(_share("coverage", coverage) * len(scores) - 1e-9)
    return _cut(scores, errors, float(np.sort(scores)[k - 1]), 1.0 - _share("confidence", confidence))


def at_risk(scores: Floats, errors: NDArray[np.bool_], risk: float, confidence: float = 0.95, points: int = 40) -> Cut:
    """Coverage at risk: the widest cut whose error rate on new rows is at most `risk`, with `confidence`.

    Selection with guaranteed risk (Geifman and El-Yaniv, NeurIPS 2017): exact binomial bounds at coverages
    i / points, each allowed to fail with (1 - confidence) / points, so that choosing among them costs nothing
    (union bound; any score and classifier, rows independent and from where requests come from).

    Returns:
        The cut; `attained` is False, its threshold -inf and its bound 1 when no coverage qualifies.

    Raises:
        UserError: risk or confidence outside (0, 1).
    """
    _check(scores, errors)
    _share("risk", risk)
    miss = (1.0 - _share("confidence", confidence)) / points
    ordered = np.sort(scores)
    for i in range(points, 0, -1):
        cut = _cut(scores, errors, float(ordered[-(-i * len(scores) // points) - 1]), miss)
        if cut.bound <= risk:
            return cut
    return Cut(-math.inf, 0.0, math.nan, 1.0)


Kind = Literal["risk_at_coverage", "coverage_at_risk", "escalate_share"]


@dataclass(frozen=True)
class Target:
    """What `accept` shall mean. `value` is a coverage, a risk or a share of rows not accepted."""

    kind: Kind
    value: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"no decision target {self.kind!r}; known: {', '.join(get_args(Kind))}", "target")

    def cut(self, scores: Floats, errors: NDArray[np.bool_]) -> Cut:
        """The cut of validation scores (N,) with known errors (N,) that meets the target."""
        if self.kind == "coverage_at_risk":
            return at_risk(scores, errors, self.value, self.confidence)
        coverage = 1.0 - self.value if self.kind == "escalate_share" else self.value
        return at_coverage(scores, errors, coverage, self.confidence)


@dataclass(frozen=True)
class Thresholds:
    """A calibrated decision: accept up to `accept`, abstain above `abstain`, escalate between.

    Attributes:
        score: key of the score (`scores.DIRECTION`).
        accept: -inf accepts nothing (the target is out of reach).
        abstain: inf never abstains.
        shown: the target and what validation measured, for the card and GET /models.
    """

    score: str
    accept: float
    abstain: float = math.inf
    shown: Mapping[str, float | str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.score not in DIRECTION:
            raise UserError(f"no score named {self.score!r}; known: {', '.join(DIRECTION)}", "score")
        if not self.accept <= self.abstain:
            raise UserError(f"accept threshold {self.accept} must not exceed abstain threshold {self.abstain}")

    @classmethod
    def choose(
        cls,
        score: str,
        scores: Floats,
        errors: NDArray[np.bool_],
        target: Target,
        abstain_share: float = 0.0,
    ) -> Thresholds:
        """From validation scores (N,), turned so that more is more uncertain, and errors (N,).

        `abstain_share` of validation rows, the least sure, abstain rather than escalate.
        """
        cut = target.cut(scores, errors)
        abstain = math.inf
        if abstain_share:
            abstain = max(cut.threshold, at_coverage(scores, errors, 1.0 - abstain_share).threshold)
        shown: dict[str, float | str | None] = {
            "target": target.kind,
            "value": target.value,
            "confidence": target.confidence,
            "rows": len(scores),
            "coverage": cut.coverage,
            "risk": cut.risk if cut.attained else None,
            "bound": cut.bound if cut.attained else None,
        }
        return cls(score, cut.threshold, abstain, shown)

    def decide(self, scores: Floats) -> Codes:
        """Codes (N,) into DECISIONS; NaN abstains."""
        codes = np.full(scores.shape, ABSTAIN, dtype=np.int8)
        codes[scores <= self.abstain] = ESCALATE
        codes[scores <= self.accept] = ACCEPT
        return codes

    def to_json(self) -> dict[str, Any]:
        """Plain values; null stands for an infinite threshold."""
        accept, abstain = (t if math.isfinite(t) else None for t in (self.accept, self.abstain))
        return {"score": self.score, "accept": accept, "abstain": abstain, "shown": dict(self.shown)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Thresholds:
        """The inverse of `to_json`.

        Raises:
            UserError: a field is missing or not a number.
        """
        try:
            accept = -math.inf if found["accept"] is None else float(found["accept"])
            abstain = math.inf if found["abstain"] is None else float(found["abstain"])
            return cls(str(found["score"]), accept, abstain, dict(found["shown"]))
        except (KeyError, TypeError) as error:
            raise UserError(f"decision thresholds: {error}; calibrate the model again") from error
