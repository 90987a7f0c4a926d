import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.api import UserError
from models.uncertainty.decision import (
    ABSTAIN,
    ACCEPT,
    DECISIONS,
    ESCALATE,
    Target,
    Thresholds,
    at_coverage,
    at_risk,
    clopper_pearson,
)


def draw(n, seed=0, level=0.3):
    """Scores uniform on 0..1, errors with probability level * score: accepting up to t errs with level * t / 2."""
    rng = np.random.default_rng(seed)
    scores = rng.random(n)
    return scores, rng.random(n) < level * scores


@pytest.mark.parametrize(
    ("errors", "trials", "miss", "bound"),
    [
        (0, 10, 0.05, 1 - 0.05 ** (1 / 10)),
        (9, 10, 0.05, (1 - 0.05) ** (1 / 10)),
        (10, 10, 0.05, 1.0),
        (0, 0, 0.05, 1.0),
        (5, 100, 0.05, 0.10225),
    ],
)
def test_clopper_pearson_of_known_cases(errors, trials, miss, bound):
    assert clopper_pearson(errors, trials, miss) == pytest.approx(bound, abs=1e-5)


@given(st.integers(0, 200), st.integers(1, 200), st.floats(0.001, 0.4))
def test_clopper_pearson_lies_above_the_rate_and_tightens_with_miss(errors, more, miss):
    trials = errors + more
    bound = clopper_pearson(errors, trials, miss)
    assert errors / trials <= bound + 0.5 / trials
    assert bound <= clopper_pearson(errors, trials, miss / 2)
    assert bound <= clopper_pearson(errors + 1, trials, miss)


def test_coverage_at_risk_breaks_its_promise_no_oftener_than_stated():
    """300 validations of 300 rows at 80 % confidence: the true risk of the chosen cut is level * threshold / 2."""
    cuts = [at_risk(*draw(300, seed), risk=0.08, confidence=0.8, points=4) for seed in range(300)]
    assert np.mean([cut.attained for cut in cuts]) > 0.2
    assert np.mean([cut.attained and 0.3 * cut.threshold / 2 > 0.08 for cut in cuts]) <= 0.2


def test_bounds_spend_the_failure_over_all_points_and_one_row_on_the_threshold():
    scores, errors = draw(2000)
    for cut, miss in ((at_risk(scores, errors, 0.08), 0.05 / 40), (at_coverage(scores, errors, 0.5), 0.05)):
        taken = scores <= cut.threshold
        assert cut.bound == clopper_pearson(errors[taken].sum(), taken.sum() - 1, miss)


def test_coverage_at_risk_nears_the_best_threshold_with_data():
    cut = at_risk(*draw(50_000), risk=0.08)
    assert 0.45 < cut.threshold <= 0.08 * 2 / 0.3
    assert cut.risk < cut.bound <= 0.08
    assert cut.coverage == pytest.approx(cut.threshold, abs=0.01)


def test_an_unattainable_risk_accepts_nothing_and_says_so():
    scores = np.random.default_rng(0).random(300)
    cut = at_risk(scores, np.ones(300, dtype=bool), risk=0.1)
    assert not cut.attained
    chosen = Thresholds.choose("entropy", scores, np.ones(300, dtype=bool), Target("coverage_at_risk", 0.1))
    assert chosen.accept == -math.inf
    assert chosen.shown["risk"] is None
    assert (chosen.decide(scores) == ESCALATE).all()
    assert Thresholds.from_json(json.loads(json.dumps(chosen.to_json(), allow_nan=False))) == chosen


def test_errors_bound_of_a_perfect_classifier_still_needs_rows():
    assert at_risk(np.arange(1000.0), np.zeros(1000, dtype=bool), risk=0.02).coverage == 1.0
    assert not at_risk(np.arange(20.0), np.zeros(20, dtype=bool), risk=0.02).attained


@given(st.integers(0, 99), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_a_laxer_risk_never_takes_less(seed, a, b):
    low, high = (at_risk(*draw(300, seed), risk=r) for r in (min(a, b), max(a, b)))
    assert low.threshold <= high.threshold


@given(st.floats(0.01, 0.99))
def test_risk_at_coverage_takes_the_share_asked_for(coverage):
    scores, errors = draw(1000)
    cut = at_coverage(scores, errors, coverage)
    assert coverage - 1e-9 <= cut.coverage < coverage + 1 / 1000 + 1e-9
    assert cut.risk == errors[scores <= cut.threshold].mean()
    assert cut.risk < cut.bound


def test_escalate_and_abstain_shares_on_new_rows():
    chosen = Thresholds.choose("entropy", *draw(5000), Target("escalate_share", 0.2), abstain_share=0.05)
    codes = chosen.decide(draw(5000, seed=1)[0])
    assert [(codes == c).mean() for c in range(3)] == pytest.approx([0.8, 0.15, 0.05], abs=0.02)


def test_decisions_of_each_side_and_of_nan():
    made = Thresholds("entropy", 0.5, 1.0)
    codes = made.decide(np.array([0.5, 0.500001, 1.0, 1.1, np.nan, -np.inf]))
    assert codes.tolist() == [ACCEPT, ESCALATE, ESCALATE, ABSTAIN, ABSTAIN, ACCEPT]
    assert [DECISIONS[c] for c in (ACCEPT, ESCALATE, ABSTAIN)] == ["accept", "escalate", "abstain"]


@given(hnp.arrays(np.float64, 7, elements=st.floats(-5, 5)), st.floats(-5, 5), st.floats(-5, 5))
def test_more_uncertainty_is_never_decided_more_boldly(scores, a, b):
    codes = Thresholds("margin", min(a, b), max(a, b)).decide(np.sort(scores))
    assert (np.diff(codes.astype(int)) >= 0).all()


def test_tied_scores_are_taken_together():
    cut = at_coverage(np.array([0.0, 0.0, 0.0, 1.0]), np.array([False, True, False, True]), 0.5)
    assert cut.coverage == 0.75
    assert cut.risk == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Thresholds("luck", 0.0),
        lambda: Thresholds("entropy", 1.0, 0.5),
        lambda: Thresholds("entropy", float("nan")),
        lambda: Target("risk", 0.1),
        lambda: at_risk(*draw(10), risk=0.0),
        lambda: at_coverage(*draw(10), coverage=1.0),
        lambda: at_risk(*draw(10), risk=0.1, confidence=1.0),
        lambda: Thresholds.from_json({"score": "entropy", "accept": 1.0}),
        lambda: Thresholds.from_json({"score": "entropy", "accept": [], "abstain": 1.0, "shown": {}}),
    ],
)
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(UserError):
        make()


def test_nan_scores_set_no_threshold():
    with pytest.raises(ValueError, match="finite scores"):
        at_coverage(np.array([0.1, np.nan]), np.array([True, False]), 0.5)
