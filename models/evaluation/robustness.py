"""`offramp eval robustness`: accuracy under attack with and without purification, the attacker knowing all.

The dose is chosen on the selection images against a short adaptive attack; test images are attacked at that dose.
An image counts as robust when it is right clean and after every attack: the worst case is the number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from models.api import UserError
from models.backbones.macs import count_macs
from models.evaluation import attacks
from models.evaluation.attacked import NOISES, Images, Right, bare, pick, purified, right
from models.evaluation.attacks import Ball, Classify, attack
from models.evaluation.report import find, markdown, origin, provenance
from models.evaluation.turns import alternate
from models.purification.purify import Dose, Purifier
from models.tasks.classifier import load_classifier
from models.training.data import splits

ALLOWED = 0.05  # clean accuracy on selection images that a dose may cost
SCREEN = 10  # PGD steps against a candidate dose, one draw a gradient


@dataclass(frozen=True)
class Trial:
    """A dose on selection images: accuracy clean, and clean and after the screening attack; cost of its network."""

    dose: Dose
    clean: float
    robust: float
    cost: float


def trials(
    classify: Classify, make: Callable[[Dose], Purifier], doses: list[Dose], images: Images, ball: Ball, macs: int
) -> list[Trial]:
    """Try doses that differ in draws alone on the images of one attack."""
    one = make(replace(doses[0], draws=1))
    found = replace(images, x=attack(attacks.adaptive(classify, one), images.x, images.labels, ball, seed=1))
    tried = []
    for dose in doses:
        purifier = make(dose)
        clean = right(classify, purifier, images)
        robust = clean & right(classify, purifier, found)
        tried.append(Trial(dose, float(clean.mean()), float(robust.mean()), purifier.cost(macs)))
    return tried


def best(tried: list[Trial], clean: float) -> Trial:
    """The most robust dose that costs at most ALLOWED of the `clean` accuracy; the least harmful if none does."""
    fair = [t for t in tried if t.clean >= clean - ALLOWED] or [max(tried, key=lambda t: t.clean)]
    return max(fair, key=lambda t: (t.robust, -t.cost))


def choose(
    classify: Classify, make: Callable[[Dose], Purifier], images: Images, ball: Ball, macs: int, us: list[float]
) -> tuple[list[Trial], Dose]:
    """One step at each of `us`, then more steps at the best: what was tried, and the dose chosen."""
    clean = float(right(classify, None, images).mean())
    short = replace(ball, steps=min(SCREEN, ball.steps))

    def run(u: float, steps: int) -> list[Trial]:
        return trials(classify, make, [Dose(u, steps, draws) for draws in (1, 4)], images, short, macs)

    tried = [trial for u in us for trial in run(u, 1)]
    u = best(tried, clean).dose.u
    tried += [trial for steps in (2, 3) for trial in run(u, steps)]
    return tried, best(tried, clean).dose


def percent(values: Right) -> str:
    """Accuracy with its binomial standard error."""
    p = float(values.mean())
    return f"{100 * p:.1f} ± {100 * math.sqrt(p * (1.0 - p) / len(values)):.1f}"


def robustness(
    model: Annotated[Path, typer.Argument(help="Ensemble folder, or the name of one of the zoo.")],
    data: Annotated[Path, typer.Option(help="Folder of IDX files, or of train/<class>/ and test/<class>/ images.")],
    generator: Annotated[Path, typer.Option(help="Pixel diffusion model that purifies.")] = Path("fashion-dit"),
    gear: Annotated[str, typer.Option(help="Gear whose exit schedule the purifier runs.")] = "full",
    method: Annotated[str, typer.Option(help="Classifiers attacked, comma-separated.")] = "single,bridge,ensemble",
    n: Annotated[int, typer.Option(min=8, help="Test images attacked.")] = 256,
    screened: Annotated[int, typer.Option(min=8, help="Selection images that choose the dose.")] = 128,
    us: Annotated[str, typer.Option(help="Diffusion times tried.")] = "0.1,0.2,0.3,0.4,0.5",
    dose: Annotated[str, typer.Option(help="u,steps,draws: this dose, and none is tried.")] = "",
    radius: Annotated[int, typer.Option(min=1, max=255, help="l-infinity radius, in levels of 255.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="PGD steps, each a quarter of the radius.")] = 20,
    eot: Annotated[int, typer.Option(min=1, max=16, help="Draws of noise averaged in one gradient.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the images picked and of every attack's noise.")] = 0,
) -> None:
    """Accuracy under PGD with and without purification, through the purifier too; what purification costs."""
    folder, source_folder, found = find(model), find(generator), splits(data)
    classifier = load_classifier(folder)
    known = attacks.methods(classifier)
    names = [name for name in method.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--method: {unknown[0]!r} is not one of {', '.join(known)}")
    image, member, ball = classifier.config["image"], classifier.members[0], Ball(radius, radius / 4.0, steps)

    def make(dose: Dose) -> Purifier:
        return Purifier.load(source_folder, image, dose, gear)

    test = pick(found.test, n, seed)
    macs = count_macs(member, lambda: member(test.x[:1]))
    tried: list[Trial] = []
    given = read_dose(dose) if dose else None
    if given is None:
        screen = pick(found.selection, screened, seed)
        tried, given = choose(known["single"], make, screen, ball, macs, [float(u) for u in us.split(",") if u])
        print(trials_table(tried, given, screened), end="\n\n", flush=True)
    purifier, costs, summary = make(given), classifier.costs(), {}
    time = slowdown(known["single"], purifier, test)
    print(markdown(["classifier", "purified", *COLUMNS.values(), "MACs"], []))
    for name in names:
        for behind in (None, purifier):
            if behind is None:
                result, cost = bare(known[name], test, ball, seed), costs[name]
            else:
                result = purified(known[name], behind, test, ball, eot, seed)
                cost = costs[name] * given.draws + behind.cost(macs)
            cells = [percent(result[key]) if key in result else "" for key in COLUMNS]
            line = [name, "yes" if behind else "no", *cells, f"{cost:.1f}"]
            print("| " + " | ".join(line) + " |", flush=True)
            scores = {key: float(values.mean()) for key, values in result.items()}
            summary[name + (" purified" if behind else "")] = {**scores, "cost": cost}
    where = provenance()
    print(
        f"\n{how(given, gear, ball, eot, n, seed)} One purified `single` takes {time:.0f} x its time. {origin(where)}"
    )
    attempts = [{**asdict(t.dose), "clean": t.clean, "robust": t.robust, "cost": t.cost} for t in tried]
    made = {"model": folder.name, "dose": asdict(given), "gear": gear, "methods": summary, "time_vs_single": time}
    print(json.dumps({**made, "trials": attempts, "n": n, "ball": asdict(ball), "eot": eot, "seed": seed, **where}))


def read_dose(text: str) -> Dose:
    """A dose written u,steps,draws."""
    try:
        u, steps, draws = text.split(",")
        return Dose(float(u), int(steps), int(draws))
    except UserError:
        raise
    except ValueError:
        raise UserError(f"--dose: {text!r} is not u,steps,draws, as in 0.3,1,4") from None


def slowdown(classify: Classify, purifier: Purifier, images: Images) -> float:
    """Time of a purified answer relative to the classifier's own, the fastest of three turns."""
    runs = {"bare": partial(right, classify, None, images), "purified": partial(right, classify, purifier, images)}
    seconds = alternate(runs, 3)
    return float(seconds["purified"].min() / seconds["bare"].min())


