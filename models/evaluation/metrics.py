"""Evaluation metrics of classifiers and generators, and what their errors are. Numpy only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def accuracy(p: Floats, labels: NDArray[np.int64]) -> float:
    """Share of rows of (N, K) whose largest entry is the label (N,)."""
    return float((p.argmax(-1) == labels).mean())


def brier(p: Floats, labels: NDArray[np.int64]) -> float:
    """Mean squared distance to the one-hot label, in 0..2."""
    onehot = np.eye(p.shape[1])[labels]
    return float(((p - onehot) ** 2).sum(-1).mean())


def ece(p: Floats, labels: NDArray[np.int64], bins: int = 15) -> float:
    """Expected calibration error: equal-width bins (low, high] on the largest probability."""
    confidence, correct = p.max(-1), p.argmax(-1) == labels
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            gap += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(gap)


def ranks(values: Floats) -> Floats:
    """Ranks 1..N of (N,); equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]


def auroc(positive: Floats, negative: Floats) -> float:
    """Probability that a positive score exceeds a negative one, ties half (Mann-Whitney)."""
    n, m = len(positive), len(negative)
    return float((ranks(np.concatenate([positive, negative]))[:n].sum() - n * (n + 1) / 2.0) / (n * m))


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation of (N,) and (N,) in -1..1, ties by mean rank; NaN where one of them is constant."""
    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else float("nan")


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of a few runs and, of two to five, its standard error and 95 % t-interval."""
    t95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
    n, mean = len(values), float(np.mean(values))
    if n not in t95:
        return {"mean": mean, "n": n}
    se = float(np.std(values, ddof=1) / np.sqrt(n))
    return {"mean": mean, "se": se, "low": mean - t95[n] * se, "high": mean + t95[n] * se, "n": n}


def over_subsets(values: Sequence[float], subsets: Sequence[tuple[int, ...]], n: int) -> dict[str, float]:
    """Mean over subsets of a pool of `n`, and its standard error by leaving out one of the pool at a time.

    Subsets overlap, so their scatter says too little; the jackknife of U-statistics (Arvesen, Annals of Mathematical
    Statistics 1969) counts what is independent, the members. No error where some member is in every subset.

    Args:
        values: one figure for each subset.
        subsets: indices below `n`.
        n: size of the pool.
    """
    found = {"mean": float(np.mean(values)), "n": len(values)}
    without = [[v for v, s in zip(values, subsets, strict=True) if i not in s] for i in range(n)]
    if n < 2 or not all(without):
        return found
    left = np.array([np.mean(kept) for kept in without])
    return {**found, "se": float(np.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum()))}


def deep_ensemble_equivalent(value: float, curve: dict[int, float]) -> float:
    """DEE: the ensemble size whose NLL equals `value`, piecewise linear, ends extrapolated.

    Args:
        value: the method's NLL.
        curve: NLL of deep ensembles by size, sizes rising, NLL falling.
    """
    sizes = sorted(curve)
    for a, b in itertools.pairwise(sizes):
        if value >= curve[b] or b == sizes[-1]:
            return a + (b - a) * (curve[a] - value) / (curve[a] - curve[b])
    raise ValueError("the curve needs at least two sizes")


def moments(features: Floats) -> tuple[Floats, Floats]:
    """Mean (D,) and covariance (D, D) of features (N, D)."""
    return features.mean(0), np.cov(features, rowvar=False)


def frechet(a: tuple[Floats, Floats], b: tuple[Floats, Floats]) -> float:
    """Frechet distance of two Gaussians, each (mean, covariance): |m - n|^2 + tr(A + B - 2 (AB)^(1/2))."""
    values, vectors = np.linalg.eigh(a[1])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b[1] @ root), 0, None)).sum()
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2.0 * cross)


def frechet_interval(
    features: Floats, reference: tuple[Floats, Floats], repeats: int = 200, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap 95 % interval of the distance of `features` (N, D), re-centred on the point estimate.

    Resampling inflates the distance by a bias of its own, which is subtracted.
    """
    rng = np.random.default_rng(seed)
    point = frechet(moments(features), reference)
    draws = np.array(
        [frechet(moments(features[rng.integers(len(features), size=len(features))]), reference) for _ in range(repeats)]
    )
    low, high = np.quantile(draws, [0.025, 0.975]) - (draws.mean() - point)
    return float(low), float(high)
