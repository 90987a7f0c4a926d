"""White-box attacks on classifiers in an l-infinity ball, with and without a purifier before them.

PGD: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018). Random defences are
attacked through fresh noise at every gradient (expectation over transformation), and what has no useful gradient is
replaced by the identity on the way back (BPDA): Athalye, Carlini, Wagner, "Obfuscated Gradients Give a False Sense of
Security" (ICML 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.bridge.process import posterior_mean, source
from models.purification.purify import Purifier
from models.tasks.classifier import BridgeModel, Classifier

Classify = Callable[[Tensor], Tensor]  # pixels (N, C, H, W) in [0, 1] -> log probabilities (N, K), differentiable
Noisy = Callable[[Tensor, torch.Generator], Tensor]  # the same, with fresh noise from the generator
CHUNK = 32  # images attacked at a time


@dataclass(frozen=True)
class Ball:
    """l-infinity ball of `radius`, walked in `steps` of `stride`; both in levels of 255."""

    radius: int = 8
    stride: float = 2.0
    steps: int = 20


def pgd(model: Noisy, x: Tensor, labels: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """Images that climb the cross-entropy, from a random start in the ball.

    Args:
        x: pixels (N, C, H, W), whole levels of 255 scaled to [0, 1]; labels: (N,).

    Returns:
        Pixels (N, C, H, W), whole levels again, in the ball and in [0, 1].
    """
    radius, stride = ball.radius / 255.0, ball.stride / 255.0
    low, high = (x - radius).clamp_min(0.0), (x + radius).clamp_max(1.0)
    found = (x + radius * (2.0 * torch.rand(x.shape, generator=generator) - 1.0)).clamp(low, high)
    for _ in range(ball.steps):
        found.requires_grad_(True)
        loss = -model(found, generator).gather(1, labels[:, None]).sum()
        (slope,) = torch.autograd.grad(loss, found)
        found = (found.detach() + stride * slope.sign()).clamp(low, high)
    return (255.0 * found).round() / 255.0


def attack(model: Noisy, x: Tensor, labels: Tensor, ball: Ball, seed: int) -> Tensor:
    """`pgd`, a chunk at a time, from one seed."""
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(x.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([x[:0], *(pgd(model, some, of, ball, generator) for some, of in pairs)])


def plain(classify: Classify) -> Noisy:
    """The classifier as it is."""
    return lambda x, _: classify(x)


def adaptive(classify: Classify, purifier: Purifier) -> Noisy:
    """Purifier and classifier with their exact gradient, probabilities averaged over the purifier's draws."""
    return lambda x, generator: averaged(classify, purifier(x, fresh(len(x), generator)))


def unclipped(classify: Classify, purifier: Purifier) -> Noisy:
    """As `adaptive`, without the clipping of estimates to the pixel range, which stops the gradient where it acts."""
    free = replace(purifier, process=replace(purifier.process, clip=None))

    def model(x: Tensor, generator: torch.Generator) -> Tensor:
        state = free.begin(x, fresh(len(x), generator))
        for n in range(free.calls):
            state = free.step(state, [n] * len(x))
        return averaged(classify, 0.5 * state + 0.5)

    return model


def bpda(classify: Classify, purifier: Purifier) -> Noisy:
    """Purified on the way forward, the identity on the way back."""

    def model(x: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            moved = purifier(x, fresh(len(x), generator)) - x[:, None]
        return averaged(classify, x[:, None] + moved)

    return model


def fresh(n: int, generator: torch.Generator) -> Tensor:
    """Random noise keys (n,)."""
    return torch.randint(2**53, (n,), generator=generator)


def averaged(classify: Classify, purified: Tensor) -> Tensor:
    """Log of the mean probability over draws: purified (N, D, C, H, W) -> (N, K)."""
    n, draws = purified.shape[:2]
    log_p = classify(purified.flatten(0, 1)).unflatten(0, (n, draws))
    return log_p.logsumexp(1) - math.log(draws)


def methods(classifier: Classifier) -> dict[str, Classify]:
    """Each way to answer, from pixels to log probabilities, differentiable end to end; untempered."""
    members = classifier.members

    def ensemble(x: Tensor) -> Tensor:
        return torch.stack([m(x).log_softmax(1) for m in members]).logsumexp(0) - math.log(len(members))

    found: dict[str, Classify] = {"single": lambda x: members[0](x).log_softmax(1), "ensemble": ensemble}
    if (bridge := classifier.bridge) is not None:
        found["bridge"] = lambda x: bridged(classifier, bridge, x)
    return found


def bridged(classifier: Classifier, bridge: BridgeModel, x: Tensor) -> Tensor:
    """Pixels through the source and every network of a served entry to log probabilities (N, K)."""
    member = classifier.members[0]
    tap = member.tap(x)
    late = member.features(tap)
    logits = member.fc(late)
    start, p = source(logits, bridge.softening), torch.zeros_like(logits)
    for network in bridge.networks.values():
        z, steps = start, network.config.steps
        for n in range(steps, steps - bridge.evaluations, -1):
            at = torch.full((len(x), 1), n)
            u = network(tap, z, at[:, 0], late)
            z = z - u if bridge.evaluations == 1 else posterior_mean(z, u, at.float(), steps)
        p = p + z.softmax(1) / len(bridge.networks)
    if (w := bridge.source_weight) != 0.0:
        p = ((p - w * logits.softmax(1)) / (1.0 - w)).clamp_min(1e-6)
    return (p / p.sum(1, keepdim=True)).log()
