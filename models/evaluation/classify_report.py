"""Markdown of the evaluation of classifiers: two tables of the same rows, and what they say of the bars."""

from __future__ import annotations

from collections.abc import Mapping

from models.evaluation.classify import Evaluation
from models.evaluation.costs import BATCHES, Cost
from models.evaluation.report import markdown, origin

Estimated = Mapping[str, float]
CHEAP = 1.5  # MACs relative to the source: bridges and students, no second member
LIKELIHOODS = {
    "ACC": ("acc", 2, 100.0),
    "NLL": ("nll", 4, 1.0),
    "cNLL": ("cnll", 4, 1.0),
    "Brier": ("brier", 4, 1.0),
    "cBrier": ("cbrier", 4, 1.0),
    "ECE": ("ece", 3, 1.0),
    "cECE": ("cece", 3, 1.0),
    "T*": ("temperature", 2, 1.0),
}
RANKINGS = {
    "AUROC errors": ("errors", 3, 1.0),
    "AUPR errors": ("errors_precision", 3, 1.0),
    "AURC": ("aurc", 4, 1.0),
    "AUROC foreign": ("foreign", 3, 1.0),
    "AUPR foreign": ("foreign_precision", 3, 1.0),
}


def shown(found: Estimated | None, digits: int = 2, scale: float = 1.0) -> str:
    """Mean, and ± its standard error where there is one; blank where nothing was found."""
    if not found:
        return ""
    error = f" ± {scale * found['se']:.{digits}f}" if "se" in found else ""
    return f"{scale * found['mean']:.{digits}f}{error}"


def labelled(name: str, made: Evaluation) -> str:
    """A row's name, with how many runs it averages."""
    row = made.rows[name]
    n, what = len(row.scores), "subsets" if row.subsets else "seeds"
    return f"{name} ({n} {what})" if n > 1 else name


def classify_table(made: Evaluation, costs: Mapping[str, Cost], where: dict[str, str]) -> str:
    """Likelihoods, then costs and ranking; one row a method in both."""
    goals = list(next(iter(made.recovered.values()), {}))
    likelihoods, others = [], []
    for name, row in made.rows.items():
        summary, recovered, cost = row.summary(), made.recovered.get(name, {}), costs.get(name)
        label = labelled(name, made)
        likelihoods.append(
            [
                label,
                *(shown(summary.get(key), digits, scale) for key, digits, scale in LIKELIHOODS.values()),
                shown(made.dee_raw[name]),
                shown(made.dee[name]),
                *(shown(recovered.get(goal)) for goal in goals),
            ]
        )
        times = [f"{cost.times[b]:.2f}" if cost and b in cost.times else "" for b in BATCHES]
        paid = [f"{cost.macs:.2f}", f"{cost.parameters:.2f}"] if cost else ["", ""]
        rankings = [shown(summary.get(key), digits, scale) for key, digits, scale in RANKINGS.values()]
        others.append([label, *paid, *times, *rankings])
    first = ["method", *LIKELIHOODS, "DEE raw", "DEE", *(f"gap to {goal} recovered" for goal in goals)]
    second = ["method", "MACs", "parameters", *(f"time, batch {b}" for b in BATCHES), *RANKINGS]
    return "\n\n".join([markdown(first, likelihoods), markdown(second, others), notes(made, costs, where)])


def notes(made: Evaluation, costs: Mapping[str, Cost], where: dict[str, str]) -> str:
    """What the tables say of the gaps and of predicted spread, and how to read them."""
    said = [*bars(made, costs), *best_line(made, costs)]
    if made.spread:
        said.append(spread_line(made))
    said.append(
        "c: at the method's own validation temperature T*. DE-m is averaged over subsets of the pool, ± by leaving one "
        "member out at a time (jackknife); elsewhere ± is the standard error over seeds. DEE: the m of DE-m with the "
        "same cNLL (raw: NLL), which a temperature alone can raise when raw. Gaps are in cNLL, from the source. "
        "exits, cascade: costs on test images, as served; their MACs count the distance of features, where there is "
        "one, on both sides, their time on theirs. "
        "DBN x1 stands on the source and one light network, x2 on two, all trained as bridges of T steps; x2 takes one "
        "evaluation of each. regressors: the same networks trained for one evaluation. corrected: the source's double "
        "weight taken back. AUROC, AUPR, AURC: of entropy at T*; foreign: those images above test images. MACs, "
        f"parameters and time are relative to the source, time the fastest of 15 turns. {origin(where)}"
    )
    return " ".join(said)


def bars(made: Evaluation, costs: Mapping[str, Cost]) -> list[str]:
    """Of the gap to DE-3 what one light network recovers at one evaluation, and of that to DE-5 what two do."""
    lines = []
    for name, by_goal in made.recovered.items():
        goal = {"DBN x1": "DE-3", "DBN x2": "DE-5"}.get(name.split(",")[0])
        if goal in by_goal and not name.endswith("steps"):
            found = by_goal[goal]
            over = f", 95 % interval [{found['low']:.1%}, {found['high']:.1%}]" if "low" in found else ""
            paid = f" at {paid_for(costs[name])}" if name in costs else ""
            lines.append(
                f"{name} recovers {found['mean']:.1%} of the gap to {goal}{over} over {found['n']} seeds{paid}."
            )
    return lines


def paid_for(cost: Cost) -> str:
    """MACs, and time at the first batch that was measured."""
    times = [f" and {cost.times[b]:.2f}x time at batch {b}" for b in BATCHES if b in cost.times]
    return f"{cost.macs:.2f}x MACs{times[0] if times else ''}"


def best_line(made: Evaluation, costs: Mapping[str, Cost]) -> list[str]:
    """The likeliest of the methods that cost less than `CHEAP`."""
    cheap = [name for name in made.recovered if name in costs and costs[name].macs < CHEAP]
    if len(cheap) < 2:
        return []
    best = min(cheap, key=lambda name: made.rows[name].summary()["cnll"]["mean"])
    return [f"Lowest cNLL below {CHEAP:g}x MACs: {best}, at {paid_for(costs[best])}."]


def spread_line(made: Evaluation) -> str:
    """How well mutual information is predicted without the members."""
    predicted, beside = made.spread["predicted"], made.spread
    parts = []
    for key, what in (("rho", "Spearman rho with it"), ("errors", "AUROC errors"), ("foreign", "AUROC foreign")):
        if key in predicted:
            own = f", the members' own {beside['true'][key]:.3f}" if key != "rho" else ""
            parts.append(f"{what} {shown(predicted[key], 3)} (source's entropy {beside['entropy'][key]:.3f}{own})")
    return f"Predicted mutual information of the members: {'; '.join(parts)}; errors are the source's."
