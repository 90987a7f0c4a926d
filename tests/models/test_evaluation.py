"""Evaluation end to end at toy size: tables from real runs of the tasks, written between a card's markers."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from models.backbones.dit import DiT, DiTConfig
from models.evaluation.cli import app
from models.evaluation.report import BEGIN, END, markdown, write_card
from models.store import StoreError, read_json, write_model
from models.tasks.gears import write_gears
from models.training.diffusion import model_config
from tests.models.test_classify_task import LABELS, make_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    make_zoo(root)
    torch.manual_seed(0)
    shape = DiTConfig(width=32, depth=3, heads=2, classes=3, time_features=16)
    weights = write_model(
        root / "gen", model_config("gen", LABELS, shape, "toy"), {"m.safetensors": DiT(shape).state_dict()}
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


def run(*args):
    found = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output, json.loads(found.stdout.strip().splitlines()[-1])


def test_generate_measures_every_gear_and_writes_the_card(zoo, data):
    output, summary = run("generate", zoo / "gen", "--data", data, "--judge", zoo / "toy", "--n", 100, "--write")
    assert summary["gears"]["full"]["layer_evals_per_image"] == 3 * 3 * 2
    assert summary["gears"]["eco"]["layer_evals_ratio"] == pytest.approx((1 + 1 + 3) / 9)
    stored = read_json(zoo / "gen" / "gears.json")["gears"]
    assert [gear["n"] for gear in stored] == [100, 100]
    assert stored[1]["layer_evals_ratio"] == pytest.approx(5 / 9, abs=1e-3)
    card = (zoo / "gen" / "card.md").read_text()
    assert card.index(BEGIN) < card.index("| eco |") < card.index(END)
    assert "| eco |" in output


def test_classify_measures_every_method(zoo, data):
    output, summary = run("classify", zoo / "toy", "--data", data, "--ood", data, "--write")
    for row in ("source at T*", "DE-2", "DE-3", "bridge x1", "bridge x5"):
        assert f"| {row} |" in output
    assert summary["dee"]["DE-2"]["mean"] == pytest.approx(2)
    assert set(summary["auroc"]) == {"single", "bridge", "ensemble"}
    assert summary["auroc"]["single"] == pytest.approx(0.5)
    assert set(read_json(zoo / "toy" / "config.json")["times"]) == {"single", "bridge", "ensemble"}


def test_markdown():
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_a_card_without_markers_is_refused(tmp_path):
    (tmp_path / "card.md").write_text("# card\n")
    with pytest.raises(StoreError, match=r"card\.md lacks"):
        write_card(tmp_path, "| a |")
