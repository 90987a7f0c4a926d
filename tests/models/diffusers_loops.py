"""Sampling loops of diffusers' schedulers, for comparison: the same network, start and noise as ours.

Schedulers get their table of alpha_bar in float64, as the product has it; their own is float32, whose last bits are
3e-4 of 1 - alpha_bar at trained time 0.
"""

import importlib

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from models.solvers.vp import TERMINAL

BY_LEVEL = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "logsnr": "use_lu_lambdas"}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample", "flow": "flow_prediction"}
MULTISTEP = {
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
}
DISCRETE = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    **MULTISTEP,
}


def spacing(grid):
    """A grid as diffusers' configs have it."""
    return {BY_LEVEL[grid]: True} if grid in BY_LEVEL else {"timestep_spacing": grid}


def discrete(name, process, grid, steps, **config):
    """A scheduler of the DDPM family for a discrete process, ready to step."""
    cls, fixed = DISCRETE[name]
    betas = process.betas
    config = config | fixed | spacing(grid)
    config |= {"beta_schedule": betas["schedule"], "prediction_type": PREDICTIONS[process.prediction]}
    config |= {"steps_offset": process.steps_offset}
    if "start" in betas:
        config |= {"beta_start": betas["start"], "beta_end": betas["end"]}
    if process.zero_terminal_snr:
        config |= {"rescale_betas_zero_snr": True}
    if name in ("ddpm", "ddim", "heun"):
        config |= {"clip_sample": process.clip is not None, "clip_sample_range": process.clip or 1.0}
    if name == "ddim":
        config |= {"set_alpha_to_one": process.final_alpha == "one"}
    scheduler = cls(num_train_timesteps=process.timesteps, **config)
    table = torch.from_numpy(process.alpha_bar.copy())
    assert torch.allclose(scheduler.alphas_cumprod.double(), table, rtol=2e-5, atol=1e-7)
    if process.zero_terminal_snr and name not in ("ddpm", "ddim"):
        table[-1] = TERMINAL
    scheduler.alphas_cumprod = table
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if name == "ddim":
        scheduler.final_alpha_cumprod = scheduler.one if process.final_alpha == "one" else table[0]
    scheduler.set_timesteps(steps)
    return scheduler


def edm(name, process, grid, steps, **config):
    """An EDM scheduler, ready to step."""
    cls = EDMEulerScheduler if name == "euler" else EDMDPMSolverMultistepScheduler
    if name == "dpmpp_2m_sde":
        config["algorithm_type"] = "sde-dpmsolver++"
    scheduler = cls(sigma_schedule=grid, prediction_type=PREDICTIONS[process.prediction], **config)
    scheduler.set_timesteps(steps)
    return scheduler


def flow(name, process, grid, steps, **config):
    """A flow scheduler, ready to step."""
    if name in MULTISTEP:
        cls, fixed = MULTISTEP[name]
        config = config | fixed | {"use_flow_sigmas": True, "flow_shift": process.shift}
        scheduler = cls(prediction_type="flow_prediction", **config)
        if name == "unipc":  # its own default starts 1e-6 below pure noise; ours is that of DPM-Solver++
            scheduler.set_timesteps(sigmas=np.linspace(1 - 1 / process.timesteps, 0, steps + 1)[:-1])
        else:
            scheduler.set_timesteps(steps)
        scheduler.timesteps = scheduler.sigmas[:-1].double() * process.timesteps  # it cuts them to whole numbers
        return scheduler
    cls = FlowMatchEulerDiscreteScheduler if name == "euler" else FlowMatchHeunDiscreteScheduler
    scheduler = cls(shift=process.shift, **config, **(spacing(grid) if grid in BY_LEVEL else {}))
    scheduler.set_timesteps(steps)
    return scheduler


def loop(scheduler, network, x, noise, monkeypatch, variance=None, **step):
    """The scheduler's own loop, float64 where it lets us: the final state.

    `noise(i)` is the noise of step i, zeros on the last one; `variance(i)` is appended to the output's channels.
    """
    module = importlib.import_module(scheduler.__module__)
    at = 0

    def drawn(shape, **_):
        return noise(at)

    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    if isinstance(scheduler, EDMEulerScheduler | EDMDPMSolverMultistepScheduler):
        scheduler.timesteps = scheduler.timesteps.double()
    scaled = getattr(scheduler, "scale_model_input", None)
    for at, t in enumerate(scheduler.timesteps):  # noqa: B007  # `drawn` reads it
        o = network(x if scaled is None else scaled(x, t), t.item())
        if variance is not None:
            o = torch.cat([o, variance(at)], 1)
        x = scheduler.step(o, t, x, return_dict=False, **step)[0]
    return x
