"""What the served answers are worth on test, foreign and corrupted images: numbers for the card, none of them a choice.

Every method is calibrated as it is served; thresholds and sets come from validation alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from models.bridge.sample import run_bridge
from models.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from models.evaluation.metrics import auroc, brier
from models.evaluation.served import Outputs, calibrate, run
from models.evaluation.turns import measure_times
from models.registry import METHODS
from models.tasks.classifier import Classifier
from models.tasks.contracts import Calibration
from models.training.data import Split, Splits
from models.training.session import device_of
from models.uncertainty.calibration import Estimate, bootstrap, reliability
from models.uncertainty.cascade import Bools, Point, compare
from models.uncertainty.conformal import Coverage, measure, repeated_splits
from models.uncertainty.contract import ALPHAS, TARGET, Contract
from models.uncertainty.router import SHARES, Terms
from models.uncertainty.scores import entropy, nll
from models.uncertainty.selective import aurc, average_precision, excess_aurc, risk_at_coverage

Floats = NDArray[np.float64]
ESCALATED = 0.05  # share of images like the training images that a score's threshold may flag
COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
CORRUPTED = 1000  # test images a corruption is shown on


@dataclass(frozen=True, eq=False)
class Study:
    """Outputs of every split, `cascade` at its default point among the methods, and the calibration of validation."""

    calibration: Calibration
    selection: Outputs
    conformal: Outputs
    test: Outputs
    foreign: Outputs | None
    corrupted: dict[tuple[str, int], Outputs]

    @property
    def methods(self) -> list[str]:
        """In the order of the tables."""
        return [name for name in METHODS if name in self.test.p]

    def contract(self, method: str) -> Contract:
        """As served without options."""
        router = self.calibration.router
        found = router.pick(None).contract if method == "cascade" and router else self.calibration.methods[method]
        assert found is not None
        return found


def study(classifier: Classifier, splits: Splits, foreign: Split | None, risk: float = TARGET.value) -> Study:
    """Run every split once, and calibrate: `accept` shall err at most `risk` of the time. Corruptions are those of the
    first `CORRUPTED` test images."""
    selection, conformal, test = (run(classifier, s) for s in (splits.selection, splits.conformal, splits.test))
    calibration = calibrate(classifier, selection, conformal, replace(TARGET, value=risk))
    some = splits.test[slice(0, CORRUPTED)]
    corrupted = {
        (kind, severity): run(classifier, replace(some, images=corrupt(some.images, kind, severity)))
        for kind in CORRUPTIONS
        for severity in SEVERITIES
    }
    outside = run(classifier, foreign) if foreign is not None else None
    if (router := calibration.router) is None:
        return Study(calibration, selection, conformal, test, outside, corrupted)
    point = router.pick(None)

    def at_default(outputs: Outputs) -> Outputs:
        return outputs.cascaded(router, point)[0]

    return Study(
        calibration,
        at_default(selection),
        at_default(conformal),
        at_default(test),
        at_default(outside) if outside else None,
        {key: at_default(outputs) for key, outputs in corrupted.items()},
    )


@dataclass(frozen=True)
class Quality:
    """A method on test: likelihood, calibration, ranking of errors by entropy, and what its decision does."""

    accuracy: float
    nll: Estimate
    brier: Estimate
    ece: float
    ece_mass: float
    aurc: Estimate
    excess_aurc: float
    accepted: float
    risk: Estimate
    abstained: float
    risks: dict[float, float]


def quality(found: Study, method: str) -> Quality:
    """Of a served method; errors by bootstrap over test images."""
    p, labels = found.test.p[method], found.test.labels
    wrong, scores = p.argmax(-1) != labels, entropy(p)
    codes = found.test.decided(method, found.contract(method))
    taken = codes == "accept"
    return Quality(
        accuracy=float(1.0 - wrong.mean()),
        nll=bootstrap(nll, p, labels),
        brier=bootstrap(brier, p, labels),
        ece=reliability(p, labels).ece,
        ece_mass=reliability(p, labels, by="mass").ece,
        aurc=bootstrap(aurc, scores, wrong),
        excess_aurc=excess_aurc(scores, wrong),
        accepted=float(taken.mean()),
        risk=bootstrap(lambda w: float(w.mean()), wrong[taken]) if taken.any() else Estimate(*[float("nan")] * 4),
        abstained=float((codes == "abstain").mean()),
        risks={coverage: risk_at_coverage(scores, wrong, coverage) for coverage in COVERAGES},
    )


@dataclass(frozen=True)
class Ranking:
    """One score of a method: how it ranks errors on test, and foreign and corrupted above test images.

    `flagged` and `flagged_foreign` are shares above the threshold that flags `ESCALATED` of the selection rows;
    `corrupted` is AUROC by severity, mean over kinds. NaN without foreign images.
    """

    errors: float
    errors_precision: float
    aurc: float
    foreign: float
    foreign_precision: float
    flagged: float
    flagged_foreign: float
    corrupted: tuple[float, ...]


def rankings(found: Study, method: str) -> dict[str, Ranking]:
    """Every score that the method can give."""
    chosen, test = found.selection.scores(method), found.test.scores(method)
    outside = found.foreign.scores(method) if found.foreign else None
    corrupted = {key: outputs.scores(method) for key, outputs in found.corrupted.items()}
    wrong = found.test.p[method].argmax(-1) != found.test.labels
    ranked = {}
    for name, scores in test.items():
        threshold = float(np.quantile(chosen[name], 1.0 - ESCALATED))
        away = outside[name] if outside else np.empty(0)
        nothing, both = not len(away), np.concatenate([away, scores])
        by_severity = [
            np.mean([auroc(corrupted[kind, severity][name], scores) for kind in CORRUPTIONS]) for severity in SEVERITIES
        ]
        ranked[name] = Ranking(
            errors=auroc(scores[wrong], scores[~wrong]),
            errors_precision=average_precision(scores, wrong),
            aurc=aurc(scores, wrong),
            foreign=float("nan") if nothing else auroc(away, scores),
            foreign_precision=average_precision(both, np.arange(len(both)) < len(away)),
            flagged=float((scores > threshold).mean()),
            flagged_foreign=float("nan") if nothing else float((away > threshold).mean()),
            corrupted=tuple(float(value) for value in by_severity),
        )
    return ranked


@dataclass(frozen=True)
class Shift:
    """A method on images unlike the training images: accuracy, shares accepted and abstained from, error rate of what
    was accepted."""

    accuracy: float
    accepted: float
    abstained: float
    risk: float


def shift(found: Study, method: str, outputs: Outputs) -> Shift:
    """On corrupted images, whose labels hold; of foreign ones only the decisions mean something."""
    wrong = outputs.p[method].argmax(-1) != outputs.labels
    codes = outputs.decided(method, found.contract(method))
    taken = codes == "accept"
    risk = float(wrong[taken].mean()) if taken.any() else float("nan")
    return Shift(float(1.0 - wrong.mean()), float(taken.mean()), float((codes == "abstain").mean()), risk)


def coverages(found: Study, method: str) -> dict[float, tuple[Coverage, Coverage]]:
    """By alpha: the shipped calibration on test, and the mean of 20 random splits of conformal and test rows."""
    contract, rows = found.contract(method), {}
    p, labels = (
        np.concatenate([found.conformal.p[method], found.test.p[method]]),
        np.concatenate([found.conformal.labels, found.test.labels]),
    )
    for alpha in ALPHAS:
        shipped = contract.conformal.sets(found.test.p[method], alpha, found.test.u)
        split = repeated_splits(p, labels, contract.conformal.rule, alpha, len(found.conformal.labels))
        rows[alpha] = measure(shipped, found.test.labels), split
    return rows


def cascades(found: Study, classifier: Classifier) -> tuple[list[Point], list[Point]]:
    """Both rules at equal cost, on selection and on test rows."""
    costs = classifier.cascade_costs()
    return tuple(  # type: ignore[return-value]
        compare(o.p[o.cheap], o.p["ensemble"], o.labels, costs, [*SHARES, 1.0]) for o in (found.selection, found.test)
    )


def cost_of_rows(classifier: Classifier, outputs: Outputs, escalated: Bools) -> float:
    """Mean cost of a cascade whose rows `escalated` (N,) the members answer, and whose others leave where they do."""
    costs, exits = classifier.cascade_costs(), classifier.exits
    calm = np.take(exits.costs, outputs.left) if exits else np.full(len(escalated), costs.cheap)
    return float(np.where(escalated, costs.cheap + costs.extra, calm).mean())


def at_points(found: Study, classifier: Classifier) -> list[tuple[Terms, float, Outputs]]:
    """Every operating point as served: its terms, what it cost on test, and its answers there."""
    router, rows = found.calibration.router, []
    for terms in router.points if router else ():
        assert router is not None
        outputs, escalated = found.test.cascaded(router, terms)
        rows.append((terms, cost_of_rows(classifier, outputs, escalated), outputs))
    return rows


@torch.inference_mode()
def time_cascade(classifier: Classifier, found: Study, batch: int = 64) -> float:
    """Measured time relative to the source, of a batch at the default point: as many rows as of the test images, to
    rounding, go on after each exit and to the other members."""
    height, width, channels = classifier.config["image"]
    source, bridge = classifier.members[0], classifier.bridge
    x = torch.rand(batch, channels, height, width).to(device_of(source))
    router, left = found.calibration.router, found.test.left
    assert router is not None
    _, urgent = found.test.cascaded(router, router.pick(None))
    exits = classifier.exits.networks if classifier.exits else ()
    stay = [round(batch * float(((left >= k) | urgent).mean())) for k in range(len(exits))]
    asked = round(batch * float(urgent.mean()))

    def cascaded() -> None:
        h = x
        for network, n in zip(exits, stay, strict=True):
            if n:
                h, logits, *_ = network(h[:n])
                logits.softmax(-1).amax(-1)
        if not exits and bridge is not None:
            tap = source.tap(x)
            features = source.features(tap)
            for carrier in bridge.networks.values():
                run_bridge(carrier, tap, source.fc(features), bridge.evaluations, bridge.softening, features)
        for member in classifier.members[1:] if asked else []:
            member(x[:asked])

    seconds = measure_times({"source": lambda: source(x), "cascade": cascaded})
    return seconds["cascade"] / seconds["source"]
