"""docs/add-a-method.md, followed: its example becomes a file, is registered, and meets the contract."""

import importlib.util
import random
import re
import sys

import numpy as np
import pytest

from models.methods.interface import Expected
from models.registry import METHODS
from models.store import read_config, write_json
from models.tasks.classify import load
from tests.models import method_contract
from tests.models.classifiers import IMAGES, make_whole_zoo, make_zoo, run, work
from tests.support import REPO

PAGE = (REPO / "docs" / "add-a-method.md").read_text()


@pytest.fixture(autouse=True)
def duo(monkeypatch, tmp_path):
    """The page's file and registry line in force."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    ((name, module, kind),) = re.findall(r'^    "(\w+)": "(models\.methods\.\w+):(\w+)",$', PAGE, re.M)
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(module, file)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, made)
    spec.loader.exec_module(made)
    monkeypatch.setitem(METHODS, name, f"{module}:{kind}")
    return name


def test_the_example_meets_the_contract(duo, tmp_path):
    folder = make_whole_zoo(tmp_path)
    task = load(folder, 12, "cpu")
    assert (task.info.methods[duo], task.info.calls[duo]) == (2.0, 2)
    method_contract.check_answers(task, duo)
    method_contract.check_calls(task, duo)
    method_contract.check_slots(task, duo)
    method_contract.check_cost(task, folder, duo)
    method_contract.check_max_cost(task, duo)
    method_contract.check_flood(task, random.Random(0), list(task.info.methods))


def test_with_two_members_it_is_the_ensemble(duo, tmp_path):
    task = load(make_zoo(tmp_path, members=2), 12, "cpu")
    pair, ensemble = (run(task, work(method, *IMAGES)) for method in (duo, "ensemble"))
    for row, expected in zip(pair, ensemble, strict=True):
        np.testing.assert_allclose(row.probabilities, expected.probabilities, atol=1e-9)


def test_with_one_member_it_is_not_served(duo, tmp_path):
    assert duo not in load(make_zoo(tmp_path, members=1), 4, "cpu").info.methods


def test_a_method_that_leaves_early_is_charged_as_it_says(duo, tmp_path, monkeypatch):
    kind = METHODS[duo].split(":")[1]
    example = getattr(sys.modules[METHODS[duo].split(":")[0]], kind)

    class Early(example):
        """Advertises half of its plan, and charges what rows ran."""

        def __init__(self, classifier, calibration):
            super().__init__(classifier, calibration)
            self.expected = Expected(1.5, 1)

        def paid(self, rows, max_cost):
            costs = [1.0 + row.escalated + i for i, row in enumerate(rows)]
            return {"cost_vs_single": float(np.mean(costs)), "image_costs": costs}

    monkeypatch.setattr(sys.modules[METHODS[duo].split(":")[0]], kind, Early)
    folder = make_zoo(tmp_path)
    config = read_config(folder)
    write_json(folder / "config.json", config | {"times": {duo: 1.7, "single": 1.0}})
    task = load(folder, 12, "cpu")
    assert (task.info.methods[duo], task.info.calls[duo]) == (1.5, 1)
    job = work(duo, *IMAGES[:2])
    assert task.receipt(job, run(task, job)) == {"method": duo, "cost_vs_single": 1.5, "image_costs": [1.0, 2.0]}
    job = work("single", IMAGES[0])
    receipt = {"method": "single", "cost_vs_single": 1.0, "time_vs_single": 1.0}
    assert task.receipt(job, run(task, job)) == receipt
