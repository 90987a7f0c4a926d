"""Diffusion backbones: the contract over the registry, and U-ViT against a plain per-row reading of its paper."""

import importlib.util
import json
import math
import re

import pytest
import torch
from torch.nn import functional as F

from models.api import UserError
from models.backbones.dit import DiTConfig, sincos_2d
from models.backbones.interface import Backbone
from models.backbones.macs import count_macs
from models.registry import BACKBONES, resolve
from models.store import ZOO, read_config, read_tensors
from tests.models.backbone_contract import CONTRACT, randomised, rows
from tests.support import REPO

SMALL = {
    "dit": {
        "plain": {"image_size": 8, "patch": 2, "width": 16, "depth": 4, "heads": 2, "classes": 3, "time_features": 8},
        "imported": {
            "image_size": 8, "channels": 4, "patch": 2, "width": 16, "depth": 4, "heads": 2, "classes": 3,
            "time_features": 8, "time_scale": 1.0, "freq_shift": 1.0, "mlp_norm_eps": 1e-5, "positions": "columns",
            "learned_variance": True, "block_embedders": True,
        },
    },
    "uvit": {
        "pixels": {"image_size": 8, "width": 16, "depth": 7, "heads": 2},
        "middle first": {"image_size": 8, "width": 16, "depth": 7, "heads": 2, "drop_order": "middle"},
        "latents": {
            "image_size": 8, "channels": 4, "width": 16, "depth": 5, "heads": 2, "classes": 3, "conv": False,
            "time_mlp": True, "qkv_bias": True, "time_scale": 1.0, "time_offset": 1.0,
        },
    },
}  # fmt: skip
DIFFUSION = [name for name in BACKBONES if issubclass(resolve(BACKBONES, name), Backbone)]
CASES = [(name, network) for name in DIFFUSION for network in SMALL[name].values()]


def build(name, **network):
    return randomised(resolve(BACKBONES, name).from_config(network))


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "network"), CASES, ids=[f"{n}-{case}" for n in DIFFUSION for case in SMALL[n]])
def test_contract(name, network, check):
    check(build(name, **network))


