"""`offramp train`: every command in order at toy size leave a folder that serves."""

import json
import struct

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from models.tasks.classify import load as load_classifier
from models.tasks.generator import load as load_generator
from models.training.cli import app

OPTIM = "[{0}]\nsteps = 2\nbatch = 8\nlr = 1e-3\nwarmup = 1\n"
RECIPES = {
    "diffusion": 'name = "base"\nlabels = ["a", "b"]\nbf16 = false\n[network]\nwidth = 32\ndepth = 2\nheads = 2\n'
    "classes = 2\ntime_features = 16\n" + OPTIM.format("optim"),
    "exits": 'name = "gen"\nbase = "base"\nshallowest = 1\nbins = 2\nbf16 = false\ndefault = "eco"\n'
    "[gears]\nfull = 1.0\neco = 0.5\n" + OPTIM.format("explore") + OPTIM.format("optim"),
    "members": 'name = "ens"\nlabels = ["a", "b"]\nmembers = 3\nimages = 40\nbf16 = false\n'
    "[network]\nclasses = 2\nwidth = 8\n" + OPTIM.format("optim") + 'algorithm = "sgd"\n',
    "bridge": 'name = "bri"\nensemble = "ens"\nseeds = 2\npair_teachers = [[0, 1], [0, 2]]\n'
    "[transfer]\nrows = 60\nseen = 0.4\nheld_out = 0.3\ngenerated = 0.3\ngenerator = 'gen'\npool = 12\nsteps = 2\n"
    "ods_share = 0.5\n[network]\ntap_channels = 8\nclasses = 2\nsteps = 2\nfeatures = 32\n"
    + OPTIM.format("optim")
    + OPTIM.format("distill")
    + "[curve]\nbf16 = false\n"
    + OPTIM.format("curve.optim")
    + 'algorithm = "sgd"\n',
    "distill": 'name = "stu"\nensemble = "ens"\nseeds = 2\nbf16 = false\n[transfer]\nrows = 60\nods_share = 1.0\n'
    "[network]\nclasses = 2\nwidth = 8\n" + OPTIM.format("optim"),
    "heads": 'name = "hea"\nensemble = "ens"\nseeds = 2\ngrid = 2\nhidden = 4\ncost = 0.9\n[transfer]\nrows = 60\n'
    + OPTIM.format("optim"),
    "distance": 'name = "dis"\nensemble = "ens"\nfields = 1\ncovariance = "shared"\n',
    "compare": 'kind = "mse"\n[base]\nname = "study"\nensemble = "ens"\nseeds = 2\n[base.transfer]\nrows = 40\n'
    "[base.network]\ntap_channels = 8\nclasses = 2\n"
    + OPTIM.format("base.optim")
    + OPTIM.format("base.distill")
    + "[arms.as-it-is]\n[arms.late.network]\ntap_channels = 0\nfeatures = 32\n",
}


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 10_050), ("t10k", 20)):
        pixels, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 2).astype(np.uint8)
        header = struct.pack(">HBBIII", 0, 8, 3, n, 28, 28)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, n) + labels.tobytes())
    return tmp_path


def test_trained_in_order_they_serve(data, tmp_path):
    out = tmp_path / "out"
    for command, text in RECIPES.items():
        recipe = tmp_path / f"{command}.toml"
        recipe.write_text(text)
        args = [command, "--recipe", str(recipe), "--data", str(data), "--out", str(out)]
        done = CliRunner().invoke(app, args, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        summary = json.loads(done.stdout.strip().splitlines()[-1])
        assert summary.get("model", "study") in {"base", "gen", "ens", "bri", "stu", "hea", "dis", "study"}
    assert set(summary["arms"]) == {"as-it-is", "late"}
    assert all(len(nll) == 2 and np.isfinite(nll).all() for nll in summary["arms"].values())
    assert [gear.name for gear in load_generator(out / "base", 1, "cpu").info.gears] == ["full"]
    generator = load_generator(out / "gen", 1, "cpu").info
    assert (generator.default_gear, generator.gears[1].schedule.weights) == ("eco", generator.weights)
    served = load_classifier(out / "ens", 1, "cpu").info
    assert 0 < served.methods["exits"] <= 0.9
    assert len(load_classifier(out / "ens", 1, "cpu").networks["source"](torch.zeros(1, 1, 28, 28))) == 4
    assert set(served.methods) == {
        "single",
        "bridge",
        "bridges",
        "bridge_network",
        "distilled",
        "exits",
        "ensemble",
    }
