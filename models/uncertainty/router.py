"""The cascade that is served: which images the members answer too, at operating points that a max_cost picks among.

A point is a fixed threshold on urgency, so an image's answer never depends on the images sent with it, and each point
is a classifier of its own with its own decision and sets. Its cost is a mean over validation. Numpy only.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.api import CascadePoint, UserError
from models.uncertainty.cascade import (
    CascadeConformal,
    Costs,
    RuleName,
    Window,
    combine,
    compare,
    least_urgency,
)
from models.uncertainty.conformal import Rule
from models.uncertainty.contract import ABSTAIN_SHARE, TARGET, Answers, Contract, choose_thresholds, decision_rule
from models.uncertainty.decision import Target, Thresholds
from models.uncertainty.scores import entropy, nll

Floats = NDArray[np.float64]
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
NEAR = 0.02  # the default point comes this near the dear method's validation NLL
COVERAGE = 0.9  # the decision that a window lies about
RANKS = 501  # quantiles that a window keeps


@dataclass(frozen=True, eq=False)
class Terms:
    """What a row runs under; a method without a choice has one that escalates nothing.

    Attributes:
        contract: None where the model was not calibrated.
        least: rows of at least this urgency go on to the dear method.
        share, cost: of validation rows escalated, and their mean cost.
    """

    contract: Contract | None = None
    least: float = math.inf
    share: float = 0.0
    cost: float = 0.0


@dataclass(frozen=True, eq=False)
class Router:
    """A calibrated cascade: its rule of urgency, and its operating points by rising cost."""

    rule: RuleName
    window: Window
    points: tuple[Terms, ...]
    default: int
    conformal: CascadeConformal

    def urgency(self, p: Floats) -> Floats:
        """Urgency (N,) of the cheap method's calibrated probabilities (N, K)."""
        return urgency(self.rule, self.window, entropy(p))

    def pick(self, max_cost: float | None) -> Terms:
        """The dearest point whose mean cost is at most `max_cost`, the default one without it.

        Raises:
            UserError: it is NaN or pays for none; names max_cost.
        """
        if max_cost is None:
            return self.points[self.default]
        paid = [point for point in self.points if point.cost <= max_cost]
        if not paid:
            least = math.ceil(100 * self.points[0].cost) / 100
            raise UserError(f"must be at least {least}, what the cheapest answer costs, got {max_cost}", "max_cost")
        return paid[-1]

    def catalogue(self) -> tuple[CascadePoint, ...]:
        """The points as the catalogue shows them."""
        return tuple(CascadePoint(t.share, t.cost, decision_rule(_contract(t).thresholds)) for t in self.points)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        points = [
            {
                "share": t.share,
                "cost": t.cost,
                "least": t.least if math.isfinite(t.least) else None,
                "decision": _contract(t).thresholds.to_json(),
            }
            for t in self.points
        ]
        sets = asdict(self.conformal.rule) | {
            name: _packed(getattr(self.conformal, name)) for name in ("urgency", "cheap", "dear")
        }
        window = {"decision": self.window.decision, "scores": _packed(self.window.scores)}
        return {"rule": self.rule, "window": window, "default": self.default, "points": points, "sets": sets}

    @classmethod
    def from_json(cls, found: Mapping[str, Any], foreign: Thresholds | None = None) -> Router:
        """The inverse of `to_json`; UserError, KeyError, TypeError or ValueError on what is not one."""
        sets, window = found["sets"], found["window"]
        rule = Rule(float(sets["penalty"]), int(sets["free"]), bool(sets["randomised"]))
        conformal = CascadeConformal(
            rule, _unpacked(sets["urgency"]).astype(np.float64), _unpacked(sets["cheap"]), _unpacked(sets["dear"])
        )
        points = [
            _terms(
                float(p["share"]),
                float(p["cost"]),
                math.inf if p["least"] is None else float(p["least"]),
                Thresholds.from_json(p["decision"]),
                conformal,
                foreign,
            )
            for p in found["points"]
        ]
        if not 0 <= found["default"] < len(points):
            raise ValueError("the cascade's default is none of its points")
        scores = Window(_unpacked(window["scores"]).astype(np.float64), float(window["decision"]))
        return cls(found["rule"], scores, tuple(points), int(found["default"]), conformal)


def urgency(rule: RuleName, window: Window, scores: Floats) -> Floats:
    """Urgency (N,) of the cheap method's entropies (N,)."""
    return scores if rule == "threshold" else window.urgency(scores)


def fit(
    selection: tuple[Answers, Answers],
    conformal: tuple[Answers, Answers],
    costs: Costs,
    rule: Rule,
    target: Target = TARGET,
    abstain_share: float = ABSTAIN_SHARE,
    shares: Sequence[float] = SHARES,
    foreign: Thresholds | None = None,
) -> Router:
    """From the cheap and the dear method on both halves of validation; `foreign` goes with every contract.

    The selection half chooses the rule of urgency (lower NLL, mean over `shares`), the thresholds of every point and
    the default, the cheapest point that escalates any rows and is within `NEAR` of the dear method's NLL (the point
    without is the cheap method, which may have been tuned on the same half); the conformal half calibrates sets.
    """
    cheap, dear = selection
    labels, scores = cheap.labels, entropy(cheap.p)
    trials = compare(cheap.p, dear.p, labels, costs, shares, COVERAGE)
    names: tuple[RuleName, RuleName] = ("threshold", "window")
    losses = {name: np.mean([t.nll for t in trials if t.rule == name]) for name in names}
    chosen = min(names, key=lambda name: losses[name])
    window = Window(np.quantile(scores, np.linspace(0.0, 1.0, RANKS)), float(np.quantile(scores, COVERAGE)))
    urgent, wanted = urgency(chosen, window, scores), entropy(conformal[0].p)
    own = [
        rule.strangeness(a.p, a.u if rule.randomised else None)[np.arange(len(a.labels)), a.labels] for a in conformal
    ]
    calibrated = CascadeConformal(rule, urgency(chosen, window, wanted), own[0], own[1])
    points, near = [], []
    for share in shares:
        least = least_urgency(urgent, costs, costs.mean(share))
        escalated = urgent >= least
        answers = Answers(combine(cheap.p, dear.p, escalated), labels, cheap.u, cheap.familiar)
        thresholds = choose_thresholds(answers, target, abstain_share)
        seen = float(escalated.mean())
        points.append(_terms(seen, costs.mean(seen), least, thresholds, calibrated, foreign))
        near.append(seen > 0.0 and nll(answers.p, labels) <= (1.0 + NEAR) * nll(dear.p, labels))
    default = near.index(True) if True in near else len(points) - 1
    return Router(chosen, window, tuple(points), default, calibrated)


def _terms(
    share: float,
    cost: float,
    least: float,
    thresholds: Thresholds,
    conformal: CascadeConformal,
    foreign: Thresholds | None,
) -> Terms:
    return Terms(Contract(thresholds, conformal.at(least), foreign), least, share, cost)


def _contract(terms: Terms) -> Contract:
    assert terms.contract is not None
    return terms.contract


def _packed(values: NDArray[Any]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpacked(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
