"""`offramp import --from dit|uvit`: .pt files in the layouts of the original repositories, against plain readings."""

import argparse
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from models.api import GenerateWork, Runtime, UserError
from models.importing.cli import Format, Told, app, read
from models.importing.folder import write
from models.solvers.noise import normal
from models.store import read_config
from models.tasks.generator import load, load_model
from tests.models.pipelines import random_vae

WIDTH, HEADS, SIDE = 32, 4, 4
TOLD = Told(heads=HEADS)


def random_state(shapes):
    generator = torch.Generator().manual_seed(3)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layers(**shapes):
    """Weight and bias shapes of linear layers, given as (out, in)."""
    found = {}
    for name, (rows, columns) in shapes.items():
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, columns), (rows,)
    return found


def block_shapes(prefix, qkv_bias=True):
    shapes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    shapes |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    found = layers(**{f"{prefix}.{name}": shape for name, shape in shapes.items()})
    if not qkv_bias:
        del found[f"{prefix}.attn.qkv.bias"]
    return found


def fixed_positions():
    """DiT's table: sines then cosines of the column, then of the row."""
    quarter = WIDTH // 4
    freq = [10_000 ** (-i / quarter) for i in range(quarter)]
    axis = lambda p: [math.sin(p * f) for f in freq] + [math.cos(p * f) for f in freq]  # noqa: E731
    return torch.tensor([[axis(column) + axis(row) for row in range(SIDE) for column in range(SIDE)]])


def dit_state(channels=4, patch=2, depth=3, classes=6, learned=True):
    shapes = {"x_embedder.proj.weight": (WIDTH, channels, patch, patch), "x_embedder.proj.bias": (WIDTH,)}
    shapes |= {"y_embedder.embedding_table.weight": (classes + 1, WIDTH)}
    out = (2 if learned else 1) * channels * patch**2
    shapes |= layers(
        **{"t_embedder.mlp.0": (WIDTH, 256), "t_embedder.mlp.2": (WIDTH, WIDTH)},
        **{"final_layer.linear": (out, WIDTH), "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)},
    )
    for i in range(depth):
        shapes |= block_shapes(f"blocks.{i}") | layers(**{f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH)})
    return random_state(shapes) | {"pos_embed": fixed_positions()}


def uvit_state(channels=3, patch=2, encoder=2, labels=0, conv=True, time_mlp=False):
    extras = 2 if labels else 1
    shapes = {"patch_embed.proj.weight": (WIDTH, channels, patch, patch), "patch_embed.proj.bias": (WIDTH,)}
    shapes |= {"pos_embed": (1, extras + SIDE**2, WIDTH)}
    if labels:
        shapes |= {"label_emb.weight": (labels, WIDTH)}
    if time_mlp:
        shapes |= layers(**{"time_embed.0": (4 * WIDTH, WIDTH), "time_embed.2": (WIDTH, 4 * WIDTH)})
    names = [f"in_blocks.{i}" for i in range(encoder)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(encoder)]
    for name in names:
        shapes |= block_shapes(name, qkv_bias=False)
        for norm in ("norm1", "norm2"):
            shapes |= {f"{name}.{norm}.weight": (WIDTH,), f"{name}.{norm}.bias": (WIDTH,)}
        if name.startswith("out"):
            shapes |= layers(**{f"{name}.skip_linear": (WIDTH, 2 * WIDTH)})
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)} | layers(decoder_pred=(patch**2 * channels, WIDTH))
    if conv:
        shapes |= {"final_layer.weight": (channels, channels, 3, 3), "final_layer.bias": (channels,)}
    return random_state(shapes)


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attention(w, name, x):
    n, tokens, _ = x.shape
    q, k, v = linear(w, f"{name}.qkv", x).reshape(n, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    return linear(w, f"{name}.proj", (weights @ v).transpose(1, 2).reshape(x.shape))


def sinusoids(t, dim):
    angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], 1)


