"""Evaluate a classifier: every method raw and calibrated, beside deep ensembles of every size.

DEE, the deep ensemble equivalent, is after Ashukha et al. (ICLR 2020). Temperatures are fitted on the selection half
of validation, on the averaged probabilities; the test set is touched by no choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.api import ClassifiedRow, ClassifyWork
from models.evaluation.carried import Call, Carried, load_carried
from models.evaluation.ensembles import load_pool, rows_of_ensembles
from models.evaluation.leaving import answers_of, load_seeds
from models.evaluation.metrics import deep_ensemble_equivalent, interval, spearman
from models.evaluation.score import Answers, Floats, Labels, Score, TableRow, ranked, score
from models.evaluation.served import numbers
from models.evaluation.uncertainty import Study
from models.store import read_config
from models.tasks.classify import ClassifyTask
from models.training.data import Images, Split, Splits
from models.training.members import pixels_of
from models.training.session import device_of
from models.uncertainty.scores import among_members, entropy, log_softmax, soften

CPU = torch.device("cpu")
GOALS = (3, 5)  # sizes of deep ensembles whose gain over the source is recovered by some share


def classify_images(task: ClassifyTask, method: str, images: Images) -> list[ClassifiedRow]:
    """Run uint8 images (N, H, W, C) through the task, in pool-sized jobs."""
    rows: list[ClassifiedRow] = []
    for i in range(0, len(images), task.capacity):
        part = tuple(image.tobytes() for image in images[i : i + task.capacity])
        work = ClassifyWork(model=task.info.name, images=part, method=method, top_k=1)  # type: ignore[arg-type]
        slots = list(range(len(part)))
        left = dict(zip(slots, task.admit(work, slots, slots), strict=True))
        while moving := [slot for slot, calls in left.items() if calls]:
            stats = task.step(moving)
            left |= {slot: 0 if slot in stats.finished else left[slot] - (slot not in stats.waiting) for slot in moving}
        rows += task.collect(slots)
    return rows


@dataclass(frozen=True, eq=False)
class Seen:
    """A split's log probabilities of the whole pool (N, M, K) and of every call (N, K); spreads (N,) by network."""

    members: Floats
    calls: dict[Call, Floats]
    spreads: dict[str, Floats]


@torch.inference_mode()
def look(pool: list[Any], carried: Carried, split: Split, known: Floats | None = None, batch: int = 1000) -> Seen:
    """Run every network once on a split, the source's tap shared; members whose logits (N, m, K) are `known` do not."""
    ran, source = 0 if known is None else known.shape[1], pool[0]
    members: list[torch.Tensor] = []
    device = device_of(source)
    calls = [*carried.calls, *((name, 1) for name in carried.spreads)]
    outputs: dict[Call, list[torch.Tensor]] = {call: [] for call in calls}
    for i in range(0, len(split), batch):
        x = pixels_of(split.images[i : i + batch], device)
        tap = source.tap(x)
        late = source.features(tap)
        logits = source.fc(late)
        rest = [logits if m is source else m(x) for m in pool[ran:]]
        members.append(torch.stack(rest, 1) if rest else logits[:, None][:, :0])
        for (name, evaluations), parts in outputs.items():
            parts.append(carried.run(name, evaluations, x, tap, late, logits))
    z = {call: numbers(torch.cat(parts)) for call, parts in outputs.items()}
    fresh = numbers(torch.cat(members))
    return Seen(
        members=log_softmax(fresh if known is None else np.concatenate([known, fresh], 1)),
        calls={call: log_softmax(z[call]) for call in carried.calls},
        spreads={name: z[name, 1][:, 0] for name in carried.spreads},
    )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the table shows. `dee` calibrated and `dee_raw` by row; `recovered` by row and goal ("DE-3"): the share of
    the calibrated-NLL gap from the source to that ensemble; `curve`: calibrated NLL of DE-m by m."""

    rows: dict[str, TableRow]
    dee: dict[str, dict[str, float]]
    dee_raw: dict[str, dict[str, float]]
    recovered: dict[str, dict[str, dict[str, float]]]
    curve: dict[int, float]
    spread: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """All of it, plain."""
        return {**vars(self), "rows": {name: row.summary() for name, row in self.rows.items()}}


def evaluate(
    ensemble: Path,
    splits: Splits,
    foreign: Split | None = None,
    found: Study | None = None,
    carried: Carried | None = None,
    device: torch.device = CPU,
) -> Evaluation:
    """Score every method of an ensemble folder and the folders beside it; the served cascade too where a study of the
    same splits is `found`, whose members are not run again. On `device`, where `carried` lies."""
    pool, served = load_pool(ensemble), len(read_config(ensemble, "ensemble")["members"])
    exits = load_seeds(ensemble, pool[0])
    for network in [*pool, *(network for seed in exits for network in seed.networks)]:
        network.to(device)
    carried = load_carried(ensemble) if carried is None else carried
    parts = {"selection": splits.selection, "test": splits.test} | ({} if foreign is None else {"foreign": foreign})
    seen = {}
    for name, split in parts.items():
        outputs = getattr(found, name) if found else None
        seen[name] = look(pool, carried, split, outputs.logits if outputs else None)
    members = Answers(**{name: s.members for name, s in seen.items()})

    def scored(answers: Answers) -> Score:
        return score(answers, splits.selection.labels, splits.test.labels)

    rows = rows_of_ensembles(members, served, scored)
    answered = {
        name: [Answers(**{k: way.combine(s.calls, s.members[:, 0]) for k, s in seen.items()}) for way in ways]
        for name, ways in carried.rows.items()
    }
    rows |= {name: TableRow([scored(answers) for answers in runs]) for name, runs in answered.items()}
    if exits:
        rows["exits"] = TableRow([scored(answers_of(e, parts)) for e in exits])
    if found and "cascade" in found.test.p:
        rows["cascade"] = TableRow([scored(served_answers(found, "cascade", parts))])
    spread = spreads(seen, splits.test.labels, served, rows["source"].scores[0].temperature)
    return compared(rows, served, spread)


def served_answers(found: Study, method: str, parts: dict[str, Split]) -> Answers:
    """A served method's log probabilities, calibrated as they are."""
    return Answers(**{name: np.log(np.maximum(getattr(found, name).p[method], 1e-12)) for name in parts})


