"""From a diffusers scheduler config to a process and the solver of the gear `full`.

What is not supported is refused by key. Keys that the scheduler's class does not have are ignored, as diffusers
does, when another scheduler has them; others must be empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.api import UserError

Config = dict[str, Any]


@dataclass(frozen=True)
class Scheduler:
    """What is read of a scheduler's config.

    Attributes:
        gear: from its config (defaults filled in) to solver, steps and solver_options.
        read: keys that are used, and their defaults in diffusers.
        only: keys of which one value is supported, which is also the default.
    """

    gear: Callable[[Config], Config]
    read: Config
    only: Config = field(default_factory=dict)


def _one_of(c: Config, key: str, values: Mapping[str, str] | Sequence[str]) -> str:
    """The value of `key`; of a mapping, what it is called here."""
    if c[key] not in values:
        raise UserError(f"{key}={c[key]} is not supported; supported: {', '.join(values)}")
    return values[c[key]] if isinstance(values, Mapping) else str(c[key])


def _gear(solver: str, steps: int, **options: Any) -> Config:
    return {"solver": solver, "steps": steps, "solver_options": {k: v for k, v in options.items() if v is not None}}


def _plain(solver: str) -> Callable[[Config], Config]:
    return lambda c: _gear(solver, 50)


def _ddpm(c: Config) -> Config:
    same = {name: name for name in ("fixed_small", "fixed_large", "learned_range")}
    return _gear("ddpm", 250, variance=_one_of(c, "variance_type", {**same, "fixed_small_log": "fixed_small"}))


def _dpmpp(c: Config) -> Config:
    solver = _one_of(c, "algorithm_type", {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"})
    if c["euler_at_final"] and c["final_sigmas_type"] != "zero":
        raise UserError("euler_at_final: not supported with final_sigmas_type=sigma_min")
    return _gear(solver, 25, form=_one_of(c, "solver_type", ("midpoint", "heun")), **_multistep(c))


def _unipc(c: Config) -> Config:
    return _gear("unipc", 25, form=_one_of(c, "solver_type", ("bh1", "bh2")), **_multistep(c))


def _multistep(c: Config) -> Config:
    grid, final = _by_level(c), _one_of(c, "final_sigmas_type", ("zero", "sigma_min"))
    if grid and final == "sigma_min":
        raise UserError(f"final_sigmas_type: sigma_min is not supported with use_{grid}_sigmas")
    return {"grid": grid, "final_sigma": final, "lower_order_final": bool(c["lower_order_final"])}


def _level(solver: str, steps: int) -> Callable[[Config], Config]:
    """Euler and Heun, whose noise levels by flag lie between the ends of the spacing's."""

    def gear(c: Config) -> Config:
        grid = _by_level(c)
        if grid and c["timestep_spacing"] != "linspace":
            raise UserError(f"timestep_spacing: only linspace is supported with use_{grid}_sigmas")
        return _gear(solver, steps, grid=grid)

    return gear


def _by_level(c: Config) -> str | None:
    """The grid that a noise-level flag asks for."""
    if c["use_karras_sigmas"] and c["use_exponential_sigmas"]:
        raise UserError("use_exponential_sigmas: not together with use_karras_sigmas")
    return "karras" if c["use_karras_sigmas"] else "exponential" if c["use_exponential_sigmas"] else None


TRAINED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
ZERO_SNR = {"rescale_betas_zero_snr": False}
CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
LEVELS = {"use_karras_sigmas": False, "use_exponential_sigmas": False}
ANCESTRAL = TRAINED | ZERO_SNR | CLIPPED | {"timestep_spacing": "leading"}
MULTISTEP = TRAINED | ZERO_SNR | LEVELS | {"lower_order_final": True, "final_sigmas_type": "zero"}
NO_BETA = {"use_beta_sigmas": False}
NO_SHIFT = {"use_dynamic_shifting": False}
SECOND_ORDER = NO_BETA | NO_SHIFT | {"thresholding": False, "solver_order": 2, "use_flow_sigmas": False}
WHOLE_RANGE = {"sigma_min": None, "sigma_max": None}
FLOW = {"num_train_timesteps": 1000, "shift": 1.0}

