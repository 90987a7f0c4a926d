"""One row of a table of methods: its scores on test images, by seed or by subset of a pool of members.

Temperatures are fitted on the selection half of validation, on the averaged
probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from models.evaluation.metrics import accuracy, auroc, brier, ece, interval, over_subsets
from models.uncertainty.scores import entropy, fit_temperature, log_softmax, nll, soften
from models.uncertainty.selective import aurc, average_precision

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Answers:
    """Log probabilities (N, K) of a method on selection, test and, if there are any, foreign images."""

    selection: Floats
    test: Floats
    foreign: Floats | None = None

    def softened(self, temperature: float) -> Answers:
        """All of them at a temperature."""
        foreign = None if self.foreign is None else log_softmax(self.foreign / temperature)
        return Answers(log_softmax(self.selection / temperature), log_softmax(self.test / temperature), foreign)


@dataclass(frozen=True)
class Score:
    """A method on test images; `temperature` was fitted on validation, c: at it.

    Entropy at that temperature ranks errors (AUROC, average precision, AURC) and foreign above test images (NaN
    without any).
    """

    acc: float
    nll: float
    brier: float
    ece: float
    temperature: float
    cnll: float
    cbrier: float
    cece: float
    errors: float
    errors_precision: float
    aurc: float
    foreign: float
    foreign_precision: float


def score(answers: Answers, selection: Labels, test: Labels) -> Score:
    """Score a method: the temperature from the selection labels (N,), the rest from the test labels."""
    temperature = fit_temperature(answers.selection, selection)
    raw, calibrated = soften(answers.test, 1.0), soften(answers.test, temperature)
    unsure, wrong = entropy(calibrated), calibrated.argmax(-1) != test
    away = np.empty(0) if answers.foreign is None else entropy(soften(answers.foreign, temperature))
    both = np.concatenate([away, unsure])
    return Score(
        acc=accuracy(raw, test),
        nll=nll(raw, test),
        brier=brier(raw, test),
        ece=ece(raw, test),
        temperature=temperature,
        cnll=nll(calibrated, test),
        cbrier=brier(calibrated, test),
        cece=ece(calibrated, test),
        errors=ranked(unsure[wrong], unsure[~wrong]),
        errors_precision=average_precision(unsure, wrong),
        aurc=aurc(unsure, wrong),
        foreign=ranked(away, unsure),
        foreign_precision=average_precision(both, np.arange(len(both)) < len(away)),
    )


def ranked(positive: Floats, negative: Floats) -> float:
    """AUROC, NaN where a side is empty."""
    return auroc(positive, negative) if len(positive) and len(negative) else float("nan")


@dataclass(frozen=True)
class TableRow:
    """A method's scores, one a seed; or one for each of `subsets` of a pool of `pool` members."""

    scores: list[Score]
    subsets: list[tuple[int, ...]] | None = None
    pool: int = 0

    def over(self, values: list[float]) -> dict[str, float]:
        """Mean and standard error of a figure of each score; the 95 % t-interval too where they are seeds."""
        return interval(values) if self.subsets is None else over_subsets(values, self.subsets, self.pool)

    def summary(self) -> dict[str, dict[str, float]]:
        """Every field of the scores that is a number in all of them."""
        values = {f.name: [getattr(s, f.name) for s in self.scores] for f in fields(Score)}
        return {name: self.over(found) for name, found in values.items() if np.isfinite(found).all()}
