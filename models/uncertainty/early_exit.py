"""Who leaves a network early: confidence thresholds, their mixture of answers, and their choice on validation.

An answer is softened by the temperature of the exit it left at, fitted on the validation images that leave there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.uncertainty.scores import TINY, fit_temperature, soften

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ENOUGH = 100  # validation rows that an exit's own temperature is fitted on, at least


def route(scores: Floats, thresholds: Sequence[float]) -> Ints:
    """Exit (N,) of each row: the first of E whose score (N, E) reaches its threshold, else E."""
    reached = scores >= np.asarray(thresholds)
    return np.where(reached.any(1), reached.argmax(1), scores.shape[1])


def mixture(answers: Sequence[Floats], left: Ints, temperatures: Sequence[float]) -> Floats:
    """Probabilities (N, K): each row's from the log probabilities (N, K) of the exit it left at."""
    p = np.empty_like(answers[0])
    for k, (log_p, temperature) in enumerate(zip(answers, temperatures, strict=True)):
        p[left == k] = soften(log_p[left == k], temperature)
    return p


def confidences(answers: Sequence[Floats], temperatures: Sequence[float]) -> Floats:
    """Largest probability (N, E) of each exit's log probabilities (N, K) at its temperature."""
    pairs = zip(answers, temperatures, strict=True)
    return np.stack([soften(log_p, temperature).max(1) for log_p, temperature in pairs], 1)


def temperatures_by_exit(answers: Sequence[Floats], left: Ints, labels: Ints) -> list[float]:
    """Each exit's temperature on the rows that leave there; on all rows where fewer than `ENOUGH` do."""
    rows = [left == k if (left == k).sum() >= ENOUGH else np.ones(len(left), bool) for k in range(len(answers))]
    return [fit_temperature(log_p[r], labels[r]) for log_p, r in zip(answers, rows, strict=True)]


def own_losses(p: Floats, labels: Ints) -> Floats:
    """Negative log likelihood (N,) of labels (N,)."""
    found: Floats = -np.log(np.maximum(p[np.arange(len(labels)), labels], TINY))
    return found


@dataclass(frozen=True)
class Curve:
    """Everything the choice of thresholds reads: confidences (N, 2), losses (N, 3), and cost by heads used."""

    scores: Floats
    losses: Floats
    costs: Callable[[bool, bool], Floats]

    def at(self, thresholds: Sequence[float]) -> tuple[float, float]:
        """Mean cost and mean loss; an infinite threshold also saves the head."""
        left = route(self.scores, thresholds)
        costs = self.costs(*(bool(np.isfinite(t)) for t in thresholds))
        return float(costs[left].mean()), float(self.losses[np.arange(len(left)), left].mean())


def choose_confidences(curve: Curve, budgets: Sequence[float], levels: int = 25) -> dict[float, tuple[float, float]]:
    """Per budget the thresholds of least loss whose mean cost is at most the budget, among quantiles of confidence."""
    grid = [[0.0, *np.quantile(s, np.linspace(0, 1, levels)[1:]), np.inf] for s in curve.scores.T]
    tried = {pair: curve.at(pair) for pair in itertools.product(*grid)}
    chosen = {}
    for budget in budgets:
        within = {pair: loss for pair, (cost, loss) in tried.items() if cost <= budget}
        if within:
            chosen[budget] = min(within, key=lambda pair: within[pair])
    return chosen
