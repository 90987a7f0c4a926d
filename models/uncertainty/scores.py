"""Probabilities, calibration by temperature, and uncertainty in nats. Numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
TINY = 1e-12


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


def nll(p: Floats, labels: NDArray[np.int64]) -> float:
    """Mean negative log likelihood of labels (N,) under probabilities (N, K)."""
    return float(-np.log(np.maximum(p[np.arange(len(labels)), labels], TINY)).mean())


def fit_temperature(log_p: Floats, labels: NDArray[np.int64]) -> float:
    """Temperature that minimises the NLL of softmax(log p / T), by golden section over log T in [0.05, 20]."""
    low, high = np.log(0.05), np.log(20.0)
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    a, b = high - golden * (high - low), low + golden * (high - low)

    def cost(log_t: float) -> float:
        return nll(soften(log_p, float(np.exp(log_t))), labels)

    cost_a, cost_b = cost(a), cost(b)
    while high - low > 1e-5:
        if cost_a < cost_b:
            high, b, cost_b = b, a, cost_a
            a = high - golden * (high - low)
            cost_a = cost(a)
        else:
            low, a, cost_a = a, b, cost_b
            b = low + golden * (high - low)
            cost_b = cost(b)
    return float(np.exp(0.5 * (low + high)))


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
