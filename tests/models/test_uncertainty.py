import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.uncertainty.scores import (
    against_source,
    among_members,
    describe,
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


@given(hnp.arrays(np.float64, (5, 3, 4), elements=st.floats(-20, 20)))
def test_mutual_information_is_the_members_mean_divergence(z):
    log_p = log_softmax(z)
    scores = among_members(log_p)
    p = np.exp(log_p)
    mean = np.exp(mean_log_probability(log_p))
    assert np.allclose(mean, p.mean(1))
    assert np.allclose(scores["mutual_information"], kl(p, mean[:, None]).mean(1), atol=1e-7)
    assert np.allclose(scores["mutual_information"] + scores["expected_entropy"], entropy(mean), atol=1e-7)


def test_keys_are_those_of_the_contract():
    p = np.array([[0.7, 0.3]])
    assert set(describe(p, 1.2)) == {"entropy", "margin", "max_probability", "temperature"}
    assert set(against_source(p, p)) == {"source_entropy", "disagreement_source_vs_estimate"}
    assert set(among_members(np.log(p[None]))) == {"expected_entropy", "mutual_information"}
