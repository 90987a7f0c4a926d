"""Networks that answer for an ensemble: bridges and regressors on the source's tap, and students without it.

Rows follow Kim et al. (ICLR 2024): DBN x1, and x2 for pairs of bridges whose teachers share the source; regressors of
the same size, alone and in such pairs; bridge networks (Yun et al., ICML 2023); students.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backbones.bridge import BridgeNetwork
from models.backbones.resnet import ResNet
from models.bridge.mixture import mixture
from models.bridge.process import source as softened
from models.bridge.sample import run_bridge
from models.evaluation.ensembles import load_network
from models.evaluation.score import Floats
from models.store import StoreError, read_config
from models.tasks.beside import check_source, folder_beside
from models.tasks.classifier import load_bridge_network

ALONE = {"distilled": "DBN x1, distilled", "mse": "regressor, MSE", "kl": "regressor, KL"}
PAIRS = {"bridge_pair": "DBN x{}", "pair": "regressors x{}, KL"}
KINDS = ("bridge", *ALONE, *PAIRS, "curve")
Call = tuple[str, int]  # a network and how often it is evaluated; a student runs once


@dataclass(frozen=True)
class Way:
    """Networks that answer together: p = (mean_k p_k - w p_source) / (1 - w), w = `source_weight`."""

    networks: tuple[str, ...]
    evaluations: int = 1
    source_weight: float = 0.0

    @property
    def calls(self) -> list[Call]:
        """What must run."""
        return [(name, self.evaluations) for name in self.networks]

    def like(self, other: Way) -> bool:
        """Whether both answer alike, but for a source weight that was rounded."""
        return sorted(self.calls) == sorted(other.calls) and abs(self.source_weight - other.source_weight) < 1e-3

    def combine(self, outputs: dict[Call, Floats], source: Floats) -> Floats:
        """Log probabilities (N, K) from those of every call and of the source, (N, K) each."""
        return mixture(np.stack([outputs[call] for call in self.calls], 1), source, self.source_weight)


def ways(entries: dict[str, Any]) -> dict[str, list[Way]]:
    """Rows of the table, one way a seed, from the `networks` of a bridge folder.

    M networks of N teachers each, all with the source among them, count it M times: w = (M - 1) / (M N) takes that
    back. Bridge networks estimate midpoints between source and members, and are averaged with the source: w = -1 / M.
    """
    rows: dict[str, list[Way]] = {}

    def add(row: str, *way: Any) -> None:
        rows.setdefault(row, []).append(Way(*way))

    for kind, _, names in by_seed(entries):
        first, m = entries[names[0]], len(names)
        if kind in PAIRS:
            row = PAIRS[kind].format(m)
            add(row, names)
            add(f"{row}, corrected", names, 1, (m - 1) / (m * len(first["teachers"])))
        elif kind == "curve":
            add("bridge network", names, 1, -1.0 / m)
        else:
            for name in names:
                steps = entries[name]["network"]["steps"]
                if kind == "bridge" and steps > 1:
                    add(f"DBN x1, {steps} steps", (name,), steps)
                add(ALONE.get(kind, "DBN x1, 1 evaluation"), (name,))
    return rows


def by_seed(entries: dict[str, Any]) -> list[tuple[str, int, tuple[str, ...]]]:
    """Networks of one kind and seed, in the order of the table; a spread network answers nothing and is not there."""
    found: dict[tuple[int, int], list[str]] = {}
    for name in sorted(entries):
        if (kind := entries[name]["kind"]) in KINDS:
            found.setdefault((KINDS.index(kind), entries[name]["seed"]), []).append(name)
    return [(KINDS[kind], seed, tuple(names)) for (kind, seed), names in sorted(found.items())]


@dataclass(frozen=True, eq=False)
class Carried:
    """Bridge networks by name, their config entries and softening, and students by name; rows of the table, one way a
    seed, and by served method its row."""

    networks: dict[str, BridgeNetwork]
    entries: dict[str, Any]
    softening: float
    students: dict[str, ResNet]
    rows: dict[str, list[Way]]
    served: dict[str, str]

    @property
    def calls(self) -> list[Call]:
        """Every call that some row needs, once."""
        return list(dict.fromkeys(call for found in self.rows.values() for way in found for call in way.calls))

    @property
    def spreads(self) -> list[str]:
        """Networks that predict how the members spread."""
        return [name for name, entry in self.entries.items() if entry["kind"] == "spread"]

    def to(self, device: torch.device) -> None:
        """Move every network."""
        for network in (*self.networks.values(), *self.students.values()):
            network.to(device)

    def run(self, name: str, evaluations: int, x: Tensor, tap: Tensor, late: Tensor, logits: Tensor) -> Tensor:
        """One call on pixels, tap, pooled features and logits of the source: logits (N, K), or (N, 1) of a spread."""
        if name in self.students:
            return self.students[name](x)
        network = self.networks[name]
        if name in self.spreads:
            last = torch.full((len(x),), network.config.steps, device=x.device)
            return network(tap, softened(logits, self.softening), last, late)
        return run_bridge(network, tap, logits, evaluations, self.softening, late)


def served_rows(served: dict[str, Way], rows: dict[str, list[Way]]) -> dict[str, str]:
    """By served method the row that answers as it does; rows are added for methods that have none."""
    found = {}
    for method, way in served.items():
        same = (name for name, ways in rows.items() if any(way.like(other) for other in ways))
        found[method] = next(same, f"{method} as served")
        rows.setdefault(found[method], [way])
    return found


def load_carried(ensemble: Path) -> Carried:
    """All that was trained on an ensemble, from the folders beside it.

    Raises:
        StoreError: a bridge folder of another source, or without its `networks`.
    """
    beside, taught = folder_beside(ensemble, "bridge"), folder_beside(ensemble, "student")
    bridge: dict[str, Any] = {"networks": {}, "softening": 1.0, "serve": {}}
    if beside:
        bridge = read_config(beside, "bridge")
        if "networks" not in bridge:
            raise StoreError(f"{beside}/config.json has no `networks` table: re-run `offramp train bridge`")
        check_source(beside, bridge["source"], read_config(ensemble, "ensemble"))
    entries = bridge["networks"]
    networks = {name: load_bridge_network(beside, bridge, name) for name in entries if beside}
    served = {
        method: Way(tuple(e["networks"]), e["evaluations"], e["source_weight"]) for method, e in bridge["serve"].items()
    }
    rows, students = ways(entries), {}
    if taught:
        student = read_config(taught, "student")
        names = [name.removesuffix(".safetensors") for name in sorted(student["files"])]
        students = {n: load_network(taught, student, f"{n}.safetensors") for n in names}
        rows["student"] = [Way((name,)) for name in names]
        served["distilled"] = Way((student["serve"].removesuffix(".safetensors"),))
    return Carried(networks, entries, bridge["softening"], students, rows, served_rows(served, rows))
