"""A small random classifier folder with everything a classify method may need, and how to run its task."""

import dataclasses

import numpy as np
import torch
from torch import nn

from models.api import ClassifyWork
from models.backbones.bridge import BridgeConfig, BridgeNetwork
from models.backbones.distance import FeatureDistance
from models.backbones.early_exits import ExitHeads
from models.backbones.resnet import ResNet, ResNetConfig
from models.bridge.process import TEMPERATURE
from models.store import read_config, write_model
from models.uncertainty.gaussians import Gaussians

LABELS = ["a", "b", "c"]
SHAPE = ResNetConfig(classes=3, width=8)
LIGHT = BridgeConfig(tap_channels=8, classes=3, widths=(8, 12), strides=(1, 2), expands=(2, 2))
IMAGES = [np.random.default_rng(i).integers(0, 256, (28, 28, 1), dtype=np.uint8).tobytes() for i in range(12)]


def lively(network):
    """Random weights without zeros, and BatchNorms that do something in eval mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    return network.eval()


def make_zoo(root, evaluations=5, members=3):
    """The ensemble `toy` and a bridge folder that serves method `bridge` with one network of five steps."""
    torch.manual_seed(0)
    states = {f"member-{i}.safetensors": lively(ResNet(SHAPE)).state_dict() for i in range(members)}
    config = {
        "kind": "ensemble",
        "name": "toy",
        "backbone": "resnet",
        "network": dataclasses.asdict(SHAPE),
        "labels": LABELS,
        "image": [28, 28, 1],
        "members": list(states),
        "temperatures": {"single": 1.3, "ensemble": 1.1},
    }
    write_model(root / "toy", config, states)
    write_bridges(root, {"bridge": served(["plain"], evaluations)}, {"plain": LIGHT})
    return root / "toy"


def served(networks, evaluations=1, source_weight=0.0):
    return {"networks": networks, "evaluations": evaluations, "source_weight": source_weight, "temperature": 1.2}


def write_bridges(root, serve, shapes):
    """The bridge folder of `toy`: an entry of `serve` a method, a network a shape."""
    torch.manual_seed(1)
    source, made = "member-0.safetensors", {name: lively(BridgeNetwork(shape)) for name, shape in shapes.items()}
    config = {
        "kind": "bridge",
        "name": "toy-bridge",
        "backbone": "bridge",
        "ensemble": "toy",
        "source": {"file": source, "sha256": read_config(root / "toy")["files"][source], "tap": "first"},
        "softening": TEMPERATURE,
        "networks": {
            name: {"kind": "bridge", "seed": 1, "network": dataclasses.asdict(shape), "teachers": [0, 1, 2]}
            for name, shape in shapes.items()
        },
        "serve": serve,
    }
    write_model(root / "toy-bridge", config, {f"{name}.safetensors": made[name].state_dict() for name in made})


def write_student(root, **changes):
    """The student folder of `toy`."""
    torch.manual_seed(2)
    config = {
        "kind": "student",
        "name": "toy-student",
        "backbone": "resnet",
        "network": dataclasses.asdict(SHAPE),
        "ensemble": "toy",
        "labels": LABELS,
        "image": [28, 28, 1],
        "serve": "student-1.safetensors",
        "temperature": 1.4,
    }
    state = {"student-1.safetensors": lively(ResNet(SHAPE)).state_dict()}
    write_model(root / "toy-student", config | changes, state)


LEAVING = {
    "thresholds": [0.9784, 0.665],
    "confidence_temperatures": [0.1, 0.1],
    "temperatures": [1.2, 1.3, 1.4],
    "shares": [0.5, 0.3, 0.2],
}


def write_exits(root, **changes):
    """The exits folder of `toy`; its random images leave at every stage."""
    torch.manual_seed(3)
    source, heads = "member-0.safetensors", lively(ExitHeads(SHAPE, 2, 6))
    config = {
        "kind": "exits",
        "name": "toy-exits",
        "backbone": "exits",
        "ensemble": "toy",
        "source": {
            "file": source,
            "sha256": read_config(root / "toy")["files"][source],
            "network": dataclasses.asdict(SHAPE),
        },
        "heads": {"grid": 2, "hidden": 6},
        "networks": {"heads-1": LEAVING | changes},
        "serve": "heads-1",
    }
    write_model(root / "toy-exits", config, {"heads-1.safetensors": heads.state_dict()})


def write_distance(root, fields=2, **changes):
    """The distance folder of `toy`, of Gaussians over noise."""
    rng, size = np.random.default_rng(4), SHAPE.width * fields**2
    gaussians = Gaussians.fit(rng.normal(1.0, 2.0, (9 * size, size)), np.arange(9 * size) % 3, shared=False)
    source = "member-0.safetensors"
    config = {
        "kind": "distance",
        "name": "toy-distance",
        "backbone": "distance",
        "ensemble": "toy",
        "source": {"file": source, "sha256": read_config(root / "toy")["files"][source], "tap": "first"},
        "fields": fields,
    }
    state = FeatureDistance.from_gaussians(gaussians, fields).state_dict()
    write_model(root / "toy-distance", config | changes, {"distance.safetensors": state}, keep_dtype=True)


def make_whole_zoo(root):
    """`toy` with a student, exits, and bridges of every sort: many steps, late features seen or alone, any weights."""
    folder, features = make_zoo(root), 4 * SHAPE.width
    shapes = {
        "plain": LIGHT,
        "late": dataclasses.replace(LIGHT, steps=2, features=features, logits=True),
        "one": dataclasses.replace(LIGHT, steps=1, expands=(0, 2)),
        "curve-a": dataclasses.replace(LIGHT, steps=1, features=features, tap_channels=0),
        "curve-b": dataclasses.replace(LIGHT, steps=1),
    }
    serve = {
        "bridge": served(["plain"], 5),
        "bridges": served(["one", "late"], 1, 0.2),
        "bridge_network": served(["curve-a", "curve-b", "plain"], 1, -0.5),
    }
    write_bridges(root, serve, shapes)
    write_student(root)
    write_exits(root)
    return folder


def work(method, *images, **options):
    return ClassifyWork(model="toy", images=tuple(images), method=method, top_k=2, **options)


def run(task, job, slots=None):
    """Rows of a job, run alone."""
    slots = slots or list(range(job.rows))
    left = dict(zip(slots, task.admit(job, range(job.rows), slots), strict=True))
    while moving := [slot for slot, n in left.items() if n]:
        left |= after(task.step(moving), moving, left)
    return task.collect(slots)


def after(stats, slots, left):
    """Evaluations to come of `slots` that were stepped, as the worker's scheduler counts them."""
    assert stats.finished | stats.waiting <= set(slots)
    assert stats.rows == len(slots) - len(stats.waiting) > 0
    return {slot: 0 if slot in stats.finished else left[slot] - (slot not in stats.waiting) for slot in slots}


def flood(task, jobs, rng):
    """Rows of single-image jobs, one a slot, admitted at random ticks and collected as they finish."""
    left, waiting, answers = {}, list(range(len(jobs))), {}
    while waiting or left:
        if waiting and rng.random() < 0.7:
            index = waiting.pop()
            [left[index]] = task.admit(jobs[index], [0], [index])
        moving = rng.sample(ready := [slot for slot, n in left.items() if n], len(ready))
        left |= after(task.step(moving), moving, left) if moving else {}
        for slot in [slot for slot, n in left.items() if not n]:
            [answers[slot]] = task.collect([slot])
            del left[slot]
    return [answers[i] for i in range(len(jobs))]
