"""An ensemble folder with all that stands beside it, loaded and checked together."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.backbones.bridge import BridgeNetwork
from models.backbones.macs import count_macs
from models.backbones.resnet import ResNet
from models.methods.interface import SOURCE, Plan, exit_name
from models.registry import BACKBONES, METHODS, resolve
from models.store import StoreError, read_config, weights_digest
from models.tasks.beside import check_source, filled, folder_beside, number
from models.tasks.distance import Distance, load_distance
from models.tasks.exits import EarlyExits, load_exits
from models.tasks.parts import parts
from models.uncertainty.cascade import Costs

BRIDGED = ("bridge", "bridges", "bridge_network")  # what a bridge folder may serve


@dataclass(frozen=True)
class BridgeModel:
    """A served entry of a bridge folder.

    Attributes:
        networks: by name; each carries the source's logits, softened by `softening`, in `evaluations` calls.
        source_weight: share of the source to take out of their mean probability.
        temperature: of the answer.
        digests: of the networks' files.
    """

    networks: dict[str, BridgeNetwork]
    evaluations: int
    source_weight: float
    softening: float
    temperature: float
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Student:
    """A network that was distilled from the ensemble, with its answer's temperature and its file's digest."""

    network: ResNet
    temperature: float
    sha256: str


@dataclass(frozen=True)
class Classifier:
    """Members (the first is the source), temperatures by method, and what stands beside the ensemble.

    `bridges` are served entries by method; `student`, `exits` and `distance` are None where there are none.
    """

    config: dict[str, Any]
    weights: str
    members: list[ResNet]
    temperatures: dict[str, float]
    bridges: dict[str, BridgeModel] = field(default_factory=dict)
    student: Student | None = None
    exits: EarlyExits | None = None
    distance: Distance | None = None

    @property
    def bridge(self) -> BridgeModel | None:
        """The entry of method `bridge`."""
        return self.bridges.get("bridge")

    @property
    def cheap(self) -> Literal["exits", "bridge"] | None:
        """The method that a cascade starts with; None where there is no cascade."""
        return "exits" if self.exits else "bridge" if self.bridge else None

    @property
    def softening(self) -> float:
        """Temperature of the source's logits where bridges start; 1 without any."""
        return next((bridge.softening for bridge in self.bridges.values()), 1.0)

    @property
    def networks_digest(self) -> str:
        """Digest of every file that is served, and of which stages of the source have an exit."""
        files = [self.config["files"][name] for name in self.config["members"]]
        files += [digest for bridge in self.bridges.values() for digest in bridge.digests]
        files += [beside.sha256 for beside in (self.student, self.exits, self.distance) if beside]
        return _digest([sorted({*files}), self.exits.stages if self.exits else []])

    @property
    def fingerprint(self) -> str:
        """Digest of all that its answers depend on: weights, preprocessing, temperatures, what is served, and
        what a cascade starts with where that is not the bridge."""
        bridges = {
            name: [b.digests, b.evaluations, b.source_weight, b.softening, b.temperature]
            for name, b in self.bridges.items()
        }
        student = self.student and [self.student.sha256, self.student.temperature]
        exits = [self.exits.facts(), self.cheap] if self.exits else []
        distance = [self.distance.sha256] if self.distance else []
        return _digest([self.weights, self.config["network"], self.temperatures, bridges, student, *exits, *distance])

    def plans(self) -> dict[str, Plan]:
        """What a row of each method runs, at most: every method whose networks are here."""
        found = {name: resolve(METHODS, name).plan(self) for name in METHODS}
        return {name: plan for name, plan in found.items() if plan is not None}

    def measured(self) -> frozenset[str]:
        """Methods whose answers know the feature distance: the source runs, or exits that see its tap."""
        by_exits = self.exits is not None and self.exits.measures
        starts = {name: plan.networks[0] for name, plan in self.plans().items()} if self.distance else {}
        first = {SOURCE, exit_name(1)} if by_exits else {SOURCE}
        return frozenset(name for name, network in starts.items() if network in first)

    def costs(self) -> dict[str, float]:
        """Conv + linear MACs of each method relative to `single`; of `cascade` and `exits` the most possible."""
        return {name: plan.cost(self.macs) for name, plan in self.plans().items()}

    def cascade_costs(self) -> Costs:
        """What an image costs by the method that a cascade starts with, and on top when the other members run.

        With exits the cheap cost is their mean over validation. Urgent images leave late, so that the mean cost that
        follows for a share of them is slightly too high. Only where there is a cascade.
        """
        costs = self.costs()
        cheap = self.exits.expected_cost if self.exits else costs["bridge"]
        return Costs(cheap, costs["cascade"] - cheap)

    @cached_property
    def macs(self) -> dict[str, int]:
        """Conv + linear MACs of every network on one image."""
        return {part.name: count_macs(part.network, partial(part.run, *part.example(1))) for part in parts(self)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def to_pixels(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1], where they are."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255.0


def load_members(folder: Path) -> list[ResNet]:
    """The members of an ensemble folder, eval mode, float32; the first is the source."""
    config = read_config(folder, "ensemble")
    members = []
    for name in config["members"]:
        member: ResNet = resolve(BACKBONES, config["backbone"]).from_config(config["network"])
        members.append(filled(member, folder, config, name))
    return members


def load_bridge_network(folder: Path, config: dict[str, Any], name: str) -> BridgeNetwork:
    """One network of a bridge folder, eval mode, float32."""
    network: BridgeNetwork = resolve(BACKBONES, config["backbone"]).from_config(config["networks"][name]["network"])
    return filled(network, folder, config, f"{name}.safetensors", f"networks.{name} of config.json")


def load_bridges(folder: Path, ensemble: dict[str, Any], source: ResNet) -> dict[str, BridgeModel]:
    """What a bridge folder serves, by method; each network is loaded once.

    Raises:
        StoreError: bridges of another source, preprocessing or tap; entries that cannot be served.
    """
    config = read_config(folder, "bridge")
    try:
        check_source(folder, config["source"], ensemble)
        names = dict.fromkeys(name for entry in config["serve"].values() for name in entry["networks"])
        networks = {name: load_bridge_network(folder, config, name) for name in names}
        for name, network in networks.items():
            check_shape(folder, name, network, source)
        return {name: served(folder, name, config, networks) for name in config["serve"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{folder}/config.json: missing or malformed: {error!r}; train the bridges again") from error


def check_shape(folder: Path, name: str, network: BridgeNetwork, source: ResNet) -> None:
    """Refuse a network that does not fit the source, or that predicts something else than logits."""
    c, width, classes = network.config, source.config.width, source.fc.out_features
    wanted = {
        "tap_channels": width if c.tap_channels else 0,
        "classes": classes,
        "features": source.fc.in_features if c.features else 0,
    }
    for key, value in wanted.items():
        if getattr(c, key) != value:
            raise StoreError(f"{folder}/config.json: {name} has {key} {getattr(c, key)}, the source needs {value}")
    if c.outputs not in (0, classes):
        raise StoreError(f"{folder}/config.json: {name} has {c.outputs} outputs, only {classes} logits can be served")


def served(folder: Path, method: str, config: dict[str, Any], networks: dict[str, BridgeNetwork]) -> BridgeModel:
    """Entry `method` of a bridge folder's `serve`."""
    entry, where = config["serve"][method], f"{folder}/config.json: serve.{method}"
    if method not in BRIDGED:
        raise StoreError(f"{where}: a bridge folder serves {', '.join(BRIDGED)}")
    own = {name: networks[name] for name in entry["networks"]}
    for name, network in own.items():
        if entry["evaluations"] not in (1, network.config.steps):
            raise StoreError(f"{where}: evaluations must be 1 or {network.config.steps}, what {name} was trained for")
    if not own or len(own) < len(entry["networks"]):
        raise StoreError(f"{where}: networks must be one or more, each once")
    return BridgeModel(
        networks=own,
        evaluations=entry["evaluations"],
        source_weight=number(f"{where}.", entry, "source_weight", -math.inf, 1.0),
        softening=number(f"{folder}/config.json: ", config, "softening"),
        temperature=number(f"{where}.", entry, "temperature"),
        digests=tuple(config["files"][f"{name}.safetensors"] for name in own),
    )


def load_student(folder: Path, ensemble: dict[str, Any]) -> Student:
    """A student folder; StoreError where its images or labels are not the ensemble's."""
    config = read_config(folder, "student")
    try:
        for key in ("labels", "image"):
            if config[key] != ensemble[key]:
                raise StoreError(f"{folder}/config.json: {key} is not that of {ensemble['name']}: distil it again")
        file, temperature = config["serve"], number(f"{folder}/config.json: ", config, "temperature")
        network: ResNet = resolve(BACKBONES, config["backbone"]).from_config(config["network"])
        sha256 = config["files"][file]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{folder}/config.json: missing or malformed: {error!r}; distil it again") from error
    return Student(filled(network, folder, config, file), temperature, sha256)


def load_classifier(folder: Path) -> Classifier:
    """An ensemble folder with what stands beside it."""
    config, members = read_config(folder, "ensemble"), load_members(folder)
    heat = config.get("temperatures", {"single": 1.0, "ensemble": 1.0})
    where = f"{folder}/config.json: temperatures."
    temperatures = {name: number(where, heat, name) for name in ("single", "ensemble")}
    bridges, student, exits = (folder_beside(folder, kind) for kind in ("bridge", "student", "exits"))
    beside = folder_beside(folder, "distance")
    distance = load_distance(beside, config, members[0]) if beside else None
    network = distance.network if distance else None
    return Classifier(
        config=config,
        weights=weights_digest(config["files"]),
        members=members,
        temperatures=temperatures,
        bridges=load_bridges(bridges, config, members[0]) if bridges else {},
        student=load_student(student, config) if student else None,
        exits=load_exits(exits, config, members[0], distance=network) if exits else None,
        distance=distance,
    )