def unpatchified(x, patch):
    """Tokens of (p, p, channel) to pictures."""
    n, channels = len(x), x.shape[2] // patch**2
    x = x.reshape(n, SIDE, SIDE, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(n, channels, SIDE * patch, SIDE * patch)


def dit_forward(w, x, t, y, patch=2, depth=3):
    """Peebles & Xie (2023), adaLN-Zero, read off the state dict."""
    norm = lambda h: F.layer_norm(h, (WIDTH,), eps=1e-6)  # noqa: E731
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch).flatten(2).mT + w["pos_embed"]
    time = linear(w, "t_embedder.mlp.2", F.silu(linear(w, "t_embedder.mlp.0", sinusoids(t, 256))))
    c = F.silu(time + w["y_embedder.embedding_table.weight"][y])
    for i in range(depth):
        m = linear(w, f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        h = h + m[2] * attention(w, f"blocks.{i}.attn", norm(h) * (1 + m[1]) + m[0])
        inner = F.gelu(linear(w, f"blocks.{i}.mlp.fc1", norm(h) * (1 + m[4]) + m[3]), approximate="tanh")
        h = h + m[5] * linear(w, f"blocks.{i}.mlp.fc2", inner)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    return unpatchified(linear(w, "final_layer.linear", norm(h) * (1 + scale) + shift), patch)


def uvit_forward(w, x, t, y, patch=2, encoder=2):
    """Bao et al. (2023), read off the state dict."""
    norm = lambda name, h: F.layer_norm(h, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    h = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch).flatten(2).mT
    time = sinusoids(t, WIDTH)
    if "time_embed.0.weight" in w:
        time = linear(w, "time_embed.2", F.silu(linear(w, "time_embed.0", time)))
    extras = [w["label_emb.weight"][y]] if "label_emb.weight" in w else []
    extras.append(time)
    h = torch.cat([*(extra[:, None] for extra in extras), h], 1) + w["pos_embed"]

    def block(name, h):
        h = h + attention(w, f"{name}.attn", norm(f"{name}.norm1", h))
        return h + linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", norm(f"{name}.norm2", h))))

    skips = []
    for i in range(encoder):
        h = block(f"in_blocks.{i}", h)
        skips.append(h)
    h = block("mid_block", h)
    for i in range(encoder):
        h = block(f"out_blocks.{i}", linear(w, f"out_blocks.{i}.skip_linear", torch.cat([h, skips.pop()], -1)))
    out = unpatchified(linear(w, "decoder_pred", norm("norm", h))[:, len(extras) :], patch)
    return (
        F.conv2d(out, w["final_layer.weight"], w["final_layer.bias"], padding=1) if "final_layer.weight" in w else out
    )


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    random_vae().save_pretrained(folder)
    return folder


def imported(tmp_path, form, content, told):
    torch.save(content, tmp_path / "checkpoint.pt")
    write(read(tmp_path / "checkpoint.pt", form, told), tmp_path / "m", "toy", "test")
    return load_model(tmp_path / "m")


CASES = {
    "dit latents": (Format.dit, {}),
    "dit pixels": (Format.dit, {"channels": 3, "patch": 4, "learned": False}),
    "uvit pixels": (Format.uvit, {}),
    "uvit labels, patch 4": (Format.uvit, {"labels": 7, "patch": 4, "time_mlp": True}),
    "uvit latents": (Format.uvit, {"channels": 4, "labels": 7, "conv": False}),
}
STATES = {Format.dit: (dit_state, dit_forward), Format.uvit: (uvit_state, uvit_forward)}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_network_is_the_checkpoints(case, tmp_path, vae):
    form, shape = CASES[case]
    make, forward = STATES[form]
    state = make(**shape)
    latent = shape.get("channels", 4 if form is Format.dit else 3) == 4
    told = Told(heads=HEADS, vae=vae if latent else None)
    model, config, _ = imported(tmp_path, form, state, told)
    t, y = torch.tensor([0.0, 300.0, 998.0]), torch.tensor([0, 5, max(model.null_label, 0)])
    x = torch.randn(3, *model.row_shape)
    seen = t + 1 if form is Format.uvit and latent else t  # U-ViT counts its 1000 times from 1
    expected = forward(state, x, seen, y, patch=shape.get("patch", 2))
    output, _ = model(x, model.condition(t, y), [model.depth] * 3)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert model.null_label == (6 if form is Format.dit or shape.get("labels") else 0)
    assert len(config["labels"]) == max(1, model.null_label)


def test_what_the_original_sampler_does_is_in_the_folder(tmp_path, vae):
    _, config, _ = imported(tmp_path, Format.dit, dit_state(), Told(heads=HEADS, vae=vae))
    task = load(tmp_path / "m", 2, "cpu", Runtime())
    gear = task.gears["full"]
    assert (config["guided_channels"], config["network"]["learned_variance"]) == (3, True)
    assert (gear.solver, gear.steps, gear.guidance) == ("ddpm", 250, 4.0)
    assert gear.solver_options.variance == "learned_range"


def ancestral(state, x, label, steps, scale, noise):
    """DDPM, evenly spaced, with learned variance (Nichol & Dhariwal, 2021), the first three channels guided."""
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    times = torch.linspace(0, 999, steps).round().long().tolist()
    for i in reversed(range(steps)):
        here, there = signal[times[i]], signal[times[i - 1]] if i else torch.tensor(1.0)
        t, labels = torch.full((2,), float(times[i])), torch.tensor([label, 6])
        output = dit_forward(state, torch.cat([x, x]).float(), t, labels).double()
        plain, epsilon, v = output[1:, :3], output[:1, :4], output[:1, 4:]
        epsilon = torch.cat([plain + scale * (epsilon[:, :3] - plain), epsilon[:, 3:]], 1)
        beta = 1 - here / there
        clean = (x - (1 - here).sqrt() * epsilon) / here.sqrt()
        x = there.sqrt() * beta / (1 - here) * clean + (here / there).sqrt() * (1 - there) / (1 - here) * x
        if i:
            share, least = (v + 1) / 2, (beta * (1 - there) / (1 - here)).log()
            x = x + (0.5 * (share * beta.log() + (1 - share) * least)).exp() * noise(steps - 1 - i)
    return x


@torch.no_grad()
def test_samples_are_those_of_the_original_dit(tmp_path, vae):
    state, seed, steps = dit_state(), 11, 7
    imported(tmp_path, Format.dit, state, Told(heads=HEADS, vae=vae))
    task = load(tmp_path / "m", 2, "cpu", Runtime())
    work = GenerateWork(
        **{"model": "toy", "labels": (2,), "seeds": (seed,), "steps": steps, "solver": "ddpm", "gear": "full"},
        **{"guidance": 2.5, "solver_options": task.gears["full"].solver_options},
    )
    for _ in range(task.admit(work, [0], [1])[0]):
        task.step([1])

    def noise(evaluation):
        return normal(torch.tensor([seed]), torch.tensor([evaluation]), (4, 8, 8)).double()

    expected = ancestral(state, noise(-1), 2, steps, 2.5, noise).float()
    torch.testing.assert_close(task.pool.x[1:2], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_an_imported_checkpoint_draws(case, tmp_path, vae):
    form, shape = CASES[case]
    latent = shape.get("channels", 4 if form is Format.dit else 3) == 4
    imported(tmp_path, form, STATES[form][0](**shape), Told(heads=HEADS, vae=vae if latent else None))
    task = load(tmp_path / "m", 2, "cpu", Runtime())
    gear = task.gears["full"]
    work = GenerateWork(
        **{"model": "toy", "labels": (0,), "seeds": (4,), "steps": 4, "solver": gear.solver, "gear": "full"},
        **{"guidance": gear.guidance, "solver_options": gear.solver_options},
    )
    for _ in range(task.admit(work, [0], [1])[0]):
        task.step([1])
    row = task.collect([1])[0]
    assert row.pixels.shape == task.info.image
    assert torch.isfinite(task.pool.x[1]).all()
    assert row.pixels.std() > 0


@torch.no_grad()
def test_a_table_without_a_null_label_gets_one_and_says_so(tmp_path):
    """U-ViT's ImageNet-64 models: every row is a class."""
    told = Told(heads=HEADS, classes=7)
    model, config, _ = imported(tmp_path, Format.uvit, uvit_state(labels=7), told)
    assert (model.null_label, len(config["labels"])) == (7, 7)
    assert "guidance stays at 1" in config["description"]
    assert config["guided_channels"] == 0
    assert not model.labels.weight[7].any()
    assert torch.equal(model.labels.weight[:7], uvit_state(labels=7)["label_emb.weight"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"ema": state, "model": {name: value + 1 for name, value in state.items()}},
        lambda state: {"ema": state, "args": argparse.Namespace(lr=1e-4), "opt": {"step": torch.tensor(1)}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
    ],
    ids=["ema before model", "training checkpoint", "data parallel"],
)
def test_checkpoints_come_wrapped(tmp_path, wrap):
    for folder, content in (("plain", uvit_state()), ("wrapped", wrap(uvit_state()))):
        (tmp_path / folder).mkdir()
        imported(tmp_path / folder, Format.uvit, content, TOLD)
    plain, wrapped = (read_config(tmp_path / folder / "m")["files"] for folder in ("plain", "wrapped"))
    assert wrapped == plain


def test_the_source_keeps_its_precision(tmp_path):
    half = {name: value.half() for name, value in uvit_state().items()}
    imported(tmp_path, Format.uvit, half, TOLD)
    assert {value.dtype for value in load_file(tmp_path / "m/model.safetensors").values()} == {torch.float16}


class Harmful:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("form", "content", "told", "message"),
    [
        (Format.uvit, uvit_state(), Told(), "--heads"),
        (Format.uvit, uvit_state(), Told(heads=5), "--heads"),
        (Format.uvit, uvit_state(channels=4), TOLD, "--vae"),
        (Format.dit, dit_state(), TOLD, "--vae"),
        (Format.uvit, uvit_state(labels=7), Told(heads=HEADS, classes=3), "--classes"),
        (Format.uvit, without(uvit_state(), "mid_block.attn.qkv.weight"), TOLD, r"mid_block\.attn\.qkv\.weight"),
        (Format.uvit, uvit_state() | {"text.weight": torch.ones(1)}, TOLD, r"text\.weight"),
        (Format.uvit, dit_state(), TOLD, r"patch_embed\.proj\.weight"),
        (Format.dit, dit_state(channels=3) | {"pos_embed": torch.randn(1, SIDE**2, WIDTH)}, TOLD, "pos_embed"),
        (Format.uvit, uvit_state() | {"pos_embed": torch.randn(1, 12, WIDTH)}, TOLD, "no square"),
        (Format.uvit, {"step": 3}, TOLD, "no state dict"),
    ],
)
def test_what_does_not_fit_says_why(tmp_path, form, content, told, message):
    with pytest.raises(UserError, match=message):
        imported(tmp_path, form, content, told)
    assert not (tmp_path / "m").exists()


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    with pytest.raises(UserError, match="state dict alone"):
        imported(tmp_path, Format.uvit, {"weights": Harmful(tmp_path / "harm")}, TOLD)
    assert not (tmp_path / "harm").exists()


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.pt does not exist"):
        read(tmp_path / "gone.pt", Format.dit, TOLD)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt cannot be read"):
        read(tmp_path / "text.pt", Format.dit, TOLD)


def test_the_command_takes_a_checkpoint(tmp_path):
    torch.save(uvit_state(labels=7), tmp_path / "nnet_ema.pth")
    args = ["--from", "uvit", str(tmp_path / "nnet_ema.pth"), "--out", str(tmp_path / "celeb"), "--heads", str(HEADS)]
    result = CliRunner().invoke(app, [*args, "--classes", "7"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["model"] == "celeb"
    assert "null label" in result.output
    assert read_config(tmp_path / "celeb", "generator")["process"] == {"kind": "vpsde", "prediction": "epsilon"}
