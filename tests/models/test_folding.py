"""BatchNorm folded into convolutions: the same function, and none is left."""

import copy

import pytest
import torch
from torch import nn

from models.backbones.bridge import BridgeNetwork
from models.backbones.folding import fold
from models.backbones.resnet import ResNet
from models.backends.interface import relative_error
from tests.models.classifiers import LIGHT, SHAPE, lively


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("kind", ["resnet", "bridge"])
def test_folded_networks_are_the_same_function(kind):
    torch.manual_seed(0)
    network = lively(ResNet(SHAPE) if kind == "resnet" else BridgeNetwork(LIGHT))
    x = (torch.rand(4, 1, 28, 28),) if kind == "resnet" else (torch.rand(4, 8, 14, 14), torch.randn(4, 3))
    given = x if kind == "resnet" else (*x, torch.tensor([1, 2, 4, 5]))
    folded = fold(copy.deepcopy(network))
    assert norms(network)
    assert not norms(folded)
    with torch.no_grad():
        assert relative_error(folded(*given), network(*given)) < 1e-5


def test_a_bias_is_kept_and_other_norms_are_left():
    torch.manual_seed(0)
    network = lively(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    folded, x = fold(copy.deepcopy(network)), torch.randn(2, 2, 5, 5)
    assert len(norms(folded)) == 1
    with torch.no_grad():
        assert relative_error(folded(x), network(x)) < 1e-5


def test_a_norm_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="BatchNorm of 4 channels after a convolution to 3"):
        fold(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(4)))
