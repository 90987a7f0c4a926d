"""What is chosen to be served: the method by default, a bridge's evaluations, a pair's source weight, temperatures."""

import numpy as np
import pytest

from models.backbones.bridge import BridgeConfig, BridgeNetwork
from models.evaluation.served import Outputs, likeliest
from models.training.bridge import BridgeRecipe, Run, bridge_loss, kl_loss, loss_of, network_config, runs
from models.training.loop import Optim
from models.training.serving import Served, choose
from models.uncertainty.early_exit import ENOUGH, temperatures_by_exit
from models.uncertainty.scores import fit_temperature, log_softmax

OPTIM = Optim(steps=1)
RECIPE = BridgeRecipe("bri", "ens", OPTIM, OPTIM, BridgeConfig(steps=5), seeds=2)


class Scored:
    """A validation that says what it was asked, and the NLL of each answer."""

    def __init__(self, nll):
        self.nll = nll

    def score(self, networks, evaluations=1, source_weight=0.0):
        nll = self.nll(tuple(networks), evaluations, source_weight)
        return Served(tuple(networks), evaluations, source_weight, 1.0, nll)


def chosen(todo, nll):
    networks = {run.name: BridgeNetwork(network_config(run, RECIPE)) for run in todo}
    return choose(RECIPE, todo, networks, Scored(nll))


def outputs(**likely):
    """A method by the probability that it gives to the right class."""
    p = {name: np.array([[value, 1.0 - value]]) for name, value in likely.items()}
    return Outputs(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 1, 2)), p)


def test_the_default_is_the_likeliest_that_is_cheap_enough():
    rows = outputs(worse=0.6, best=0.8, dear=0.9)
    assert likeliest(rows, {"worse": 1.0, "best": 1.5, "dear": 1.6}, 1.5) == "best"
    assert likeliest(rows, {"worse": 1.0, "best": 1.5, "dear": 1.6}, 2.0) == "dear"


@pytest.mark.parametrize(("gain", "evaluations"), [(0.001, 1), (0.003, 5)])
def test_more_evaluations_must_be_worth_it(gain, evaluations):
    todo = [Run(f"bridge-{seed}", "bridge", seed, (0, 1)) for seed in (1, 2)]
    served, found = chosen(todo, lambda names, n, weight: 0.3 - gain * (n == 5))
    assert set(found) == {"bridge x1", "bridge x5"}
    assert served["bridge"].evaluations == evaluations


@pytest.mark.parametrize("kind", ["pair", "bridge_pair"])
def test_pairs_are_tried_with_the_source_counted_once(kind):
    todo = [Run(f"{half}-{seed}", kind, seed, (0, 1, 2)) for seed in (1, 2) for half in "ab"]
    asked = []

    def nll(names, n, weight):
        asked.append((names, n, weight))
        return 0.3 - 0.01 * (weight > 0)

    served, _ = chosen(todo, nll)
    assert sorted({weight for _, _, weight in asked}) == pytest.approx([0.0, 1 / 6])
    assert {(names, n) for names, n, _ in asked} == {((f"a-{s}", f"b-{s}"), 1) for s in (1, 2)}
    assert served["bridges"].source_weight == pytest.approx(1 / 6)


def test_pairs_of_bridges_learn_as_bridges_do():
    todo = {run.name: run for run in runs(RECIPE, 5) if run.kind.endswith("pair")}
    assert [todo[f"bridge-pair-2-{half}"].teachers for half in "ab"] == [(0, 1, 2), (0, 3, 4)]
    a, b = todo["bridge-pair-1-a"], todo["pair-1-a"]
    assert (network_config(a, RECIPE).steps, network_config(b, RECIPE).steps) == (5, 1)
    assert (loss_of(a), loss_of(b)) == (bridge_loss, kl_loss)


@pytest.mark.parametrize(("leave", "own"), [(ENOUGH - 1, False), (ENOUGH, True)])
def test_an_exit_has_its_own_temperature_where_enough_rows_leave(leave, own):
    rng, n = np.random.default_rng(0), 4 * ENOUGH
    labels, left = rng.integers(0, 3, n), (np.arange(n) >= leave).astype(np.int64)
    sure = 4.0 * np.eye(3)[labels] + np.where(left[:, None] == 0, 0.5, 3.0) * rng.normal(size=(n, 3))
    log_p = log_softmax(sure)
    of_leavers, of_all = fit_temperature(log_p[left == 0], labels[left == 0]), fit_temperature(log_p, labels)
    assert abs(of_leavers - of_all) > 0.1
    assert temperatures_by_exit([log_p, log_p], left, labels)[0] == pytest.approx(of_leavers if own else of_all)