def compared(rows: dict[str, TableRow], served: int, spread: dict[str, Any] | None = None) -> Evaluation:
    """Set every row against the deep ensembles; DE-m and its curve are averaged over subsets first."""

    def mean(name: str, what: str) -> float:
        return float(np.mean([getattr(s, what) for s in rows[name].scores]))

    curves = {what: {m: mean(f"DE-{m}", what) for m in range(1, served + 1)} for what in ("nll", "cnll")}
    source, goals = mean("source", "cnll"), [m for m in GOALS if m <= served]

    def dee(name: str, what: str) -> dict[str, float]:
        row = rows[name]
        values = [mean(name, what)] if row.subsets else [getattr(s, what) for s in row.scores]
        return interval([deep_ensemble_equivalent(v, curves[what]) for v in values]) if served > 1 else {}

    recovered = {
        name: {
            f"DE-{m}": interval([(source - s.cnll) / (source - curves["cnll"][m]) for s in row.scores]) for m in goals
        }
        for name, row in rows.items()
        if not row.subsets and not name.startswith("source")
    }
    return Evaluation(
        rows=rows,
        dee={name: dee(name, "cnll") for name in rows},
        dee_raw={name: dee(name, "nll") for name in rows},
        recovered=recovered,
        curve=curves["cnll"],
        spread=spread or {},
    )


def spreads(seen: dict[str, Seen], labels: Labels, served: int, temperature: float) -> dict[str, Any]:
    """What networks that predict the served members' mutual information are worth on test images, beside it and the
    source's entropy at its best temperature: rank correlation with the truth, AUROC of the source's errors and of
    foreign images. Empty without such networks."""
    test, foreign = seen["test"], seen.get("foreign")
    if not test.spreads:
        return {}
    wrong = test.members[:, 0].argmax(-1) != labels
    truth = among_members(test.members[:, :served])["mutual_information"]

    def worth(own: Floats, away: Floats | None) -> dict[str, float]:
        found = {"rho": spearman(own, truth), "errors": ranked(own[wrong], own[~wrong])}
        return found if away is None else {**found, "foreign": ranked(away, own)}

    def unsure(s: Seen) -> Floats:
        return entropy(soften(s.members[:, 0], temperature))

    def disagreement(s: Seen) -> Floats:
        return among_members(s.members[:, :served])["mutual_information"]

    runs = [worth(own, foreign.spreads[name] if foreign else None) for name, own in test.spreads.items()]
    return {
        "predicted": {key: interval([run[key] for run in runs]) for key in runs[0]},
        "entropy": worth(unsure(test), unsure(foreign) if foreign else None),
        "true": worth(disagreement(test), disagreement(foreign) if foreign else None),
    }
