"""Markdown tables and pictures of what the served answers are worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.evaluation.corruptions import CORRUPTIONS, SEVERITIES
from models.evaluation.report import markdown
from models.evaluation.uncertainty import (
    COVERAGES,
    ESCALATED,
    Study,
    at_points,
    cascades,
    coverages,
    quality,
    rankings,
    shift,
    time_cascade,
)
from models.tasks.classifier import Classifier
from models.uncertainty.calibration import reliability
from models.uncertainty.cascade import RuleName
from models.uncertainty.scores import entropy, nll
from models.uncertainty.selective import risk_coverage

RULES: tuple[RuleName, RuleName] = ("threshold", "window")


def report(found: Study, classifier: Classifier) -> str:
    """Every table under its heading, to follow the table of methods."""
    parts = [answers(found), decisions(found), scores(found), shifts(found), sets(found)]
    if found.calibration.router is not None:
        parts.append(cascade(found, classifier))
    return "\n\n".join(parts)


def section(title: str, header: list[str], rows: list[list[str]], note: str) -> str:
    """A table under its heading, with what it needs to be read."""
    return f"### {title}\n\n{markdown(header, rows)}\n\n{note}"


def answers(found: Study) -> str:
    """Likelihood, calibration, risk and coverage of the served methods."""
    header = ["served", "ACC", "cNLL", "Brier", "ECE", "ECE, equal mass", "AURC", "excess AURC"]
    header += [f"error at {coverage:.0%}" for coverage in COVERAGES]
    rows = []
    for name in found.methods:
        q = quality(found, name)
        rows.append(
            [
                name,
                f"{100 * q.accuracy:.2f}",
                f"{q.nll.value:.4f} ± {q.nll.se:.4f}",
                f"{q.brier.value:.4f} ± {q.brier.se:.4f}",
                f"{q.ece:.3f}",
                f"{q.ece_mass:.3f}",
                f"{q.aurc.value:.4f} ± {q.aurc.se:.4f}",
                f"{q.excess_aurc:.4f}",
                *(f"{risk:.2%}" for risk in q.risks.values()),
            ]
        )
    note = (
        "Calibrated; cascade at its default point. ± is a bootstrap standard error over test images. `error at 80%`: "
        "error rate of the surest 80 % by entropy."
    )
    return section("Answers as served", header, rows, note)


def decisions(found: Study) -> str:
    """The decision of each method on validation, test and foreign images."""
    header = ["served", "accept up to", "abstain above", "accepted, validation", "error bound"]
    header += [
        "accepted, test",
        "error of accepted, test",
        "abstained, test",
        "accepted, foreign",
        "abstained, foreign",
    ]
    rows = []
    for name in found.methods:
        q, thresholds = quality(found, name), found.contract(name).thresholds
        bound = thresholds.shown["bound"]
        away = shift(found, name, found.foreign) if found.foreign else None
        rows.append(
            [
                name,
                f"{thresholds.accept:.3f}" if np.isfinite(thresholds.accept) else "nothing",
                f"{thresholds.abstain:.3f}",
                f"{thresholds.shown['coverage']:.1%}",
                "" if bound is None else f"{bound:.2%}",
                f"{q.accepted:.1%}",
                f"{q.risk.value:.2%} ± {q.risk.se:.2%}" if q.accepted else "",
                f"{q.abstained:.1%}",
                *((f"{away.accepted:.1%}", f"{away.abstained:.1%}") if away else ("", "")),
            ]
        )
    shown = found.contract(found.methods[0]).thresholds.shown
    note = (
        f"Thresholds on entropy (nats), chosen on {shown['rows']} validation images for `{shown['target']}` "
        f"{100 * float(str(shown['value'])):g}% with confidence {shown['confidence']:.0%}. The bound holds for images "
        f"drawn like those, not for foreign ones.{foreign_line(found)}"
    )
    return section("Decisions", header, rows, note)


def foreign_line(found: Study) -> str:
    """The rule on feature distance, where there is one."""
    if (rule := found.calibration.foreign) is None:
        return ""
    flagged = {"validation": found.selection, "test": found.test, "foreign": found.foreign}
    shares = [f"{(o.far > rule.accept).mean():.1%} of {name} images" for name, o in flagged.items() if o is not None]
    others = ", ".join(name for name in found.methods if name not in found.test.measured)
    return (
        f" All methods{f' but {others}' if others else ''} also escalate above {rule.accept:.1f} of `feature_distance` "
        f"and abstain above {rule.abstain:.1f}: {', '.join(shares)} lie above the first. Their thresholds on entropy "
        "were chosen on the rest of validation; what is accepted passes both."
    )


def scores(found: Study) -> str:
    """Every score of every method."""
    shown = len(next(iter(found.corrupted.values())).labels)
    header = ["score", "AUROC errors", "AUPR errors", "AURC", "AUROC foreign", "AUPR foreign", "test flagged"]
    header += ["foreign flagged", *(f"corrupted {severity}" for severity in SEVERITIES)]
    rows = []
    for method in found.methods:
        for name, r in rankings(found, method).items():
            values = [r.errors, r.errors_precision, r.aurc, r.foreign, r.foreign_precision]
            shares = [r.flagged, r.flagged_foreign]
            rows.append(
                [
                    f"{method}: {name}",
                    *("" if np.isnan(v) else f"{v:.4f}" if v is r.aurc else f"{v:.3f}" for v in values),
                    *("" if np.isnan(v) else f"{v:.1%}" for v in shares),
                    *(f"{v:.3f}" for v in r.corrupted),
                ]
            )
    note = (
        "Errors: wrong test answers above right ones. Foreign, corrupted 1-5: those images above test images (AUROC; "
        f"corruptions: mean of {', '.join(CORRUPTIONS)} at each severity, {shown} images). Flagged: above the "
        f"threshold that flags {ESCALATED:.0%} of the selection half of validation, which no foreign image chose."
    )
    return section("Scores", header, rows, note)


def shifts(found: Study) -> str:
    """Accuracy, and what the decision lets through, under corruption."""
    header = ["corruption"]
    for method in found.methods:
        header += [f"{method}: ACC", "accepted", "error of accepted"]
    rows = []
    for (kind, severity), outputs in found.corrupted.items():
        cells = [f"{kind} {severity}"]
        for method in found.methods:
            s = shift(found, method, outputs)
            cells += [f"{100 * s.accuracy:.1f}", f"{s.accepted:.1%}", "" if np.isnan(s.risk) else f"{s.risk:.1%}"]
        rows.append(cells)
    note = (
        "The thresholds are those above: under corruption the error of accepted images is bounded by nothing, and the "
        "last column of each method says what it was."
    )
    return section("Corruptions", header, rows, note)


def sets(found: Study) -> str:
    """Coverage, size and empty sets at each alpha."""
    header = ["served", "alpha", "covered, shipped", "mean size", "empty", "covered, 20 splits", "mean size", "empty"]
    rows = []
    for name in found.methods:
        for alpha, (shipped, split) in coverages(found, name).items():
            cells = [name, f"{alpha:g}"]
            for c in (shipped, split):
                cells += [f"{c.covered:.2%} ± {c.se:.2%}", f"{c.size:.2f}", f"{c.empty:.1%}"]
            rows.append(cells)
    rule = found.contract(found.methods[0]).conformal.rule
    note = (
        f"Randomised {rule.name.upper()}, penalty {rule.penalty:g} beyond rank {rule.free}. Shipped: calibrated once "
        f"on the {len(found.conformal.labels)} images of the conformal half, on test (binomial error). 20 splits: "
        "conformal and test images pooled and split anew (error of the mean)."
    )
    return section("Prediction sets", header, rows, note)


def cascade(found: Study, classifier: Classifier) -> str:
    """The two rules at equal cost, and the served points."""
    on_validation, on_test = ({(p.rule, p.share): p for p in points} for points in cascades(found, classifier))
    header = ["members asked", "mean cost", "validation cNLL: threshold", "window", "test cNLL: threshold", "window"]
    header += ["test ACC: threshold", "window", "error at 90%: threshold", "window"]
    rows = []
    for share in [share for rule, share in on_validation if rule == "threshold"]:
        v, t = ([points[rule, share] for rule in RULES] for points in (on_validation, on_test))
        cells = [f"{share:.0%}", f"{v[0].cost:.2f}", *(f"{p.nll:.4f}" for p in (*v, *t))]
        rows.append([*cells, *(f"{100 * p.accuracy:.2f}" for p in t), *(f"{p.risk:.2%}" for p in t)])
    note = (
        f"Starts with `{classifier.cheap}`. Both rules ask the members about the same share of images. Served: the "
        "lower mean validation cNLL. Costs are those that validation lets expect."
    )
    return f"{section('Cascade', header, rows, note)}\n\n{served_points(found, classifier)}"


def served_points(found: Study, classifier: Classifier) -> str:
    """The operating points on test, as `max_cost` picks them."""
    router, labels = found.calibration.router, found.test.labels
    assert router is not None
    dear, rows = nll(found.test.p["ensemble"], labels), []
    for terms, cost, outputs in at_points(found, classifier):
        assert terms.contract is not None
        p, taken = outputs.p["cascade"], outputs.decided("cascade", terms.contract) == "accept"
        wrong = p.argmax(-1) != labels
        rows.append(
            [
                f"{terms.cost:.2f}" + (" (default)" if terms is router.pick(None) else ""),
                f"{cost:.2f}",
                f"{nll(p, labels):.4f}",
                f"{nll(p, labels) / dear - 1:+.1%}",
                f"{taken.mean():.1%}",
                f"{wrong[taken].mean():.2%}" if taken.any() else "",
            ]
        )
    header = ["expected cost", "cost on test", "cNLL", "to ensemble", "accepted", "error of accepted"]
    measured = time_cascade(classifier, found)
    return (
        f"{markdown(header, rows)}\n\nThe points that `max_cost` picks among, by the {router.rule} rule: fixed "
        "thresholds from validation, so the cost on test is near the expected one, not equal. Costs are MACs relative "
        f"to `single`; measured time of the default point at batch 64: {measured:.2f}."
    )


def draw(found: Study, folder: Path) -> list[Path]:
    """Write reliability.png (bins of 10 images or more) and risk-coverage.png; needs matplotlib (extras train, dev)."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    labels, n = found.test.labels, len(found.methods)
    diagram = Figure(figsize=(3.2 * n, 3.4), layout="constrained")
    for axes, name in zip(diagram.subplots(1, n, sharey=True, squeeze=False)[0], found.methods, strict=True):
        r = reliability(found.test.p[name], labels)
        some = r.count >= 10
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.bar((np.arange(15)[some] + 0.5) / 15, r.accuracy[some], 1 / 15, edgecolor="white", label="accuracy")
        axes.plot(r.confidence[some], r.accuracy[some], "o", markersize=3, color="black")
        axes.set(title=f"{name}, ECE {r.ece:.3f}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
    diagram.axes[0].set_ylabel("accuracy")
    curve = Figure(figsize=(5, 3.4), layout="constrained")
    axes = curve.subplots()
    for name in found.methods:
        p = found.test.p[name]
        coverage, risk = risk_coverage(entropy(p), p.argmax(-1) != labels)
        shown = coverage >= 0.05
        axes.plot(coverage[shown], risk[shown], label=name)
    axes.set(xlabel="share accepted, surest first", ylabel="error rate of accepted", xlim=(0, 1), ylim=(0, None))
    axes.legend()
    paths = [folder / "reliability.png", folder / "risk-coverage.png"]
    for figure, path in zip((diagram, curve), paths, strict=True):
        figure.savefig(path, dpi=110)
    return paths
