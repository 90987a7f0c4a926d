"""Train light networks that carry the source's logits to the ensemble's, from one transfer set.

Diffusion Bridge Networks (Kim et al., ICLR 2024), alone and in pairs that share the teachers between them, beside what
they have to be compared with: the same network as a direct regressor, alone and in pairs, distilled to one step, and as
the bridges between members of Yun et al. (ICML 2023). No labels are used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.backbones.bridge import BridgeConfig, BridgeNetwork
from models.bridge.process import TEMPERATURE, sample_between, sample_temperature, source, target
from models.bridge.sample import run_bridge
from models.training.curves import CurveRecipe
from models.training.loop import Optim, Trained, train
from models.training.members import channels_last
from models.training.session import HERE, Session, half
from models.training.transfer import Cache, Transfer

KINDS = ("bridge", "distilled", "mse", "kl", "bridge_pair", "pair", "curve", "spread")
BRIDGES = ("bridge", "bridge_pair")  # kinds of T steps that learn u; the others arrive in one evaluation
PAIRS = ("bridge_pair", "pair")
LEAST_SPREAD = 1e-6  # nats of mutual information below which members count as equal


@dataclass(frozen=True)
class BridgeRecipe:
    """`offramp train bridge`. `ensemble` names the model whose member 1 is the source.

    Every kind in `kinds` is trained with each of `seeds` seeds. `pair_teachers`: members whose mean each network of a
    pair learns, a bridge (`bridge_pair`) or a KL regressor (`pair`). `distill`: how a bridge's student is trained.
    `curve`: the curves that kind `curve` needs. `bf16`: networks train under autocast.
    """

    name: str
    ensemble: str
    optim: Optim
    distill: Optim
    network: BridgeConfig = field(default_factory=BridgeConfig)
    transfer: Transfer = field(default_factory=Transfer)
    curve: CurveRecipe = field(default_factory=CurveRecipe)
    kinds: tuple[str, ...] = KINDS
    pair_teachers: tuple[list[int], ...] = ([0, 1, 2], [0, 3, 4])
    seeds: int = 3
    seed: int = 0
    bf16: bool = False


@dataclass(frozen=True)
class Run:
    """One network to train: it learns from members `teachers` (indices), or from the middle of a `curve`."""

    name: str
    kind: str
    seed: int
    teachers: tuple[int, ...] = ()
    curve: int | None = None


def runs(recipe: BridgeRecipe, members: int) -> list[Run]:
    """Every network of a recipe, a bridge before the student that starts from it."""
    made, everyone = [], tuple(range(members))
    for seed in range(recipe.seed + 1, recipe.seed + 1 + recipe.seeds):
        for kind in (k for k in KINDS if k in recipe.kinds):
            if kind in PAIRS:
                for letter, teachers in zip("abcdefgh", recipe.pair_teachers, strict=False):
                    name = f"{kind.replace('_', '-')}-{seed}-{letter}"
                    made.append(Run(name, kind, seed, tuple(teachers)))
            elif kind == "curve":
                made += [Run(f"curve-{end + 1}-{seed}", kind, seed, curve=end) for end in recipe.curve.ends]
            elif kind != "spread" or seed == recipe.seed + 1:
                made.append(Run(f"{kind}-{seed}", kind, seed, everyone))
    return made


def network_config(run: Run, recipe: BridgeRecipe) -> BridgeConfig:
    """A bridge has the recipe's steps, every other kind one."""
    steps = recipe.network.steps if run.kind in BRIDGES else 1
    return dataclasses.replace(recipe.network, steps=steps, outputs=int(run.kind == "spread"))


def mutual_information(logits: Tensor) -> Tensor:
    """Of members' logits (N, M, K), in nats (N,): mean KL from each member to their mean."""
    log_p = logits.log_softmax(-1)
    mean = log_p.exp().mean(1, keepdim=True).log()
    return (log_p.exp() * (log_p - mean)).sum(-1).mean(1)


def goal(run: Run, cache: Cache, midpoints: Mapping[int, Tensor], start: BridgeNetwork | None) -> Tensor:
    """What the network of a run shall arrive at (N, K): centred logits, or the log of the spread (N, 1)."""
    if run.curve is not None:
        return target(midpoints[run.curve][:, None])
    logits = cache.logits[:, list(run.teachers)]
    if run.kind == "spread":
        return mutual_information(logits).clamp_min(LEAST_SPREAD).log()[:, None]
    if run.kind == "distilled":
        assert start is not None
        return (target(logits) + carried(start, cache)) / 2
    return target(logits)


@torch.inference_mode()
def carried(network: BridgeNetwork, cache: Cache, batch: int = 1000) -> Tensor:
    """Where a bridge ends after all its steps (N, K), for its student to learn."""
    network, parts = network.eval(), []
    for first in range(0, len(cache.logits), batch):
        rows = slice(first, first + batch)
        tap, late = cache.see(rows)
        parts.append(run_bridge(network, tap, cache.logits[rows, 0], network.config.steps, TEMPERATURE, late))
    return torch.cat(parts).clone()


