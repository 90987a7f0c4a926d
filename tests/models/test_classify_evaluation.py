"""The table of classifiers on random networks: rows are what their definitions say, from networks run on their own."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.bridge.process import TEMPERATURE
from models.bridge.sample import run_bridge
from models.evaluation.carried import load_carried
from models.evaluation.classify import compared, evaluate, look, spreads
from models.evaluation.classify_report import classify_table
from models.evaluation.costs import Counter, cost_of_cascade, costs_of
from models.evaluation.ensembles import load_pool, rows_of_ensembles, subsets
from models.evaluation.metrics import deep_ensemble_equivalent, spearman
from models.evaluation.score import Answers, TableRow, score
from models.evaluation.uncertainty import study
from models.tasks.classifier import load_classifier, to_pixels
from models.training.data import Split, Splits
from models.uncertainty.scores import fit_temperature, log_softmax, mean_log_probability, nll, soften
from tests.models.ensemble_folders import make_bridges, make_ensemble, make_students

WHERE = {"date": "today", "machine": "here", "commit": "abc"}


def images(n, seed):
    rng = np.random.default_rng(seed)
    return Split(rng.integers(0, 256, (n, 6, 6, 1), dtype=np.uint8), rng.integers(0, 3, n))


def labelled(pool, n, seed):
    """Images whose labels the pool's mean probability draws, so that ensembles are worth something."""
    split = images(n, seed)
    with torch.inference_mode():
        z = torch.stack([m(to_pixels(split.images)) for m in pool], 1).double().numpy()
    p = np.exp(mean_log_probability(log_softmax(4 * z)))
    drawn = (p.cumsum(1) > np.random.default_rng(seed).random((n, 1))).argmax(1)
    return Split(split.images, drawn)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    ensemble = make_ensemble(tmp_path_factory.mktemp("zoo"))
    make_bridges(ensemble)
    make_students(ensemble)
    return ensemble


@pytest.fixture(scope="module")
def pool(folder):
    return load_pool(folder)


@pytest.fixture(scope="module")
def carried(folder):
    return load_carried(folder)


PAIRS = ("bridge-pair", "pair")


@pytest.fixture(scope="module")
def splits(pool):
    return Splits(images(1, 0), *(labelled(pool, n, n) for n in (200, 210, 220)))


@pytest.fixture(scope="module")
def made(folder, splits):
    return evaluate(folder, splits, images(50, 5))


def alone(pool, network, split, evaluations=1):
    """A network's probabilities (N, K), run by itself."""
    with torch.inference_mode():
        tap = pool[0].tap(to_pixels(split.images))
        late = pool[0].features(tap)
        z = run_bridge(network, tap, pool[0].fc(late), evaluations, TEMPERATURE, late)
    return z.double().softmax(-1).numpy()


def of(member, split):
    with torch.inference_mode():
        return member(to_pixels(split.images)).double().softmax(-1).numpy()


def test_rows_of_networks_are_their_definitions(made, pool, carried, splits):
    networks, test = carried.networks, splits.test
    first, second = ([alone(pool, networks[f"{kind}-1-{half}"], test) for half in "ab"] for kind in PAIRS)
    curves = [alone(pool, networks[f"curve-{j}-1"], test) for j in (2, 3)]
    source = of(pool[0], test)

    def corrected(pair):
        p = np.maximum((3 * sum(pair) - source) / 5, 1e-6)
        return p / p.sum(1, keepdims=True)

    expected = {
        "DBN x1, 3 steps": alone(pool, networks["bridge-1"], test, 3),
        "DBN x1, 1 evaluation": alone(pool, networks["bridge-1"], test),
        "DBN x1, distilled": alone(pool, networks["distilled-1"], test),
        "regressor, MSE": alone(pool, networks["mse-1"], test),
        "regressor, KL": alone(pool, networks["kl-1"], test),
        "DBN x2": sum(first) / 2,
        "DBN x2, corrected": corrected(first),
        "regressors x2, KL": sum(second) / 2,
        "regressors x2, KL, corrected": corrected(second),
        "bridge network": (sum(curves) + source) / 3,
        "student": of(carried.students["student-1"], test),
    }
    assert list(expected) == list(carried.rows)
    for name, p in expected.items():
        first = made.rows[name].scores[0]
        assert len(made.rows[name].scores) == 2
        assert first.nll == pytest.approx(nll(p, test.labels), rel=1e-4), name
        assert first.acc == (p.argmax(1) == test.labels).mean()


