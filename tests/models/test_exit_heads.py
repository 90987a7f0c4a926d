"""Heads learn the ensemble's answers, and validation says when rows leave them."""

import numpy as np
import pytest
import torch

from models.backbones.early_exits import count
from models.backbones.resnet import ResNet, ResNetConfig
from models.tasks.classifier import to_pixels
from models.training.data import Split
from models.training.exit_heads import ExitHeadsRecipe, Validation, train_exit_heads, weights, write_heads
from models.training.loop import Optim
from models.training.recipe import RecipeError
from models.training.transfer import answered
from models.uncertainty.scores import fit_temperature, log_softmax, nll, soften
from tests.models.classifiers import lively

SHAPE = ResNetConfig(classes=3, width=8)
RECIPE = ExitHeadsRecipe(
    "heads", "toy", Optim(steps=150, batch=64, lr=1e-2, warmup=5, ema=0.9), grid=2, hidden=8, cost=0.7, seeds=2
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds on images of which members disagree; the validation labels are the ensemble's own draws."""
    torch.manual_seed(0)
    members = [lively(ResNet(SHAPE)).requires_grad_(False) for _ in range(3)]
    for member in members:
        member.fc.weight.mul_(20)
        member.fc.bias.zero_()
    random = np.random.default_rng(0)
    images = (random.random((600, 28, 28, 1)) * random.random((600, 1, 1, 1)) * 255).astype(np.uint8)
    cache = answered(members, to_pixels(images))
    p = cache.logits.softmax(-1).mean(1)
    validation = Validation(members[0], Split(images[:400], torch.multinomial(p, 1)[:400, 0].numpy()))
    out = tmp_path_factory.mktemp("runs")
    return RECIPE, members, cache, validation, train_exit_heads(RECIPE, cache, members[0], validation, out)


def test_heads_come_closer_to_the_ensemble_than_chance(trained):
    _, _, cache, validation, made = trained
    goal = cache.logits.softmax(-1).mean(1)[:400]
    chance = float(-(goal * goal.mean(0).log()).sum(1).mean())
    for heads, _ in made.values():
        with torch.inference_mode():
            for head, pooled in zip(heads.heads, validation.pooled[2], strict=True):
                assert float(-(goal * head(pooled).log_softmax(-1)).sum(1).mean()) < chance
    assert set(made) == {"heads-1", "heads-2"}


def test_what_is_chosen_keeps_to_the_cost_and_is_as_likely_as_said(trained):
    recipe, members, _, validation, made = trained
    for heads, leaving in made.values():
        macs = count(members[0], heads, validation.pixels[:1])
        used = [np.isfinite(limit) for limit in leaving.thresholds]
        assert leaving.cost == pytest.approx(np.dot(leaving.shares, macs.costs([*used, True])))
        assert leaving.cost <= recipe.cost
        assert sum(leaving.shares) == pytest.approx(1.0)
        with torch.inference_mode():
            first = log_softmax(heads.heads[0](validation.pooled[2][0]).double().numpy())
        alone = soften(first, fit_temperature(first, validation.split.labels))
        assert leaving.nll <= nll(alone, validation.split.labels) + 0.02


def test_a_cost_that_no_exit_keeps_is_refused(trained):
    _, _, _, validation, made = trained
    heads, _ = made["heads-1"]
    with pytest.raises(RecipeError, match=r"cost: 0.1 is less than the first exit costs, set 0.\d\d or more"):
        validation.leaving(heads, 0.1)


def test_the_folder_holds_every_seed_and_serves_the_likeliest(trained, tmp_path):
    recipe, _, _, _, made = trained
    ensemble = {"members": ["m.safetensors"], "files": {"m.safetensors": "0" * 64}, "network": {}}
    summary = write_heads(tmp_path / "heads", recipe, ensemble, made)
    assert summary["serve"] == min(made, key=lambda name: made[name][1].nll)
    assert {path.name for path in (tmp_path / "heads").iterdir()} == {
        *(f"{n}.safetensors" for n in made),
        "config.json",
    }
    assert not any(key.startswith("gates") for heads, _ in made.values() for key in weights(heads))