def uvit_alone(model, x, t, label, depth):
    """One row through the formulas of the paper, from the weights alone; `depth` blocks run."""
    c, w = model.config, model.state_dict()
    half = c.depth // 2

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name, value):
        spread = ((value - value.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        return (value - value.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def residuals(b, tokens):
        q, k, v = linear(f"{b}.qkv", norm(f"{b}.norm1", tokens)).chunk(3, dim=-1)
        size = c.width // c.heads
        heads = [slice(h * size, (h + 1) * size) for h in range(c.heads)]
        seen = [torch.softmax(q[:, h] @ k[:, h].T / math.sqrt(size), dim=-1) @ v[:, h] for h in heads]
        tokens = tokens + linear(f"{b}.proj", torch.cat(seen, dim=-1))
        return tokens + linear(f"{b}.fc2", F.gelu(linear(f"{b}.fc1", norm(f"{b}.norm2", tokens))))

    angles = [(t * c.time_scale + c.time_offset) / 10_000 ** (i / (c.width // 2)) for i in range(c.width // 2)]
    time = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])
    if c.time_mlp:
        time = linear("time.2", F.silu(linear("time.0", time)))
    p, side = c.patch, c.image_size // c.patch
    cells = [(i, j) for i in range(side) for j in range(side)]
    patches = [linear("embed", x[:, i * p : i * p + p, j * p : j * p + p].reshape(-1)) for i, j in cells]
    extras = [w["labels.weight"][label], time] if c.classes else [time]
    tokens = torch.stack([*extras, *patches]) + w["positions"]
    skips = []
    for i in range(half):
        tokens = residuals(f"blocks.{i}", tokens)
        skips.append(tokens)
    tokens = residuals(f"blocks.{half}", tokens)
    kept = depth - half - 1
    runs = range(kept) if c.drop_order == "output" else range(half - kept, half)
    for j in range(half):
        tokens = linear(f"blocks.{half + 1 + j}.skip", torch.cat([tokens, skips.pop()], dim=-1))
        if j in runs:
            tokens = residuals(f"blocks.{half + 1 + j}", tokens)
    pixels = linear("head", norm("head_norm", tokens))[len(extras) :]
    image = torch.zeros(c.channels, c.image_size, c.image_size)
    for (i, j), patch in zip(cells, pixels, strict=True):
        image[:, i * p : i * p + p, j * p : j * p + p] = patch.view(c.channels, p, p)
    return F.conv2d(image[None], w["smooth.weight"], w["smooth.bias"], padding=1)[0] if c.conv else image


@pytest.mark.parametrize("network", SMALL["uvit"].values(), ids=SMALL["uvit"])
@torch.no_grad()
def test_uvit_is_the_papers_row_by_row(network):
    model = build("uvit", **network)
    n = 2 * len(model.ranks)
    x, t, label = torch.randn(n, *model.row_shape), torch.rand(n), torch.arange(n) % (model.null_label + 1)
    depths = sorted([*range(model.always, model.depth + 1)] * 2, reverse=True)[:n]
    output, _ = model(x, model.condition(t, label), depths)
    for i, depth in enumerate(depths):
        expected = uvit_alone(model, x[i], float(t[i]), int(label[i]), depth)
        torch.testing.assert_close(output[i], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("order", "lost"), [("output", 6), ("middle", 4)])
@torch.no_grad()
def test_a_dropped_decoder_block_keeps_its_skip_linear_and_nothing_else(order, lost):
    """One block short of full depth: residual weights of the dropped block do not matter, its skip linear does."""
    model = build("uvit", **SMALL["uvit"]["pixels"], drop_order=order)
    x, condition, _ = rows(model, 2)
    before, _ = model(x, condition, [6, 6])
    block = model.blocks[lost]
    for layer in (block.norm1, block.norm2, block.qkv, block.proj, block.fc1, block.fc2):
        layer.weight.add_(1.0)
    assert torch.equal(model(x, condition, [6, 6])[0], before)
    assert not torch.equal(model(x, condition, [7, 7])[0], before)
    block.skip.weight[0].add_(0.5)
    assert (model(x, condition, [6, 6])[0] - before).abs().max() > 1e-3


def test_uvit_drops_from_the_output_side_unless_told():
    assert build("uvit", **SMALL["uvit"]["pixels"]).ranks == (4, 5, 6)
    assert build("uvit", **SMALL["uvit"]["middle first"]).ranks == (6, 5, 4)


def test_a_dropped_uvit_block_saves_all_but_its_skip_linear():
    model = build("uvit", **SMALL["uvit"]["pixels"])
    x, condition, _ = rows(model, 1)
    macs = {d: count_macs(model, lambda d=d: model(x, condition, [d])) for d in range(4, 8)}
    tokens, width = 17, 16
    block, skip, patch, conv = 12 * width**2, 2 * width**2, 3 * 2 * 2 * width, 9 * 3 * 3
    for depth, count in macs.items():
        assert count == tokens * (depth * block + 3 * skip) + (16 + tokens) * patch + 64 * conv


@pytest.mark.parametrize(
    ("network", "named"), [({"depth": 12}, "depth"), ({"depth": 1}, "depth"), ({"drop_order": "both"}, "drop_order")]
)
def test_a_uvit_that_cannot_be_is_refused(network, named):
    with pytest.raises(UserError, match=named):
        build("uvit", **network)


def test_dit_positions_name_their_first_half():
    by_rows, by_columns = (sincos_2d(16, 3, first).view(3, 3, 16) for first in ("rows", "columns"))
    assert torch.equal(by_rows[1, 2], by_columns[2, 1])
    assert not torch.equal(by_rows[1, 2], by_columns[1, 2])
    assert torch.equal(by_rows[2, :, :8], by_rows[2, :1, :8].expand(3, 8))
    with pytest.raises(UserError, match="positions"):
        DiTConfig(positions="spiral")


@torch.no_grad()
def test_dit_block_embedders_modulate_their_own_block():
    model = build("dit", **SMALL["dit"]["imported"])
    t, label = torch.rand(2), torch.arange(2)
    before = model.condition(t, label)
    model.embedders[1].labels.weight.add_(1.0)
    changed = (model.condition(t, label) != before).any(0).nonzero().flatten()
    six = 6 * model.config.width
    assert set((changed // six).tolist()) == {2}
    model.labels.weight.add_(1.0)
    changed = (model.condition(t, label) != before).any(0).nonzero().flatten()
    assert set((changed // six).tolist()) == {0, 2, 4}


def test_fashion_dit_still_loads_and_is_what_it_was():
    """Imported checkpoints added options to DiT; the defaults are the network that ships."""
    folder = ZOO / "fashion-dit"
    config = read_config(folder, "generator")
    model = resolve(BACKBONES, config["backbone"]).from_config(config["network"])
    model.load_state_dict(read_tensors(folder, "model.safetensors", config["files"]), strict=True)
    assert (model.learned_variance, model.always, model.bypasses, len(model.embedders)) == (False, 0, False, 0)


@pytest.fixture(scope="module")
def mixer(tmp_path_factory):
    """The example of docs/add-a-backbone.md, taken from the page."""
    page = (REPO / "docs" / "add-a-backbone.md").read_text()
    path = tmp_path_factory.mktemp("docs") / "mixer.py"
    path.write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    spec = importlib.util.spec_from_file_location("mixer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = json.loads(re.search(r'"mixer": \{"plain": (\{.*?\})\}', page)[1])
    return lambda: randomised(module.Mixer.from_config(network))


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_the_example_of_the_docs_keeps_the_contract(mixer, check):
    check(mixer())
