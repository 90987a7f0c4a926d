"""docs/uncertainty.md: its code runs, its keys are those of the code, its calibration fits in what it says."""

import re

from models.uncertainty.conformal import Conformal
from models.uncertainty.scores import DIRECTION
from tests.support import REPO

PAGE = (REPO / "docs" / "uncertainty.md").read_text()


def test_the_code_runs_and_stored_scores_have_the_stated_size():
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        exec(compile(block, "docs/uncertainty.md", "exec"), names)
    fitted = names["fitted"]
    assert isinstance(fitted, Conformal)
    kilobytes = re.findall(r"float32, (\d+) kB for 5,000", PAGE)
    assert [round(fitted.scores.nbytes / 1000)] == [int(k) for k in kilobytes]


def test_every_score_is_explained():
    rows = "".join(line.split("|")[1] for line in PAGE.split("## ")[1].splitlines() if line.startswith("| "))
    assert set(re.findall(r"`(\w+)`", rows)) | {"energy"} == set(DIRECTION)
