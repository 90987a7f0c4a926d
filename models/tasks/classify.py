"""/classify: rows of every method over one pool of slots.

Admission runs the source on all new rows at once (tap and logits, shared by every method); a tick then
makes one network call for every row that has one to come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.api import ClassifiedRow, ClassifyWork, ModelInfo, Runtime, StepStats, UserError
from models.registry import METHODS, resolve
from models.store import read_config
from models.tasks.classifier import Classifier, load_classifier, to_pixels
from models.tasks.contracts import Calibration, read_calibration
from models.tasks.device import pick_device
from models.tasks.methods import Answer, Method, Slots
from models.uncertainty.cascade import Costs
from models.uncertainty.conformal import uniforms
from models.uncertainty.contract import decision_rule, set_rule
from models.uncertainty.router import Terms


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
        self.info, self.capacity, self.device = info, capacity, device
        self.source = classifier.members[0]
        self.methods: dict[str, Method] = {
            name: resolve(METHODS, name)(classifier, calibration) for name in info.methods
        }
        self.costs = running_costs(info.methods)
        height, width, channels = info.image
        example = torch.zeros(1, channels, height, width, device=self.device)
        tap, classes = self.source.tap(example), len(info.labels)
        self.pixels = torch.zeros(capacity, channels, height, width, device=self.device)
        self.taps = torch.zeros(capacity, *tap.shape[1:], device=self.device)
        self.logits = torch.zeros(capacity, len(classifier.members), classes, device=self.device)
        self.z = torch.zeros(capacity, classes, device=self.device)
        self.method, self.terms = [""] * capacity, [Terms()] * capacity
        self.alpha, self.draw = np.full(capacity, np.nan), np.zeros(capacity)
        self.done = np.zeros(capacity, np.int64)

    @torch.inference_mode()
    def admit(self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        """The source's forward on the new rows; UserError names max_cost or images when they cannot be served."""
        method = self.methods[work.method]
        terms, shape = method.terms(work.max_cost), self.info.image
        for i in indices:
            if len(work.images[i]) != math.prod(shape):
                raise UserError(f"image {i} has {len(work.images[i])} bytes, {self.info.name} takes {shape}", "images")
        images = np.stack([np.frombuffer(work.images[i], np.uint8).reshape(shape) for i in indices])
        at = torch.as_tensor(slots, device=self.device)
        self.pixels[at] = to_pixels(images).to(self.device)
        self.taps[at] = self.source.tap(self.pixels[at])
        self.logits[at, 0] = self.source.fc(self.source.features(self.taps[at]))
        self.done[list(slots)] = 0
        self.alpha[list(slots)] = np.nan if work.alpha is None else work.alpha
        self.draw[list(slots)] = uniforms(work.images[i] for i in indices)
        for slot in slots:
            self.method[slot], self.terms[slot] = work.method, terms
        return [method.evaluations] * len(slots)

    @torch.inference_mode()
    def step(self, slots: Sequence[int]) -> StepStats:
        """One network call for every row; rows of one method share theirs."""
        over: list[int] = []
        for name, rows in self._by_method(slots).items():
            over += self.methods[name].step(self, rows, self.done[rows]).tolist()
        self.done[list(slots)] += 1
        return StepStats(rows=len(slots), finished=frozenset(over))

    @torch.inference_mode()
    def collect(self, slots: Sequence[int]) -> Sequence[ClassifiedRow]:
        """Calibrated probabilities, uncertainty, decisions and the prediction sets asked for, of finished rows."""
        made: dict[int, ClassifiedRow] = {}
        for name, rows in self._by_method(slots).items():
            for part in self.methods[name].answer(self, rows):
                for i, slot in enumerate(part.slots.tolist()):
                    made[slot] = self._row(slot, part, i)
        return [made[slot] for slot in slots]

    def _row(self, slot: int, part: Answer, i: int) -> ClassifiedRow:
        """Row i of a part, with what its terms promise."""
        p, scores = part.p[i : i + 1], {key: values[i : i + 1] for key, values in part.scores.items()}
        contract, alpha = self.terms[slot].contract, self.alpha[slot : slot + 1]
        asked = contract is not None and not np.isnan(alpha[0])
        return ClassifiedRow(
            probabilities=tuple(p[0].tolist()),
            uncertainty={key: float(values[0]) for key, values in scores.items()},
            decision=contract.decide(scores)[0] if contract else None,
            prediction_set=contract.sets(p, alpha, self.draw[slot : slot + 1])[0] if contract and asked else None,
            escalated=part.escalated,
        )

    def _by_method(self, slots: Sequence[int]) -> dict[str, Slots]:
        names = dict.fromkeys(self.method[slot] for slot in slots)
        return {name: np.array([s for s in slots if self.method[s] == name]) for name in names}

    def receipt(self, work: ClassifyWork, rows: Sequence[ClassifiedRow]) -> dict[str, Any]:
        """What the answer cost, relative to `single`: MACs counted at load, time measured for the card."""
        receipt: dict[str, Any] = {"method": work.method, "cost_vs_single": self.info.methods[work.method]}
        if work.method in self.info.times:
            receipt["time_vs_single"] = self.info.times[work.method]
        if work.method == "cascade":
            costs = [self.costs.cheap + row.escalated * self.costs.extra for row in rows]
            receipt["cost_vs_single"] = float(np.mean(costs))
            receipt["expected_cost"] = self.methods["cascade"].terms(work.max_cost).cost
            receipt["escalated"] = [i for i, row in enumerate(rows) if row.escalated]
            receipt["image_costs"] = costs
        return receipt


def running_costs(costs: Mapping[str, float]) -> Costs:
    """What a cascade's image costs by the bridge, and on top when the other members run; nan without a bridge."""
    return Costs(costs.get("bridge", math.nan), costs["ensemble"] - 1.0)


def load(folder: Path, slots: int, device: str, _: Runtime = Runtime()) -> ClassifyTask:
    """An ensemble folder, with the bridge beside it, as a Task with `slots` slots; always run eagerly."""
    classifier = load_classifier(folder)
    costs = classifier.costs()
    config, where = read_config(folder, "ensemble"), pick_device(device)
    calibration = read_calibration(folder, classifier)
    for network in [*classifier.members, *([classifier.bridge.network] if classifier.bridge else [])]:
        network.to(where)
    calls = {"single": 1, "ensemble": len(classifier.members)}
    decisions = {name: decision_rule(c.thresholds) for name, c in calibration.methods.items()}
    sets = {name: set_rule(c.conformal) for name, c in calibration.methods.items()}
    if classifier.bridge is not None:
        calls["bridge"] = 1 + classifier.bridge.evaluations
    if (router := calibration.router) is not None:
        default = router.pick(None)
        costs["cascade"] = default.cost
        calls["cascade"] = math.ceil(calls["bridge"] + default.share * (len(classifier.members) - 1))
        decisions["cascade"] = router.catalogue()[router.default].decision
        sets["cascade"] = sets["bridge"]
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
        decisions=decisions,
        sets=sets,
        cascade=router.catalogue() if router else (),
        default_method="bridge" if classifier.bridge else "single",
    )
    return ClassifyTask(info, classifier, calibration, slots, where)
