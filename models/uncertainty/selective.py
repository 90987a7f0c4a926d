"""How well a score ranks: risk-coverage, AURC, average precision. More is more uncertain; numpy only.

Rows with equal scores count as if their order were drawn at random: what is returned is the expectation.
AUROC is `models.evaluation.metrics.auroc`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def risk_coverage(scores: Floats, losses: NDArray[np.bool_] | Floats) -> tuple[Floats, Floats]:
    """Risk-coverage curve (El-Yaniv and Wiener, JMLR 2010): the surest k of n rows accepted, k = 1..n.

    Args:
        scores: uncertainty (N,).
        losses: loss of each row (N,); errors as bool or 0/1 give the selective error.

    Returns:
        coverage k / n (N,) and the mean loss of the accepted rows (N,).
    """
    order = np.argsort(scores, kind="stable")
    _, tie, count = np.unique(scores[order], return_inverse=True, return_counts=True)
    loss = (np.bincount(tie, losses[order].astype(np.float64)) / count)[tie]
    k = np.arange(1, len(scores) + 1)
    return k / len(scores), np.cumsum(loss) / k


def risk_at_coverage(scores: Floats, losses: NDArray[np.bool_] | Floats, coverage: float) -> float:
    """Mean loss of the surest ceil(coverage * n) rows, at least one."""
    k = max(1, int(np.ceil(coverage * len(scores) - 1e-9)))
    return float(risk_coverage(scores, losses)[1][k - 1])


def aurc(scores: Floats, losses: NDArray[np.bool_] | Floats) -> float:
    """Area under the risk-coverage curve: its mean over k = 1..n."""
    return float(risk_coverage(scores, losses)[1].mean())


def excess_aurc(scores: Floats, losses: NDArray[np.bool_] | Floats) -> float:
    """AURC above that of the perfect order of the same losses (E-AURC: Geifman et al., ICLR 2019, section 2).

    Comparable between classifiers of different accuracy; 0 is a perfect ranking.
    """
    return aurc(scores, losses) - aurc(losses.astype(np.float64), losses)


def average_precision(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Area under the precision-recall curve as a step function, `positive` rows to be ranked first.

    Thresholds lie between distinct scores, so equal scores share a precision. NaN without a positive row.
    Unlike AUROC it moves with the share of positives: compare at equal shares only.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    found = np.cumsum(positive[order])[last]
    precision = found / (np.flatnonzero(last) + 1)
    recall = np.diff(found, prepend=0) / found[-1] if found[-1] else np.full(len(found), np.nan)
    return float((precision * recall).sum())
