"""An ensemble folder and its bridge, loaded and checked together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbones.bridge import BridgeNetwork
from models.backbones.macs import count_macs
from models.backbones.resnet import ResNet
from models.registry import BACKBONES, resolve
from models.store import StoreError, model_folders, read_config, read_tensors, weights_digest


@dataclass(frozen=True)
class BridgeModel:
    """A served bridge. `evaluations` network calls, logits softened by `softening`, answers by `temperature`."""

    network: BridgeNetwork
    evaluations: int
    softening: float
    temperature: float
    sha256: str


@dataclass(frozen=True)
class Classifier:
    """Members (the first is the source), temperatures per method, and a bridge when there is one."""

    config: dict[str, Any]
    weights: str
    members: list[ResNet]
    temperatures: dict[str, float]
    bridge: BridgeModel | None

    @property
    def fingerprint(self) -> str:
        """Digest of all that its probabilities depend on: weights, temperatures and the served bridge."""
        b = self.bridge
        served = None if b is None else [b.sha256, b.evaluations, b.softening, b.temperature]
        return hashlib.sha256(json.dumps([self.weights, self.temperatures, served]).encode()).hexdigest()

    def costs(self) -> dict[str, float]:
        """Conv + linear MACs of each method relative to `single`."""
        height, width, channels = self.config["image"]
        x, source = torch.zeros(1, channels, height, width), self.members[0]
        member = count_macs(source, lambda: source(x))
        costs = {"single": 1.0, "ensemble": float(len(self.members))}
        if self.bridge is not None:
            tap, bridge = source.tap(x), self.bridge
            z, step = torch.zeros(1, bridge.network.config.classes), torch.ones(1, dtype=torch.int64)
            light = count_macs(bridge.network, lambda: bridge.network(tap, z, step))
            costs["bridge"] = 1.0 + bridge.evaluations * light / member
        return costs


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0


def finite(path: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file, refused when one holds NaN or infinity."""
    for name, values in tensors.items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise StoreError(f"{path}: {name} holds NaN or infinity; train or export the model again")
    return tensors


def load_members(folder: Path) -> list[ResNet]:
    """The members of an ensemble folder, eval mode, float32; the first is the source."""
    config = read_config(folder, "ensemble")
    members = []
    for name in config["members"]:
        member: ResNet = resolve(BACKBONES, config["backbone"]).from_config(config["network"])
        member.load_state_dict(finite(folder / name, read_tensors(folder, name, config["files"])))
        members.append(member.eval().requires_grad_(False))
    return members


def load_bridge_network(folder: Path, config: dict[str, Any], name: str) -> BridgeNetwork:
    """One network of a bridge folder, eval mode, float32. A regressor is a bridge with one step."""
    steps = config["network"]["steps"] if name.startswith("bridge") else 1
    network: BridgeNetwork = resolve(BACKBONES, config["backbone"]).from_config(config["network"] | {"steps": steps})
    network.load_state_dict(finite(folder / name, read_tensors(folder, name, config["files"])))
    return network.eval().requires_grad_(False)


def bridge_folder(ensemble: Path) -> Path | None:
    """The folder beside `ensemble` whose bridge was trained for it; None when there is none."""
    name = read_config(ensemble, "ensemble")["name"]
    for folder in model_folders(ensemble.parent):
        config = read_config(folder)
        if config.get("kind") == "bridge" and config.get("ensemble") == name:
            return folder
    return None


def load_bridge(folder: Path, ensemble: dict[str, Any]) -> BridgeModel:
    """A bridge folder, refused when it was trained on other source weights."""
    config = read_config(folder, "bridge")
    source = config["source"]
    if ensemble["files"].get(source["file"]) != source["sha256"] or ensemble["members"][0] != source["file"]:
        raise StoreError(
            f"{folder} was trained on another {source['file']} than {ensemble['name']} has: "
            "re-run `offramp train bridge`, or remove the bridge folder"
        )
    if isinstance(config["serve"], dict):
        from models.evaluation.ensembles import load_network

        entry = config["serve"]["bridge"]
        name = entry["networks"][0]
        return BridgeModel(
            network=load_network(folder, config, f"{name}.safetensors", config["networks"][name]["network"]),
            evaluations=entry["evaluations"],
            softening=config["softening"],
            temperature=entry["temperature"],
            sha256=config["files"][f"{name}.safetensors"],
        )
    return BridgeModel(
        network=load_bridge_network(folder, config, config["serve"]),
        evaluations=config["evaluations"],
        softening=config["softening"],
        temperature=config["temperature"],
        sha256=config["files"][config["serve"]],
    )


def load_classifier(folder: Path) -> Classifier:
    """An ensemble folder with the bridge beside it."""
    config = read_config(folder, "ensemble")
    beside = bridge_folder(folder)
    return Classifier(
        config=config,
        weights=weights_digest(config["files"]),
        members=load_members(folder),
        temperatures=config.get("temperatures", {"single": 1.0, "ensemble": 1.0}),
        bridge=load_bridge(beside, config) if beside else None,
    )