COLUMNS = {
    "clean": "clean",
    "classifier": "PGD, classifier only",
    "bpda": "BPDA",
    "adaptive": "adaptive",
    "worst": "worst case",
    "noises": f"worst of {NOISES} more noises",
}


def trials_table(tried: list[Trial], chosen: Dose, n: int) -> str:
    """What the screening attack left of every dose."""
    rows = [
        [
            f"{t.dose.u:g}",
            str(t.dose.steps),
            str(t.dose.draws) + (" (chosen)" if t.dose == chosen else ""),
            f"{100 * t.clean:.1f}",
            f"{100 * t.robust:.1f}",
            f"{t.cost:.0f}",
        ]
        for t in tried
    ]
    table = markdown(["u", "steps", "draws", "clean", "robust", "MACs of the purifier"], rows)
    return f"{table}\n\n`single` on {n} selection images; adaptive PGD of {SCREEN} steps, one draw a gradient."


def how(dose: Dose, gear: str, ball: Ball, eot: int, n: int, seed: int) -> str:
    """The conditions of the table."""
    return (
        f"Accuracy on {n} test images in %, binomial standard errors, seed {seed}. Purified: u {dose.u:g}, "
        f"steps {dose.steps}, draws {dose.draws}, exits of gear {gear}. Attacks: l-infinity {ball.radius}/255, "
        f"{ball.steps} PGD steps of {ball.stride:g}/255, {eot} fresh draws a gradient; adaptive goes through the "
        "purifier's exact gradient. "
        "Worst case: right clean and after each attack, the adaptive one without clipping included."
    )
