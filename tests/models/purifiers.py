"""A small random generator that purifies the images of `classifiers.make_zoo`."""

import dataclasses

import torch

from models.api import ExitSchedule
from models.backbones.dit import DiT, DiTConfig
from models.store import read_config, write_json, write_model
from tests.models.test_generate_task import lively

STAIRS = ExitSchedule((0.1, 0.2, 1.0), (3, 2, 1))
ENTRY = {"model": "toy-dit", "u": 0.3, "steps": 2, "gear": "eco"}


def save_generator(folder, side=28, **process):
    torch.manual_seed(3)
    shape = DiTConfig(image_size=side, width=16, depth=3, heads=2, classes=3, time_features=16)
    config = {
        "kind": "generator",
        "name": folder.name,
        "backbone": "dit",
        "network": dataclasses.asdict(shape),
        "process": {"prediction": "v", "clip": 1.0} | process,
        "labels": ["a", "b", "c"],
    }
    write_model(folder, config, {"model.safetensors": lively(DiT(shape)).state_dict()})
    stairs = {"edges": STAIRS.edges, "depths": STAIRS.depths}
    gears = [
        {"name": name, "schedule": schedule, "solver": "ddim", "steps": 5, "guidance": 1.0}
        for name, schedule in (("full", {"edges": [1.0], "depths": [3]}), ("eco", stairs))
    ]
    write_json(folder / "gears.json", {"version": 1, "default": "full", "gears": gears})
    return folder


def name_purifier(root, entry):
    """The key `purifier` of `toy`."""
    write_json(root / "toy" / "config.json", read_config(root / "toy") | {"purifier": entry})


def write_purifier(root, **entry):
    """A generator beside `toy` that its config names; two steps, the second deeper than the first."""
    save_generator(root / "toy-dit")
    name_purifier(root, ENTRY | entry)
