"""Training loops at toy size: they learn, they resume to the same weights, recipes refuse mistakes."""

import copy
import dataclasses
import gzip
import struct

import numpy as np
import pytest
import torch

from models.api import UserError
from models.backbones.dit import DiT, DiTConfig
from models.backbones.uvit import UViT, UViTConfig
from models.training.data import DataError, read, splits
from models.training.diffusion import DiffusionRecipe, perturb, sample_times, train_diffusion
from models.training.exit_heads import ExitHeadsRecipe
from models.training.exits import ExitsRecipe, loss_weights, train_exits
from models.training.loop import Optim, train
from models.training.members import MembersRecipe, epoch_rows, random_shift
from models.training.recipe import RecipeError, build, read_recipe

TOY = DiTConfig(image_size=8, patch=4, width=32, depth=3, heads=2, classes=2, time_features=16)


def write_idx(folder, images=24, test=6):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", images), ("t10k", test)):
        pixels = rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
        labels = (np.arange(n) % 2).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">HBBIII", 0, 8, 3, n, 8, 8) + pixels.tobytes())
        )
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, n) + labels.tobytes())
    (folder / "t10k-labels-idx1-ubyte").rename(folder / "t10k-labels-idx1-ubyte.gz")
    raw = (folder / "t10k-labels-idx1-ubyte.gz").read_bytes()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(raw))
    raw = (folder / "train-labels-idx1-ubyte").read_bytes()
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(raw))


def test_idx_folder_and_splits(tmp_path):
    write_idx(tmp_path)
    found = splits(tmp_path, validation=10)
    assert [len(s) for s in (found.train, found.selection, found.conformal, found.test)] == [14, 5, 5, 6]
    assert found.train.images.shape == (14, 8, 8, 1)


