"""Purification on networks whose answer is known, and the attacks that judge it, at toy size."""

import dataclasses
import itertools
import json
import struct

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from models.api import ExitSchedule, UserError
from models.evaluation import attacks
from models.evaluation.attacked import keys_of, pick, purified, right
from models.evaluation.attacks import Ball, attack
from models.evaluation.cli import app
from models.evaluation.robustness import Trial, best, choose
from models.purification.purify import Dose, Purifier, image_keys
from models.solvers.vp import Cosine
from models.store import StoreError, read_config, write_json
from models.tasks.classifier import load_classifier
from tests.models.purifiers import save_generator
from tests.models.test_classify_task import make_zoo
from tests.models.test_contract import split

MEAN, SPREAD = 0.2, 0.6
FULL = ExitSchedule((1.0,), (3,))


class Gaussian(torch.nn.Module):
    """The exact v of data ~ N(MEAN, SPREAD^2) in every pixel, under the cosine process."""

    null_label, depth = 3, 3

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def condition(self, t, label):
        assert (label == self.null_label).all()
        return t[:, None]

    def forward(self, x, condition, depths):
        angle = 0.5 * torch.pi * condition[:, :, None, None]
        alpha, sigma = angle.cos(), angle.sin()
        return (alpha * x - posterior_mean(x, alpha, sigma)) / sigma, [len(x)] * self.depth


def posterior_mean(x, alpha, sigma):
    """E[x_0 | x_u] of that data: Bayes' rule for Gaussians."""
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def gaussian(clip=None, **dose):
    return Purifier(Gaussian(), Cosine(clip=clip), Dose(**dose), FULL)


def write_idx(folder):
    """Just more training images than the house keeps for validation."""
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 10_001), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 3, n).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / name).write_bytes(head + array.tobytes())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    make_zoo(root)
    save_generator(root / "toy-dit")
    return root


@pytest.fixture(scope="module")
def known(zoo):
    """Every method of a toy classifier."""
    return attacks.methods(load_classifier(zoo / "toy"))


def load(zoo, gear="full", **dose):
    return Purifier.load(zoo / "toy-dit", (28, 28, 1), Dose(**dose), gear)


def test_one_step_is_the_posterior_mean():
    purifier, x, keys = gaussian(u=0.3, draws=3), torch.rand(2, 1, 4, 4), torch.tensor([5, 6])
    noised = purifier.begin(x, keys)
    here = purifier.points[0]
    expected = posterior_mean(noised, here.alpha, here.sigma)
    assert noised.shape == (2, 3, 1, 4, 4)
    assert torch.allclose(purifier.step(noised, [0, 0]), expected, atol=1e-5)
    assert torch.allclose(purifier(x, keys), (0.5 * expected + 0.5).clamp(0, 1), atol=1e-5)


def test_noising_has_the_moments_of_the_process():
    purifier, x = gaussian(u=0.25, draws=16), torch.full((64, 1, 8, 8), 0.7)
    noised, here = purifier.begin(x, torch.arange(64)), purifier.points[0]
    assert noised.mean().item() == pytest.approx(0.4 * here.alpha, abs=4 * here.sigma / 256)
    assert noised.std().item() == pytest.approx(here.sigma, rel=0.01)


def test_three_steps_are_ddim_in_float64():
    purifier, x, keys = gaussian(u=0.45, steps=3, draws=1), torch.rand(2, 1, 4, 4), torch.tensor([1, 2])
    state = purifier.begin(x, keys).double().numpy()
    times = [0.45, 0.30, 0.15, 0.0]
    for here, there in itertools.pairwise(times):
        alpha, sigma = np.cos(0.5 * np.pi * here), np.sin(0.5 * np.pi * here)
        mean = posterior_mean(state, alpha, sigma)
        noise = (state - alpha * mean) / sigma
        state = np.cos(0.5 * np.pi * there) * mean + np.sin(0.5 * np.pi * there) * noise
    np.testing.assert_allclose(purifier(x, keys).numpy(), np.clip(0.5 * state + 0.5, 0, 1), atol=1e-5)


