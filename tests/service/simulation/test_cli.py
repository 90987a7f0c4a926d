"""The command: traces in, a table and JSON out; what is wrong in a file is said by its line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from models.api import UserError
from service.cli import app
from service.simulation.profiles import parse_ticks, read_profile, write_profile
from service.simulation.traces import Arrival, bursts, poisson, read_trace, write_trace
from tests.support import REPO


def run(*args):
    result = CliRunner().invoke(app, ["simulate", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_trace_on_both_ways(tmp_path):
    write_trace(trace := tmp_path / "trace.jsonl", [Arrival(0.2 * i, deadline_ms=5000) for i in range(20)])
    printed = run("--trace", trace, "--gears", "both", "--ticks", "16:10,1024:500", "--plot", tmp_path / "seen.png")
    found = json.loads(printed.splitlines()[-1])
    assert set(found["runs"]) == {"gears on", "gears off"}
    assert found["runs"]["gears off"]["gears"] == {"full": 20}
    assert sum(second["offered"] for second in found["runs"]["gears on"]["seconds"]) == 20
    assert found["deadline_ms"] == 600
    assert "goodput per s" in printed
    assert (tmp_path / "seen.png").stat().st_size > 1000


def test_drawn_arrivals_are_saved_and_read_again(tmp_path):
    drawn = ("--bursts", "2x", "--seconds", 6, "--floor", "balanced", "--rows", 2, "--deadline", 900)
    first = json.loads(run(*drawn, "--save", tmp_path / "t").splitlines()[-1])
    again = json.loads(run("--trace", tmp_path / "t", "--deadline", 900).splitlines()[-1])
    assert first == again
    assert read_trace(tmp_path / "t")[0] == Arrival(read_trace(tmp_path / "t")[0].at, 2, floor="balanced")
    assert set(first["runs"]["gears on"]["gears"]) <= {"full", "balanced"}


@pytest.mark.parametrize(
    "arguments", [(), ("--poisson", "2x", "--bursts", "1"), ("--poisson", "-1"), ("--poisson", "x")]
)
def test_one_rate_is_needed(arguments):
    with pytest.raises(UserError, match="--"):
        run(*arguments)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ('{"at": 1, "rows": 2}', "rows"),
        ('{"at": -1}', "at"),
        ('{"at": 1, "n": 0}', "n: "),
        ('{"at": 1, "deadline_ms": 0}', "deadline_ms"),
        ('{"at": 1, "priority": "urgent"}', "priority"),
        ("[1]", "line 2"),
        ('{"n": 1}', "at"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, said):
    (tmp_path / "trace").write_text('{"at": 0}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2") as error:
        read_trace(tmp_path / "trace")
    assert said in str(error.value)


def test_rates_of_drawn_arrivals():
    assert len(poisson(50.0, 40.0, 0)) == pytest.approx(2000, rel=0.1)
    times = bursts(50.0, 40.0, 0)
    assert len(times) == pytest.approx(2000, rel=0.1)
    crowded = sum(int(at / 5) % 2 == 0 for at in times)
    assert crowded / len(times) == pytest.approx(1.75 / 2, abs=0.05)


def test_profiles(tmp_path):
    points = parse_ticks("16:9.1,32:13.3")
    write_profile(tmp_path / "p", points, "this machine")
    assert read_profile(tmp_path / "p") == (points, "this machine")
    for wrong in ("16", "16:1,8:2", "16:2,32:1", "0:1", "a:b"):
        with pytest.raises(UserError, match="units"):
            parse_ticks(wrong)


def test_it_runs_without_torch():
    script = "import sys; sys.modules['torch'] = None; from service.cli import app; app(sys.argv[1:])"
    arguments = ["simulate", "--poisson", "5", "--seconds", "3"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["runs"]["gears on"]["offered"] > 5
