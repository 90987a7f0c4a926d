import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.uncertainty.scores import (
    DIRECTION,
    against_source,
    among_members,
    as_uncertainty,
    describe,
    energy,
    entropy,
    fit_temperature,
    kl,
    log_softmax,
    margin,
    mean_log_probability,
    nll,
    soften,
)

LOGITS = hnp.arrays(np.float64, (6, 4), elements=st.floats(-30, 30))


@given(LOGITS)
def test_probabilities_sum_to_one_and_entropy_is_bounded(z):
    p = soften(log_softmax(z), 1.7)
    assert np.allclose(p.sum(-1), 1)
    assert (entropy(p) >= -1e-12).all()
    assert (entropy(p) <= np.log(4) + 1e-9).all()


@given(LOGITS, LOGITS)
def test_kl_is_never_negative_and_zero_on_itself(a, b):
    p, q = np.exp(log_softmax(a)), np.exp(log_softmax(b))
    assert (kl(p, q) >= 0).all()
    assert np.allclose(kl(p, p), 0)


def test_known_values():
    uniform, sure = np.full((1, 4), 0.25), np.array([[1.0, 0, 0, 0]])
    assert entropy(uniform)[0] == pytest.approx(np.log(4))
    assert entropy(sure)[0] == pytest.approx(0, abs=1e-9)
    assert margin(np.array([[0.5, 0.3, 0.2]]))[0] == pytest.approx(0.2)
    assert kl(np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]]))[0] == pytest.approx(
        0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    )


def test_temperature_is_recovered():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(20_000, 5)) * 2
    p = np.exp(log_softmax(z))
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    assert fit_temperature(log_softmax(3.0 * z), labels) == pytest.approx(3.0, rel=0.05)


def test_the_fitted_temperature_is_a_minimum():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(500, 3)) * 4
    labels = np.where(rng.random(500) < 0.7, z.argmax(1), rng.integers(0, 3, 500))
    log_p = log_softmax(z)
    best = fit_temperature(log_p, labels)
    at = nll(soften(log_p, best), labels)
    assert at <= nll(soften(log_p, best * 1.02), labels)
    assert at <= nll(soften(log_p, best / 1.02), labels)


@pytest.mark.parametrize(
    ("z", "temperature"),
    [
        (np.eye(3)[[0, 1, 2, 0]] * 4.0, 0.05),  # always right: as sharp as allowed
        (np.eye(3)[[1, 2, 0, 1]] * 4.0, 20.0),  # always wrong: as flat as allowed
        (np.full((4, 3), 7.0), 1.0),  # no temperature changes anything
        (np.array([[0.0, -np.inf, -np.inf]] * 4), 20.0),  # an impossible class occurs
    ],
)
def test_temperature_at_its_edges(z, temperature):
    assert fit_temperature(z, np.array([0, 1, 2, 0])) == pytest.approx(temperature, rel=1e-4)


@given(
    hnp.arrays(np.float64, (12, 3), elements=st.floats(-40, 40)), hnp.arrays(np.int64, 12, elements=st.integers(0, 2))
)
def test_no_temperature_on_a_grid_beats_the_fitted_one(z, labels):
    def cost(t):
        log_p = log_softmax(z / t)
        return -log_p[np.arange(12), labels].mean()

    best = fit_temperature(z, labels)
    assert 0.049 < best < 20.01
    assert cost(best) <= min(cost(t) for t in np.geomspace(0.05, 20, 60)) + 1e-5


@given(hnp.arrays(np.float64, (12, 3), elements=st.floats(-20, 20)), st.floats(-50, 50))
def test_temperature_reads_logits_and_log_probabilities_alike(z, offset):
    labels = np.arange(12) % 3
    assert fit_temperature(z + offset, labels) == pytest.approx(fit_temperature(log_softmax(z), labels), rel=1e-3)


@pytest.mark.parametrize("z", [np.empty((0, 3)), *(np.array([[0.0, bad, 1.0]]) for bad in (np.nan, np.inf))])
def test_nothing_to_fit_a_temperature_on(z):
    with pytest.raises(ValueError, match="temperature needs"):
        fit_temperature(z, np.zeros(len(z), dtype=np.int64))


@given(LOGITS, st.floats(0.5, 3))
def test_energy_is_the_negative_log_partition_and_moves_with_the_offset(z, t):
    assert np.allclose(energy(z, t), -t * np.log(np.exp(z / t).sum(-1)))
    assert np.allclose(energy(z + 5, t), energy(z, t) - 5)


def test_every_score_can_be_turned_so_that_more_is_more_uncertain():
    sure, unsure = np.array([[0.98, 0.01, 0.01]]), np.array([[0.4, 0.35, 0.25]])
    for name in ("entropy", "margin", "max_probability"):
        low, high = (as_uncertainty(name, describe(p, 1.0)[name])[0] for p in (sure, unsure))
        assert low < high
    keys = {*describe(sure, 1.0), *against_source(sure, sure), *among_members(np.log(sure[None]))}
    assert keys - {"temperature"} <= set(DIRECTION)


@given(hnp.arrays(np.float64, (5, 3, 4), elements=st.floats(-20, 20)))
def test_mutual_information_is_the_members_mean_divergence(z):
    log_p = log_softmax(z)
    scores = among_members(log_p)
    p = np.exp(log_p)
    mean = np.exp(mean_log_probability(log_p))
    assert np.allclose(mean, p.mean(1))
    assert np.allclose(scores["mutual_information"], kl(p, mean[:, None]).mean(1), atol=1e-7)
    assert (scores["mutual_information"] >= 0).all()
    assert np.allclose(scores["mutual_information"] + scores["expected_entropy"], entropy(mean), atol=1e-7)


def test_keys_are_those_of_the_contract():
    p = np.array([[0.7, 0.3]])
    assert set(describe(p, 1.2)) == {"entropy", "margin", "max_probability", "temperature"}
    assert set(against_source(p, p)) == {"source_entropy", "disagreement_source_vs_estimate"}
    assert set(among_members(np.log(p[None]))) == {"expected_entropy", "mutual_information"}
