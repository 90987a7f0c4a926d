import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.api import UserError
from models.uncertainty.cascade import (
    CascadeConformal,
    Costs,
    Window,
    combine,
    compare,
    least_urgency,
    most_urgent,
)
from models.uncertainty.conformal import Rule, measure
from models.uncertainty.scores import entropy, nll

COSTS = Costs(1.2, 4.0)
URGENCY = hnp.arrays(np.float64, st.integers(1, 30), elements=st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]))


def draw(n=4000, seed=0):
    """A cheap and a better method: softmaxes of noisier and cleaner logits around those that the labels follow."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 5)) * 2.5
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    labels = (p.cumsum(1) > rng.random((n, 1))).argmax(1)
    noisy = [np.exp(z + s * rng.normal(size=z.shape)) for s in (1.2, 0.2)]
    cheap, dear = (q / q.sum(1, keepdims=True) for q in noisy)
    return cheap, dear, labels


@given(URGENCY, st.floats(1.2, 6.0))
def test_the_budget_holds_and_is_used_up(urgency, max_cost):
    n = len(urgency)
    chosen = most_urgent(urgency, -np.inf, COSTS.allowance(max_cost, n))
    assert COSTS.mean(chosen.mean()) <= max_cost + 1e-9
    assert chosen.all() or COSTS.mean(chosen.mean() + 1 / n) > max_cost - 1e-9
    if chosen.any() and not chosen.all():
        assert urgency[chosen].min() >= urgency[~chosen].max()


@given(URGENCY, st.floats(0, 1), st.integers(0, 30), st.integers(0, 30))
def test_more_budget_adds_images_and_takes_none_away(urgency, least, a, b):
    few, many = (most_urgent(urgency, least, m) for m in (min(a, b), max(a, b)))
    assert (many | ~few).all()
    assert (urgency[many] >= least).all()
    assert many.sum() == min(max(a, b), (urgency >= least).sum())


@given(URGENCY, st.floats(1.2, 6.0))
def test_a_threshold_chosen_on_validation_keeps_its_cost_there(urgency, max_cost):
    flagged = urgency >= least_urgency(urgency, COSTS, max_cost)
    assert COSTS.mean(flagged.mean()) <= max_cost + 1e-9
    assert (urgency >= least_urgency(urgency, COSTS, None)).all()


def test_a_threshold_chosen_on_validation_uses_the_cost_where_nothing_is_tied():
    urgency = np.random.default_rng(0).random(1000)
    flagged = urgency >= least_urgency(urgency, COSTS, 2.2)
    assert COSTS.mean(flagged.mean()) == pytest.approx(2.2, abs=0.005)
    assert not (urgency >= least_urgency(urgency, COSTS, 1.2)).any()


@pytest.mark.parametrize("max_cost", [1.19, 0.0, -1.0, float("nan")])
def test_an_impossible_cost_is_refused(max_cost):
    with pytest.raises(UserError, match=r"at least 1\.2") as caught:
        COSTS.allowance(max_cost, 4)
    assert caught.value.field == "max_cost"


def test_allowance_of_one_image_and_of_many():
    assert COSTS.allowance(5.1, 1) == 0
    assert COSTS.allowance(5.2, 1) == 1
    assert COSTS.allowance(2.2, 64) == 16
    assert COSTS.allowance(float("inf"), 64) == COSTS.allowance(None, 64) == 64


def test_all_escalated_is_the_dear_method_and_none_the_cheap_one():
    cheap, dear, _ = draw(50)
    assert (combine(cheap, dear, np.ones(50, dtype=bool)) == dear).all()
    assert (combine(cheap, dear, np.zeros(50, dtype=bool)) == cheap).all()
    some = np.arange(50) % 3 == 0
    assert (combine(cheap[:, 0], dear[:, 0], some)[some] == dear[some, 0]).all()


def test_the_window_takes_both_sides_of_the_decision_and_the_threshold_only_the_upper_end():
    scores = np.linspace(0, 1, 101)
    window = Window(scores, 0.8)
    chosen = most_urgent(window.urgency(scores), -np.inf, 21)
    assert scores[chosen].tolist() == pytest.approx(np.linspace(0.7, 0.9, 21))
    assert scores[most_urgent(scores, -np.inf, 21)].min() == pytest.approx(0.8)


def test_ranks_count_ties_half():
    window = Window(np.array([1.0, 2.0, 2.0, 3.0]), 2.0)
    assert window.rank(np.array([0.0, 1.0, 2.0, 2.5, 3.0, 9.0])).tolist() == [0, 0.125, 0.5, 0.75, 0.875, 1]


@given(st.floats(-3, 3))
def test_the_window_lives_on_ranks(shift):
    scores = np.sort(np.random.default_rng(0).random(200))
    plain, bent = Window(scores, scores[150]), Window(np.exp(3 * scores) + shift, np.exp(3 * scores[150]) + shift)
    assert np.allclose(plain.urgency(scores), bent.urgency(np.exp(3 * scores) + shift), atol=0.006)


@pytest.mark.parametrize("max_cost", [1.2, 1.6, 3.0, None])
def test_sets_of_a_cascade_cover_at_every_cost(max_cost):
    cheap, dear, labels = draw(16_000)
    rng, scores = np.random.default_rng(0), entropy(cheap)
    u, a, b = rng.random(len(labels)), slice(8000), slice(8000, None)
    own = [Rule().strangeness(p[a], u[a])[np.arange(8000), labels[a]] for p in (cheap, dear)]
    fitted = CascadeConformal(Rule(), scores[a], own[0], own[1])
    least = least_urgency(scores[a], COSTS, max_cost)
    p = combine(cheap[b], dear[b], scores[b] >= least)
    found = measure(fitted.at(least).sets(p, 0.1, u[b]), labels[b])
    assert found.covered == pytest.approx(0.9, abs=0.015)


def test_compare_starts_at_the_cheap_method_ends_at_the_dear_one_and_costs_rise():
    cheap, dear, labels = draw()
    points = compare(cheap, dear, labels, COSTS)
    for rule in ("threshold", "window"):
        curve = [p for p in points if p.rule == rule]
        assert curve[0].nll == pytest.approx(nll(cheap, labels))
        assert curve[-1].nll == pytest.approx(nll(dear, labels))
        assert [p.cost for p in curve] == sorted(p.cost for p in curve)
        assert (curve[0].cost, curve[-1].cost) == (1.2, 5.2)
    at = [[p.cost for p in points if p.rule == rule] for rule in ("threshold", "window")]
    assert at[0] == at[1]


def test_each_rule_wins_at_what_it_is_for():
    cheap, dear, labels = draw(40_000)
    threshold, window = compare(cheap, dear, labels, COSTS, shares=[0.2], coverage=0.6)
    assert threshold.nll < window.nll
    assert window.risk < threshold.risk