SCHEDULERS = {
    "DDPMScheduler": Scheduler(_ddpm, ANCESTRAL | {"variance_type": "fixed_small"}, {"thresholding": False}),
    "DDIMScheduler": Scheduler(_plain("ddim"), ANCESTRAL | {"set_alpha_to_one": True}, {"thresholding": False}),
    "DPMSolverMultistepScheduler": Scheduler(
        _dpmpp,
        MULTISTEP
        | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False, "variance_type": None},
        SECOND_ORDER | {"use_lu_lambdas": False, "lambda_min_clipped": -math.inf},
    ),
    "UniPCMultistepScheduler": Scheduler(
        _unipc,
        MULTISTEP | {"solver_type": "bh2"},
        SECOND_ORDER
        | WHOLE_RANGE
        | {"predict_x0": True, "disable_corrector": [], "solver_p": None, "shift_terminal": None},
    ),
    "EulerDiscreteScheduler": Scheduler(
        _level("euler", 50),
        TRAINED | ZERO_SNR | LEVELS,
        NO_BETA
        | WHOLE_RANGE
        | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
    ),
    "EulerAncestralDiscreteScheduler": Scheduler(_plain("euler_ancestral"), TRAINED | ZERO_SNR),
    "HeunDiscreteScheduler": Scheduler(
        _level("heun", 25),
        TRAINED | LEVELS | CLIPPED | {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
        NO_BETA,
    ),
    "FlowMatchEulerDiscreteScheduler": Scheduler(
        _plain("euler"),
        FLOW,
        LEVELS | NO_BETA | NO_SHIFT | {"shift_terminal": None, "invert_sigmas": False, "stochastic_sampling": False},
    ),
    "FlowMatchHeunDiscreteScheduler": Scheduler(_plain("heun"), FLOW),
}
ELSEWHERE = {  # keys of other schedulers, and keys that mean nothing when the switches above are off
    *("skip_prk_steps", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"),
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
}
KNOWN = ELSEWHERE.union(*(s.read.keys() | s.only.keys() for s in SCHEDULERS.values()))


def read_scheduler(config: Mapping[str, Any], learned_variance: bool) -> tuple[Config, Config]:
    """The `process` table of a config.json, and solver, steps and solver_options of the gear `full`.

    Raises:
        UserError: a scheduler or a setting that is not supported, by key.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise UserError(f"_class_name={name} is not supported; supported: {', '.join(SCHEDULERS)}")
    scheduler = SCHEDULERS[name]
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in given.items():
        only = scheduler.only.get(key)
        if key in scheduler.only and value != only and (value or only):  # null is as good as false
            raise UserError(f"{key}={value} is not supported; supported: {only}")
        if key not in KNOWN and value:
            raise UserError(f"{key}={value} is not supported: no known scheduler has this key")
    settings = {**scheduler.read, **{k: v for k, v in given.items() if k in scheduler.read}}
    gear = scheduler.gear(settings)
    if "shift" in settings:
        flow = {"kind": "flow", "timesteps": settings["num_train_timesteps"], "shift": settings["shift"]}
        return {**flow, "grid": "linspace"}, gear
    wants = settings.get("variance_type")
    if wants in ("learned", "learned_range") and not learned_variance:
        raise UserError(f"variance_type={wants} needs a network with a learned variance (twice the channels)")
    return _discrete(settings, learned_variance), gear


def _discrete(c: Config, learned_variance: bool) -> Config:
    """The process of a network trained at whole times."""
    if c["trained_betas"] is not None:
        betas: Config = {"trained": [float(beta) for beta in c["trained_betas"]]}
    else:
        schedule = _one_of(c, "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))
        ends = {} if schedule == "squaredcos_cap_v2" else {"start": c["beta_start"], "end": c["beta_end"]}
        betas = {"schedule": schedule, **ends}
    return {
        "kind": "discrete",
        "timesteps": c["num_train_timesteps"],
        "betas": betas,
        "prediction": _one_of(c, "prediction_type", {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}),
        "learned_variance": learned_variance,
        "zero_terminal_snr": bool(c.get("rescale_betas_zero_snr")),
        "steps_offset": c["steps_offset"],
        "final_alpha": "one" if c.get("set_alpha_to_one", True) else "first",
        "clip": float(c["clip_sample_range"]) if c.get("clip_sample") else None,
        "grid": _one_of(c, "timestep_spacing", ("linspace", "leading", "trailing")),
    }
