import numpy as np
import pytest
import torch

from models.backbones.bridge import BridgeConfig, BridgeNetwork
from models.backbones.macs import count_macs
from models.backbones.resnet import ResNet, ResNetConfig
from models.bridge.process import BETA, posterior_mean, sample_between, sample_temperature, source, target
from models.bridge.sample import run_bridge


class Exact(torch.nn.Module):
    """The network that knows the end point: u = (Z_tau - Z_0) / tau."""

    def __init__(self, z0, steps):
        super().__init__()
        self.z0, self.config = z0, BridgeConfig(steps=steps)

    def forward(self, tap, z, step, features=None):
        return (z - self.z0) / (step[:, None] / self.config.steps)


def test_target_is_the_ensemble():
    z = torch.randn(8, 3, 5, dtype=torch.float64)
    assert torch.allclose(target(z).softmax(-1), z.softmax(-1).mean(1))
    assert torch.allclose(target(z).mean(-1), torch.zeros(8, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_exact_network_reaches_the_ensemble_in_any_number_of_steps(steps):
    z0, logits = torch.randn(4, 10), torch.randn(4, 10)
    for evaluations in {1, steps}:
        out = run_bridge(Exact(z0, steps), torch.zeros(4, 1, 1, 1), logits, evaluations, 2.0)
        torch.testing.assert_close(out, z0, rtol=1e-4, atol=1e-4)


def test_other_evaluations_are_refused():
    with pytest.raises(ValueError, match="1 or 5"):
        run_bridge(Exact(torch.zeros(1, 10), 5), torch.zeros(1, 1, 1, 1), torch.zeros(1, 10), 3, 2.0)


def test_bridge_ends_at_both_ends():
    z0, z1 = torch.randn(2, 6, 10)
    assert torch.equal(sample_between(z0, z1, torch.ones(6, 1)), z1)
    near = sample_between(z0, z1, torch.full((6, 1), 1e-6))
    torch.testing.assert_close(near, z0, atol=1e-3, rtol=0)


def test_bridge_variance():
    torch.manual_seed(0)
    zero = torch.zeros(200_000, 1)
    found = sample_between(zero, zero, torch.full((200_000, 1), 0.3)).var().item()
    assert found == pytest.approx(BETA * 0.3 * 0.7, rel=0.02)


def test_posterior_mean_walks_the_straight_line():
    z0, z1, steps = torch.randn(1, 10), torch.randn(1, 10), 5
    z = z1
    for n in range(steps, 0, -1):
        at = torch.tensor([[float(n)]])
        z = posterior_mean(z, (z - z0) / (n / steps), at, steps)
        torch.testing.assert_close(z, z0 + (n - 1) / steps * (z1 - z0), atol=1e-5, rtol=1e-4)


def test_softening_temperature_has_the_stated_law():
    torch.manual_seed(0)
    s = sample_temperature(100_000)
    assert s.min() >= 2.0
    assert s.max() <= 2.4
    assert s.mean().item() == pytest.approx(2 + 0.4 / 6, abs=2e-3)
    assert s.std().item() == pytest.approx(0.4 * (5 / (36 * 7)) ** 0.5, rel=0.03)


def test_source_is_centred_and_softened():
    z = torch.tensor([[1.0, 3.0]])
    assert source(z, 2.0).tolist() == [[-0.5, 0.5]]


def test_the_source_network_shares_its_tap():
    torch.manual_seed(0)
    member = ResNet(ResNetConfig()).eval()
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(member.fc(member.features(member.tap(x))), member(x))


def test_macs_by_hand():
    layer = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(48, 5))
    assert count_macs(layer, lambda: layer(torch.zeros(1, 2, 4, 4))) == 3 * 16 * 9 * 2 + 48 * 5


def test_bridge_cost_stays_within_the_bar():
    member, bridge = ResNet(ResNetConfig()).eval(), BridgeNetwork(BridgeConfig(logits=True)).eval()
    x = torch.zeros(1, 1, 28, 28)
    heavy = count_macs(member, lambda: member(x))
    light = count_macs(bridge, lambda: bridge(member.tap(x), torch.zeros(1, 10), torch.ones(1, dtype=torch.int64)))
    assert 1 + light / heavy <= 1.25


def test_one_batch_serves_rows_at_different_steps():
    torch.manual_seed(0)
    bridge = BridgeNetwork(BridgeConfig()).eval()
    for table in bridge.time:
        torch.nn.init.normal_(table.weight)
    torch.nn.init.normal_(bridge.fc.weight)
    tap, z, n = torch.randn(4, 24, 14, 14), torch.randn(4, 10), torch.tensor([1, 5, 3, 5])
    together = bridge(tap, z, n)
    for i in range(4):
        torch.testing.assert_close(
            bridge(tap[i : i + 1], z[i : i + 1], n[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5
        )
    assert not np.allclose(together[1].detach(), bridge(tap[1:2], z[1:2], torch.tensor([2]))[0].detach())
