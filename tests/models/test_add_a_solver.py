"""docs/add-a-solver.md, followed: its example becomes a file, is registered, and meets the contract."""

import importlib.util
import math
import re
import sys

import pytest

from models.registry import SOLVERS
from tests.models import solver_contract
from tests.models.solving import PROCESSES, edm, vpsde
from tests.support import REPO

PAGE = (REPO / "docs" / "add-a-solver.md").read_text()


@pytest.fixture(autouse=True)
def ab2(monkeypatch, tmp_path):
    """The page's file and registry line in force."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    (line,) = re.findall(r'^    "(\w+)": "(models\.solvers\.\w+):trajectory",$', PAGE, re.M)
    name, module = line
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location(module, file)
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, made)
    spec.loader.exec_module(made)
    monkeypatch.setitem(SOLVERS, name, f"{module}:trajectory")
    return name


def test_the_example_meets_the_contract(ab2):
    fitting = solver_contract.fitting(ab2)
    assert len(fitting) == len(PROCESSES)
    for process in (PROCESSES[key] for key in fitting):
        for steps in (1, 2, 3, 20, 500):
            solver_contract.check_table(ab2, process, steps)
        solver_contract.check_end(ab2, process)
        if process.clip is None:
            solver_contract.check_samples(ab2, process)
            solver_contract.check_flow(ab2, process)


@pytest.mark.parametrize("process", [vpsde(), edm(sigma_min=0.1, sigma_max=10.0)], ids=lambda p: p.kind)
def test_its_order_is_what_the_page_says(ab2, process):
    (order,) = re.findall(r"measures its order, which is (\d)", PAGE)
    coarse, fine = (solver_contract.error(ab2, process, steps) for steps in (160, 320))
    assert int(order) - 0.1 < math.log2(coarse / fine) < int(order) + 0.2