def test_estimates_are_clipped_as_the_process_says():
    x, keys = torch.ones(1, 1, 4, 4), torch.tensor([1])
    far = Purifier(Gaussian(), Cosine(clip=0.25), Dose(u=0.1, draws=1), FULL)
    assert torch.allclose(far.step(far.begin(x, keys), [0]), torch.tensor(0.25))


@pytest.mark.parametrize("gear", ["full", "eco"])
def test_an_answer_is_a_function_of_its_image(zoo, gear):
    purifier = load(zoo, gear, u=0.3, steps=3, draws=2)
    images = split(6, 1).images
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0
    keys = image_keys(image.tobytes() for image in images)
    together = purifier(x, keys)
    for i in range(len(x)):
        assert torch.allclose(purifier(x[i : i + 1], keys[i : i + 1])[0], together[i], atol=1e-5)


def test_rows_at_different_steps_share_a_call(zoo):
    """Depths differ too: rows are sorted by depth inside and come back in their own order."""
    purifier = load(zoo, "eco", u=0.27, steps=3, draws=2)
    assert purifier.depths == [1, 2, 3]
    state = purifier.begin(torch.rand(4, 1, 28, 28), torch.arange(4))
    mixed = purifier.step(state, [0, 2, 1, 2])
    for i, n in enumerate([0, 2, 1, 2]):
        assert torch.allclose(mixed[i : i + 1], purifier.step(state[i : i + 1], [n]), atol=1e-5)
    assert not torch.allclose(mixed[1], purifier.step(state[1:2], [0])[0], atol=1e-3)


def test_noise_is_a_function_of_the_bytes():
    images = split(3, 4).images
    keys = keys_of(torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0)
    assert keys.tolist() == image_keys(image.tobytes() for image in images).tolist()
    images[1, 0, 0, 0] ^= 1
    changed = image_keys(image.tobytes() for image in images)
    assert (keys == changed).tolist() == [True, False, True]
    purifier, x = gaussian(u=0.2, draws=2), torch.full((3, 1, 28, 28), 0.5)
    noised = purifier.begin(x, keys)
    assert torch.equal(noised, purifier.begin(x, keys))
    assert not torch.allclose(noised[0, 0], noised[0, 1])
    assert not torch.allclose(noised[0], noised[1])


@pytest.mark.parametrize("dose", [{"u": 0.0}, {"u": 0.51}, {"steps": 0}, {"steps": 4}, {"draws": 0}, {"draws": 17}])
def test_impossible_doses_are_refused(dose):
    with pytest.raises(UserError, match=next(iter(dose))) as caught:
        Dose(**dose)
    assert caught.value.field == "purify"


def test_generators_that_cannot_purify_are_refused(zoo, tmp_path):
    with pytest.raises(StoreError, match="pixel model"):
        Purifier.load(zoo / "toy-dit", (32, 32, 3))
    with pytest.raises(StoreError, match="gear 'turbo'"):
        Purifier.load(zoo / "toy-dit", (28, 28, 1), gear="turbo")
    with pytest.raises(StoreError, match="process flow"):
        Purifier.load(save_generator(tmp_path / "flow", kind="flow", prediction="flow"), (28, 28, 1))
    with pytest.raises(StoreError, match="kind"):
        Purifier.load(zoo / "toy", (28, 28, 1))
    coded = save_generator(tmp_path / "coded")
    write_json(coded / "config.json", read_config(coded) | {"codec": {}})
    with pytest.raises(StoreError, match="pixel model"):
        Purifier.load(coded, (28, 28, 1))


def test_cost_counts_draws_steps_and_depth(zoo):
    one = load(zoo, u=0.3, draws=1).cost(1000)
    tokens, width = 49, 16
    assert one == tokens * (16 * width * 2 + 3 * 12 * width**2) / 1000
    assert load(zoo, u=0.3, steps=2, draws=4).cost(1000) == 8 * one
    assert load(zoo, "eco", u=0.3, draws=1).cost(1000) < one
    assert (load(zoo, steps=2).calls, load(zoo, steps=1).calls) == (2, 1)


