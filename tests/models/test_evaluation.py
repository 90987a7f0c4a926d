"""Evaluation end to end at toy size: tables from real runs of the tasks, written between a card's markers."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from models.api import ExitSchedule, Gear, SolverOptions
from models.backbones.dit import DiT, DiTConfig
from models.evaluation import served_times
from models.evaluation.adaptive import shares
from models.evaluation.cli import app
from models.evaluation.dynamic import Adaptive
from models.evaluation.generate import GearScore, balanced_work, run_work
from models.evaluation.profile import app as profiler
from models.evaluation.profile import pareto
from models.evaluation.report import markdown, write_card
from models.evaluation.timing import saturation
from models.registry import METHODS
from models.store import StoreError, read_json, write_model
from models.tasks.gears import read_gears, write_gears
from models.training.diffusion import model_config
from tests.models.classifiers import LABELS
from tests.models.ensemble_folders import make_bridges, make_ensemble, make_exits, make_students
from tests.models.test_generate_task import latent_task


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    ensemble = make_ensemble(root, size=28, pool=1)
    make_bridges(ensemble)
    make_students(ensemble)
    make_exits(ensemble)
    torch.manual_seed(0)
    shape = DiTConfig(width=32, depth=3, heads=2, classes=3, time_features=16)
    network = DiT(shape)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    weights = write_model(
        root / "gen", model_config("gen", LABELS, shape, "toy"), {"model.safetensors": network.state_dict()}
    )
    table = {"solver": "ddim", "steps": 3, "guidance": 2.0}
    schedules = {"full": ([1.0], [3]), "eco": ([0.5, 1.0], [3, 1])}
    gears = [
        {"name": name, "schedule": {"edges": e, "depths": d, "weights": weights}, **table}
        for name, (e, d) in schedules.items()
    ]
    write_gears(root / "gen", gears, "eco")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """10,600 training and 300 test images of noise in IDX files, three classes."""
    import struct

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 10_600), ("t10k", 300)):
        pixels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 3, n).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">HBBIII", 0, 8, 3, n, 28, 28) + pixels.tobytes()
        )
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, n) + labels.tobytes())
    return folder


def run(*args, command=app):
    found = CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output, json.loads(found.stdout.strip().splitlines()[-1])


def small(zoo, data, *more):
    return (zoo / "gen", "--data", data, "--judge", zoo / "toy", "--workers", 1, *more)


def test_generate_measures_every_gear(zoo, data):
    before = (zoo / "gen" / "gears.json").read_text()
    output, summary = run("generate", *small(zoo, data, "--n", 100))
    assert summary["gears"]["full"]["layer_evals_per_image"] == 3 * 3 * 2
    assert summary["gears"]["eco"]["layer_evals_ratio"] == pytest.approx((1 + 1 + 3) / 9)
    assert "| eco |" in output
    assert (zoo / "gen" / "gears.json").read_text() == before


def test_profile_measures_and_keeps_the_pareto_set(zoo, data, tmp_path):
    folder = tmp_path / "gen"
    shutil.copytree(zoo / "gen", folder)
    stored = read_json(folder / "gears.json")
    full = stored["gears"][0]
    write_gears(folder, [*stored["gears"], {**full, "name": "as-dear"}], "eco")
    args = (folder, "--data", data, "--judge", zoo / "toy", "--workers", 1, "--n", 100, "--batch", 2, "--repeats", 1)
    output, summary = run(*args, command=profiler)
    eco_wins = summary["gears"]["eco"]["frechet"] <= summary["gears"]["full"]["frechet"]
    assert summary["dropped"] == (["as-dear"] if eco_wins else [])
    kept = {gear["name"]: gear for gear in read_json(folder / "gears.json")["gears"]}
    assert set(kept) == {"full", "eco", "as-dear"} - set(summary["dropped"])
    assert kept["eco"]["layer_evals_ratio"] == pytest.approx(5 / 9, abs=1e-3)
    assert kept["full"]["time_ratio"] == {
        "value": 1.0,
        "spread": [1.0, 1.0],
        "device": "cpu",
        "batch": 2,
        "threads": 1,
    }
    assert (kept["eco"]["n"], kept["eco"]["seed"]) == (100, 0)
    assert {"date", "machine", "commit"} <= set(kept["eco"])
    assert [gear.frechet for gear in read_gears(folder, 3)[0]] == [g["frechet"]["value"] for g in kept.values()]
    card = (folder / "card.md").read_text()
    assert (
        card.index("`offramp profile`") < card.index("| eco |") < card.index("| network rows | 1 blocks | 3 blocks |")
    )
    assert "| eco |" in output
    with Image.open(folder / "profile.png") as picture:
        assert picture.size[0] > 400


def score(name, cost, distance):
    gear = Gear(name, ExitSchedule((1.0,), (1,)), "ddim", 3, 1.0)
    return GearScore(gear, 0.0, cost, 0.0, distance, 0.0, 0.0)


def test_pareto_drops_what_costs_more_and_gives_less():
    scores = [score("full", 1.0, 0.30), score("a", 0.7, 0.29), score("b", 0.75, 0.31), score("c", 0.6, 0.4)]
    assert [s.gear.name for s in pareto(scores, ("full",))] == ["full", "a", "c"]
    assert [s.gear.name for s in pareto(scores, ("full", "b"))] == ["full", "a", "b", "c"]
    equal = [score("x", 0.5, 0.3), score("y", 0.5, 0.3)]
    assert pareto(equal, ()) == equal


@pytest.mark.parametrize("knee", [1, 4, 16])
def test_saturation_is_found_where_time_stops_falling(knee):
    rows = np.array([1, 2, 4, 8, 16, 32, 64])
    assert saturation(rows, 3.0 * np.maximum(knee, rows)) == pytest.approx(knee, rel=0.05)


def test_schedules_compares_at_equal_budgets(zoo, data):
    more = ("--n", 100, "--rows", 10, "--drops", 4, "--shares", "0.7", "--bins", 2, "--shallowest", 1, "--no-bf16")
    output, summary = run("schedules", *small(zoo, data, *more))
    assert np.array(summary["errors"]).shape == np.array(summary["sensitivity"]).shape == (3, 2)
    assert summary["sensitivity"][2] == [0.0, 0.0]
    rows = {line.split("|")[1].strip(): line.split("|") for line in output.splitlines() if line.startswith("| ")}
    assert set(rows) >= {"full", "ase 4", "greedy 4", "dp error 4", "dp final 4", "dp final, free 4", "dp error 70%"}
    hand = float(rows["ase 4"][3].strip(" %"))
    for name in ("greedy 4", "dp error 4", "dp final 4"):
        assert float(rows[name][3].strip(" %")) >= hand
    assert (rows["full"][2].strip(), float(rows["full"][7])) == ("3 3", 0.0)


def test_adaptive_decomposes_the_oracle_depth(zoo):
    output, summary = run("adaptive", zoo / "gen", "--n", 60, "--shallowest", 1, "--taus", "0.001,1000")
    assert "| output | 1e+03 | 1 | 0 | 0 | 0 | 0 |" in output
    first = summary["e0"][0]
    assert 1 <= first["mean_depth"] <= 3
    assert first["within_time_label"] <= first["within_time"] + 1e-9


def test_dynamic_and_its_shuffled_control_run_the_same_depths(zoo, data):
    args = (zoo / "gen", "--data", data, "--judge", zoo / "toy", "--shallowest", 1, "--n", 100, "--rows", 50)
    _, summary = run("dynamic", *args, "--gear", "eco", "--share", "0.3", "--no-bf16")
    e1 = summary["e1"]
    assert (e1["full"]["blocks"], e1["full"]["deviation"]) == (9, 0)
    assert e1["eco"]["blocks"] == 5
    assert 3 <= e1["dynamic 30%"]["blocks"] <= 9
    assert e1["shuffled 30%"]["deviation"] > 0


def test_time_explains_what_it_explains():
    """d* of time alone has nothing within; d* of the label alone nothing within time and label."""
    depths, time = (1, 2, 3), np.repeat(np.arange(3), 2)
    found = np.ones((3, 6, 6))
    for d in range(3):
        found[d][:, time <= d] = 0.0
    assert shares(found, np.arange(6) % 2, depths, 0.5).within_time == 0
    by_label = np.ones((3, 6, 6))
    by_label[2] = 0.0
    by_label[0, ::2] = 0.0
    found = shares(by_label, np.arange(6) % 2, depths, 0.5)
    assert (found.mean_depth, found.within_time, found.within_time_label) == (2, 1, 0)
    assert found.within_time_last == pytest.approx(1 / 6)


def test_the_exit_is_one_step_late_and_thresholds_move_it():
    """Three rows whose last block changes nothing, something, much: one block less, the same, one block more."""
    guided = torch.zeros(3, 3, 1, 1, 1)
    guided[1:, 1], guided[1:, 2] = 1.0, 9.0
    low, high = np.full((2, 3), 0.5), np.full((2, 3), 5.0)
    policy = Adaptive(np.array([1, 1]), low, high)
    assert policy(0, guided).tolist() == [1, 1, 1]
    assert policy(1, guided).tolist() == [0, 1, 2]
    mixed = Adaptive(np.array([1, 1]), low, high, np.random.default_rng(0))
    mixed(0, guided)
    assert sorted(mixed(1, guided).tolist()) == [0, 1, 2]


def test_classify_measures_every_method(zoo, data, monkeypatch):
    monkeypatch.setattr(served_times, "REPEATS", 2)
    monkeypatch.setattr(served_times, "TIMED", {32: 64, 1: 4})
    output, summary = run("classify", zoo / "toy", "--data", data, "--ood", data, "--write", "--plots", zoo / "plots")
    assert {path.name for path in (zoo / "plots").iterdir()} == {"reliability.png", "risk-coverage.png"}
    methods = set(read_json(zoo / "toy" / "calibration.json")["methods"])
    assert methods >= {"single", "bridge", "ensemble"}
    assert "### Prediction sets" in (zoo / "toy" / "card.md").read_text()
    for beside in ("toy-bridge", "toy-student", "toy-exits"):
        card = (zoo / beside / "card.md").read_text()
        assert "| DBN x2, corrected (2 seeds) |" in card
        assert "### Prediction sets" not in card
    rows = ["source", "source at T*", *(f"DE-{m}" for m in range(1, 6)), "DE-5 served", "cascade", "student"]
    rows += ["DBN x1, 3 steps", "DBN x1, 1 evaluation", "DBN x1, distilled", "regressor, MSE", "regressor, KL"]
    rows += ["DBN x2", "DBN x2, corrected", "bridge network", "exits"]
    rows += ["regressors x2, KL", "regressors x2, KL, corrected"]
    assert set(summary["rows"]) == set(summary["dee"]) == set(summary["costs"]) == set(rows)
    for name in rows:
        assert sum(line.startswith((f"| {name} |", f"| {name} (")) for line in output.splitlines()) >= 2
        assert {"acc", "cnll", "foreign", "aurc"} <= set(summary["rows"][name])
    assert [summary["rows"][f"DE-{m}"]["nll"]["n"] for m in range(1, 6)] == [6, 15, 20, 15, 6]
    assert summary["dee"]["DE-2"]["mean"] == pytest.approx(2)
    assert set(summary["recovered"]["DBN x2"]) == {"DE-3", "DE-5"}
    assert summary["rows"]["source"]["foreign"]["mean"] == pytest.approx(0.5)
    assert summary["spread"]["predicted"]["rho"]["n"] == 2
    times = read_json(zoo / "toy" / "config.json")["times"]
    assert set(times) == set(METHODS)
    assert summary["rows"]["exits"]["cnll"]["n"] == 2
    assert summary["costs"]["exits"]["macs"] < 1.0
    assert times["single"] == 1.0
    assert min(times.values()) > 0.0


def test_markdown():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_card_without_markers_is_refused(tmp_path):
    (tmp_path / "card.md").write_text("# card\n")
    with pytest.raises(StoreError, match=r"card\.md lacks"):
        write_card(tmp_path, "| a |")


def test_latent_rows_that_wait_for_the_codec_are_measured_whole():
    task = latent_task()
    gear = replace(task.info.gears[0], steps=2)
    images, _ = run_work(task, balanced_work(task, gear, 0, 10, seed=3))
    for i in range(10):
        alone, _ = run_work(task, balanced_work(task, gear, i, 1, seed=3))
        assert np.array_equal(images[i], alone[0])


def test_gears_are_measured_as_they_are_served():
    gear = Gear(
        "full", ExitSchedule((1.0,), (4,)), "ddim", 3, 2.0, SolverOptions(eta=0.5), guidance_interval=(0.1, 0.9)
    )
    work = balanced_work(latent_task(), gear, 0, 1, seed=0)
    assert (work.solver_options, work.guidance_interval) == (gear.solver_options, gear.guidance_interval)
