"""The road to the CIFAR-10 models at toy size: every stage of benchmarks.gpu.train, on two machines in turn."""

import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu import train
from models.evaluation.cli import app as evaluate
from models.store import read_config, read_json
from models.tasks.classifier import load_classifier
from models.tasks.generator import load as load_generator
from models.training import cli
from models.training.data import Split, pack, read

LABELS = 'labels = ["a", "b"]\n'
OPTIM = "[{}]\nsteps = 3\nbatch = 8\nlr = 1e-3\nwarmup = 1\ncompile = true\n"
GUIDED = 'steps = 2\nguidance = 1.5\nsolver = "dpmpp_2m"\n'
RECIPES = {
    "cifar-uvit": f'name = "cifar-uvit-base"\n{LABELS}backbone = "uvit"\nflip = true\n{GUIDED}'
    "[network]\nimage_size = 8\nchannels = 3\npatch = 4\nwidth = 16\ndepth = 5\nheads = 2\nclasses = 2\n"
    "time_scale = 1000.0\n" + OPTIM.format("optim") + "minutes = 5.0\n",
    "cifar-exits": f'name = "cifar-uvit"\nbase = "cifar-uvit-base"\n{GUIDED}distill = 0.5\nflip = true\nbins = 2\n'
    'default = "eco"\n[gears]\nfull = 1.0\neco = 0.8\n' + OPTIM.format("explore") + OPTIM.format("optim"),
    "cifar-ensemble": f'name = "cifar-ensemble"\n{LABELS}members = 2\npool = 1\nimages = 24\nshift = 1\nflip = true\n'
    '[network]\nchannels = 3\nclasses = 2\nwidth = 4\nnorm = "frn"\nactivation = "swish"\nstem_stride = 1\n'
    + OPTIM.format("optim")
    + 'algorithm = "sgd"\nema = 0.0\n',
    "cifar-bridge": 'name = "cifar-bridge"\nensemble = "cifar-ensemble"\nkinds = ["bridge", "distilled", "kl"]\n'
    "seeds = 1\nbf16 = true\npair_teachers = [[0, 1]]\n[transfer]\nrows = 40\nseen = 1.0\nheld_out = 0.0\n"
    "flip = true\nmixup_share = 1.0\n[network]\ntap_channels = 4\nclasses = 2\nsteps = 2\nstem_stride = 1\n"
    "widths = [4, 8]\nstrides = [1, 2]\nexpands = [1, 2]\n" + OPTIM.format("optim") + OPTIM.format("distill"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, n in (("train", 10_032), ("test", 40)):
        images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        pack(Split(images, np.arange(n, dtype=np.int64) % 2), folder / f"{part}.safetensors")
    return folder


@pytest.fixture
def road(tmp_path, data, monkeypatch):
    """Calls of the script on toy recipes, its processes run in this one; small shards."""
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.toml").write_text(text)
    quick = ("--n", "100", "--batch", "2", "--repeats", "1", "--judge", "OUT/cifar-ensemble", "--workers", "1")
    monkeypatch.setitem(train.STAGES, "uvit-profile", replace(train.STAGES["uvit-profile"], arguments=quick))
    monkeypatch.setattr(cli, "SHARD", 20_000)
    real = subprocess.run

    def run(command, **how):
        if command[:2] != [sys.executable, "-c"]:
            return real(command, **how)
        app = import_module(command[2].split()[1]).app
        done = CliRunner().invoke(app, command[3:])
        return subprocess.CompletedProcess(command, done.exit_code, done.stdout.encode())

    monkeypatch.setattr(subprocess, "run", run)

    def call(stages, machine, slot, **options):
        given = {"data": data, "recipes": tmp_path, "device": "cpu", "work": tmp_path / machine, "out": tmp_path / slot}
        listed = [text for name, value in (given | options).items() for text in (f"--{name}", str(value))]
        train.main([*stages, *listed])
        return read_json(tmp_path / slot / "train.json")

    return call


def test_every_stage_in_order_and_on_a_second_machine(road, data, tmp_path):
    first = road(["members", "uvit"], "a", "slot-1")
    assert [stage["finished"] for stage in first["stages"]] == [True, True]
    assert np.isfinite(first["stages"][1]["validation"])
    came_back = {p.name for p in (tmp_path / "slot-1").iterdir()}
    assert came_back >= {"members.tar.00", "members-pool.tar.00", "uvit.tar.00", "train.log", "train.json"}
    (tmp_path / "slot-1" / "members-pool.tar.00").rename(tmp_path / "members-pool.tar.00")
    stages = ["uvit", "uvit-exits", "bridge", "uvit-profile"]
    second = road(stages, "b", "slot-2", state=tmp_path / "slot-1")
    assert [(s["stage"], s["finished"]) for s in second["stages"]] == [(name, True) for name in stages[1:]]
    assert second["waiting"] == []
    assert read_json(tmp_path / "b" / "out" / "runs" / "cifar-uvit" / "schedules.json").keys() == {"full", "eco"}

    pool = tmp_path / "b" / "out" / "cifar-ensemble" / "member-3.safetensors"
    assert not pool.exists()
    (tmp_path / "slot-2" / "members-pool.tar.00").write_bytes((tmp_path / "members-pool.tar.00").read_bytes())
    third = road(["classify"], "b", "slot-3", state=tmp_path / "slot-2")
    assert [stage["finished"] for stage in third["stages"]] == [True]
    assert pool.is_file()
    with tarfile.open(tmp_path / "slot-3" / "classify.tar.00") as archive:
        assert {"out/cifar-ensemble/card.md", "out/cifar-bridge/card.md"} <= set(archive.getnames())

    made = tmp_path / "b" / "out"
    files = list(read_config(made / "cifar-uvit")["files"])
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    generator = load_generator(made / "cifar-uvit", 1, "cpu").info
    assert [gear.name for gear in generator.gears] == ["full", "eco"]
    assert all(gear.frechet is not None and gear.schedule.weights == generator.weights for gear in generator.gears)
    classifier = load_classifier(made / "cifar-ensemble")
    assert classifier.bridge is not None
    assert "temperatures" in classifier.config

    args = [
        "generate",
        str(made / "cifar-uvit"),
        "--data",
        str(data),
        "--n",
        "100",
        "--workers",
        "1",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(evaluate, [*args, "--judge", str(made / "cifar-ensemble")], catch_exceptions=False)
    assert set(json.loads(done.stdout.splitlines()[-1])["gears"]) == {"full", "eco"}


def test_an_unfinished_stage_goes_on_where_it_stopped(road, tmp_path, data):
    """Stopped before its first step: what comes back is the average, the fresh machine goes on from there."""
    args = ["diffusion", "--recipe", str(tmp_path / "cifar-uvit.toml"), "--data", str(data), "--minutes", "0"]
    done = CliRunner().invoke(cli.app, [*args, "--out", str(tmp_path / "a" / "out")], catch_exceptions=False)
    closing = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, closing["finished"], closing["step"], closing["steps"]) == (0, False, 0, 3)
    (tmp_path / "slot-1").mkdir()
    slot = train.Slot(tmp_path / "a", tmp_path / "slot-1", tmp_path, "cpu", 0.0)
    (piece,) = train.keep("uvit", slot)
    with tarfile.open(fileobj=io.BytesIO(piece.read_bytes())) as archive:
        assert "out/runs/cifar-uvit-base/checkpoint.safetensors" in archive.getnames()
    second = road(["uvit"], "b", "slot-2", state=tmp_path / "slot-1")
    assert (second["stages"][0]["finished"], second["stages"][0]["steps"]) == (True, 3)


def test_a_stage_that_lacks_what_it_needs_says_so(road):
    with pytest.raises(SystemExit):
        road(["bridge"], "a", "slot-1")
    assert train.STAGES["bridge"].needs == ("cifar-ensemble",)


def test_archives_are_cut_and_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PIECE", 4096)
    slot = train.Slot(tmp_path / "a", tmp_path / "slot", tmp_path, "cpu", 0.0)
    model = slot.models / "cifar-ensemble"
    for folder in (model, slot.out, slot.done("members").parent):
        folder.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    weights = np.random.default_rng(0).bytes(20_000)
    (model / "member-1.safetensors").write_bytes(weights)
    slot.done("members").write_text("{}")
    assert len(train.keep("members", slot)) > 4
    fresh = replace(slot, work=tmp_path / "b")
    assert train.restore(slot.out, fresh) == ["members"]
    assert (fresh.models / "cifar-ensemble" / "member-1.safetensors").read_bytes() == weights
    assert train.restore(slot.out, fresh) == []
    assert not train.keep("pilot-dit", fresh)


def test_packed_images_are_those_of_the_folder(tmp_path):
    from PIL import Image

    for i in range(6):
        for part in ("train", "test"):
            (tmp_path / part / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8, 3), 40 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"class{i % 2}" / f"{i}.png")
    args = ["pack", "--data", str(tmp_path), "--out", str(tmp_path / "packed")]
    assert CliRunner().invoke(cli.app, args, catch_exceptions=False).exit_code == 0
    for part in ("train", "test"):
        raw, packed = read(tmp_path, part), read(tmp_path / "packed", part)
        assert np.array_equal(raw.images, packed.images)
        assert raw.labels.tolist() == packed.labels.tolist()
        assert torch.from_numpy(packed.images).shape == (6, 8, 8, 3)