def test_de_is_the_mean_over_subsets_of_the_pool(made, pool, splits):
    val, test = (np.stack([of(m, s) for m in pool], 1) for s in (splits.selection, splits.test))
    values = []
    for which in itertools.combinations(range(8), 3):
        a, b = (np.log(p[:, list(which)].mean(1)) for p in (val, test))
        values.append(nll(soften(b, fit_temperature(a, splits.selection.labels)), splits.test.labels))
    row = made.rows["DE-3"]
    assert len(row.scores) == 56
    assert made.curve[3] == pytest.approx(np.mean(values), rel=1e-5)
    assert row.summary()["cnll"]["se"] > 0
    served = made.rows["DE-5 served"].scores[0]
    assert served.nll == pytest.approx(nll(test[:, :5].mean(1), splits.test.labels), rel=1e-4)


def test_rows_are_set_against_the_curve_of_the_pool(made):
    source, row = made.rows["source"].scores[0], made.rows["DBN x2"]
    raw = {m: made.rows[f"DE-{m}"].summary()["nll"]["mean"] for m in range(1, 6)}
    assert made.dee_raw["DBN x2"]["mean"] == pytest.approx(
        np.mean([deep_ensemble_equivalent(s.nll, raw) for s in row.scores])
    )
    assert made.dee["DBN x2"]["se"] > 0
    shares = [(source.cnll - s.cnll) / (source.cnll - made.curve[5]) for s in row.scores]
    assert made.recovered["DBN x2"]["DE-5"]["mean"] == pytest.approx(np.mean(shares))
    for m in range(1, 6):
        assert made.dee[f"DE-{m}"]["mean"] == pytest.approx(m)
        assert made.dee_raw[f"DE-{m}"]["mean"] == pytest.approx(m)
    assert made.rows["source at T*"].scores[0].nll == pytest.approx(source.cnll)
    assert not {"source", "source at T*", "DE-3"} & set(made.recovered)


def test_nothing_runs_twice_when_members_are_known(folder, pool, carried, splits):
    seen = look(pool, carried, splits.test, batch=64)
    logits = np.stack([np.log(of(m, splits.test)) for m in pool[:5]], 1)

    class Unused(torch.nn.Module):
        def forward(self, x):
            raise AssertionError("a member whose logits are known was run")

    lazy = [pool[0], *(Unused() for _ in range(4)), *pool[5:]]
    again = look(lazy, carried, splits.test, logits)
    np.testing.assert_allclose(again.members, seen.members, atol=1e-5)
    for call, log_p in seen.calls.items():
        np.testing.assert_allclose(again.calls[call], log_p, atol=1e-4)
    assert look(pool[:5], carried, splits.test, logits).members.shape == (220, 5, 3)


def test_spread_is_compared_with_the_members_that_ran(pool, carried, splits):
    seen = look(pool, carried, splits.test)
    p = np.exp(seen.members[:, :5])
    mean = p.mean(1)
    truth = (p * (seen.members[:, :5] - np.log(mean)[:, None])).sum(2).mean(1)
    perfect = replace(seen, spreads={"spread-1": np.log(truth)})
    found = spreads({"test": perfect}, splits.test.labels, 5, 1.0)
    assert found["predicted"]["rho"]["mean"] == pytest.approx(1)
    assert found["predicted"]["errors"]["mean"] == pytest.approx(found["true"]["errors"])
    assert "foreign" not in found["predicted"]
    real = spreads({"test": seen, "foreign": seen}, splits.test.labels, 5, 1.0)
    rhos = [spearman(own, truth) for own in seen.spreads.values()]
    assert real["predicted"]["rho"]["mean"] == pytest.approx(np.mean(rhos))
    assert real["entropy"]["foreign"] == pytest.approx(0.5)


