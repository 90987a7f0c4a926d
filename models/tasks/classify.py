"""/classify: rows of every method over one pool of slots.

A tick runs one network on all rows whose turn it is, whatever their methods: the one that most of them wait for, and
before it the source (tap, features and logits, shared by every method) on those of them that are new. So rows gather
instead of going through the networks few at a time; none waits for company longer than `PATIENCE` ticks. Purified rows
(`PurifyStage`) make their denoiser's calls first; then, in one tick, their method runs on all draws of an image, in
cells of the pool beyond its slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.api import MAX_DRAWS, ClassifiedRow, ClassifyWork, ModelInfo, Runtime, StepStats, UserError
from models.backends.independent import Programs
from models.bridge.process import source
from models.methods.exits import room
from models.methods.interface import SOURCE, Answer, Call, Method, Slots
from models.purification.purify import Purifier
from models.registry import METHODS, resolve
from models.tasks.classifier import BRIDGED, Classifier, load_classifier, to_pixels
from models.tasks.contracts import Calibration, read_calibration
from models.tasks.device import Uplink, pick_device
from models.tasks.parts import run_by
from models.tasks.purifying import PurifyStage, check_purify, load_purifier, mean_of, purified_receipt, purifier_info
from models.uncertainty.conformal import uniforms
from models.uncertainty.contract import decision_rule, set_rule
from models.uncertainty.router import Terms

PATIENCE = 8


class ClassifyTask:
    """A classifier and its pool of `capacity` slots; see models.api.Task for the contract, Rows for the pool."""

    def __init__(
        self,
        info: ModelInfo,
        classifier: Classifier,
        methods: Mapping[str, Method],
        networks: Programs,
        capacity: int,
        device: torch.device,
        purifier: Purifier | None = None,
    ) -> None:
        self.info, self.capacity, self.device, self.networks = info, capacity, device, networks
        self.methods = methods
        self.plans = {name: plan for name, plan in classifier.plans().items() if name in methods}
        self.softening = classifier.softening
        self.stage = PurifyStage(purifier, MAX_DRAWS if device.type == "cpu" else 16 * MAX_DRAWS)
        self.uplink = Uplink(device)
        cells = capacity + (MAX_DRAWS if purifier else 0)
        height, width, channels = info.image
        self.pixels = torch.zeros(cells, channels, height, width, device=device)
        with torch.inference_mode():
            tap, features, logits, *_ = networks[SOURCE](self.pixels[:1])
        columns = max((len(bridge.networks) for bridge in classifier.bridges.values()), default=0)
        self.taps = torch.zeros(cells, *tap.shape[1:], device=device)
        self.features = torch.zeros(cells, *features.shape[1:], device=device)
        self.logits = torch.zeros(cells, len(classifier.members), *logits.shape[1:], device=device)
        self.z = torch.zeros(cells, columns, *logits.shape[1:], device=device)
        self.stages = room(networks, self.plans.get("exits"), self.pixels)
        self.heads = torch.zeros(cells, *logits.shape[1:], device=device)
        self.far = torch.full((cells,), math.nan, device=device)
        self.method, self.terms = [""] * cells, [Terms()] * cells
        self.alpha, self.draw = np.full(capacity, np.nan), np.zeros(capacity)
        self.done, self.urgent = np.zeros(cells, np.int64), np.zeros(cells, bool)
        self.fresh, self.waited = np.zeros(cells, bool), np.zeros(cells, np.int64)

    @torch.inference_mode()
    def admit(self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int]) -> Sequence[int]:
        """Images into slots, for the source's forward in the next step; noise on rows to be purified.

        Raises:
            UserError: names max_cost, purify or images where they cannot be served.
        """
        plan, terms, shape = self.plans[work.method], self.methods[work.method].terms(work.max_cost), self.info.image
        if work.purify is not None:
            check_purify(work, self.info)
            terms = Terms()  # contracts were fitted on images as they are
        for i in indices:
            if len(work.images[i]) != math.prod(shape):
                raise UserError(f"image {i} has {len(work.images[i])} bytes, {self.info.name} takes {shape}", "images")
        images = np.stack([np.frombuffer(work.images[i], np.uint8).reshape(shape) for i in indices])
        rows, sent = self.uplink.send(np.asarray(slots, np.int64), images)
        self.pixels[rows] = to_pixels(sent)
        self.far[list(slots)] = math.nan
        self.done[list(slots)], self.urgent[list(slots)] = 0, False
        self.alpha[list(slots)] = np.nan if work.alpha is None else work.alpha
        self.draw[list(slots)] = uniforms(work.images[i] for i in indices)
        for slot in slots:
            self.method[slot], self.terms[slot] = work.method, terms
        self.fresh[list(slots)], self.waited[list(slots)] = plan.source and work.purify is None, 0
        self.stage.forget(slots)
        if work.purify is not None:
            pixels = self.pixels[rows]
            return [self.stage.enter(slots, pixels, (work.images[i] for i in indices), work.purify)] * len(slots)
        return [max(1, len(plan.calls))] * len(slots)

    def _on_device(self, slots: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return self.uplink.send(np.asarray(slots, np.int64))[0]

    def _source(self, slots: Sequence[int]) -> None:
        """The source's forward: tap, features, logits, distance, and where bridges start."""
        rows = self._on_device(slots)
        self.taps[rows], self.features[rows], logits, *far = self.networks[SOURCE](self.pixels[rows])
        if far:
            self.far[rows] = far[0]
        self.logits[rows, 0] = logits
        self.z[rows] = source(logits, self.softening)[:, None]

    @torch.inference_mode()
    def step(self, slots: Sequence[int]) -> StepStats:
        """One network call for the rows that share it; others wait, and so do purified rows at times."""
        purified = [slot for slot in slots if slot in self.stage.images]
        moved, due = self.stage.choose(purified), self._due([slot for slot in slots if slot not in self.stage.images])
        states, clean = self.stage.denoise(moved), self.stage.finish(moved)
        answers = {slot: self._classify_draws(self.method[slot], pixels) for slot, pixels in clean.items()}
        with self._unmoved(due):
            over = self._step(due)
        self.stage.keep(states, answers)
        waiting = frozenset(slots) - frozenset(moved) - frozenset(due)
        self.waited[list(waiting)] += 1
        return StepStats(rows=len(slots) - len(waiting), waiting=waiting, finished=frozenset(over))

    def _next(self, slot: int) -> Call | None:
        """A row's next call; None for the source alone."""
        calls = self.plans[self.method[slot]].calls
        return calls[self.done[slot]] if calls else None

    def _due(self, slots: Sequence[int]) -> list[int]:
        """Rows of the network that most of them wait for, or of one that a row has waited for too long."""
        groups: dict[str, list[int]] = {}
        for slot in slots:
            call = self._next(slot)
            groups.setdefault(call.network if call else SOURCE, []).append(slot)
        late = [own for own in groups.values() if self.waited[own].max() >= PATIENCE]
        return max(late or groups.values(), key=len, default=[])

    @contextmanager
    def _unmoved(self, slots: Sequence[int]) -> Iterator[None]:
        """Put rows back where they were when their step fails: all that a call both reads and writes."""
        rows, at = self._on_device(slots), list(slots)
        before = self.z[rows], self.done[at], self.urgent[at], self.fresh[at]
        try:
            yield
        except BaseException:
            self.z[rows], self.done[at], self.urgent[at], self.fresh[at] = before
            raise

    def _step(self, slots: list[int]) -> list[int]:
        """The next call, of one network, of rows that are not purified; those that need no more are returned."""
        self.waited[slots] = 0
        if fresh := [slot for slot in slots if self.fresh[slot]]:
            self._source(fresh)
            self.fresh[fresh] = False
        if calls := [call for slot in slots if (call := self._next(slot))]:
            calls[0].run(self, self._on_device(slots), calls)
        self.done[slots] += 1
        over: list[int] = []
        for name, own in self._by_method(slots).items():
            over += self.methods[name].finished(self, own).tolist()
        return over

    def _classify_draws(self, method: str, pixels: Tensor) -> ClassifiedRow:
        """A method's whole plan on the draws (D, C, H, W) of one image: the mean of their probabilities."""
        cells = list(range(self.capacity, self.capacity + len(pixels)))
        rows, plan = self._on_device(cells), self.plans[method]
        self.pixels[rows], self.done[cells] = pixels, 0
        if plan.source:
            self._source(cells)
        for call in plan.calls:
            call.run(self, rows, [call] * len(cells))
        [draws] = self.methods[method].answer(self, np.array(cells))
        return mean_of(draws)

    def save(self, slots: Sequence[int]) -> Sequence[bytes]:
        """Nothing: a few network calls are as cheap to begin again."""
        return [b""] * len(slots)

    def restore(
        self, work: ClassifyWork, indices: Sequence[int], slots: Sequence[int], states: Sequence[bytes]
    ) -> Sequence[int]:
        """Nothing was saved: ValueError."""
        raise ValueError(f"{self.info.name} saves no rows: admit them again")

    def shift(self, work: ClassifyWork, slots: Sequence[int]) -> None:
        """Rows go on as they began."""

    def preview(self, slots: Sequence[int]) -> Sequence[None]:
        """Nothing to see."""
        return [None] * len(slots)

    @torch.inference_mode()
    def collect(self, slots: Sequence[int]) -> Sequence[ClassifiedRow]:
        """Calibrated probabilities, uncertainty, decisions and the prediction sets asked for, of finished rows."""
        held = {slot: self.stage.images[slot].row for slot in slots if slot in self.stage.images}
        made: dict[int, ClassifiedRow] = {slot: row for slot, row in held.items() if row is not None}
        for name, rows in self._by_method([slot for slot in slots if slot not in held]).items():
            for part in map(self._with_distance, self.methods[name].answer(self, rows)):
                for i, slot in enumerate(part.slots.tolist()):
                    made[slot] = self._row(slot, part, i)
        return [made[slot] for slot in slots]

    def _with_distance(self, part: Answer) -> Answer:
        """The same, with the feature distance where it was measured."""
        far = self.far[self._on_device(part.slots)].double().cpu().numpy()
        return part if np.isnan(far).any() else replace(part, scores=part.scores | {"feature_distance": far})

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
            exit=part.exit,
        )

    def _by_method(self, slots: Sequence[int]) -> dict[str, Slots]:
        names = dict.fromkeys(self.method[slot] for slot in slots)
        return {name: np.array([s for s in slots if self.method[s] == name]) for name in names}

    def receipt(self, work: ClassifyWork, rows: Sequence[ClassifiedRow]) -> dict[str, Any]:
        """What the answer cost, relative to `single`: MACs counted at load, time measured for the card."""
        if work.purify is not None:
            return purified_receipt(work, self.info)
        receipt: dict[str, Any] = {"method": work.method, **self.methods[work.method].paid(rows, work.max_cost)}
        if work.method in self.info.times and "image_costs" not in receipt:  # images that leave early have no one time
            receipt["time_vs_single"] = self.info.times[work.method]
        return receipt


