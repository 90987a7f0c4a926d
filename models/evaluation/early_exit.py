"""What early exits of the classifier itself are worth on test images, and how they run one after the other.

Costs are relative to one forward of the source: the stages run plus the heads run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbones.early_exits import stages
from models.backbones.resnet import ResNet
from models.evaluation.metrics import ece
from models.training.heads import Exits
from models.uncertainty.calibration import Estimate, bootstrap
from models.uncertainty.early_exit import mixture, own_losses, temperatures_by_exit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Leave = Callable[[Tensor], Tensor]  # logits (N, K) of an exit -> who leaves there (N,) bool


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
