"""What the served methods answer on a split, in one pass; and the calibration that is fitted from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.bridge.mixture import mixture
from models.bridge.sample import run_bridge
from models.tasks.classifier import Classifier
from models.tasks.contracts import Calibration
from models.training.data import Split
from models.training.members import pixels_of
from models.training.session import device_of
from models.uncertainty.cascade import combine
from models.uncertainty.conformal import uniforms
from models.uncertainty.contract import ABSTAIN_SHARE, TARGET, Answers, Contract, choose_foreign, choose_rule
from models.uncertainty.decision import Target, Thresholds
from models.uncertainty.router import Router, Terms
from models.uncertainty.router import fit as fit_router
from models.uncertainty.scores import (
    against_source,
    among_members,
    as_uncertainty,
    describe,
    energy,
    entropy,
    log_softmax,
    mean_log_probability,
    nll,
    soften,
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Outputs:
    """Of a split's rows: labels and draws (N,), logits of the members (N, M, K), calibrated probabilities by method.

    `left` (N,): no. of the exit at which method `exits` answered; empty without one. `cheap`: the method that a cascade
    starts with. `far` (N,): feature distances, known to the methods `measured`; empty without any.
    """

    labels: NDArray[np.int64]
    u: Floats
    logits: Floats
    p: dict[str, Floats]
    left: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    cheap: str = ""
    far: Floats = field(default_factory=lambda: np.empty(0))
    measured: frozenset[str] = frozenset()

    def answers(self, method: str, foreign: Thresholds | None = None) -> Answers:
        """One method's, with what fitting needs.

        Rows are familiar below the threshold of `foreign`: the row that is the threshold is no independent draw.
        """
        familiar = self.far < foreign.accept if foreign and method in self.measured else None
        return Answers(self.p[method], self.labels, self.u, familiar)

    def decided(self, method: str, contract: Contract) -> NDArray[np.str_]:
        """The decision (N,) on every row."""
        known = {"feature_distance": self.far} if method in self.measured else {}
        return np.array(contract.decide({"entropy": entropy(self.p[method]), **known}))

    def cascaded(self, router: Router, terms: Terms) -> tuple[Outputs, NDArray[np.bool_]]:
        """The same with `cascade` at one operating point, and the rows (N,) that it escalates."""
        escalated = router.urgency(self.p[self.cheap]) >= terms.least
        answer = combine(self.p[self.cheap], self.p["ensemble"], escalated)
        return replace(self, p={**self.p, "cascade": answer}), escalated

    def scores(self, method: str) -> dict[str, Floats]:
        """Every uncertainty that a method can give (N,), turned so that more is more uncertain.

        `energy` is that of the source's own logits, and stands with `single`.
        """
        p, source = self.p[method], self.p["single"]
        found = describe(p, 1.0)
        del found["temperature"]
        if method == "single":
            found["energy"] = energy(self.logits[:, 0])
        elif (self.cheap if method == "cascade" else method) not in ("distilled", "exits"):
            found |= against_source(p, source)
        if method == "ensemble":
            found |= among_members(log_softmax(self.logits))
        if method in self.measured:
            found["feature_distance"] = self.far
        return {name: as_uncertainty(name, values) for name, values in found.items()}


def numbers(values: Tensor) -> Floats:
    """In float64, off the device."""
    return values.double().cpu().numpy()


@torch.inference_mode()
def run(classifier: Classifier, split: Split, batch: int = 1000) -> Outputs:
    """Every method on every row, the source's tap shared as in service; where the networks lie."""
    source, student, exits = classifier.members[0], classifier.student, classifier.exits
    logits, estimates, distilled = [], {name: list[Floats]() for name in classifier.bridges}, []
    staged: list[list[Floats]] = []
    far: list[Floats] = []
    device = device_of(source)
    for i in range(0, len(split), batch):
        x = pixels_of(split.images[i : i + batch], device)
        tap = source.tap(x)
        features = source.features(tap)
        own = source.fc(features)
        everyone = torch.stack([own, *(member(x) for member in classifier.members[1:])], 1)
        logits.append(numbers(everyone))
        for name, bridge in classifier.bridges.items():
            carried = [
                run_bridge(network, tap, own, bridge.evaluations, bridge.softening, features)
                for network in bridge.networks.values()
            ]
            estimates[name].append(numbers(torch.stack(carried, 1)))
        if classifier.distance is not None:
            far.append(numbers(classifier.distance.network(tap)))
        if student is not None:
            distilled.append(numbers(student.network(x)))
        if exits is not None:
            staged.append([log_softmax(numbers(z)) for z in exits.every(x)])
    z = np.concatenate(logits)
    log_p = log_softmax(z)
    p = {
        "single": soften(log_p[:, 0], classifier.temperatures["single"]),
        "ensemble": soften(mean_log_probability(log_p), classifier.temperatures["ensemble"]),
    }
    for name, bridge in classifier.bridges.items():
        each = log_softmax(np.concatenate(estimates[name]))
        p[name] = soften(mixture(each, log_p[:, 0], bridge.source_weight), bridge.temperature)
    if student is not None:
        p["distilled"] = soften(log_softmax(np.concatenate(distilled)), student.temperature)
    left = np.empty(0, np.int64)
    if exits is not None:
        p["exits"], left = exits.leave([np.concatenate(answers) for answers in zip(*staged, strict=True)])
    draws = uniforms(image.tobytes() for image in split.images)
    distances = np.concatenate(far) if far else np.empty(0)
    return Outputs(split.labels, draws, z, p, left, classifier.cheap or "", distances, classifier.measured())


def likeliest(outputs: Outputs, costs: Mapping[str, float], most: float) -> str:
    """The method with the lowest NLL of those whose cost is at most `most`."""
    offered = [name for name in outputs.p if costs[name] <= most]
    return min(offered, key=lambda name: nll(outputs.p[name], outputs.labels))


def calibrate(
    classifier: Classifier,
    selection: Outputs,
    conformal: Outputs,
    target: Target = TARGET,
    abstain_share: float = ABSTAIN_SHARE,
) -> Calibration:
    """Decisions from the selection half of validation, sets from the conformal half; the rule of sets is one for all
    methods, chosen on the selection half with the best method at hand, and so is the rule on feature distance."""
    rule = choose_rule(selection.answers("ensemble"))
    foreign = choose_foreign(selection.far, selection.answers("single").errors) if len(selection.far) else None

    def fitted(name: str) -> Contract:
        halves = selection.answers(name, foreign), conformal.answers(name)
        return Contract.fit(*halves, rule, target, abstain_share, foreign)

    methods = {name: fitted(name) for name in selection.p}
    if (cheap := classifier.cheap) is None:
        return Calibration(methods, foreign=foreign)
    halves = [(half.answers(cheap, foreign), half.answers("ensemble")) for half in (selection, conformal)]
    costs = classifier.cascade_costs()
    router = fit_router(halves[0], halves[1], costs, rule, target, abstain_share, foreign=foreign)
    return Calibration(methods, router, foreign)
