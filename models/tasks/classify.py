"""/classify: source, bridge and ensemble rows over one pool of slots.

Admission runs the source on all new rows at once (tap and logits, shared by every method); a tick then
makes one network call for every row that has one to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.api import ClassifiedRow, ClassifyWork, DecisionName, ModelInfo, Runtime, StepStats
from models.registry import METHODS, resolve
from models.store import read_config
from models.tasks.classifier import Classifier, load_classifier, to_pixels
from models.tasks.contracts import Calibration, read_calibration
from models.tasks.device import pick_device
from models.tasks.methods import Floats, Method
from models.uncertainty.conformal import uniforms
from models.uncertainty.contract import decision_rule, set_rule


class ClassifyTask:
    """A classifier and its pool of `capacity` slots; see models.api.Task for the contract."""

    def __init__(
        self,
        info: ModelInfo,
        classifier: Classifier,
        calibration: Calibration,
        capacity: int,
        device: torch.device,
    ) -> None:
        self.info, self.calibration, self.capacity, self.device = info, calibration, capacity, device
        self.source = classifier.members[0]
        self.methods: dict[str, Method] = {name: resolve(METHODS, name)(classifier) for name in info.methods}
        height, width, channels = info.image
        example = torch.zeros(1, channels, height, width, device=self.device)
        tap, classes = self.source.tap(example), len(info.labels)
        self.pixels = torch.zeros(capacity, channels, height, width, device=self.device)
        self.taps = torch.zeros(capacity, *tap.shape[1:], device=self.device)
        self.logits = torch.zeros(capacity, len(classifier.members), classes, device=self.device)
        self.z = torch.zeros(capacity, classes, device=self.device)
        self.method = [""] * capacity
        self.alpha, self.draw = np.full(capacity, np.nan), np.zeros(capacity)
        self.done = np.zeros(capacity, np.int64)

    @torch.inference_mode()
    def admit(self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        """The source's forward on the new rows."""
        shape = self.info.image
        images = np.stack([np.frombuffer(work.images[i], np.uint8).reshape(shape) for i in indices])
        at = torch.as_tensor(slots, device=self.device)
        self.pixels[at] = to_pixels(images).to(self.device)
        self.taps[at] = self.source.tap(self.pixels[at])
        self.logits[at, 0] = self.source.fc(self.source.features(self.taps[at]))
        self.done[list(slots)] = 0
        self.alpha[list(slots)] = np.nan if work.alpha is None else work.alpha
        self.draw[list(slots)] = uniforms(work.images[i] for i in indices)
        for slot in slots:
            self.method[slot] = work.method
        return [self.methods[work.method].evaluations] * len(slots)

    @torch.inference_mode()
    def step(self, slots: Sequence[int]) -> StepStats:
        """One network call for every row; rows of one method share theirs."""
        for name, rows in self._by_method(slots).items():
            self.methods[name].step(self, rows, self.done[rows])
        self.done[list(slots)] += 1
        return StepStats(rows=len(slots))

    @torch.inference_mode()
    def collect(self, slots: Sequence[int]) -> Sequence[ClassifiedRow]:
        """Calibrated probabilities, uncertainty, decisions and the prediction sets asked for, of finished rows."""
        made: dict[int, ClassifiedRow] = {}
        for name, rows in self._by_method(slots).items():
            p, scores = self.methods[name].answer(self, rows)
            decisions, sets = self._promise(name, rows, p, scores)
            for i, slot in enumerate(rows.tolist()):
                uncertainty = {key: float(values[i]) for key, values in scores.items()}
                made[slot] = ClassifiedRow(tuple(p[i].tolist()), uncertainty, decisions[i], sets[i])
        return [made[slot] for slot in slots]

    def _promise(
        self, method: str, slots: NDArray[np.int64], p: Floats, scores: dict[str, Floats]
    ) -> tuple[Sequence[DecisionName | None], Sequence[tuple[int, ...] | None]]:
        """Decisions, and sets of the rows with an alpha; None for all of a model that was not calibrated."""
        nothing: list[None] = [None] * len(slots)
        contract = self.calibration.methods.get(method)
        if contract is None:
            return nothing, nothing
        sets: list[tuple[int, ...] | None] = [*nothing]
        asked = np.flatnonzero(~np.isnan(self.alpha[slots]))
        found = contract.sets(p[asked], self.alpha[slots[asked]], self.draw[slots[asked]])
        for i, members in zip(asked, found, strict=True):
            sets[i] = members
        return contract.decide(scores), sets

    def _by_method(self, slots: Sequence[int]) -> dict[str, NDArray[np.int64]]:
        names = dict.fromkeys(self.method[slot] for slot in slots)
        return {name: np.array([s for s in slots if self.method[s] == name]) for name in names}

    def receipt(self, work: ClassifyWork, rows: Sequence[ClassifiedRow]) -> dict[str, Any]:
        """What the answer cost, relative to `single`: MACs counted at load, time measured for the card."""
        receipt: dict[str, Any] = {"method": work.method, "cost_vs_single": self.info.methods[work.method]}
        if work.method in self.info.times:
            receipt["time_vs_single"] = self.info.times[work.method]
        return receipt


def load(folder: Path, slots: int, device: str, _: Runtime = Runtime()) -> ClassifyTask:
    """An ensemble folder, with the bridge beside it, as a Task with `slots` slots; always run eagerly."""
    classifier = load_classifier(folder)
    costs = classifier.costs()
    config, where = read_config(folder, "ensemble"), pick_device(device)
    calibration = read_calibration(folder, classifier)
    for network in [*classifier.members, *([classifier.bridge.network] if classifier.bridge else [])]:
        network.to(where)
    calls = {"single": 1, "ensemble": len(classifier.members)}
    if classifier.bridge is not None:
        calls["bridge"] = 1 + classifier.bridge.evaluations
    height, width, channels = config["image"]
    info = ModelInfo(
        name=config["name"],
        task="classify",
        labels=tuple(config["labels"]),
        image=(height, width, channels),
        weights=classifier.weights,
        description=config.get("description", ""),
        methods=costs,
        times=config.get("times", {}),
        calls=calls,
        decisions={name: decision_rule(c.thresholds) for name, c in calibration.methods.items()},
        sets={name: set_rule(c.conformal) for name, c in calibration.methods.items()},
        default_method="bridge" if classifier.bridge else "single",
    )
    return ClassifyTask(info, classifier, calibration, slots, where)
