"""What early exits of the classifier itself cost and are worth: routes, their mixture of answers, their time.

Costs are relative to one forward of the source: the stages run plus the heads run. An answer is softened by the
temperature of the exit it left at, fitted on the selection images that leave there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbones.macs import count_macs
from models.backbones.resnet import ResNet
from models.evaluation.metrics import ece
from models.training.heads import Exits, stages
from models.uncertainty.calibration import Estimate, bootstrap
from models.uncertainty.scores import TINY, fit_temperature, soften

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Leave = Callable[[Tensor], Tensor]  # logits (N, K) of an exit -> who leaves there (N,) bool
ENOUGH = 100  # selection rows that an exit's own temperature is fitted on, at least


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one image: three stages, the head on each, and the source's own last layer."""

    stages: tuple[int, ...]
    heads: tuple[int, ...]
    last: int

    @property
    def single(self) -> int:
        """One forward of the source."""
        return sum(self.stages) + self.last

    def costs(self, used: Sequence[bool], end: float = 0.0) -> Floats:
        """Cost (3,) of leaving at each stage when only heads of `used` stages run.

        An unused third head is the source's own last layer. `end` is what the last answer costs on top.
        """
        heads = [h * u for h, u in zip(self.heads, used, strict=True)]
        total = np.cumsum(self.stages) + np.cumsum(heads)
        found: Floats = total / self.single
        found[-1] += (0 if used[-1] else self.last) / self.single + end
        return found


@torch.no_grad()
def count(source: ResNet, exits: Exits, x: Tensor) -> Macs:
    """Count on one image (1, C, H, W)."""
    parts, heads, h = [], [], x
    for stage, head in zip(stages(source), exits.heads, strict=True):
        before = h
        parts.append(count_macs(source, lambda stage=stage, before=before: stage(before)))  # type: ignore[misc]
        h = stage(h)
        heads.append(count_macs(head, lambda head=head, h=h: head(exits.pool(h))))  # type: ignore[misc]
    return Macs(tuple(parts), tuple(heads), source.fc.in_features * source.fc.out_features)


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


def temperatures_by_exit(answers: Sequence[Floats], left: Ints, labels: Ints) -> list[float]:
    """Each exit's temperature on the rows that leave there; on all rows where fewer than `ENOUGH` do."""
    rows = [left == k if (left == k).sum() >= ENOUGH else np.ones(len(left), bool) for k in range(len(answers))]
    return [fit_temperature(log_p[r], labels[r]) for log_p, r in zip(answers, rows, strict=True)]


@dataclass(frozen=True)
class Candidate:
    """A way to leave: log probabilities by exit, who leaves where, on selection and on test; cost (3,) of each exit."""

    answers: tuple[Sequence[Floats], Sequence[Floats]]
    left: tuple[Ints, Ints]
    costs: Floats


@dataclass(frozen=True)
class Point:
    """A candidate on the test set. `gains`: calibrated NLL of served methods less its own, over the same images."""

    cost: float
    left: tuple[float, ...]
    accuracy: float
    nll: Estimate
    gains: dict[str, Estimate]
    ece: float


def own_losses(p: Floats, labels: Ints) -> Floats:
    """Negative log likelihood (N,) of labels (N,)."""
    found: Floats = -np.log(np.maximum(p[np.arange(len(labels)), labels], TINY))
    return found


def mean(losses: Floats) -> float:
    """Of (N,)."""
    return float(losses.mean())


def evaluate(candidate: Candidate, selection: Ints, test: Ints, served: Mapping[str, Floats]) -> Point:
    """Temperatures from the selection labels, numbers from the test labels; `served`: other methods' losses (N,)."""
    (val, tst), (val_left, left) = candidate.answers, candidate.left
    p = mixture(tst, left, temperatures_by_exit(val, val_left, selection))
    losses = own_losses(p, test)
    return Point(
        cost=float(candidate.costs[left].mean()),
        left=tuple(float((left == k).mean()) for k in range(len(tst))),
        accuracy=float((p.argmax(1) == test).mean()),
        nll=bootstrap(mean, losses),
        gains={name: bootstrap(mean, other - losses) for name, other in served.items()},
        ece=ece(p, test),
    )


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


def choose_thresholds(curve: Curve, budgets: Sequence[float], levels: int = 25) -> dict[float, tuple[float, float]]:
    """Per budget the thresholds of least loss whose mean cost is at most the budget, among quantiles of confidence."""
    grid = [[0.0, *np.quantile(s, np.linspace(0, 1, levels)[1:]), np.inf] for s in curve.scores.T]
    tried = {pair: curve.at(pair) for pair in itertools.product(*grid)}
    chosen = {}
    for budget in budgets:
        within = {pair: loss for pair, (cost, loss) in tried.items() if cost <= budget}
        if within:
            chosen[budget] = min(within, key=lambda pair: within[pair])
    return chosen


@torch.inference_mode()
def run(source: ResNet, exits: Exits, leave: Sequence[Leave | None], refit: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and the exit (N,) of pixels (N, C, H, W); later stages run on the rows that are left.

    Args:
        source: the frozen network.
        exits: its heads.
        leave: of the first two stages; None runs no head there.
        refit: the third head answers last, not the source's own layer.
        x: pixels in [0, 1].
    """
    rows, h = torch.arange(len(x)), x
    logits, left = x.new_empty(len(x), source.config.classes), torch.full((len(x),), len(leave))
    for k, stage in enumerate(stages(source)):
        if not len(rows):
            break
        h = stage(h)
        if k == len(leave):
            logits[rows] = exits.heads[k](exits.pool(h)) if refit else source.fc(h.mean(dim=(2, 3)))
        elif (leaves := leave[k]) is not None:
            z = exits.heads[k](exits.pool(h))
            goes = leaves(z)
            logits[rows[goes]], left[rows[goes]] = z[goes], k
            rows, h = rows[~goes], h[~goes]
    return logits, left


def surer_than(threshold: float, temperature: float) -> Leave | None:
    """Leave where the largest probability at `temperature` reaches `threshold`; None at an infinite one."""
    if not np.isfinite(threshold):
        return None
    return lambda z: (z / temperature).softmax(-1).amax(-1) >= threshold
