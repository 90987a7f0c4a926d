"""benchmarks/gpu at its smallest: every section runs, targets and tables say what the figures say."""

import importlib.metadata
import json

import pytest

from benchmarks.gpu import bench_engine, bench_report, road
from benchmarks.gpu.bench_models import stand_in, subject, write_random
from benchmarks.gpu.bench_network import saturation
from benchmarks.gpu.bench_targets import targets, verdict
from benchmarks.gpu.bench_timing import Bench, Clock, torch
from models.registry import BACKENDS

SECTIONS = ("network", "engine", "exits", "quality", "batch", "equal", "mixed", "load", "ticks")


def test_the_whole_measurement_runs_at_toy_size(tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = bench_engine.run(tmp_path, [write_random("dit", tmp_path, toy=True)], 60.0, toy=True, of="abc")
    finally:
        torch.set_num_threads(threads)
    sections = found["sections"]
    assert {name: one["error"] for name, one in sections.items() if "error" in one} == {}
    assert list(sections) == ["limits", *(f"random-dit/{name}" for name in SECTIONS)]
    assert json.loads((tmp_path / "engine.json").read_text())["commit"] == "abc"
    network = sections["random-dit/network"]["found"]
    assert set(network["ways"]) == {"fp32/eager", "bf16/eager", "bf16/cudagraph"}
    assert network["faults"]["bf16/compiled"] == "only on CUDA"
    gaps = sections["random-dit/quality"]["found"]
    assert gaps["fp32/eager"]["most"] <= 1  # the plain loop and the engine draw the same images
    assert gaps["bf16/cudagraph"]["mean"] < 8
    assert gaps["fp32/eager, few rows at a time"]["most"] <= 1
    beside = [gap for name, gap in gaps.items() if name.startswith("bf16/cudagraph beside eager")]
    assert len(beside) == 3
    assert max(gap["mean"] for gap in beside) < 1
    exits = sections["random-dit/exits"]["found"]
    assert {row["gear"] for row in exits} == {"balanced", "eco"}
    assert all(0 < row["layer_saving"] < 1 for row in exits)
    assert len(found["targets"]) == 10
    assert "mixed steps" in capsys.readouterr().out
    text = bench_report.markdown(tmp_path / "engine.json")
    for words in (
        "commit abc",
        "Network at full depth:",
        "Images / s by batch",
        "With scheduler, gears and metrics",
        "Poisson arrivals",
        "| bf16/cudagraph |",
    ):
        assert words in text
    assert BACKENDS["cudagraph"] == "models.backends.cudagraph:build"


def test_a_section_that_fails_leaves_its_traceback_and_the_rest_goes_on(tmp_path):
    report = bench_engine.Report(tmp_path, {"date": "today"})

    def fail():
        raise ValueError("out of luck")

    assert report.section("first", fail) is None
    assert report.section("second", lambda: 7) == 7
    sections = json.loads((tmp_path / "engine.json").read_text())["sections"]
    assert "ValueError: out of luck" in sections["first"]["error"]
    assert sections["second"]["found"] == 7


def test_flops_of_a_dit_are_its_layers_and_attention(tmp_path):
    found = subject(write_random("dit", tmp_path, toy=True))
    width, tokens, patch = 32, 4, 3 * 16
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    assert found.tokens == tokens
    assert found.flops[3] - found.flops[2] == block
    assert found.flops[1] - block == 2 * tokens * 2 * width * patch


def test_saturation_is_the_fewest_rows_near_the_best():
    assert saturation({1: 4.0, 2: 2.0, 4: 1.09, 8: 1.0, 16: 1.05}) == 4


def test_turns_end_with_the_clock_but_not_before_one():
    runs = []
    found = Bench(torch.device("cpu"), True).turns({"a": lambda: runs.append("a")}, 5, Clock(0.0))
    assert runs == ["a"]
    assert len(found["a"]) == 1


def test_targets_are_met_missed_or_not_measured():
    ways = {
        "plain bf16": {"over_plain": {"median": 1.0}, "over_compiled": {"median": 0.8}},
        "full bf16/eager": {"over_plain": {"median": 1.1}, "over_compiled": {"median": 0.9}},
        "full bf16/cudagraph": {"over_plain": {"median": 2.1}, "over_compiled": {"median": 1.7}},
        "balanced best": {"over_plain": {"median": 2.7}, "over_compiled": {"median": 2.2}},
    }
    saving = [
        {"way": way, "gear": "balanced", "rows": rows, "n_sat": 8, "mixed_s": seconds, "of_layer_saving": share}
        for way, rows, seconds, share in (
            *(("bf16/cudagraph", 8, 1.0, 0.9), ("bf16/cudagraph", 32, 3.0, 0.97), ("bf16/cudagraph", 64, 6.0, 0.96)),
            *(("bf16/eager", 32, 6.0, 0.99), ("bf16/eager", 64, 12.0, 0.5)),
        )
    ]
    ticks = [
        {"rows": rows, "way": way, "tick_s": seconds, "outside_kernels": share}
        for rows, way, seconds, share in (
            *((1, "bf16/cudagraph", 1.0, 0.05), (1, "bf16/cudagraph", 1.1, 0.2)),
            *((1, "bf16/compiled_cudagraph", 1.2, 0.01), (64, "bf16/cudagraph", 0.9, 0.0)),
        )
    ]
    found = targets(
        {"sections": {"m/mixed": {"found": {"ways": ways}}, "m/exits": {"found": saving}, "m/ticks": {"found": ticks}}}
    )
    said = {one["what"]: (one["value"], verdict(one)) for one in found}
    assert said["full over the plain loop, mixed steps"] == (2.1, "met")
    assert said["balanced over the plain loop, mixed steps"] == (2.7, "missed")
    assert said["full over the compiled plain loop, mixed steps"] == (1.7, "")
    assert said["full over the plain loop, equal steps"] == (None, "not measured")
    assert said["time saved over layers saved, balanced, at 4 n_sat rows or more"] == (0.96, "met")
    assert said["share of a tick outside kernels, one row, CUDA graphs"] == (0.2, "missed")


def test_a_stand_in_goes_with_its_block():
    with stand_in(True):
        assert BACKENDS["cudagraph"] == "benchmarks.gpu.bench_models:uncaptured"
    assert BACKENDS["cudagraph"] == "models.backends.cudagraph:build"


# The road


PAGE = """# TYPE offramp_layer_evals counter
offramp_layer_evals_total{{kind="run",model="m"}} {run}
offramp_layer_evals_total{{kind="skipped",model="m"}} {skipped}
# TYPE offramp_exit_depth histogram
offramp_exit_depth_bucket{{model="m",u_bin="0.0",le="+Inf"}} {n}
offramp_exit_depth_count{{model="m",u_bin="0.0"}} {n}
offramp_exit_depth_sum{{model="m",u_bin="0.0"}} {depth}
"""


def test_what_the_load_saved_is_read_off_the_metrics_before_and_after():
    before, after = PAGE.format(run=10, skipped=0, n=1, depth=8), PAGE.format(run=70, skipped=40, n=11, depth=58)
    assert road.saved(before, after) == {"compute_saved": 0.4, "mean_depth": 5.0, "evaluations": 10.0}
    assert road.saved(before, before)["compute_saved"] is None


def test_a_line_of_the_road_counts_answers_in_time():
    seen = [(0.0, 0.1, 200), (0.1, 0.2, 200), (0.2, 0.9, 200), (0.3, 0.01, 429)]
    found = road.row("generate", {"seen": seen, "bodies": {"200": "x", "429": "busy"}}, 2.0, 2.0, 500.0)
    assert (found["ok_per_s"], found["p50_ms"], found["p99_ms"], found["in_time"]) == (1.5, 200.0, 900.0, 0.5)
    assert found["statuses"] == {"200": 3, "429": 1}
    assert found["example"] == {"429": "busy"}


def test_a_package_that_is_only_on_the_path_gets_a_version(tmp_path, monkeypatch):
    assert road.versioned(tmp_path) == []

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    [folder] = road.versioned(tmp_path)
    [found] = importlib.metadata.distributions(path=[folder])
    assert found.metadata["Name"] == "offramp"


def test_requests_of_the_road_are_whole():
    text = road.post("generate", {"label": 1})
    head, body = text.split("\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head
    assert json.loads(body) == {"label": 1}


@pytest.mark.parametrize("kind", ["dit", "uvit"])
def test_random_weights_have_no_zeros_that_would_run_faster(tmp_path, kind):
    task = subject(write_random(kind, tmp_path, toy=True)).load(2, "cpu", "eager", "fp32", tmp_path, 1.0)
    assert all(parameter.any() for parameter in task.model.parameters())
    assert [gear.name for gear in task.info.gears] == ["full", "balanced", "eco"]
