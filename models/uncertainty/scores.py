"""Probabilities, calibration by temperature, and uncertainty in nats. Numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TINY = 1e-12
FLAT = 1e-10  # a slope of the NLL that rounding cannot tell from 0
LEAST = -700.0  # log probability of what is impossible, still finite in float64

# Which way a score points: +1 where more is more uncertain, -1 where more is surer.
DIRECTION = {
    "entropy": 1,
    "margin": -1,
    "max_probability": -1,
    "energy": 1,
    "source_entropy": 1,
    "disagreement_source_vs_estimate": 1,
    "expected_entropy": 1,
    "mutual_information": 1,
    "feature_distance": 1,
}


def log_softmax(z: Floats) -> Floats:
    """Logits (..., K) -> log probabilities (..., K)."""
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def soften(log_p: Floats, temperature: float) -> Floats:
    """Probabilities softmax(log p / temperature), (..., K)."""
    return np.exp(log_softmax(log_p / temperature))


def mean_log_probability(member_log_p: Floats) -> Floats:
    """Log of the members' mean probability: (N, M, K) log probabilities -> (N, K)."""
    top = member_log_p.max(1, keepdims=True)
    return (top + np.log(np.exp(member_log_p - top).mean(1, keepdims=True)))[:, 0]


def entropy(p: Floats) -> Floats:
    """Shannon entropy (...,) of probabilities (..., K)."""
    return -(p * np.log(np.maximum(p, TINY))).sum(-1)


def kl(p: Floats, q: Floats) -> Floats:
    """KL(p || q) (...,) of probabilities (..., K); never negative."""
    ratio = np.log(np.maximum(p, TINY)) - np.log(np.maximum(q, TINY))
    return np.maximum(0.0, (p * ratio).sum(-1))


def margin(p: Floats) -> Floats:
    """Difference of the two largest probabilities (...,)."""
    top = np.sort(p, -1)[..., -2:]
    return top[..., 1] - top[..., 0]


def energy(z: Floats, temperature: float = 1.0) -> Floats:
    """Free energy -T log sum exp(z / T) (...,) of raw logits (..., K) (Liu et al., NeurIPS 2020).

    It reads the logits' offset, which averaging, centring and bridges discard: for one network's own logits only.
    """
    top = z.max(-1)
    return -top - temperature * np.log(np.exp((z - top[..., None]) / temperature).sum(-1))


def as_uncertainty(name: str, score: Floats) -> Floats:
    """A score by its key, turned so that more is more uncertain."""
    return DIRECTION[name] * score


def nll(p: Floats, labels: NDArray[np.int64]) -> float:
    """Mean negative log likelihood of labels (N,) under probabilities (N, K)."""
    return float(-np.log(np.maximum(p[np.arange(len(labels)), labels], TINY)).mean())


def fit_temperature(log_p: Floats, labels: NDArray[np.int64]) -> float:
    """Temperature that minimises the NLL of softmax(log p / T) (Guo et al., ICML 2017), in [0.05, 20].

    The NLL is convex in b = 1 / T with slope mean(E_b[log p] - log p_label), whose sign is bisected over log b.
    Labels that are always the likeliest class end at 0.05; probabilities that no temperature changes give 1.

    Args:
        log_p: log probabilities or logits (N, K); an ensemble's are those of the averaged probability.
        labels: classes (N,).

    Raises:
        ValueError: no rows, or a row whose largest entry is not finite.
    """
    if not len(labels) or not np.isfinite(log_p.max(-1)).all():
        raise ValueError("a temperature needs rows, each with a finite largest entry and no NaN")
    z = np.maximum(log_softmax(log_p), LEAST)
    own = z[np.arange(len(labels)), labels]

    def slope(b: float) -> float:
        return float(((np.exp(log_softmax(b * z)) * z).sum(-1) - own).mean())

    low, high = -np.log(20.0), np.log(20.0)
    if max(abs(slope(np.exp(low))), abs(slope(np.exp(high)))) < FLAT:
        return 1.0
    while high - low > 1e-6:
        middle = 0.5 * (low + high)
        if slope(np.exp(middle)) > FLAT:
            high = middle
        else:
            low = middle
    return float(np.exp(-0.5 * (low + high)))


def describe(p: Floats, temperature: float) -> dict[str, Floats]:
    """Uncertainty that any method can give from calibrated probabilities (N, K): arrays (N,)."""
    return {
        "entropy": entropy(p),
        "margin": margin(p),
        "max_probability": p.max(-1),
        "temperature": np.full(len(p), temperature),
    }


def against_source(p: Floats, source: Floats) -> dict[str, Floats]:
    """Uncertainty from a source's and an estimate's calibrated probabilities, both (N, K): arrays (N,)."""
    return {"source_entropy": entropy(source), "disagreement_source_vs_estimate": kl(source, p)}


def among_members(member_log_p: Floats) -> dict[str, Floats]:
    """Decomposition over members (N, M, K), uncalibrated, so that it adds up: arrays (N,).

    Mutual information = entropy of the mean probability - expected entropy.
    """
    expected = entropy(np.exp(member_log_p)).mean(-1)
    total = entropy(np.exp(mean_log_probability(member_log_p)))
    return {"expected_entropy": expected, "mutual_information": np.maximum(0.0, total - expected)}
