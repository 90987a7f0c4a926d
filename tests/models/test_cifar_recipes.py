"""The CIFAR-10 recipes: networks of the published size, and a dry run of a few steps that loads as a classifier."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.api import UserError
from models.backbones.bridge import BridgeNetwork, InvertedResidual
from models.backbones.macs import count_macs
from models.backbones.resnet import BasicBlock, FilterResponseNorm, ResNet, ResNetConfig
from models.store import ZOO, read_config
from models.tasks.classifier import load_classifier, load_members, to_pixels
from models.training.bridge import BridgeRecipe, Run, train_all, train_run
from models.training.data import DataError, Split, Splits, read_folder
from models.training.loop import Optim
from models.training.members import MembersRecipe, augment, train_members
from models.training.recipe import read_recipe
from models.training.serving import Served, write_bridge
from models.training.transfer import build

RECIPES = Path(__file__).parents[2] / "models" / "training" / "recipes"
ENSEMBLE = read_recipe(RECIPES / "cifar-ensemble.toml", MembersRecipe)
BRIDGE = read_recipe(RECIPES / "cifar-bridge.toml", BridgeRecipe)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_a_member_has_the_published_size():
    """ResNet-32x2 FRN-Swish: 271.0M MACs, 1.861M parameters."""
    member, x = ResNet(ENSEMBLE.network), torch.zeros(1, 3, 32, 32)
    assert member.tap(x).shape == (1, 32, 32, 32)
    assert count_macs(member, lambda: member(x)) == pytest.approx(271.0e6, abs=0.05e6)
    assert parameters(member) == pytest.approx(1.861e6, abs=0.5e3)


def test_a_bridge_has_the_published_size():
    """42.7M MACs, 0.396M parameters: ours embed the step before every block, not before every stage (-0.7k)."""
    bridge, tap = BridgeNetwork(BRIDGE.network), torch.zeros(1, 32, 32, 32)
    assert tap.shape[1] == BRIDGE.network.tap_channels
    step, z = torch.ones(1, dtype=torch.int64), torch.zeros(1, 10)
    assert count_macs(bridge, lambda: bridge(tap, z, step)) == pytest.approx(42.7e6, abs=0.1e6)
    assert parameters(bridge) == pytest.approx(0.396e6, abs=2e3)


def test_filter_response_norm_divides_by_the_root_mean_square_and_cuts_off():
    norm, x = FilterResponseNorm(2), torch.randn(3, 2, 5, 5, dtype=torch.float64).float() * 7
    with torch.no_grad():
        norm.threshold.fill_(-1e9)
        norm.bias.copy_(torch.tensor([0.0, 2.0]))
        y = norm(x)
        torch.testing.assert_close(y[:, 0].square().mean((1, 2)), torch.ones(3))
        torch.testing.assert_close(y[0, 1], x[0, 1] / x[0, 1].square().mean().sqrt() + 2)
        norm.threshold.copy_(torch.tensor([0.5, -0.5]))
        torch.testing.assert_close(norm(x), torch.maximum(y, norm.threshold[:, None, None]))
        assert norm(x.bfloat16()).dtype == torch.float32


def test_frn_members_do_not_see_the_rest_of_the_batch():
    torch.manual_seed(0)
    member, x = ResNet(dataclasses.replace(ENSEMBLE.network, width=8, blocks=1)).train(), torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(member(x)[:1], member(x[:1]))


def test_blocks_end_in_the_activation_asked_for():
    x = torch.randn(2, 4, 6, 6)
    assert BasicBlock(4, 8, 1)(x).amin() == 0
    assert BasicBlock(4, 8, 1, activation="swish")(x).amin() < 0


def test_shipped_members_are_computed_as_before_there_were_options():
    """BatchNorm, ReLU, bias-free, one mean and one deviation: written out, bit for bit."""
    member, x = load_members(ZOO / "fashion-ensemble")[0], torch.rand(8, 1, 28, 28)
    assert "mean" not in member.state_dict()
    h = F.relu(member.stem_norm(F.conv2d((x - 0.286) / 0.353, member.stem.weight, None, 2, 1)))
    for block, stride in ((member.first, 1), *((b, 2) for b in member.rest)):
        assert isinstance(block, BasicBlock)
        inner = F.relu(block.norm1(F.conv2d(h, block.conv1.weight, None, stride, 1)))
        h = F.relu(block.norm2(F.conv2d(inner, block.conv2.weight, None, 1, 1)) + block.shortcut(h))
    assert torch.equal(member(x), member.fc(h.mean(dim=(2, 3))))


def test_every_channel_is_standardised_by_its_own_numbers():
    member = ResNet(ENSEMBLE.network)
    x = torch.tensor([0.49, 0.48, 0.44])[None, :, None, None].expand(1, 3, 8, 8)
    torch.testing.assert_close((x - member.mean) / member.std, torch.zeros(1, 3, 8, 8))


def test_he_normal_starts_convolutions_with_variance_two_over_fan_in():
    torch.manual_seed(0)
    conv = ResNet(ENSEMBLE.network).rest[-1].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert not conv.bias.any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"norm": "layer"}, "norm"), ({"activation": "gelu"}, "activation"), ({"mean": [0.5, 0.5]}, "mean")],
)
def test_shapes_that_do_not_fit_are_named(changes, says):
    with pytest.raises(UserError, match=f"network {says} must be"):
        ResNetConfig(**{"channels": 3} | changes)


def test_a_block_that_widens_nothing_has_no_first_convolution():
    assert [m.kernel_size for m in InvertedResidual(8, 8, 1, 1).body if isinstance(m, torch.nn.Conv2d)] == [
        (3, 3),
        (1, 1),
    ]
    assert sum(isinstance(m, torch.nn.Conv2d) for m in InvertedResidual(8, 8, 1, 2).body) == 3


def test_augment_mirrors_half_of_the_images():
    torch.manual_seed(0)
    x = torch.arange(6.0).expand(400, 1, 4, 6)
    found = augment(x, 0, flip=True)
    mirrored = [bool((image == x[0].flip(2)).all()) for image in found]
    assert all(m or bool((image == x[0]).all()) for m, image in zip(mirrored, found, strict=True))
    assert 160 < sum(mirrored) < 240
    assert augment(x, 0, flip=False) is x


def test_image_folders_refuse_what_does_not_fit(tmp_path):
    from PIL import Image

    for name, shape in (("cat", (8, 8, 3)), ("dog", (8, 9, 3))):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / name / "0.png")
    with pytest.raises(DataError, match="has shape"):
        read_folder(tmp_path)
    (tmp_path / "dog" / "0.png").write_text("not an image")
    with pytest.raises(DataError, match=r"0\.png is not an image"):
        read_folder(tmp_path)


def test_a_dry_run_loads_as_a_classifier(tmp_path):
    """Both recipes, shrunk to three steps of a small batch; networks, augmentation and options stay as they are."""
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), np.arange(24) % 10)
    recipe = dataclasses.replace(ENSEMBLE, members=2, images=16, optim=shrunk(ENSEMBLE.optim))
    train_members(recipe, Splits(split, split, split, split), tmp_path)
    folder = tmp_path / ENSEMBLE.name
    members, made_config = load_members(folder), read_config(folder)

    transfer = dataclasses.replace(BRIDGE.transfer, rows=24)
    cache = build(transfer, members, split.images, split.images[:0], lambda: split.images[:0])
    assert cache.taps.shape == (24, 32, 32, 32)
    recipe = dataclasses.replace(BRIDGE, optim=shrunk(BRIDGE.optim), transfer=transfer)
    run = Run("bridge-1", "bridge", 1, (0, 1))
    done = train_run(run, recipe, cache, tmp_path / "runs")
    assert np.isfinite(done.loss)
    served = {"bridge": Served(("bridge-1",), 1, 0.0, 1.0, 0.0)}
    write_bridge(tmp_path / BRIDGE.name, recipe, made_config, [run], {"bridge-1": done.ema}, served)

    classifier = load_classifier(folder)
    assert classifier.config["image"] == [32, 32, 3]
    costs = classifier.costs()
    assert (costs["single"], costs["ensemble"]) == (1.0, 2.0)
    assert costs["bridge"] == pytest.approx(1.158, abs=1e-3)
    assert bool(torch.isfinite(classifier.members[1](to_pixels(split.images))).all())


def shrunk(optim: Optim) -> Optim:
    return dataclasses.replace(optim, steps=3, batch=8, warmup=1)


def test_taps_that_are_not_kept_are_made_anew(tmp_path):
    """The same pixels and logits, the same taps up to their rounding to float16, and so the same training."""
    torch.manual_seed(0)
    shape = dataclasses.replace(ENSEMBLE.network, width=8, blocks=1)
    members = [ResNet(shape).eval().requires_grad_(False) for _ in range(2)]
    images = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    transfer = dataclasses.replace(BRIDGE.transfer, rows=30)
    kept, bare = (build(transfer, members, images, images[:0], lambda: images[:0], most) for most in (1 << 20, 0))
    assert (len(kept.taps), len(bare.taps)) == (30, 0)
    for name in ("pixels", "features", "logits"):
        assert torch.equal(getattr(kept, name), getattr(bare, name))
    rows = torch.tensor([3, 29, 0])
    for mine, other in zip(kept.see(rows), bare.see(rows), strict=True):
        torch.testing.assert_close(mine, other, rtol=2**-10, atol=1e-4)
    torch.testing.assert_close(kept.see(slice(4, 9)), bare.see(slice(4, 9)), rtol=2**-10, atol=1e-4)

    network = dataclasses.replace(BRIDGE.network, tap_channels=8, widths=(8, 8), strides=(1, 2), expands=(1, 2))
    gentle = Optim(steps=4, batch=8, lr=0.01, warmup=0, algorithm="sgd")
    recipe = dataclasses.replace(BRIDGE, network=network, optim=gentle, distill=gentle, bf16=False)
    runs = [Run("bridge-1", "bridge", 1, (0, 1)), Run("distilled-1", "distilled", 1, (0, 1))]
    ends = [train_all(recipe, runs, cache, {}, tmp_path / str(len(cache.taps))) for cache in (kept, bare)]
    for run in runs:
        mine, other = (end[run.name].ema.state_dict() for end in ends)
        for name in mine:
            torch.testing.assert_close(mine[name], other[name], rtol=1e-3, atol=1e-4)
    assert not members[0].training