def test_pgd_stays_in_the_ball_and_raises_the_loss(known):
    images, ball = pick(split(20, 5), 20, 0), Ball(8, 2.0, 10)
    for name, classify in known.items():
        found = attack(attacks.plain(classify), images.x, images.labels, ball, 0)
        assert (found - images.x).abs().max() <= 8 / 255 + 1e-6
        assert 0.0 <= found.min() <= found.max() <= 1.0
        assert torch.allclose((255 * found).round(), 255 * found, atol=1e-4)
        signs = torch.randn(images.x.shape, generator=torch.Generator().manual_seed(2)).sign()
        by_chance = (images.x + 8 / 255 * signs).clamp(0, 1)
        before, after, chance = (
            -classify(x).gather(1, images.labels[:, None]).mean().item() for x in (images.x, found, by_chance)
        )
        assert after - before > 0.005, name
        assert after - before > 3 * abs(chance - before), name


@pytest.mark.parametrize("way", ["adaptive", "unclipped", "bpda"])
def test_gradients_reach_the_pixels_through_the_purifier(zoo, known, way):
    purifier, generator = load(zoo, u=0.2, steps=2, draws=3), torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 28, 28, requires_grad=True)
    log_p = getattr(attacks, way)(known["single"], purifier)(x, generator)
    (slope,) = torch.autograd.grad(log_p[:, 0].sum(), x)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(4), atol=1e-5)
    assert (slope.flatten(1).abs().amax(1) > 0).all()


def test_the_adaptive_gradient_is_that_of_the_served_answer(zoo, known):
    """Against finite differences, noise held: nothing in the purifier hides its gradient."""
    purifier, keys = load(zoo, u=0.2, steps=2, draws=2), torch.tensor([7])
    free = dataclasses.replace(purifier, process=Cosine())

    def smooth(x):
        """A classifier without kinks."""
        return torch.stack([x.square().mean((1, 2, 3)), x.sin().mean((1, 2, 3))], 1).double().log_softmax(1)

    def answer(x):
        return attacks.averaged(smooth, free(x, keys))[0, 1]

    x = (0.3 + 0.4 * torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(1))).requires_grad_(True)
    (slope,) = torch.autograd.grad(answer(x), x)
    way = slope.sign() * 3e-3
    with torch.no_grad():
        rise = (answer(x + way) - answer(x - way)).item()
    assert rise == pytest.approx(2 * (slope * way).sum().item(), rel=0.05)


def test_bpda_gives_the_purified_value_and_the_classifiers_gradient():
    purifier, x = gaussian(u=0.2, draws=2), torch.rand(3, 1, 4, 4, requires_grad=True)
    weights = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def linear(pixels):
        return (pixels.flatten(1) @ weights.T).log_softmax(1)

    value = attacks.bpda(linear, purifier)(x, torch.Generator().manual_seed(1))
    assert torch.allclose(value, attacks.adaptive(linear, purifier)(x, torch.Generator().manual_seed(1)), atol=1e-5)
    margin = (value[:, 0] - value[:, 1]).sum()
    (slope,) = torch.autograd.grad(margin, x)
    ratio = slope.flatten(1) / (weights[0] - weights[1])
    assert (ratio > 0).all()
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)


def test_the_worst_case_is_right_everywhere(zoo, known):
    images = pick(split(40, 6), 40, 0)
    told = dataclasses.replace(images, labels=known["single"](images.x).argmax(1))
    found = purified(known["single"], load(zoo, u=0.1, draws=2), told, Ball(8, 2.0, 3), 2, 0)
    assert set(found) == {"clean", "classifier", "bpda", "adaptive", "unclipped", "worst", "noises"}
    every = np.logical_and.reduce([found[key] for key in ("clean", "classifier", "bpda", "adaptive", "unclipped")])
    assert (found["worst"] == every).all()
    assert (found["noises"] <= found["worst"]).all()
    assert found["clean"].any()


