"""Distance in feature space: Gaussians against closed forms, and the study at toy size."""

import numpy as np
import pytest
import torch

from models.backbones.resnet import ResNet, ResNetConfig
from models.evaluation.distances import layers, measure
from models.training.data import Split
from models.uncertainty.gaussians import Gaussians


def two_classes(n=20_000):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    scale = np.array([[1.0, 2.0], [3.0, 0.5]])[labels]
    return np.array([[0.0, 0.0], [10.0, 0.0]])[labels] + scale * rng.normal(size=(n, 2)), labels


def test_the_distance_is_the_negative_log_density_of_the_nearest_class():
    features, labels = two_classes()
    found = Gaussians.fit(features, labels, shared=False)
    at = np.array([[0.0, 0.0], [1.0, 2.0], [10.0, 0.5]])
    log_det = 2 * np.log(2.0), 2 * np.log(1.5)
    expected = [log_det[0] / 2, log_det[0] / 2 + 1.0, log_det[1] / 2 + 0.5]
    assert found.distance(at) == pytest.approx(expected, abs=0.06)


def test_a_shared_covariance_is_that_within_classes():
    features, labels = two_classes()
    found = Gaussians.fit(features, labels, shared=True)
    covariance = np.linalg.inv(found.factors[0] @ found.factors[0].T)
    assert np.diag(covariance) == pytest.approx([(1 + 9) / 2, (4 + 0.25) / 2], rel=0.05)
    assert (found.factors[0] == found.factors[1]).all()


def test_far_images_are_flagged_and_near_ones_are_not():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    source = ResNet(ResNetConfig(classes=2, width=8)).eval()

    def split(n, low, high):
        return Split(rng.integers(low, high, (n, 28, 28, 1), dtype=np.uint8), np.arange(n) % 2)

    rows = measure(source, split(400, 80, 120), split(200, 80, 120), split(200, 80, 120), split(100, 0, 256))
    assert {row[0] for row in rows} == set(layers(source, split(2, 0, 9).images))
    for *_, test, foreign in rows:
        assert test < 0.25
        assert foreign > 0.9
