"""Trainings in sessions: pauses, minutes, small checkpoints; and the sizes of the recipes that need a GPU."""

import copy
import dataclasses
import math

import pytest
import torch

from models.api import UserError
from models.backbones.dit import DiTConfig
from models.backbones.macs import count_macs
from models.backbones.uvit import UViT, UViTConfig
from models.store import ZOO, StoreError, read_config, read_tensors, write_model
from models.training import loop
from models.training.checkpoint import (
    CHECKPOINT,
    Progress,
    compact,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from models.training.compiling import compile_in_place, repeated
from models.training.diffusion import DiffusionRecipe
from models.training.exits import ExitsRecipe
from models.training.loop import Optim, finite, learning_rate, make_optimizer, train
from models.training.recipe import RecipeError, read_recipe
from models.training.session import Paused, Session, begin

RECIPES = ZOO.parent / "training" / "recipes"


class Short(Session):
    """Over after so many steps."""

    left = 25

    @property
    def over(self):
        Short.left -= 1
        return Short.left < 0


def fit(out, optim, session=None):
    torch.manual_seed(0)
    model, goal = torch.nn.Linear(4, 1), torch.tensor([[1.0, -2.0, 0.5, 3.0]])

    def loss(step):
        x = torch.randn(16, 4)
        return (model(x) - x @ goal.T).square().mean()

    return train(model, optim, loss, out, label="toy", session=session or Session())


OPTIM = Optim(steps=40, lr=0.05, warmup=5, ema=0.9, checkpoint_every=30)


def test_a_paused_run_ends_at_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(Short, "left", 25)
    with pytest.raises(Paused) as paused:
        fit(tmp_path / "b", OPTIM, Short())
    assert (paused.value.label, paused.value.step, paused.value.steps) == ("toy", 25, 40)
    whole, resumed = fit(tmp_path / "a", OPTIM), fit(tmp_path / "b", OPTIM)
    assert resumed.steps == 40
    assert resumed.loss == whole.loss
    for mine, other in zip(whole.ema.parameters(), resumed.ema.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_compact_checkpoint_is_the_average_and_warms_up_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Short, "left", 25)
    with pytest.raises(Paused):
        fit(tmp_path / "a", OPTIM, Short())
    compact(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / CHECKPOINT).stat().st_size < (tmp_path / "a" / CHECKPOINT).stat().st_size
    stand = read_progress(tmp_path / "b" / CHECKPOINT)
    assert (stand.step, stand.restarted) == (25, 25)
    again = fit(tmp_path / "b", OPTIM)
    assert again.steps == 40
    assert math.isfinite(again.loss)
    assert read_progress(tmp_path / "b" / CHECKPOINT).restarted == 25
    assert learning_rate(OPTIM, 25, restarted=25) == pytest.approx(learning_rate(OPTIM, 25) / 5)
    assert learning_rate(OPTIM, 30, restarted=25) == learning_rate(OPTIM, 30)
    cold = dataclasses.replace(OPTIM, warmup=0)
    assert learning_rate(cold, 25, restarted=25) == learning_rate(cold, 25)


def test_moments_come_back_in_the_layout_of_their_weights(tmp_path):
    """Fused kernels pair weights and moments in memory order, and refuse what differs on a GPU."""

    def one():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
        return model, make_optimizer(OPTIM, model.parameters())

    def step(model, optimizer):
        model(torch.arange(64.0).view(1, 4, 4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = one()
    step(model, optimizer)
    save_checkpoint(tmp_path, Progress(1, 0.5), model, model, optimizer)
    again, resumed = one()
    load_checkpoint(tmp_path, again, copy.deepcopy(again), resumed)
    assert resumed.state[again.weight]["exp_avg"].stride() == again.weight.stride()
    assert again.weight.stride() != again.weight.contiguous().stride()
    for pair in ((model, optimizer), (again, resumed)):
        step(*pair)
    assert torch.equal(again.weight, model.weight)


def test_a_pause_does_not_keep_weights_that_are_no_numbers(tmp_path, monkeypatch):
    """On CUDA the loss is looked at now and then; a pause between looks finds it too."""
    monkeypatch.setattr(Short, "left", 10)
    seen = []

    def look(mean, label, step):
        seen.append(step)
        return finite(mean, label, step) if step == 10 else 0.0

    monkeypatch.setattr("models.training.loop.finite", look)
    model = torch.nn.Linear(1, 1)

    def loss(step):
        return model(torch.ones(1, 1)).sum() * (math.nan if step == 3 else 1.0)

    with pytest.raises(FloatingPointError, match="nan at step 10"):
        train(model, OPTIM, loss, tmp_path, label="toy", session=Short())
    assert seen[-1] == 10
    assert not (tmp_path / CHECKPOINT).is_file()


def test_of_a_finished_run_the_compact_checkpoint_gives_the_model_as_it_is_written(tmp_path):
    done = fit(tmp_path / "a", OPTIM)
    compact(tmp_path / "a", tmp_path / "b")
    again = fit(tmp_path / "b", OPTIM)
    for mine, other in zip(done.ema.parameters(), again.ema.parameters(), strict=True):
        assert torch.equal(mine.half(), other.half())


def test_minutes_end_a_run_and_its_schedule(tmp_path):
    hurried = dataclasses.replace(OPTIM, minutes=1e-9)
    done = fit(tmp_path, hurried)
    assert done.steps < 40
    assert fit(tmp_path, hurried).steps == done.steps
    assert learning_rate(OPTIM, 10, spent=1.0) == 0
    assert learning_rate(OPTIM, 10, spent=0.1) == pytest.approx(learning_rate(OPTIM, 10), rel=0.03)
    assert learning_rate(OPTIM, 2, spent=0.9) < 0.1 * learning_rate(OPTIM, 2)


def test_minutes_count_from_where_the_network_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "compile_in_place", lambda model: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    hurried = dataclasses.replace(OPTIM, minutes=1e-9, compile=True)
    monkeypatch.setattr(Short, "left", loop.WARM - 1)
    with pytest.raises(Paused):
        fit(tmp_path, hurried, Short())
    assert read_progress(tmp_path / CHECKPOINT).seconds == 0
    done = fit(tmp_path, hurried)
    assert done.steps == loop.WARM - 1 + loop.WARM + 1
    assert done.seconds > 0


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(tmp_path):
    model = torch.nn.Linear(1, 1)

    def loss(step):
        return model(torch.ones(1, 1)).sum() * (math.nan if step == 3 else 1.0)

    with pytest.raises(FloatingPointError, match="nan at step 3"):
        train(model, OPTIM, loss, tmp_path, label="toy")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert begin("auto").device.type == "cpu"
    assert begin("cpu", 1.0).over is False
    assert begin("cpu", 0.0).over is True
    for name in ("cuda", "gpu"):
        with pytest.raises(UserError, match=f"--device {name}"):
            begin(name)


def test_what_is_not_compiled_says_why(capsys):
    network = torch.nn.Linear(2, 2)
    assert compile_in_place(network) is False
    assert "not compiled: on cpu" in capsys.readouterr().err
    assert network._compiled_call_impl is None


def test_of_a_backbone_the_blocks_are_compiled():
    network = UViT(UViTConfig(image_size=8, patch=4, width=16, depth=3, heads=2))
    assert repeated(network) == list(network.blocks)
    plain = torch.nn.Linear(2, 2)
    assert repeated(plain) == [plain]


@pytest.mark.parametrize(("name", "flop"), [("cifar-uvit", 5.55e9), ("cifar-dit", 3.76e9)])
def test_a_generator_has_the_size_that_its_recipe_counts_on(name, flop):
    recipe = read_recipe(RECIPES / f"{name}.toml", DiffusionRecipe)
    model = recipe.make().eval()
    assert 8e6 < sum(p.numel() for p in model.parameters()) < 12e6
    condition = model.condition(torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    macs = count_macs(model, lambda: model(torch.zeros(1, *model.row_shape), condition, [model.depth]))
    c = recipe.network
    tokens = (c.image_size // c.patch) ** 2 + (2 if recipe.backbone == "uvit" else 0)
    assert 2 * macs + 4 * tokens**2 * c.width * c.depth == pytest.approx(flop, rel=0.01)


def test_exits_of_the_recipes_fit_their_bases():
    for base, exits in (("cifar-uvit", "cifar-exits"), ("cifar-dit", "cifar-dit-exits")):
        whole = read_recipe(RECIPES / f"{base}.toml", DiffusionRecipe)
        tuned = read_recipe(RECIPES / f"{exits}.toml", ExitsRecipe)
        assert tuned.base == whole.name
        assert min(tuned.gears.values()) * whole.network.depth >= tuned.shallowest


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backbone": "unet"}, "backbone must be dit or uvit"),
        ({"backbone": "uvit"}, "network must be a table"),
        ({"backbone": "uvit", "network": {"hats": 3}}, "unknown key 'hats'"),
    ],
)
def test_backbones_that_do_not_fit_are_named(changes, says):
    fields = {"name": "toy", "labels": ["a"], "optim": Optim(steps=1), "network": DiTConfig()}
    with pytest.raises(RecipeError, match=says):
        DiffusionRecipe(**(fields | changes))


def test_weights_are_cut_into_shards_and_read_as_one(tmp_path):
    tensors = {f"t{i}": torch.randn(100).half().float() for i in range(5)} | {"steps": torch.tensor(3)}
    digest = write_model(tmp_path, {"kind": "generator"}, {"model.safetensors": tensors}, shard=400)
    files = read_config(tmp_path)["files"]
    assert list(files) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    found = read_tensors(tmp_path, "model.safetensors", files)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert digest != write_model(tmp_path / "one", {}, {"model.safetensors": tensors}, shard=2000)
    assert list(read_config(tmp_path / "one")["files"]) == ["model.safetensors"]
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"model-00002-of-00003\.safetensors does not match"):
        read_tensors(tmp_path, "model.safetensors", files)
    del files["model-00002-of-00003.safetensors"]
    with pytest.raises(StoreError, match="does not exist"):
        read_tensors(tmp_path, "model.safetensors", files)


def test_a_tensor_larger_than_a_shard_has_one_for_itself(tmp_path):
    tensors = {"a": torch.zeros(10), "b": torch.zeros(1000), "c": torch.zeros(10)}
    write_model(tmp_path, {}, {"model.safetensors": tensors}, shard=100)
    sizes = [(tmp_path / name).stat().st_size > 1500 for name in read_config(tmp_path)["files"]]
    assert sizes == [False, True, False]
