"""What stands beside an ensemble, as the evaluation runs and counts it: ways to answer, their rows and costs."""

import numpy as np
import pytest
import torch

from models.backbones.macs import count_macs
from models.evaluation.carried import Way, load_carried, served_rows, ways
from models.evaluation.costs import Counter, costs_of
from models.store import StoreError, read_json, write_json
from models.tasks.classifier import load_classifier
from tests.models.ensemble_folders import make_bridges, make_ensemble, make_students


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    ensemble = make_ensemble(tmp_path_factory.mktemp("zoo"))
    make_bridges(ensemble)
    make_students(ensemble)
    return ensemble


@pytest.fixture(scope="module")
def carried(folder):
    return load_carried(folder)


def test_costs_are_counted(carried, folder):
    classifier = load_classifier(folder)
    source, x = classifier.members[0], torch.zeros(1, 1, 6, 6)
    counter = Counter(classifier.members, carried, (6, 6, 1))
    costs = costs_of(counter, [])
    base, tap, z = count_macs(source, lambda: source(x)), source.tap(x), torch.zeros(1, 3)
    late, one = source.features(tap), torch.ones(1, dtype=torch.int64)
    light = {n: count_macs(m, lambda m=m: m(tap, z, one, late)) for n, m in carried.networks.items()}
    assert costs["DBN x1, 3 steps"].macs == pytest.approx(1 + 3 * light["bridge-1"] / base)
    assert costs["DBN x2"].macs == pytest.approx(1 + (light["bridge-pair-1-a"] + light["bridge-pair-1-b"]) / base)
    assert costs["DBN x2"] is costs["DBN x2, corrected"]
    assert costs["student"].macs == costs["student"].parameters == 1
    assert costs["DE-3"].macs == 3
    size = {n: sum(p.numel() for p in m.parameters()) for n, m in carried.networks.items()}
    own = sum(p.numel() for p in source.parameters())
    assert costs["DBN x1, 1 evaluation"].parameters == pytest.approx(1 + size["bridge-1"] / own)
    assert costs["source at T*"].macs == 1
    assert {"DE-5 served", *carried.rows} <= set(costs)


def test_served_ways_are_found_among_the_rows(carried):
    assert carried.served == {
        "bridge": "DBN x1, distilled",
        "bridges": "regressors x2, KL, corrected",
        "bridge_network": "bridge network",
        "distilled": "student",
    }


def test_a_served_way_like_no_row_is_a_row_of_its_own():
    rows = {"DBN x2": [Way(("a", "b"))], "DBN x2, corrected": [Way(("a", "b"), 1, 1 / 6)]}
    served = {"rounded": Way(("a", "b"), 1, 0.1667), "bridges": Way(("a", "b"), 1, 0.1)}
    assert served_rows(served, rows) == {"rounded": "DBN x2, corrected", "bridges": "bridges as served"}
    assert rows["bridges as served"] == [served["bridges"]]


def test_taking_the_source_back_gives_the_union_of_two_teacher_sets():
    rng = np.random.default_rng(0)
    members = rng.dirichlet(np.ones(4), (6, 5))
    a, b = members[:, [0, 1, 2]].mean(1), members[:, [0, 3, 4]].mean(1)
    way = Way(("a", "b"), 1, 1 / 6)
    log_p = way.combine({("a", 1): np.log(a), ("b", 1): np.log(b)}, np.log(members[:, 0]))
    np.testing.assert_allclose(np.exp(log_p), members.mean(1), atol=1e-5)


def test_a_network_that_gave_too_little_is_clipped():
    log_p = Way(("a",), 1, 0.5).combine({("a", 1): np.log([[0.4, 0.6]])}, np.log([[0.9, 0.1]]))
    np.testing.assert_allclose(np.exp(log_p), [[1e-6 / (1.1 + 1e-6), 1.1 / (1.1 + 1e-6)]])


def test_ways_follow_kind_and_seed():
    entry = {"network": {"steps": 1}, "teachers": [0, 1, 2, 3]}
    names = {"pair-2-a": ("pair", 2), "pair-1-a": ("pair", 1), "pair-1-b": ("pair", 1), "pair-1-c": ("pair", 1)}
    names |= {f"bridge-pair-3-{half}": ("bridge_pair", 3) for half in "ab"}
    names |= {"bridge-7": ("bridge", 7), "spread-1": ("spread", 1)}
    found = ways({name: {"kind": kind, "seed": seed, **entry} for name, (kind, seed) in names.items()})
    assert found["DBN x1, 1 evaluation"] == [Way(("bridge-7",))]
    assert found["regressors x3, KL, corrected"] == [Way(("pair-1-a", "pair-1-b", "pair-1-c"), 1, 2 / 12)]
    assert found["regressors x1, KL"] == [Way(("pair-2-a",))]
    assert found["DBN x2"] == [Way(("bridge-pair-3-a", "bridge-pair-3-b"))]
    assert found["DBN x2, corrected"] == [Way(("bridge-pair-3-a", "bridge-pair-3-b"), 1, 1 / 8)]


@pytest.mark.parametrize(("dropped", "match"), [("networks", "no `networks` table"), ("sha256", "another member-1")])
def test_folders_of_other_formats_or_sources_are_refused(tmp_path, dropped, match):
    ensemble = make_ensemble(tmp_path, pool=0)
    path = make_bridges(ensemble) / "config.json"
    config = read_json(path)
    if dropped == "networks":
        del config["networks"]
    else:
        config["source"]["sha256"] = "0" * 64
    write_json(path, config)
    with pytest.raises(StoreError, match=match):
        load_carried(ensemble)