def test_image_folder_holds_the_same_pixels(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (tmp_path / "train" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "train" / f"class{i % 2}" / f"{i}.png")
    found = read(tmp_path, "train")
    assert sorted(found.labels.tolist()) == [0, 0, 1, 1]
    assert {image.tobytes() for image in found.images} == {image.tobytes() for image in pixels}


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        read(tmp_path, "train")


def test_recipes_name_the_key_at_fault(tmp_path):
    with pytest.raises(RecipeError, match="unknown key 'step'"):
        build(Optim, {"steps": 3, "step": 4}, "r.toml")
    with pytest.raises(RecipeError, match="steps is missing"):
        build(Optim, {}, "r.toml")
    with pytest.raises(RecipeError, match="steps must be int"):
        build(Optim, {"steps": "many"}, "r.toml")
    with pytest.raises(RecipeError, match="does not exist"):
        read_recipe(tmp_path / "none.toml", Optim)


def test_perturb_and_v_invert_each_other():
    x0, u = torch.randn(5, 1, 8, 8), torch.rand(5)
    x, v = perturb(x0, u)
    alpha, sigma = (f(0.5 * torch.pi * u)[:, None, None, None] for f in (torch.cos, torch.sin))
    torch.testing.assert_close(alpha * x - sigma * v, x0, atol=1e-5, rtol=1e-4)


def test_times_stay_inside_and_cover_the_range():
    torch.manual_seed(0)
    u = sample_times(4096, 0.5)
    assert u.min() >= 0
    assert u.max() <= 1
    assert (torch.histc(u, 10, 0, 1) > 100).all()


def test_epochs_visit_every_row_once():
    rows = torch.cat([epoch_rows(12, 4, step, seed=3) for step in range(3)])
    assert sorted(rows.tolist()) == list(range(12))
    assert torch.equal(epoch_rows(12, 4, 4, 3), epoch_rows(12, 4, 4, 3))


def test_shift_moves_pixels_and_keeps_shape():
    torch.manual_seed(0)
    x = torch.zeros(50, 1, 8, 8)
    x[:, :, 4, 4] = 1
    moved = random_shift(x, 2)
    assert moved.shape == x.shape
    assert moved.flatten(1).sum(1).tolist() == [1.0] * 50
    assert len({tuple(m.nonzero()[0].tolist()) for m in moved[:, 0]}) > 5
    assert random_shift(x, 0) is x


def test_a_resumed_run_ends_at_the_same_weights(tmp_path):
    def run(out, steps_at_once):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        goal = torch.tensor([[1.0, -2.0, 0.5, 3.0]])

        def loss(step):
            x = torch.randn(16, 4)
            return (model(x) - x @ goal.T).square().mean()

        optim = Optim(steps=40, lr=0.05, warmup=5, ema=0.9, checkpoint_every=20)
        if steps_at_once < 40:
            with pytest.raises(KeyboardInterrupt):
                train(model, optim, interrupt(loss, steps_at_once), out, label="toy")
            torch.manual_seed(123)
            model.reset_parameters()
        return train(model, optim, loss, out, label="toy").ema.state_dict()

    def interrupt(loss, at):
        def wrapped(step):
            if step == at:
                raise KeyboardInterrupt
            return loss(step)

        return wrapped

    whole, resumed = run(tmp_path / "a", 40), run(tmp_path / "b", 25)
    for key in whole:
        assert torch.equal(whole[key], resumed[key])


def test_diffusion_learns_and_exits_keep_the_time_embedder(tmp_path):
    images = np.full((64, 8, 8, 1), 200, np.uint8)
    labels = np.zeros(64, np.int64)
    recipe = DiffusionRecipe("toy", ["a", "b"], Optim(steps=60, batch=16, lr=3e-3, warmup=5), network=TOY, bf16=False)
    base = train_diffusion(recipe, images, labels, tmp_path / "base")
    assert base.loss < 0.9
    model = base.ema.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    short = Optim(steps=8, batch=16, lr=1e-3, warmup=2, checkpoint_every=4)
    exits = exits_recipe(optim=short, explore=short)
    tuned, schedules, _ = train_exits(model, exits, images, labels, tmp_path / "exits")
    assert isinstance(tuned, DiT)
    assert schedules["full"].depths == (3,)
    assert max(schedules["eco"].depths) <= 3
    same = {key for key, value in before.items() if torch.equal(tuned.state_dict()[key], value)}
    assert {key for key in before if key.startswith("time")} <= same
    assert "head.weight" not in same


@pytest.fixture(scope="module")
def base():
    """A network whose exits disagree, and images of one grey level."""
    torch.manual_seed(0)
    model = DiT(TOY)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model, np.full((64, 8, 8, 1), 200, np.uint8), np.zeros(64, np.int64)


def exits_recipe(**changes):
    tune = Optim(steps=12, batch=16, lr=3e-3, warmup=2)
    recipe = ExitsRecipe("e", "toy", tune, {"full": 1.0, "eco": 0.5}, shallowest=1, bins=5, bf16=False)
    return dataclasses.replace(recipe, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"distill": 0.5},
        {"distill": 1.0, "teacher": "ema"},
        {"loss_weight": "snr_clip"},
        {"loss_weight": [1, 2, 3]},
        {"gears": {"full": {"exit": "full"}, "hand": {"exit": "ase", "name": "demo"}}},
        {"gears": {"full": 1.0, "mine": {"edges": [0.5, 1.0], "depths": [3, 1]}}},
    ],
    ids=str,
)
def test_every_option_of_exit_training_trains(base, changes, tmp_path):
    model, images, labels = base
    student = copy.deepcopy(model)
    tuned, schedules, summary = train_exits(student, exits_recipe(**changes), images, labels, tmp_path)
    assert np.isfinite(summary["loss"])
    assert set(schedules) == set(exits_recipe(**changes).gears)
    moved = [k for k, v in tuned.state_dict().items() if not torch.equal(v, model.state_dict()[k])]
    assert any(k.startswith("blocks.0") for k in moved)
    assert not any(k.startswith("time") for k in moved)