def test_the_cascade_and_its_cost_come_from_the_study(folder, splits, carried):
    classifier = load_classifier(folder)
    found = study(classifier, splits, images(40, 6))
    made = evaluate(folder, splits, images(40, 6), found)
    assert made.rows["cascade"].scores[0].nll == pytest.approx(nll(found.test.p["cascade"], splits.test.labels))
    counter = Counter(classifier.members, carried, (6, 6, 1))
    cost = cost_of_cascade(counter, classifier, found)
    share = (found.test.p["cascade"] != found.test.p["bridge"]).any(1).mean()
    assert cost.macs == pytest.approx(classifier.costs()["bridge"] + 4 * share)
    text = classify_table(made, costs_of(counter, [32]) | {"cascade": cost}, WHERE)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in lines]
    half = len(names) // 2
    assert names[:half] == names[half:]
    assert "nan" not in text
    assert "DBN x2, corrected recovers" in text
    assert "of the gap to DE-5, 95 % interval [" in text
    assert "Predicted mutual information" in text
    priced = {**costs_of(counter, [32]), "cascade": cost}
    cheap = {n: made.rows[n].summary()["cnll"]["mean"] for n in made.recovered if priced[n].macs < 1.5}
    assert f"below 1.5x MACs: {min(cheap, key=cheap.get)}, at " in text


def test_many_subsets_are_drawn_once_each():
    drawn = subsets(12, 5)
    assert len(drawn) == len(set(drawn)) == 70
    assert all(len(set(s)) == 5 and max(s) < 12 for s in drawn)
    assert drawn == subsets(12, 5)
    assert subsets(8, 4) == list(itertools.combinations(range(8), 4))


def test_without_a_pool_or_folders_beside_the_members_are_the_curve(tmp_path):
    folder = make_ensemble(tmp_path, members=3, pool=0)
    splits = Splits(images(1, 0), images(90, 1), images(90, 2), images(90, 3))
    made = evaluate(folder, splits)
    assert list(made.rows) == ["source", "source at T*", "DE-1", "DE-2", "DE-3"]
    assert "se" not in made.rows["DE-3"].summary()["nll"]
    assert "foreign" not in made.rows["DE-3"].summary()
    text = classify_table(made, costs_of(Counter(load_pool(folder), load_carried(folder), (6, 6, 1)), [1]), WHERE)
    assert "nan" not in text
    assert "| DE-2 (3 subsets) | 2.00 | 2.00 |" in text


def test_an_ensemble_of_one_has_no_curve():
    members = Answers(*(np.log(np.random.default_rng(i).dirichlet(np.ones(3), (30, 1))) for i in (0, 1)))
    labels = np.arange(30) % 3
    rows = rows_of_ensembles(members, 1, lambda answers: score(answers, labels, labels))
    assert compared(rows, 1).dee == {"source": {}, "source at T*": {}, "DE-1": {}}


def test_seeds_have_intervals_and_subsets_do_not():
    answers = Answers(*(np.log(np.random.default_rng(i).dirichlet(np.ones(3), 30)) for i in (0, 1, 2)))
    one = score(answers, np.arange(30) % 3, np.arange(30) % 3)
    two = replace(one, acc=one.acc + 0.1)
    assert {"mean", "se", "low", "high", "n"} == set(TableRow([one, two]).summary()["acc"])
    assert {"mean", "se", "n"} == set(TableRow([one, two], [(0,), (1,)], 2).summary()["acc"])
