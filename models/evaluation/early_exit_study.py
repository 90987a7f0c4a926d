"""`offramp eval exits`: heads on the source's stages, thresholds against learned gates, on the cost/quality plane."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from models.api import UserError
from models.backbones.early_exits import Macs, count
from models.evaluation import early_exit as ee
from models.evaluation import served
from models.evaluation.report import find, markdown, provenance
from models.evaluation.studies import Data, numbers
from models.evaluation.timing import one_thread
from models.evaluation.turns import alternate
from models.tasks.classifier import Classifier, load_classifier, to_pixels
from models.training.data import Split, Splits, splits
from models.training.heads import Cache, Exits, HeadsRecipe, cache, train_heads, train_jointly
from models.training.members import random_shift
from models.uncertainty.early_exit import Curve, choose_confidences, confidences, own_losses, route
from models.uncertainty.scores import fit_temperature, log_softmax, soften

Model = Annotated[Path, typer.Argument(help="Ensemble folder, or the name of a model of the zoo.")]
BATCH = 64  # images of a timed call
SHIFT = 2  # pixels, of images that the source knows by heart
Parts = tuple[ee.Floats, ee.Floats]  # of selection and of test


@dataclass(frozen=True)
class Known:
    """What is run once: caches of both splits, and log probabilities of methods, of selection and of test."""

    labels: tuple[ee.Ints, ee.Ints]
    caches: tuple[Cache, Cache]
    methods: dict[str, Parts]

    def losses(self, method: str) -> ee.Floats:
        """Calibrated losses (N,) of a method on test."""
        val, tst = self.methods[method]
        return own_losses(soften(tst, fit_temperature(val, self.labels[0])), self.labels[1])


@dataclass(frozen=True)
class Row:
    """A line of the table; `run` answers pixels (N, C, H, W) where its time is measured."""

    heads: str
    name: str
    candidate: ee.Candidate
    run: Callable[[Tensor], Any] | None = None


def know(classifier: Classifier, found: Splits, exits: Exits) -> Known:
    """Run the members, and the bridge if there is one, on selection and test."""
    parts = (found.selection, found.test)
    caches = [cache(classifier.members, exits, to_pixels(s.images), s.labels) for s in parts]

    def both(values: Sequence[ee.Floats]) -> Parts:
        return values[0], values[1]

    methods = {
        "single": both([log_softmax(c.source.double().numpy()) for c in caches]),
        "ensemble": both([np.log(np.maximum(c.ensemble.double().numpy(), 1e-12)) for c in caches]),
    }
    if classifier.bridge is not None:
        methods["bridge"] = both([np.log(served.run(classifier, s).p["bridge"]) for s in parts])
    return Known((parts[0].labels, parts[1].labels), (caches[0], caches[1]), methods)


@torch.inference_mode()
def by_exit(exits: Exits, known: Known) -> list[Parts]:
    """Log probabilities of the three heads."""

    def answer(k: int, part: Cache) -> ee.Floats:
        return log_softmax(exits.heads[k](part.pooled[k]).double().numpy())

    return [(answer(k, known.caches[0]), answer(k, known.caches[1])) for k in range(len(exits.heads))]


def alone(name: str, method: Parts, cost: float, heads: str = "", run: Any = None) -> Row:
    """A method that answers every image at one cost."""
    left = (np.zeros(len(method[0]), np.int64), np.zeros(len(method[1]), np.int64))
    return Row(heads, name, ee.Candidate(([method[0]], [method[1]]), left, np.array([cost])), run)


def thresholded(
    heads: str, exits: Exits, known: Known, source: Any, macs: Macs, ends: dict[str, float], budgets: list[float]
) -> list[Row]:
    """Confidence thresholds at every budget; who answers last is chosen on selection with them."""
    own, labels = by_exit(exits, known), known.labels[0]
    heat = [fit_temperature(p[0], labels) for p in own]
    scores = [confidences([own[k][part] for k in (0, 1)], heat[:2]) for part in (0, 1)]
    curves = {}
    for end, extra in ends.items():
        last = own[2] if end == "head 3" else known.methods[end]
        answers = [own[0], own[1], last]
        losses = [own_losses(soften(p[0], fit_temperature(p[0], labels)), labels) for p in answers]

        def costs(first: bool, second: bool, end: str = end, extra: float = extra) -> ee.Floats:
            return macs.costs([first, second, end == "head 3"], extra)

        curve = Curve(scores[0], np.stack(losses, 1), costs)
        curves[end] = (curve, answers, choose_confidences(curve, budgets))
    rows = []
    for budget in budgets:
        offered = [end for end in curves if budget in curves[end][2]]
        if not offered:
            continue
        end = min(offered, key=lambda e: curves[e][0].at(curves[e][2][budget])[1])
        curve, answers, chosen = curves[end]
        limits = chosen[budget]
        candidate = ee.Candidate(
            ([p[0] for p in answers], [p[1] for p in answers]),
            (route(scores[0], limits), route(scores[1], limits)),
            curve.costs(*(bool(np.isfinite(t)) for t in limits)),
        )
        leave = [ee.surer_than(t, h) for t, h in zip(limits, heat, strict=False)]
        run = None if end == "bridge" else partial(ee.run, source, exits, leave, end == "head 3")
        rows.append(Row(heads, f"thresholds <= {budget:g}, else {end}", candidate, run))
    return rows


@torch.inference_mode()
def gated(heads: str, price: float, exits: Exits, known: Known, source: Any, macs: Macs) -> Row:
    """Jointly trained heads and gates: leave where the gate says more likely than not."""
    own = by_exit(exits, known)
    left = []
    for part in known.caches:
        gates = [exits.gate(k, exits.heads[k](part.pooled[k])) for k in range(len(exits.gates))]
        left.append(route(torch.stack(gates, 1).double().numpy(), [0.5] * len(gates)))
    candidate = ee.Candidate(
        ([p[0] for p in own], [p[1] for p in own]), (left[0], left[1]), macs.costs([True, True, True])
    )

    def leave(k: int) -> ee.Leave:
        return lambda z: exits.gate(k, z) >= 0.5

    return Row(heads, f"gates, lambda {price:g}", candidate, partial(ee.run, source, exits, [leave(0), leave(1)], True))


def transfer(classifier: Classifier, exits: Exits, train: Split) -> dict[str, tuple[Cache, str]]:
    """What heads learn from: name -> images and the field of the cache that is the target."""
    seen = classifier.config.get("trained_on", {}).get("images", 0)
    if not 0 < seen < len(train):
        raise UserError(f"the heads need images that the members did not see: {seen} of {len(train)}", "data")
    members = classifier.members
    pixels = random_shift(to_pixels(train.images[:seen]).repeat(2, 1, 1, 1), SHIFT)
    same = cache(members[:1], exits, pixels, np.tile(train.labels[:seen], 2))
    others = cache(members, exits, to_pixels(train.images[seen:]), train.labels[seen:])
    return {
        "labels, the source's images": (same, "labels"),
        "labels, other images": (others, "labels"),
        "ensemble, other images": (others, "ensemble"),
    }


def references(classifier: Classifier, known: Known) -> list[Row]:
    """What is served already: `single`, `bridge`, a cascade of bridge and members, `ensemble`."""
    costs = classifier.costs()
    rows = [alone(name, known.methods[name], costs[name]) for name in known.methods]
    if "bridge" in known.methods:
        answers = [known.methods["bridge"], known.methods["ensemble"]]
        temperature = fit_temperature(answers[0][0], known.labels[0])
        scores = [soften(answers[0][part], temperature).max(1, keepdims=True) for part in (0, 1)]
        limit = float(np.quantile(scores[0], 0.1))
        left = (route(scores[0], [limit]), route(scores[1], [limit]))
        extra = costs["bridge"] + costs["ensemble"] - 1.0
        pair = ([p[0] for p in answers], [p[1] for p in answers])
        rows.append(Row("", "cascade, 10 % asked", ee.Candidate(pair, left, np.array([costs["bridge"], extra]))))
    return rows


def study(classifier: Classifier, found: Splits, recipe: HeadsRecipe, prices: list[float], budgets: list[float]) -> Any:
    """All rows; seeds are `recipe.seed`."""
    torch.manual_seed(recipe.seed)
    source = classifier.members[0]
    exits = Exits(source.config, recipe.grid, recipe.hidden)
    macs = count(source, exits, to_pixels(found.test.images[:1]))
    known, costs = know(classifier, found, exits), classifier.costs()
    ends = {"single": 0.0, "head 3": 0.0} | ({"bridge": costs["bridge"] - 1.0} if "bridge" in costs else {})
    rows = references(classifier, known)
    for name, (part, field) in transfer(classifier, exits, found.train).items():
        goal: Tensor = getattr(part, field)
        with TemporaryDirectory() as folder:
            heads = train_heads(exits, part.pooled, goal, recipe, Path(folder) / "heads")
            for k, own in enumerate(by_exit(heads, known)):
                used = [k == j for j in range(3)]
                leave: list[ee.Leave | None] = [(lambda z: z[:, 0] == z[:, 0]) if u else None for u in used[:2]]
                run = partial(ee.run, source, heads, leave, True)
                rows.append(alone(f"exit {k + 1} alone", own, float(macs.costs(used)[k]), name, run))
            rows += thresholded(name, heads, known, source, macs, ends, budgets)
            for price in prices if "other" in name else []:
                cost = macs.costs([True] * 3).tolist()
                joint = train_jointly(heads, part, goal, cost, price, recipe, Path(folder) / f"{price:g}")
                rows.append(gated(name, price, joint, known, source, macs))
    served: dict[str, ee.Floats] = {n: known.losses(n) for n in ("single", "bridge") if n in known.methods}
    return [(row, ee.evaluate(row.candidate, *known.labels, served)) for row in rows], macs


def times(rows: list[Row], source: Any, x: Tensor, repeats: int) -> dict[int, float]:
    """Time of the rows that can run, by index, relative to the source: median of turns, x in batches of `BATCH`."""

    def over(run: Callable[[Tensor], Any]) -> None:
        with torch.inference_mode():
            for part in x.split(BATCH):
                run(part)

    runs = {str(i): partial(over, row.run) for i, row in enumerate(rows) if row.run is not None}
    with one_thread():
        seconds = alternate({"single": partial(over, source), **runs}, repeats)
    return {int(i): float(np.median(seconds[i] / seconds["single"])) for i in runs}


def exits(
    model: Model,
    data: Data,
    prices: Annotated[str, typer.Option(help="Nats that a forward of the source is worth.")] = "0.02,0.05,0.1",
    budgets: Annotated[str, typer.Option(help="Mean costs for thresholds.")] = "0.4,0.5,0.6,0.8",
    steps: Annotated[int, typer.Option(min=1, help="Steps that heads are trained; gates a third of them.")] = 1200,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of the timing.")] = 9,
    seed: Annotated[int, typer.Option(help="Of heads and gates.")] = 0,
) -> None:
    """Early exit of the source: exit heads with thresholds or learned gates, against what is served already."""
    classifier, found = load_classifier(find(model)), splits(data)
    r = HeadsRecipe(seed=seed)
    r = replace(r, optim=replace(r.optim, steps=steps), joint=replace(r.joint, steps=max(1, steps // 3)))
    scored, macs = study(classifier, found, r, numbers(prices), numbers(budgets))
    took = times([row for row, _ in scored], classifier.members[0], to_pixels(found.test.images[: 8 * BATCH]), repeats)
    header = ["heads learn from", "who leaves", "cost", "time", "left at 1 / 2 / end", "ACC", "cNLL", "ECE"]
    header += [f"gain on {name}" for name in scored[0][1].gains]
    table, summary = [], []
    for i, (row, p) in enumerate(scored):
        left = " / ".join(f"{share:.0%}" for share in p.left) if len(p.left) == 3 else ""
        shown = [f"{p.cost:.2f}", f"{took[i]:.2f}" if i in took else "", left, f"{100 * p.accuracy:.2f}"]
        gains = [f"{gain.value:+.4f} ± {gain.se:.4f}" for gain in p.gains.values()]
        table.append([row.heads, row.name, *shown, f"{p.nll.value:.4f} ± {p.nll.se:.4f}", f"{p.ece:.3f}", *gains])
        summary.append({"heads": row.heads, "name": row.name, "time": took.get(i), **asdict(p)})
    print(markdown(header, table))
    macs_of = {"stages": macs.stages, "heads": macs.heads, "single": macs.single}
    facts = {"model": classifier.config["name"], "macs": macs_of, "seed": seed, "rows": summary}
    print(json.dumps(facts | provenance()))
