"""Sampling loops of diffusers' schedulers, for comparison: the same network, start and noise as ours.

The schedulers run in float64: their modules are given a `torch` and a `np` whose float32 is float64, so that a
difference is one of formulas, not of rounding.
"""

import importlib
import types

import numpy as np
import pytest
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

BY_LEVEL = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "logsnr": "use_lu_lambdas"}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample", "flow": "flow_prediction"}
DISCRETE = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
SDE = {"dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"}}
EDM = {
    "euler": EDMEulerScheduler,
    "dpmpp_2m": EDMDPMSolverMultistepScheduler,
    "dpmpp_2m_sde": EDMDPMSolverMultistepScheduler,
}
FLOW = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}


@pytest.fixture
def float64(monkeypatch):
    """All of diffusers' schedulers in float64."""
    doubled = []
    for library, double in ((torch, torch.float64), (np, np.float64)):
        copy = types.ModuleType(library.__name__)
        copy.__dict__.update(library.__dict__ | {"float32": double})
        doubled.append(copy)
    for cls in {*DISCRETE.values(), *EDM.values(), *FLOW.values()}:
        module = importlib.import_module(cls.__module__)
        monkeypatch.setattr(module, "torch", doubled[0])
        monkeypatch.setattr(module, "np", doubled[1], raising=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def scheduler(name, process, grid, steps, **config):
    """The scheduler that a process and a solver correspond to, ready to step."""
    made = {"discrete": _discrete, "edm": _edm, "flow": _flow}[process.kind](name, process, grid, steps, config)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(0)
    return made


def _spacing(grid):
    return {BY_LEVEL[grid]: True} if grid in BY_LEVEL else {"timestep_spacing": grid}


def _discrete(name, process, grid, steps, config):
    betas = process.betas
    config |= SDE.get(name, {}) | _spacing(grid)
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
    made = DISCRETE[name](num_train_timesteps=process.timesteps, **config)
    made.set_timesteps(steps)
    return made


def _edm(name, process, grid, steps, config):
    config |= SDE.get(name, {})
    made = EDM[name](sigma_schedule=grid, prediction_type=PREDICTIONS[process.prediction], **config)
    made.set_timesteps(steps)
    return made


def _flow(name, process, grid, steps, config):
    if name in FLOW:
        made = FLOW[name](shift=process.shift, **config, **(_spacing(grid) if grid in BY_LEVEL else {}))
        made.set_timesteps(steps)
        return made
    config |= SDE.get(name, {}) | {"use_flow_sigmas": True, "flow_shift": process.shift}
    made = DISCRETE[name](prediction_type="flow_prediction", **config)
    if name == "unipc":  # its own default starts 1e-6 below pure noise; here it is given DPM-Solver++'s
        made.set_timesteps(sigmas=np.linspace(1 - 1 / process.timesteps, 0, steps + 1)[:-1])
    else:
        made.set_timesteps(steps)
    made.timesteps = made.sigmas[:-1] * process.timesteps  # it cuts them to whole numbers, which are not its sigmas
    return made


def loop(made, network, x, noise, monkeypatch, variance=None, **step):
    """The scheduler's own loop from `x`: the final state.

    `noise(i)` is the noise of step i; `variance(i)` is appended to the output's channels.
    """
    at = 0

    def drawn(shape, **_):
        return noise(at)

    module = importlib.import_module(made.__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", drawn)
    scaled = getattr(made, "scale_model_input", None)
    for at, t in enumerate(made.timesteps):  # `drawn` reads `at`
        o = network(x if scaled is None else scaled(x, t), t.item())
        if variance is not None:
            o = torch.cat([o, variance(at)], 1)
        x = made.step(o, t, x, return_dict=False, **step)[0]
    return x
