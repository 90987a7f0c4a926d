"""The solver contract over the registry. A new solver is tested here by being registered."""

from typing import get_args

import pytest

from models.api import SolverName
from models.registry import SOLVERS, resolve
from tests.models import solver_contract
from tests.models.solving import PROCESSES

PAIRS = [(name, key) for name in SOLVERS for key in solver_contract.fitting(name)]
pairs = pytest.mark.parametrize(("name", "key"), PAIRS)
unclipped = pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in PAIRS if PROCESSES[k].clip is None])


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 500])
@pairs
def test_the_table_is_finite_and_falls_from_noise_to_data(name, key, steps):
    solver_contract.check_table(name, PROCESSES[key], steps)


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in PAIRS if n not in solver_contract.NOT_DENOISED])
def test_the_last_step_returns_the_denoised_estimate(name, key):
    solver_contract.check_end(name, PROCESSES[key])


@unclipped
def test_it_samples_the_data_distribution(name, key):
    solver_contract.check_samples(name, PROCESSES[key])


@unclipped
def test_without_noise_it_follows_the_probability_flow(name, key):
    solver_contract.check_flow(name, PROCESSES[key])


def test_every_name_that_a_request_may_give_is_registered():
    assert set(get_args(SolverName)) == set(SOLVERS)
    assert all(resolve(SOLVERS, name).name == name for name in SOLVERS)
