"""Random networks in folders as training writes them: an ensemble with a pool, bridges of every kind, students."""

import dataclasses

import torch

from models.backbones.bridge import BridgeConfig, BridgeNetwork
from models.backbones.early_exits import ExitHeads
from models.backbones.resnet import ResNet, ResNetConfig
from models.bridge.process import TEMPERATURE
from models.store import read_config, write_model
from tests.models.classifiers import LABELS, lively

SOURCE = "member-1.safetensors"
SHAPE = ResNetConfig(classes=3, width=4)


def make_ensemble(root, members=5, pool=3, size=6, name="toy"):
    """An ensemble folder `name`; images of `size` x `size` grey pixels."""
    torch.manual_seed(0)
    files = {f"member-{i + 1}.safetensors": lively(ResNet(SHAPE)).state_dict() for i in range(members + pool)}
    config = {
        "kind": "ensemble",
        "name": name,
        "backbone": "resnet",
        "network": dataclasses.asdict(SHAPE),
        "labels": LABELS,
        "image": [size, size, 1],
        "members": list(files)[:members],
        "temperatures": {"single": 1.3, "ensemble": 1.1},
    }
    write_model(root / name, config | ({"pool": list(files)[members:]} if pool else {}), files)
    return root / name


def make_bridges(ensemble, seeds=2, spread=True):
    """The bridge folder beside an ensemble: bridges of three steps, fed features, and every other kind of network."""
    torch.manual_seed(1)
    networks, files = {}, {}

    def add(name, kind, seed, teachers, **changes):
        shape = BridgeConfig(tap_channels=4, classes=3, widths=(4, 6), strides=(1, 2), expands=(2, 2), **changes)
        network = lively(BridgeNetwork(shape))
        networks[name] = {"kind": kind, "seed": seed, "network": dataclasses.asdict(shape), "teachers": teachers}
        files[f"{name}.safetensors"] = network.state_dict()

    for seed in range(1, seeds + 1):
        add(f"bridge-{seed}", "bridge", seed, [0, 1, 2], steps=3, features=16)
        for kind in ("distilled", "mse", "kl"):
            add(f"{kind}-{seed}", kind, seed, [0, 1, 2], steps=1, logits=kind == "kl")
        for half, teachers in (("a", [0, 1, 2]), ("b", [0, 3, 4])):
            add(f"pair-{seed}-{half}", "pair", seed, teachers, steps=1)
            add(f"bridge-pair-{seed}-{half}", "bridge_pair", seed, teachers, steps=3)
        for member in (2, 3):
            add(f"curve-{member}-{seed}", "curve", seed, [0, member - 1], steps=1)
        if spread:
            add(f"spread-{seed}", "spread", seed, [0, 1, 2, 3, 4], steps=1, outputs=1, features=16)
    answer = {"evaluations": 1, "temperature": 1.3}
    config = {
        "kind": "bridge",
        "name": "toy-bridge",
        "backbone": "bridge",
        "ensemble": ensemble.name,
        "source": {"file": SOURCE, "sha256": read_config(ensemble)["files"][SOURCE], "tap": "first"},
        "softening": TEMPERATURE,
        "networks": networks,
        "serve": {
            "bridge": {"networks": ["distilled-2"], "source_weight": 0.0, **answer},
            "bridges": {"networks": ["pair-1-a", "pair-1-b"], "source_weight": 1 / 6, **answer},
            "bridge_network": {"networks": ["curve-2-1", "curve-3-1"], "source_weight": -0.5, **answer},
        },
    }
    write_model(ensemble.parent / "toy-bridge", config, files)
    return ensemble.parent / "toy-bridge"


def make_students(ensemble, seeds=2):
    """The student folder beside an ensemble."""
    torch.manual_seed(2)
    config = {
        "kind": "student",
        "name": "toy-student",
        "backbone": "resnet",
        "network": dataclasses.asdict(SHAPE),
        "ensemble": ensemble.name,
        "labels": LABELS,
        "image": read_config(ensemble)["image"],
        "serve": "student-2.safetensors",
        "temperature": 1.2,
    }
    files = {f"student-{i + 1}.safetensors": lively(ResNet(SHAPE)).state_dict() for i in range(seeds)}
    write_model(ensemble.parent / "toy-student", config, files)
    return ensemble.parent / "toy-student"


def make_exits(ensemble, seeds=2):
    """The exits folder beside an ensemble: heads that see the mean of a stage, the second stage without one."""
    torch.manual_seed(3)
    leaving = {"thresholds": [0.3477, None], "confidence_temperatures": [1.0, 1.0]}
    leaving |= {"temperatures": [1.0, 1.1, 1.2], "shares": [0.5, 0.0, 0.5]}
    config = {
        "kind": "exits",
        "name": "toy-exits",
        "backbone": "exits",
        "ensemble": ensemble.name,
        "source": {"file": SOURCE, "sha256": read_config(ensemble)["files"][SOURCE]},
        "heads": {"grid": 1, "hidden": 4},
        "networks": {f"heads-{i + 1}": leaving for i in range(seeds)},
        "serve": "heads-2",
    }
    files = {f"heads-{i + 1}.safetensors": lively(ExitHeads(SHAPE, 1, 4)).state_dict() for i in range(seeds)}
    write_model(ensemble.parent / "toy-exits", config, files)
    return ensemble.parent / "toy-exits"
