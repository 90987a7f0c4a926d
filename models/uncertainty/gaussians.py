"""Gaussians over features, one a class: how far an image lies from all that the classes hold. Numpy only.

Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks" (NeurIPS
2018): the score is the least negative log density over classes. Here with one covariance for all classes, as there, or
with one each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RIDGE = 1e-6


@dataclass(frozen=True, eq=False)
class Gaussians:
    """One a class: means (C, D), whitening factors (C, D, D), log determinants (C,)."""

    means: Floats
    factors: Floats
    log_det: Floats

    @classmethod
    def fit(cls, features: Floats, labels: NDArray[np.int64], shared: bool) -> Gaussians:
        """From features (N, D); `shared`: one covariance, within classes, for all of them."""
        classes = np.unique(labels)
        means = np.stack([features[labels == k].mean(0) for k in classes])
        centred = features - means[np.searchsorted(classes, labels)]
        groups = [centred] * len(classes) if shared else [centred[labels == k] for k in classes]
        eye = RIDGE * np.eye(features.shape[1])
        factors = np.stack([np.linalg.cholesky(np.linalg.inv(g.T @ g / len(g) + eye)) for g in groups])
        return cls(means, factors, -2.0 * np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1))

    def distance(self, features: Floats) -> Floats:
        """Least negative log density over classes (N,), in nats, but for a constant."""
        each = zip(self.means, self.factors, self.log_det, strict=True)
        return np.min([0.5 * (np.square((features - m) @ f).sum(1) + d) for m, f, d in each], axis=0)
