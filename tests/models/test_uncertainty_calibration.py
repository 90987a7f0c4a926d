import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.evaluation.metrics import accuracy, auroc, ece
from models.uncertainty.calibration import bootstrap, reliability
from models.uncertainty.selective import aurc, average_precision, excess_aurc, risk_at_coverage, risk_coverage

SCORES = hnp.arrays(np.float64, 9, elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
ERRORS = hnp.arrays(np.bool_, 9)


def draw(n, classes=4, scale=2.0, seed=0):
    """Calibrated probabilities and labels drawn from them."""
    rng = np.random.default_rng(seed)
    p = np.exp(rng.normal(size=(n, classes)) * scale)
    p /= p.sum(1, keepdims=True)
    return p, (p.cumsum(1) > rng.random((n, 1))).argmax(1)


@pytest.mark.parametrize("by", ["width", "mass"])
def test_reliability_counts_every_row_once(by):
    p, y = draw(1000)
    found = reliability(p, y, by=by)
    assert found.count.sum() == 1000
    assert found.share @ found.accuracy == pytest.approx(accuracy(p, y))
    assert found.share @ found.confidence == pytest.approx(p.max(1).mean())


def test_equal_mass_bins_hold_equally_many_rows_in_order():
    p, y = draw(1003)
    found = reliability(p, y, by="mass")
    assert np.ptp(found.count) <= 1
    assert (np.diff(found.confidence) > 0).all()


def test_equal_width_gives_the_usual_ece():
    p, y = draw(500, scale=3.0)
    sharp = p**2 / (p**2).sum(1, keepdims=True)
    assert reliability(sharp, y).ece == pytest.approx(ece(sharp, y))
    assert reliability(sharp, y).worst >= reliability(sharp, y).ece


def test_bins_hold_their_upper_edge():
    p = np.array([[0.6, 0.4], [0.61, 0.39], [1.0, 0.0]])
    assert np.flatnonzero(reliability(p, np.zeros(3, dtype=int), bins=10).count).tolist() == [5, 6, 9]


def test_ece_is_small_for_calibrated_rows_and_the_gap_for_overconfident_ones():
    p, y = draw(20_000)
    assert reliability(p, y, by="mass").ece < 0.015
    wrong = np.tile([0.9, 0.1], (10, 1))
    found = reliability(wrong, np.array([0] * 7 + [1] * 3))
    assert found.ece == pytest.approx(0.2)
    assert found.worst == pytest.approx(0.2)


def test_brier_parts_add_up_to_the_score_of_the_bins_mean_forecast():
    p, y = draw(2000)
    found = reliability(p, y)
    parts = found.brier_parts()
    bins = np.clip(np.ceil(p.max(1) * 15).astype(int) - 1, 0, 14)
    score = ((found.confidence[bins] - (p.argmax(1) == y)) ** 2).mean()
    assert parts["calibration"] - parts["resolution"] + parts["uncertainty"] == pytest.approx(score)


def test_bootstrap_error_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap(np.mean, x, repeats=400)
    assert found.value == x.mean()
    assert found.se == pytest.approx(2 / 20, rel=0.15)
    assert found.low < found.value < found.high
    assert found == bootstrap(np.mean, x, repeats=400)


def test_bootstrap_keeps_rows_together():
    x = np.random.default_rng(0).normal(size=50)
    assert bootstrap(lambda a, b: float((a - b).mean()), x, x - 1).se == pytest.approx(0, abs=1e-12)


@given(SCORES, ERRORS)
def test_risk_coverage_is_the_mean_over_orders_of_ties(scores, errors):
    rng = np.random.default_rng(0)
    orders = [np.lexsort((rng.random(9), scores)) for _ in range(600)]
    seen = np.mean([np.cumsum(errors[o]) / np.arange(1, 10) for o in orders], 0)
    coverage, risk = risk_coverage(scores, errors)
    assert np.allclose(coverage, np.arange(1, 10) / 9)
    assert np.allclose(risk, seen, atol=0.12)
    assert risk[-1] == pytest.approx(errors.mean())


@given(SCORES, ERRORS)
def test_aurc_lies_between_the_best_and_the_worst_order(scores, errors):
    e = errors.astype(float)
    assert aurc(e, errors) - 1e-12 <= aurc(scores, errors) <= aurc(-e, errors) + 1e-12
    assert excess_aurc(e, errors) == 0
    assert aurc(np.zeros(9), errors) == pytest.approx(errors.mean())


def test_known_curve():
    scores, errors = np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, False, True, False])
    assert risk_coverage(scores, errors)[1].tolist() == [0, 0, pytest.approx(1 / 3), 0.25]
    assert risk_at_coverage(scores, errors, 0.5) == 0
    assert risk_at_coverage(scores, errors, 0.75) == pytest.approx(1 / 3)
    assert excess_aurc(scores, errors) == pytest.approx((1 / 3 + 0.25) / 4 - 0.25 / 4)


@given(SCORES, ERRORS.filter(lambda e: 0 < e.sum() < 9))
def test_auroc_and_average_precision_equal_their_definitions(scores, errors):
    good, bad = scores[~errors], scores[errors]
    wins = (bad[:, None] > good).mean() + 0.5 * (bad[:, None] == good).mean()
    assert auroc(bad, good) == pytest.approx(wins)
    area, before = 0.0, 0.0
    for t in sorted(set(scores), reverse=True):
        recall = (scores[errors] >= t).mean()
        area += (recall - before) * errors[scores >= t].mean()
        before = recall
    assert average_precision(scores, errors) == pytest.approx(area)


def test_average_precision_at_its_ends():
    y = np.array([True, True, False])
    assert average_precision(np.array([3.0, 2.0, 1.0]), y) == 1
    assert average_precision(np.zeros(3), y) == pytest.approx(2 / 3)
    assert np.isnan(average_precision(np.zeros(3), np.zeros(3, dtype=bool)))
