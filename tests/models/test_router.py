"""The served cascade's operating points: what max_cost picks, what each promises on fresh rows, kept as JSON."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.api import UserError
from models.uncertainty.cascade import Costs, combine
from models.uncertainty.conformal import Rule
from models.uncertainty.contract import Answers
from models.uncertainty.decision import Target
from models.uncertainty.router import Router, fit
from models.uncertainty.scores import entropy, log_softmax, nll, soften

COSTS = Costs(1.2, 4.0)


def pair(n, seed, coarse=1.5):
    """A cheap and a dear method that see the same truth through much and little noise."""
    rng = np.random.default_rng(seed)
    truth = 4 * rng.normal(size=(n, 6))
    labels = (soften(truth, 1.0).cumsum(1) > rng.random((n, 1))).argmax(1)
    u = rng.random(n)
    seen = (soften(log_softmax(truth + noise * rng.normal(size=truth.shape)), 1 + noise / 2) for noise in (coarse, 0.3))
    return tuple(Answers(p, labels, u) for p in seen)


@pytest.fixture(scope="module")
def router():
    return fit(pair(4000, 0), pair(4000, 1), COSTS, Rule(penalty=0.05, free=2), Target("coverage_at_risk", 0.1))


@pytest.fixture(scope="module")
def fresh():
    return pair(20_000, 2)


def answers(router, terms, cheap, dear):
    escalated = router.urgency(cheap.p) >= terms.least
    return combine(cheap.p, dear.p, escalated), escalated


def test_points_rise_in_cost_from_the_cheap_method_alone(router):
    assert (router.points[0].cost, router.points[0].share, router.points[0].least) == (1.2, 0.0, math.inf)
    for a, b in itertools.pairwise(router.points):
        assert a.cost < b.cost
        assert a.least > b.least
        assert b.cost == pytest.approx(1.2 + 4.0 * b.share)


@given(st.floats(1.2, 20))
def test_max_cost_picks_the_dearest_point_that_it_pays_for(router, max_cost):
    picked = router.pick(max_cost)
    assert picked.cost <= max_cost
    assert not [point for point in router.points if picked.cost < point.cost <= max_cost]


@pytest.mark.parametrize("max_cost", [1.0, 1.19, math.nan, -1.0])
def test_a_cost_that_pays_for_nothing_is_refused(router, max_cost):
    with pytest.raises(UserError, match=r"at least 1\.2") as refused:
        router.pick(max_cost)
    assert refused.value.field == "max_cost"


def test_every_point_keeps_its_share_risk_and_coverage_on_fresh_rows(router, fresh):
    cheap, dear = fresh
    for terms in router.points:
        p, escalated = answers(router, terms, cheap, dear)
        assert escalated.mean() == pytest.approx(terms.share, abs=0.02)
        names = np.array(terms.contract.decide({"entropy": entropy(p)}))
        assert (p.argmax(1) != cheap.labels)[names == "accept"].mean() <= 0.1
        sets = terms.contract.sets(p, np.full(len(p), 0.1), cheap.u)
        covered = np.mean([y in s for y, s in zip(cheap.labels, sets, strict=True)])
        assert covered == pytest.approx(0.9, abs=0.015)


def test_more_cost_answers_better_and_accepts_more(router, fresh):
    found = [nll(answers(router, terms, *fresh)[0], fresh[0].labels) for terms in router.points]
    assert found == sorted(found, reverse=True)
    accepted = [point.decision.coverage for point in router.catalogue()]
    assert accepted[0] < accepted[-1]


@pytest.mark.parametrize(("coarse", "reached"), [(0.6, True), (1.5, False)])
def test_the_default_is_the_cheapest_near_the_dear_method_or_the_dearest(coarse, reached):
    cheap, dear = pair(4000, 0, coarse)
    found = fit((cheap, dear), (cheap, dear), COSTS, Rule())
    limit = 1.02 * nll(dear.p, dear.labels)
    near = [nll(answers(found, terms, cheap, dear)[0], cheap.labels) <= limit for terms in found.points]
    assert (True in near) == reached
    assert found.default == (near.index(True) if reached else len(found.points) - 1)
    assert found.pick(None) is found.points[found.default]


def test_the_default_asks_the_dear_method_even_where_the_cheap_one_is_as_good():
    _, dear = pair(4000, 0)
    assert fit((dear, dear), (dear, dear), COSTS, Rule()).default == 1


@pytest.mark.parametrize("rule", ["threshold", "window"])
def test_a_router_survives_json(router, fresh, rule):
    stored = {**json.loads(json.dumps(router.to_json())), "rule": rule}
    again = Router.from_json(stored)
    assert again.rule == rule
    assert again.catalogue() == router.catalogue()
    for a, b in zip(again.points, router.points, strict=True):
        assert (a.least, a.share, a.cost) == (b.least, b.share, b.cost)
        np.testing.assert_allclose(a.contract.conformal.threshold(0.1), b.contract.conformal.threshold(0.1), atol=1e-3)
    if rule == "threshold":
        np.testing.assert_array_equal(again.urgency(fresh[0].p), router.urgency(fresh[0].p))
    else:
        nearest = again.urgency(fresh[0].p).argmax()
        assert entropy(fresh[0].p)[nearest] == pytest.approx(router.window.decision, abs=0.02)


@pytest.mark.parametrize("broken", [{"default": 99}, {"points": [{}]}, {"sets": {}}, {"window": None}])
def test_what_is_no_router_is_refused(router, broken):
    with pytest.raises((UserError, KeyError, TypeError, ValueError)):
        Router.from_json(router.to_json() | broken)


def test_the_rule_with_the_lower_validation_nll_is_served():
    """Where the dear method knows nothing of the least sure rows, only those near the decision are worth its price."""
    cheap, dear = pair(4000, 5)
    lost = entropy(cheap.p) > np.quantile(entropy(cheap.p), 0.96)
    useless = np.where(lost[:, None], np.full_like(dear.p, 1e-6), dear.p)
    useless[lost, 0] = 1.0 - 5e-6
    harmful = Answers(useless, dear.labels, dear.u)
    assert fit((cheap, harmful), (cheap, harmful), COSTS, Rule(), shares=(0.05, 0.1)).rule == "window"
    assert fit((cheap, dear), (cheap, dear), COSTS, Rule(), shares=(0.05, 0.1)).rule == "threshold"