def test_any_backbone_learns_its_exits(base, tmp_path):
    """A U-ViT: encoder and middle always run, so the shallowest exit is theirs."""
    _, images, labels = base
    torch.manual_seed(0)
    config = UViTConfig(image_size=8, channels=1, patch=4, width=32, depth=5, heads=2, classes=2, conv=False)
    model = UViT(config)
    recipe = exits_recipe(gears={"full": 1.0, "eco": 0.8}, distill=0.5)
    tuned, schedules, _ = train_exits(copy.deepcopy(model), recipe, images, labels, tmp_path)
    assert schedules["full"].depths == (5,)
    assert model.always <= min(schedules["eco"].depths) < 5
    assert any(not torch.equal(a, b) for a, b in zip(tuned.parameters(), model.parameters(), strict=True))


def test_distilling_alone_teaches_exits_the_full_output(base, tmp_path):
    """Against the frozen start, the shallow exit comes nearer to full depth of the start than it was."""
    model, images, labels = base
    tune = Optim(steps=80, batch=32, lr=3e-3, warmup=2, ema=0.9)
    gears = {"full": 1.0, "thin": {"edges": [1.0], "depths": [1]}}
    recipe = exits_recipe(distill=1.0, full_share=0.0, gears=gears, optim=tune)
    tuned, _, _ = train_exits(copy.deepcopy(model), recipe, images, labels, tmp_path)
    torch.manual_seed(3)
    x, u, y = torch.randn(64, 1, 8, 8), torch.rand(64), torch.zeros(64, dtype=torch.int64)
    with torch.no_grad():
        want = model(x, model.condition(u, y), [3] * 64)[0]
        apart = [(m(x, m.condition(u, y), [1] * 64)[0] - want).square().mean() for m in (model, tuned)]
    assert apart[1] < 0.5 * apart[0]


def test_loss_weights_have_mean_one_and_snr_clip_favours_the_middle():
    u = (torch.arange(2000) + 0.5) / 2000
    for kind in ("none", "snr_clip", [1, 3], [0.5]):
        assert loss_weights(kind, u).mean() == pytest.approx(1, abs=0.01)
    clipped = loss_weights("snr_clip", torch.tensor([0.01, 0.3, 0.99]))
    assert clipped[1] > clipped[0]
    assert clipped[1] > clipped[2]
    assert loss_weights([1, 3], torch.tensor([0.2, 0.8])).tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"loss_weight": "snr"}, "snr_clip"), ({"distill": 2.0}, "distill"), ({"teacher": "me"}, "teacher")],
)
def test_options_that_do_not_exist_are_named(base, changes, says, tmp_path):
    model, images, labels = base
    with pytest.raises(UserError, match=says):
        train_exits(copy.deepcopy(model), exits_recipe(**changes), images, labels, tmp_path)


def test_shipped_recipes_parse():
    from models.store import ZOO
    from models.training.bridge import KINDS, BridgeRecipe
    from models.training.compare import StudyRecipe
    from models.training.distance import DistanceRecipe
    from models.training.distill import DistillRecipe

    folder = ZOO.parent / "training" / "recipes"
    kinds = {
        "cifar-uvit": DiffusionRecipe,
        "cifar-dit": DiffusionRecipe,
        "cifar-exits": ExitsRecipe,
        "cifar-dit-exits": ExitsRecipe,
        "cifar-ensemble": MembersRecipe,
        "cifar-bridge": BridgeRecipe,
        "fashion-dit": DiffusionRecipe,
        "fashion-exits": ExitsRecipe,
        "fashion-gears": ExitsRecipe,
        "fashion-ensemble": MembersRecipe,
        "fashion-bridge": BridgeRecipe,
        "fashion-bridge-study": StudyRecipe,
        "fashion-transfer-study": StudyRecipe,
        "fashion-budget-study": StudyRecipe,
        "fashion-student": DistillRecipe,
        "fashion-heads": ExitHeadsRecipe,
        "fashion-distance": DistanceRecipe,
    }
    assert {p.stem for p in folder.glob("*.toml")} == set(kinds)
    for name, kind in kinds.items():
        found = read_recipe(folder / f"{name}.toml", kind)
        if isinstance(found, StudyRecipe):
            assert all(found.arm(arm, name)[0] in KINDS for arm in found.arms)
        else:
            assert found.name.startswith(name.split("-")[0])