def bridge_loss(model: BridgeNetwork, tap: Tensor, late: Tensor, logits: Tensor, z0: Tensor) -> Tensor:
    """Mean over rows of |Z_0_hat - Z_0|^2 / tau, every step n in 1..T drawn (dividing by tau: its well-scaled form)."""
    n, steps, device = len(z0), model.config.steps, z0.device
    at = torch.randint(1, steps + 1, (n,), device=device)
    tau = (at / steps)[:, None]
    z = sample_between(z0, source(logits, sample_temperature(n, device)), tau)
    estimate = z - tau * model(tap, z, at, late)
    return ((estimate - z0).square().sum(1, keepdim=True) / tau).mean()


def arrival(model: BridgeNetwork, tap: Tensor, late: Tensor, logits: Tensor) -> Tensor:
    """Where one evaluation ends (N, K)."""
    z1 = source(logits, TEMPERATURE)
    return z1 - model(tap, z1, torch.ones(len(z1), dtype=torch.int64, device=z1.device), late)


def mse_loss(model: BridgeNetwork, tap: Tensor, late: Tensor, logits: Tensor, z0: Tensor) -> Tensor:
    """Squared error of one evaluation."""
    return (arrival(model, tap, late, logits) - z0).square().sum(1).mean()


def kl_loss(model: BridgeNetwork, tap: Tensor, late: Tensor, logits: Tensor, z0: Tensor) -> Tensor:
    """KL from the goal's probabilities to those of one evaluation."""
    log_p = arrival(model, tap, late, logits).log_softmax(-1)
    return F.kl_div(log_p, z0.log_softmax(-1), reduction="batchmean", log_target=True)


def spread_loss(model: BridgeNetwork, tap: Tensor, late: Tensor, logits: Tensor, spread: Tensor) -> Tensor:
    """Squared error of the predicted log spread (N, 1)."""
    z1 = source(logits, TEMPERATURE)
    one = torch.ones(len(z1), dtype=torch.int64, device=z1.device)
    return (model(tap, z1, one, late) - spread).square().mean()


Loss = Callable[[BridgeNetwork, Tensor, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    **dict.fromkeys(BRIDGES, bridge_loss),
    "distilled": mse_loss,
    "mse": mse_loss,
    "spread": spread_loss,
}


def loss_of(run: Run) -> Loss:
    """What a network minimises: KL where its kind has nothing of its own."""
    return LOSSES.get(run.kind, kl_loss)


def train_run(
    run: Run,
    recipe: BridgeRecipe,
    cache: Cache,
    out: Path,
    midpoints: Mapping[int, Tensor] | None = None,
    start: BridgeNetwork | None = None,
    session: Session = HERE,
) -> Trained:
    """Train one network; a distilled one starts from the bridge of its seed."""
    torch.manual_seed(run.seed)
    device = cache.logits.device
    model = channels_last(BridgeNetwork(network_config(run, recipe)).to(device))
    if run.kind == "distilled":
        assert start is not None
        begin_at_the_source(model, start)
    z0, loss = goal(run, cache, midpoints or {}, start), loss_of(run)
    optim = recipe.distill if run.kind == "distilled" else recipe.optim

    def on_batch(step: int) -> Tensor:
        rows = torch.randint(len(z0), (optim.batch,), device=device)
        with half(device, recipe.bf16):
            tap, late = cache.see(rows)
            tap = tap.contiguous(memory_format=torch.channels_last)
            return loss(model, tap, late, cache.logits[rows, 0], z0[rows]).float()

    return train(model, optim, on_batch, out / run.name, label=run.name, session=session)


def begin_at_the_source(student: BridgeNetwork, teacher: BridgeNetwork) -> None:
    """Copy a bridge of T steps into a network of one: its only step is the teacher's last, at the source end."""
    weights = dict(teacher.state_dict())
    for name in [n for n in weights if n.startswith("time.")]:
        weights[name] = weights[name][[0, teacher.config.steps]]
    student.load_state_dict(weights)


def train_all(
    recipe: BridgeRecipe,
    todo: Iterable[Run],
    cache: Cache,
    midpoints: Mapping[int, Tensor],
    out: Path,
    session: Session = HERE,
) -> dict[str, Trained]:
    """Every run; those that are there already are read."""
    trained: dict[str, Trained] = {}
    for run in todo:
        start = trained[f"bridge-{run.seed}"].ema if run.kind == "distilled" else None
        assert start is None or isinstance(start, BridgeNetwork)
        trained[run.name] = train_run(run, recipe, cache, out, midpoints, start, session)
    return trained


def summary(done: Trained) -> dict[str, float]:
    """What the JSON line says of one run."""
    return {"loss": round(done.loss, 5), "seconds": round(done.seconds, 1), "steps": done.steps}
