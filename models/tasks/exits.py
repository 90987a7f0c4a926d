"""A folder of exit heads beside an ensemble: which stages of the source may answer, and when they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.backbones.distance import FeatureDistance
from models.backbones.early_exits import STAGES, ExitHeads, ExitStage, count
from models.backbones.resnet import ResNet
from models.store import StoreError, read_config
from models.tasks.beside import check_source, filled
from models.uncertainty.early_exit import Floats, Ints, confidences, mixture, route


@dataclass(frozen=True, eq=False)
class EarlyExits:
    """What an exits folder serves. One entry an exit, in order; a stage whose threshold is infinite has none.

    Attributes:
        stages: number of the source's stage that each exit follows, counted from 1; the last is the third.
        networks: pixels, or what the exit before left -> stage output, logits (N, K), and of the first one the
            distance (N,) where `measures`.
        thresholds: largest probability at `confidence_temperatures` that suffices to leave, at every exit but the last.
        confidence_temperatures: of every exit but the last.
        temperatures: of the answers given at each exit.
        shares: of the validation images, that left at each exit.
        costs: conv + linear MACs of an image that leaves at each exit, relative to the source (with the distance,
            where there is one), whose own last layer runs after the last stage.
        sha256: digest of the heads' file.
    """

    stages: tuple[int, ...]
    networks: tuple[ExitStage, ...]
    thresholds: tuple[float, ...]
    confidence_temperatures: tuple[float, ...]
    temperatures: tuple[float, ...]
    shares: tuple[float, ...]
    costs: tuple[float, ...]
    sha256: str

    @property
    def measures(self) -> bool:
        """Whether its answers know the distance."""
        return self.networks[0].distance is not None

    @property
    def expected_cost(self) -> float:
        """Of an image like the validation images."""
        return float(np.dot(self.shares, self.costs))

    @property
    def expected_calls(self) -> float:
        """Network calls of such an image."""
        return float(np.dot(self.shares, range(1, len(self.shares) + 1)))

    def sure(self, log_p: Floats, exit: int) -> Ints:
        """Indices of rows, log probabilities (N, K) at exit no. `exit`, that leave there."""
        temperature, threshold = self.confidence_temperatures[exit], self.thresholds[exit]
        return np.flatnonzero(confidences([log_p], [temperature])[:, 0] >= threshold)

    def leave(self, answers: Sequence[Floats]) -> tuple[Floats, Ints]:
        """Probabilities (N, K) and exits (N,), from log probabilities (N, K) of every exit."""
        left = route(confidences(answers[:-1], self.confidence_temperatures), self.thresholds)
        return mixture(answers, left, self.temperatures), left

    def every(self, x: Tensor) -> list[Tensor]:
        """Logits (N, K) of every exit on pixels (N, C, H, W), as if no row left."""
        found = []
        for network in self.networks:
            x, logits, *_ = network(x)
            found.append(logits)
        return found

    def facts(self) -> list[Any]:
        """All that its probabilities depend on, plain."""
        return [self.sha256, self.stages, self.thresholds, self.confidence_temperatures, self.temperatures]


def load_exits(
    folder: Path,
    ensemble: dict[str, Any],
    source: ResNet,
    name: str | None = None,
    distance: FeatureDistance | None = None,
) -> EarlyExits:
    """What an exits folder serves, or its heads `name`. `distance` is measured where the first exit sees the tap.

    Raises:
        StoreError: heads of another source; an entry that is malformed, not a number or out of range.
    """
    config = read_config(folder, "exits")
    try:
        check_source(folder, config["source"], ensemble, "heads")
        name = config["serve"] if name is None else name
        heads = load_heads(folder, config, name, source)
        return entry_of(folder, config, name, heads, source, ensemble["image"], distance)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder}/config.json: missing or malformed: {error!r}; train the heads again") from error


def load_heads(folder: Path, config: dict[str, Any], name: str, source: ResNet) -> ExitHeads:
    """The heads `name` of a folder, eval mode, float32; StoreError where they do not fit."""
    heads, file = ExitHeads(source.config, **config["heads"]), f"{name}.safetensors"
    return filled(heads, folder, config, file, "the source, or `heads` of config.json")


def entry_of(
    folder: Path,
    config: dict[str, Any],
    name: str,
    heads: ExitHeads,
    source: ResNet,
    image: Sequence[int],
    distance: FeatureDistance | None = None,
) -> EarlyExits:
    """Entry `name` of a folder's `networks`, without the exits that it does not use."""
    entry, where = config["networks"][name], f"{folder}/config.json: networks.{name}"
    limits = [math.inf if value is None else float(value) for value in entry["thresholds"]]
    heat = [float(value) for value in entry["confidence_temperatures"]]
    temperatures, shares = ([float(value) for value in entry[key]] for key in ("temperatures", "shares"))
    if not len(limits) == len(heat) == STAGES - 1 or not len(temperatures) == len(shares) == STAGES:
        raise StoreError(f"{where}: {STAGES} stages need {STAGES - 1} thresholds, {STAGES} temperatures and shares")
    if not all(limit >= 0.0 for limit in limits) or min(limits) == math.inf:
        raise StoreError(f"{where}: thresholds must be probabilities, one of them may be null, got {limits}")
    if not all(0.0 < value < math.inf for value in heat + temperatures):
        raise StoreError(f"{where}: temperatures must be above 0 and finite")
    if not all(share >= 0.0 for share in shares) or abs(sum(shares) - 1.0) > 1e-6:
        raise StoreError(f"{where}: shares must be 0 or more and sum to 1, got {shares}")
    used = [k for k, limit in enumerate(limits) if limit < math.inf] + [STAGES - 1]
    height, width, channels = image
    macs = count(source, heads, torch.zeros(1, channels, height, width), distance)
    seen = distance if used[0] == 0 and source.config.blocks == 1 else None  # that stage's output is the tap
    start = macs.distance / macs.single if seen else 0.0
    costs = macs.costs([k in used for k in range(STAGES)], macs.last / macs.single, start)
    starts = [0, *(k + 1 for k in used)]
    spans = zip(starts, used, strict=False)
    return EarlyExits(
        stages=tuple(k + 1 for k in used),
        networks=tuple(ExitStage(source, heads, a, b, None if a else seen) for a, b in spans),
        thresholds=tuple(limits[k] for k in used[:-1]),
        confidence_temperatures=tuple(heat[k] for k in used[:-1]),
        temperatures=tuple(temperatures[k] for k in used),
        shares=tuple(shares[k] for k in used),
        costs=tuple(costs[used].tolist()),
        sha256=config["files"][f"{name}.safetensors"],
    )
