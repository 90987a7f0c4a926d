import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.api import UserError
from models.uncertainty.conformal import Conformal, Rule, measure, repeated_splits, uniforms

RULES = [Rule(), Rule(randomised=False), Rule(0.05, 2), Rule(0.05, 2, randomised=False)]
EXACT = [rule for rule in RULES if rule.randomised]
NAMES = [f"{rule.name}-{'randomised' if rule.randomised else 'plain'}" for rule in RULES]


def draw(n, classes=10, sharper=1.0, seed=0):
    """Labels from a softmax, and probabilities that are over-confident by `sharper`."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, classes)) * 3
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.random((n, 1))).argmax(1)
    q = np.exp(sharper * z)
    return q / q.sum(1, keepdims=True), labels, rng.random(n)


def fit(rule, n=500, sharper=1.5, seed=0):
    p, y, u = draw(n, sharper=sharper, seed=seed)
    return Conformal.calibrate(p, y, rule, u if rule.randomised else None)


@pytest.mark.parametrize("sharper", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("rule", EXACT, ids=lambda r: r.name)
def test_randomised_coverage_is_nominal_however_bad_the_probabilities(rule, alpha, sharper):
    p, y, _ = draw(8000, sharper=sharper)
    found = repeated_splits(p, y, rule, alpha, calibration=4000, splits=20)
    assert found.covered == pytest.approx(1 - alpha, abs=0.01)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("rule", RULES[1::2], ids=lambda r: r.name)
def test_plain_coverage_is_at_least_nominal_and_sets_are_never_empty(rule, alpha):
    p, y, _ = draw(8000, sharper=2.0)
    found = repeated_splits(p, y, rule, alpha, calibration=4000, splits=20)
    assert found.covered >= 1 - alpha - 0.01
    assert found.empty == 0


def test_the_finite_sample_quantile_is_exact():
    """Over many calibrations by 10 rows coverage at alpha 0.1 is 10 / 11; a plain quantile would give 9 / 11."""
    covered = []
    for seed in range(400):
        p, y, u = draw(110, classes=4, seed=seed)
        fitted = Conformal.calibrate(p[:10], y[:10], Rule(), u[:10])
        covered.append(measure(fitted.sets(p[10:], 0.1, u[10:]), y[10:]).covered)
    assert np.mean(covered) == pytest.approx(10 / 11, abs=0.015)


@given(st.integers(0, 3), st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.integers(0, 99))
def test_sets_shrink_as_alpha_grows(which, a, b, seed):
    rule = RULES[which]
    fitted, (p, _, u) = fit(rule), draw(20, seed=1000 + seed)
    small, large = (fitted.sets(p, alpha, u if rule.randomised else None) for alpha in (max(a, b), min(a, b)))
    assert (large | ~small).all()


@given(st.integers(0, 3), st.permutations(range(10)), st.integers(0, 99))
def test_sets_follow_a_permutation_of_classes_even_with_ties(which, order, seed):
    rule = RULES[which]
    p, _, u = draw(20, seed=seed)
    p = np.round(p, 1) + 0.01
    p /= p.sum(1, keepdims=True)
    given_u = u if rule.randomised else None
    assert (fit(rule).sets(p, 0.1, given_u)[:, order] == fit(rule).sets(p[:, order], 0.1, given_u)).all()


@given(st.integers(0, 99), st.floats(0.01, 0.99))
def test_plain_sets_are_the_likeliest_classes_and_hold_the_top_one(seed, alpha):
    p, _, _ = draw(20, seed=seed)
    sets = fit(Rule(randomised=False)).sets(p, alpha)
    assert sets[np.arange(20), p.argmax(1)].all()
    assert (np.where(sets, p, 1).min(1) > np.where(sets, 0, p).max(1)).all()


def test_alpha_per_row_equals_alpha_alone():
    fitted, (p, _, u) = fit(Rule()), draw(30, seed=5)
    alphas = np.tile([0.02, 0.1, 0.4], 10)
    mixed = fitted.sets(p, alphas, u)
    for i, alpha in enumerate(alphas):
        assert (mixed[i] == fitted.sets(p[i : i + 1], float(alpha), u[i : i + 1])[0]).all()


def test_too_few_calibration_rows_give_every_class():
    fitted, (p, _, u) = fit(Rule(), n=9), draw(5, seed=5)
    assert fitted.smallest_alpha == pytest.approx(0.1)
    assert fitted.threshold(0.1) == fitted.scores[-1]
    assert fitted.threshold(0.099) == np.inf
    assert fitted.sets(p, 0.05, u).all()


def test_the_penalty_shrinks_the_largest_sets():
    p, y, u = draw(8000, sharper=0.3)
    a, b = slice(4000), slice(4000, None)
    aps, raps = (
        Conformal.calibrate(p[a], y[a], rule, u[a]).sets(p[b], 0.05, u[b]).sum(1) for rule in (Rule(), Rule(1.0, 3))
    )
    assert np.quantile(raps, 0.95) < np.quantile(aps, 0.95)
    assert raps.max() < aps.max()


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_json_keeps_every_threshold_bit_for_bit(rule):
    fitted = fit(rule)
    again = Conformal.from_json(json.loads(json.dumps(fitted.to_json())))
    assert again.rule == rule
    assert (again.scores == fitted.scores).all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.1, float("nan"), float("inf")])
def test_alpha_outside_the_open_interval_is_refused(alpha):
    with pytest.raises(UserError, match="alpha must lie strictly") as caught:
        fit(Rule()).threshold(alpha)
    assert caught.value.field == "alpha"


def test_one_bad_alpha_in_a_batch_is_refused():
    with pytest.raises(UserError, match="alpha"):
        fit(Rule()).threshold(np.array([0.1, 1.0]))


@pytest.mark.parametrize("p", [[[0.5, np.nan]], [[0.7, 0.7]], [[1.2, -0.2]], [0.5, 0.5]])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(ValueError, match="probabilities must"):
        Rule(randomised=False).strangeness(np.array(p))


def test_u_is_required_exactly_when_randomised():
    p = np.array([[0.7, 0.3]])
    with pytest.raises(ValueError, match="randomised"):
        Rule().strangeness(p)
    with pytest.raises(ValueError, match="randomised"):
        Rule(randomised=False).strangeness(p, np.array([0.5]))


@pytest.mark.parametrize(
    "change", [{"scores": "!"}, {"scores": ""}, {"scores": "AACAPwAAAAA="}, {"penalty": -1.0}, {"free": None}]
)
def test_a_damaged_calibration_is_refused(change):
    with pytest.raises(UserError, match="conformal"):
        Conformal.from_json(fit(Rule()).to_json() | change)


def test_uniforms_are_uniform_and_repeat():
    images = [i.to_bytes(4, "big") * 10 for i in range(4000)]
    u = uniforms(images)
    assert (u == uniforms(images)).all()
    assert (u >= 0).all()
    assert (u < 1).all()
    assert np.abs(np.sort(u) - np.arange(4000) / 4000).max() < 0.03


def test_known_scores():
    p = np.array([[0.5, 0.2, 0.3]])
    assert Rule(randomised=False).strangeness(p)[0] == pytest.approx([0, 0.8, 0.5])
    assert Rule(1.0, 1).strangeness(p, np.array([0.5]))[0] == pytest.approx([0.25, 2.9, 1.65])
    with pytest.raises(UserError, match="penalty"):
        Rule(float("nan"))
