"""A cheap method first, a dear one for the images that need it, within a mean cost. Numpy only.

Costs are relative to one forward of `single`, mean over the images of a request. Urgency says who goes first: the
plain rule ranks by uncertainty; the window rule by nearness to the threshold of the decision to come, since far
from it on either side the dear method would not change that decision (Xia and Bouganis, ICCV 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.api import UserError
from models.uncertainty.conformal import Conformal, Rule
from models.uncertainty.scores import entropy, nll
from models.uncertainty.selective import aurc, risk_at_coverage

Floats = NDArray[np.float64]
F = TypeVar("F", np.float64, np.float32)
Bools = NDArray[np.bool_]
RuleName = Literal["threshold", "window"]


@dataclass(frozen=True)
class Costs:
    """`cheap` for every image, and what an escalated image costs on top (not the dear method's total)."""

    cheap: float
    extra: float

    def mean(self, share: float) -> float:
        """Mean cost when `share` of images are escalated."""
        return self.cheap + share * self.extra

    def allowance(self, max_cost: float | None, rows: int) -> int:
        """Images of `rows` that may be escalated at a mean cost of at most `max_cost`; None is no limit.

        Raises:
            UserError: `max_cost` is NaN or below what the cheap method alone costs.
        """
        if max_cost is None:
            return rows
        if not max_cost >= self.cheap:
            raise UserError(f"max_cost must be at least {self.cheap:.3g}, the cost of answering at all", "max_cost")
        if max_cost >= self.cheap + self.extra:
            return rows
        return math.floor(rows * (max_cost - self.cheap) / self.extra + 1e-9)


def most_urgent(urgency: Floats, least: float, most: int) -> Bools:
    """Rows (N,) to escalate: urgency of at least `least`, of those the `most` most urgent, first come first."""
    order = np.argsort(-urgency, kind="stable")
    chosen = np.zeros(len(urgency), dtype=bool)
    chosen[order[: max(0, most)]] = True
    return chosen & (urgency >= least)


@dataclass(frozen=True, eq=False)
class Window:
    """Urgency by nearness to a decision threshold, in ranks of the cheap scores seen on validation.

    Attributes:
        scores: validation uncertainties of the cheap method, sorted (V,).
        decision: the threshold on that uncertainty at which a decision changes.
    """

    scores: Floats
    decision: float

    def rank(self, scores: Floats) -> Floats:
        """Share of validation rows below each score, ties half, in 0..1."""
        below, upto = (np.searchsorted(self.scores, scores, side) for side in ("left", "right"))
        return (below + upto) / (2.0 * len(self.scores))

    def urgency(self, scores: Floats) -> Floats:
        """Minus the distance in rank to the decision threshold, so that 0 is most urgent."""
        return -np.abs(self.rank(scores) - self.rank(np.array([self.decision])))


def least_urgency(urgency: Floats, costs: Costs, max_cost: float | None) -> float:
    """The threshold on urgency (V,) of validation rows at which the mean cost there is at most `max_cost`.

    Ties are left out rather than exceed the cost; inf escalates nothing.
    """
    most = costs.allowance(max_cost, len(urgency))
    if most >= len(urgency):
        return -math.inf
    falling = np.sort(urgency)[::-1]
    above = falling[:most]
    return float(above[above > falling[most]].min(initial=math.inf))


def combine(cheap: NDArray[F], dear: NDArray[F], escalated: Bools) -> NDArray[F]:
    """The dear answers (N, ...) where `escalated` (N,), the cheap ones elsewhere."""
    return np.where(escalated.reshape(-1, *[1] * (cheap.ndim - 1)), dear, cheap)


@dataclass(frozen=True, eq=False)
class CascadeConformal:
    """Prediction sets of a cascade at any threshold on urgency: a cascade at a fixed one is one more classifier.

    Attributes:
        rule: of both methods.
        urgency: of the calibration rows (n,), from the cheap method.
        cheap: strangeness of each row's class under the cheap method (n,).
        dear: the same under the dear method (n,).
    """

    rule: Rule
    urgency: Floats
    cheap: NDArray[np.float32]
    dear: NDArray[np.float32]

    def at(self, least: float) -> Conformal:
        """Calibrated for rows escalated from urgency `least` on.

        Exact while a request's `max_cost` leaves none of those out; a cap that binds makes the choice depend on
        the request's other images, and coverage is then only near nominal.
        """
        return Conformal(self.rule, np.sort(combine(self.cheap, self.dear, self.urgency >= least)))


@dataclass(frozen=True)
class Point:
    """A cascade on labelled rows: what it cost, how well it answered, how well its entropy ranks its errors."""

    rule: RuleName
    share: float
    cost: float
    nll: float
    accuracy: float
    aurc: float
    risk: float


def compare(
    cheap: Floats,
    dear: Floats,
    labels: NDArray[np.int64],
    costs: Costs,
    shares: Sequence[float] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    coverage: float = 0.9,
) -> list[Point]:
    """Both rules at equal costs, from cached calibrated probabilities (N, K) of both methods.

    Urgency comes from the cheap method's entropy. The window is centred on the decision `accept the surest
    `coverage` of rows`, and `risk` is the error rate of what the finished cascade accepts there.

    Args:
        cheap: probabilities of the cheap method at its temperature.
        dear: probabilities of the dear method at its temperature.
        labels: classes (N,).
        costs: of both.
        shares: shares of rows to escalate.
        coverage: where the decision lies.
    """
    scores = entropy(cheap)
    window = Window(np.sort(scores), float(np.quantile(scores, coverage)))
    urgencies: dict[RuleName, Floats] = {"threshold": scores, "window": window.urgency(scores)}
    points = []
    for rule, urgency in urgencies.items():
        for share in shares:
            escalated = most_urgent(urgency, -math.inf, round(share * len(labels)))
            p = combine(cheap, dear, escalated)
            wrong, final = p.argmax(-1) != labels, entropy(p)
            points.append(
                Point(
                    rule=rule,
                    share=float(escalated.mean()),
                    cost=costs.mean(float(escalated.mean())),
                    nll=nll(p, labels),
                    accuracy=float(1.0 - wrong.mean()),
                    aurc=aurc(final, wrong),
                    risk=risk_at_coverage(final, wrong, coverage),
                )
            )
    return points