def default_method(config: Mapping[str, Any], offered: Mapping[str, float]) -> str:
    """What the folder's evaluation chose, else the first bridge that is offered, else `single`."""
    chosen = [str(config.get("default_method")), *BRIDGED]
    return next((name for name in chosen if name in offered), "single")


def load(
    folder: Path, slots: int, device: str, runtime: Runtime = Runtime(), calibration: Calibration | None = None
) -> ClassifyTask:
    """An ensemble folder, with what stands beside it, as a Task with `slots` slots; its own calibration if None."""
    classifier, where = load_classifier(folder), pick_device(device)
    calibration, config = calibration or read_calibration(folder, classifier), classifier.config
    plans, router = classifier.plans(), calibration.router
    if router is None:
        plans.pop("cascade", None)
    methods: dict[str, Method] = {name: resolve(METHODS, name)(classifier, calibration) for name in plans}
    costs = {name: method.expected.cost for name, method in methods.items()}
    contracts = {name: contract for name, m in methods.items() if (contract := m.terms(None).contract) is not None}
    purifying = None
    if (purifier := load_purifier(folder, config)) is not None:
        purifying = purifier_info(purifier, config["purifier"], plans, classifier.macs[SOURCE])
        purifier.model.to(where)
    networks, backend = run_by(classifier, slots, where, runtime)
    height, width, channels = config["image"]
    info = ModelInfo(
        name=config["name"],
        task="classify",
        labels=tuple(config["labels"]),
        image=(height, width, channels),
        weights=classifier.weights,
        description=config.get("description", ""),
        backend=backend,
        methods=costs,
        times=config.get("times", {}),
        calls={name: method.expected.calls for name, method in methods.items()},
        decisions={name: decision_rule(contract.thresholds) for name, contract in contracts.items()},
        sets={name: set_rule(contract.conformal) for name, contract in contracts.items()},
        foreign=decision_rule(calibration.foreign) if calibration.foreign else None,
        cascade=router.catalogue() if router else (),
        purifier=purifying,
        default_method=default_method(config, costs),
    )
    return ClassifyTask(info, classifier, methods, networks, slots, where, purifier)