def test_the_dose_is_robust_at_a_fair_price(zoo, known):
    cheap, strong = Trial(Dose(0.1), 0.89, 0.3, 10.0), Trial(Dose(0.3), 0.86, 0.5, 10.0)
    harmful, dear = Trial(Dose(0.5), 0.7, 0.6, 10.0), Trial(Dose(0.3, 2), 0.86, 0.5, 20.0)
    assert best([cheap, dear, strong, harmful], 0.9) == strong
    assert best([strong, harmful], 0.99) == strong
    images = pick(split(12, 7), 12, 0)
    tried, dose = choose(
        known["single"],
        lambda d: load(zoo, u=d.u, steps=d.steps, draws=d.draws),
        images,
        Ball(8, 2.0, 1),
        1,
        [0.1, 0.3],
    )
    assert [(t.dose.u, t.dose.steps, t.dose.draws) for t in tried[:4]] == [
        (0.1, 1, 1),
        (0.1, 1, 4),
        (0.3, 1, 1),
        (0.3, 1, 4),
    ]
    assert [t.dose.steps for t in tried[4:]] == [2, 2, 3, 3]
    assert dose in [t.dose for t in tried]


def test_every_method_is_the_served_one(zoo, known):
    """Differentiable paths give what the house's sampler and members give."""
    from models.bridge.sample import run_bridge

    classifier, x = load_classifier(zoo / "toy"), torch.rand(5, 1, 28, 28)
    member, bridge = classifier.members[0], classifier.bridge
    tap = member.tap(x)
    (network,) = bridge.networks.values()
    z = run_bridge(network, tap, member(x), bridge.evaluations, bridge.softening)
    assert torch.allclose(known["bridge"](x), z.log_softmax(1), atol=1e-5)
    p = torch.stack([m(x).softmax(1) for m in classifier.members]).mean(0)
    assert torch.allclose(known["ensemble"](x).exp(), p, atol=1e-5)
    assert torch.allclose(known["single"](x).exp(), member(x).softmax(1), atol=1e-5)
    assert right(known["single"], None, pick(split(9, 1), 9, 0)).shape == (9,)


def test_the_command_prints_every_method(zoo, tmp_path):
    write_idx(tmp_path)
    told = ["robustness", str(zoo / "toy"), "--data", str(tmp_path), "--generator", str(zoo / "toy-dit")]
    few = ["--n", "8", "--screened", "8", "--us", "0.1,0.2", "--steps", "2", "--eot", "2"]
    result = CliRunner().invoke(app, [*told, *few])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output.splitlines()[-1])
    assert set(summary["methods"]) == {f"{m}{p}" for m in ("single", "bridge", "ensemble") for p in ("", " purified")}
    for name, scores in summary["methods"].items():
        assert scores["worst"] <= min(v for k, v in scores.items() if k not in ("cost", "worst", "noises")), name
    dose = Dose(**summary["dose"])
    made = Purifier.load(zoo / "toy-dit", (28, 28, 1), dose)
    assert summary["methods"]["single purified"]["cost"] > dose.draws
    assert f"u {made.dose.u:g}" in result.output
    assert Dose(**summary["dose"]) in [Dose(t["u"], t["steps"], t["draws"]) for t in summary["trials"]]


@pytest.mark.parametrize(
    ("option", "value"), [("--method", "psychic"), ("--dose", "0.3,1"), ("--dose", "a,b,c"), ("--dose", "0.9,1,1")]
)
def test_the_command_names_what_it_cannot_do(zoo, tmp_path, option, value):
    write_idx(tmp_path)
    told = ["robustness", str(zoo / "toy"), "--data", str(tmp_path), "--generator", str(zoo / "toy-dit")]
    with pytest.raises(UserError, match=option if value != "0.9,1,1" else "u must be"):
        CliRunner().invoke(app, [*told, option, value], catch_exceptions=False)


def test_a_given_dose_is_used_untried(zoo, tmp_path):
    write_idx(tmp_path)
    told = ["robustness", str(zoo / "toy"), "--data", str(tmp_path), "--generator", str(zoo / "toy-dit")]
    few = ["--n", "8", "--dose", "0.12,2,3", "--steps", "1", "--method", "single", "--gear", "eco"]
    result = CliRunner().invoke(app, [*told, *few], catch_exceptions=False)
    summary = json.loads(result.output.splitlines()[-1])
    assert (summary["dose"], summary["trials"]) == ({"u": 0.12, "steps": 2, "draws": 3}, [])
    assert set(summary["methods"]) == {"single", "single purified"}
