import itertools

import numpy as np
import pytest

from models.evaluation.metrics import (
    accuracy,
    auroc,
    brier,
    deep_ensemble_equivalent,
    ece,
    frechet,
    frechet_interval,
    interval,
    moments,
    over_subsets,
    spearman,
)


def test_accuracy_and_brier():
    p, y = np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1])
    assert accuracy(p, y) == 0.5
    assert brier(p, y) == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 2)


def test_ece_of_a_known_gap():
    p = np.tile([0.9, 0.1], (10, 1))
    y = np.array([0] * 7 + [1] * 3)
    assert ece(p, y) == pytest.approx(0.2)


def test_auroc_counts_ties_half():
    assert auroc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auroc(np.array([1.0]), np.array([1.0])) == 0.5
    assert auroc(np.array([0.0, 2.0]), np.array([1.0, 1.0])) == 0.5


@pytest.mark.parametrize(
    ("value", "dee"), [(0.5, 1), (0.4, 2), (0.45, 1.5), (0.35, 3), (0.325, 3.5), (0.3, 4), (0.6, 0)]
)
def test_dee_is_piecewise_linear_and_extrapolates(value, dee):
    assert deep_ensemble_equivalent(value, {1: 0.5, 2: 0.4, 3: 0.35}) == pytest.approx(dee)


def test_frechet_of_diagonal_gaussians():
    a = (np.zeros(2), np.diag([1.0, 4.0]))
    b = (np.array([1.0, 0.0]), np.diag([4.0, 1.0]))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, b) == pytest.approx(1 + (2 - 1) ** 2 + (1 - 2) ** 2)


def test_bootstrap_interval_holds_the_point():
    rng = np.random.default_rng(0)
    reference, sample = moments(rng.normal(size=(5000, 4))), rng.normal(0.2, 1, size=(1000, 4))
    low, high = frechet_interval(sample, reference, repeats=50)
    assert low < frechet(moments(sample), reference) < high


def test_t_interval_over_three_seeds():
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["low"] == pytest.approx(2 - 4.303 / np.sqrt(3))
    assert interval([1.0]) == {"mean": 1.0, "n": 1}


def test_spearman_is_the_correlation_of_ranks():
    rng = np.random.default_rng(0)
    a = rng.permutation(20).astype(float)
    b = rng.permutation(20).astype(float)
    assert spearman(a, b) == pytest.approx(1 - 6 * ((a - b) ** 2).sum() / (20 * (20**2 - 1)))
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    assert spearman(a, -(a**3)) == pytest.approx(-1)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(np.sqrt(3) / 2)
    assert np.isnan(spearman(a, np.ones(20)))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_error_over_subsets_is_that_of_independent_members(size):
    """A mean over members has the same error however it is cut into subsets."""
    members = np.random.default_rng(1).normal(size=8)
    subsets = list(itertools.combinations(range(8), size))
    found = over_subsets([members[list(s)].mean() for s in subsets], subsets, 8)
    assert found["mean"] == pytest.approx(members.mean())
    assert found["se"] == pytest.approx(members.std(ddof=1) / np.sqrt(8))
    assert found["n"] == len(subsets)


def test_one_ensemble_has_no_error():
    assert over_subsets([0.5], [(0, 1, 2)], 3) == {"mean": 0.5, "n": 1}
    assert over_subsets([0.5], [(0,)], 1) == {"mean": 0.5, "n": 1}
