"""Prediction sets by split conformal prediction: APS and RAPS at any alpha, asked for per request. Numpy only.

Rows that are exchangeable with the calibration rows get a set that holds their class with probability at least
1 - alpha, whatever the classifier (Vovk et al., 2005). The promise is marginal: over images and over the draw of
calibration rows, not for one class or one image, and not for images from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.api import UserError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """How strange a class is for an image. APS is `penalty` 0, RAPS is above.

    Attributes:
        penalty: added per rank beyond `free` (lambda of RAPS): keeps sets small at high coverage.
        free: ranks without penalty (k_reg of RAPS).
        randomised: exact coverage, by a random share of the class's own probability. Without it coverage is
            at least nominal, and far above it once the classifier errs less often than alpha.
    """

    penalty: float = 0.0
    free: int = 1
    randomised: bool = True

    def __post_init__(self) -> None:
        if not (self.penalty >= 0.0 and self.free >= 0):
            raise UserError(f"conformal penalty and free ranks must be at least 0, got {self.penalty}, {self.free}")

    @property
    def name(self) -> str:
        """`aps` or `raps`."""
        return "raps" if self.penalty else "aps"

    def strangeness(self, p: Floats, u: Floats | None = None) -> NDArray[np.float32]:
        """Score of every class: probability of likelier classes + u x its own + penalty (N, K).

        The smallest level at which the class enters the nested sets of Romano et al. (NeurIPS 2020), with the rank
        penalty of Angelopoulos et al. (ICLR 2021). Not randomised is u = 0: the likeliest class scores 0, so that no
        set is empty. Equally likely classes share the best rank among them: the order of classes does not matter.

        Args:
            p: probabilities (N, K).
            u: uniform draws (N,), one per image; required if and only if the rule is randomised.

        Raises:
            ValueError: NaN, entries outside 0..1, rows that do not sum to 1, or `u` not as required.
        """
        if not (p.ndim == 2 and p.min(initial=0.0) >= 0.0 and np.allclose(p.sum(-1), 1.0, atol=1e-4)):
            raise ValueError("probabilities must be (N, K), at least 0 and sum to 1 in each row")
        if self.randomised != (u is not None):
            raise ValueError("a randomised rule needs u, one uniform draw per image; another takes none")
        order = np.argsort(-p, axis=-1, kind="stable")
        ranked = np.take_along_axis(p, order, -1)
        first = np.ones(p.shape, dtype=bool)
        first[:, 1:] = ranked[:, 1:] < ranked[:, :-1]
        best = np.maximum.accumulate(np.where(first, np.arange(p.shape[1]), 0), axis=-1)
        likelier = np.take_along_axis(np.cumsum(ranked, -1) - ranked, best, -1)
        score = likelier + self.penalty * np.maximum(0, best + 1 - self.free)
        if u is not None:
            score = score + u[:, None] * ranked
        found = np.empty(p.shape, dtype=np.float32)
        np.put_along_axis(found, order, score.astype(np.float32), -1)
        return found


def uniforms(images: Iterable[bytes]) -> Floats:
    """A draw in [0, 1) per image, from a digest of its bytes: the same image always gets the same set."""
    heads = (hashlib.blake2b(image, digest_size=8).digest() for image in images)
    return np.array([(int.from_bytes(head, "big") >> 11) * 2.0**-53 for head in heads])


@dataclass(frozen=True, eq=False)
class Conformal:
    """A calibrated rule: every calibration score is kept (float32, sorted), so that any alpha is exact."""

    rule: Rule
    scores: NDArray[np.float32]

    @classmethod
    def calibrate(cls, p: Floats, labels: NDArray[np.int64], rule: Rule, u: Floats | None = None) -> Conformal:
        """From probabilities (N, K) and labels (N,) that chose nothing else, temperature included."""
        if not len(labels):
            raise ValueError("conformal calibration needs at least one row")
        return cls(rule, np.sort(rule.strangeness(p, u)[np.arange(len(labels)), labels]))

    @property
    def smallest_alpha(self) -> float:
        """Below this the calibration rows are too few: the only valid set is all classes."""
        return 1.0 / (len(self.scores) + 1)

    def threshold(self, alpha: float | Floats) -> NDArray[np.float32]:
        """The ceil((n + 1)(1 - alpha))-th smallest calibration score, infinite where that exceeds n; () or (N,).

        Raises:
            UserError: alpha is not strictly between 0 and 1.
        """
        a = np.asarray(alpha, dtype=np.float64)
        if not ((a > 0.0) & (a < 1.0)).all():
            raise UserError(f"alpha must lie strictly between 0 and 1, got {alpha}", "alpha")
        n = len(self.scores)
        # (n + 1) * 0.9 may come out a rounding error above the integer that it is.
        k = np.ceil((n + 1) * (1.0 - a) - 1e-9).astype(np.int64)
        found = np.append(self.scores, np.float32(np.inf))[np.clip(k, 1, n + 1) - 1]
        return np.asarray(found, dtype=np.float32)

    def sets(self, p: Floats, alpha: float | Floats, u: Floats | None = None) -> NDArray[np.bool_]:
        """Membership (N, K) at one alpha or one per row (N,); randomised sets can be empty."""
        inside = self.rule.strangeness(p, u) <= self.threshold(alpha)[..., None]
        return np.asarray(inside, dtype=np.bool_)

    def to_json(self) -> dict[str, Any]:
        """Plain values; scores as base64 of little-endian float32, four bytes a row."""
        packed = base64.b64encode(self.scores.astype("<f4").tobytes()).decode()
        return {**asdict(self.rule), "scores": packed}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Conformal:
        """The inverse of `to_json`.

        Raises:
            UserError: a field is missing or scores are not sorted numbers.
        """
        try:
            rule = Rule(float(found["penalty"]), int(found["free"]), bool(found["randomised"]))
            scores = np.frombuffer(base64.b64decode(found["scores"], validate=True), dtype="<f4").astype(np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"conformal: {error}; calibrate the model again") from error
        if not len(scores) or not (np.isfinite(scores).all() and (np.diff(scores) >= 0).all()):
            raise UserError("conformal: scores must be finite and sorted; calibrate the model again")
        return cls(rule, scores)


@dataclass(frozen=True)
class Coverage:
    """What sets did on rows with known labels: share that held the class, mean size, share of empty sets."""

    covered: float
    size: float
    empty: float
    se: float = math.nan


def measure(sets: NDArray[np.bool_], labels: NDArray[np.int64]) -> Coverage:
    """Of sets (N, K); `se` is the binomial standard error of `covered`."""
    covered, sizes = float(sets[np.arange(len(labels)), labels].mean()), sets.sum(-1)
    se = math.sqrt(covered * (1.0 - covered) / len(labels))
    return Coverage(covered, float(sizes.mean()), float((sizes == 0).mean()), se)


def repeated_splits(
    p: Floats, labels: NDArray[np.int64], rule: Rule, alpha: float, calibration: int, splits: int = 20, seed: int = 0
) -> Coverage:
    """Mean over random splits of rows (N, K): `calibration` rows calibrate, the others are measured.

    `se` is that of the mean over splits; splits share rows, so it is a lower bound of the error over fresh data.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(splits):
        order, u = rng.permutation(len(p)), rng.random(len(p)) if rule.randomised else None
        a, b = order[:calibration], order[calibration:]
        fitted = Conformal.calibrate(p[a], labels[a], rule, None if u is None else u[a])
        found.append(measure(fitted.sets(p[b], alpha, None if u is None else u[b]), labels[b]))
    covered, size, empty = (float(np.mean([getattr(c, key) for c in found])) for key in ("covered", "size", "empty"))
    se = float(np.std([c.covered for c in found], ddof=1) / math.sqrt(splits))
    return Coverage(covered, size, empty, se)
