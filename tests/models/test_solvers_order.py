"""Order of convergence, measured on the analytic model between two noise levels, where no step is infinite in
log-SNR and the last step, which goes on to the data, does not count."""

import math

import pytest

from tests.models.solver_contract import error
from tests.models.solving import cosine, discrete, edm, flow, vpsde

PROCESSES = {
    "edm": edm(sigma_min=0.1, sigma_max=10.0),
    "edm-v": edm("v", sigma_min=0.1, sigma_max=10.0),
    "vpsde": vpsde(),
    "vpsde-v": vpsde("v"),
    "cosine": cosine(),
    "cosine-sample": cosine("sample"),
    "discrete": discrete(),
    "flow": flow(timesteps=20),
}
TO_FLOOR = {"final_sigma": "sigma_min", "lower_order_final": False}
SOLVERS = {
    "ddim": (1, "ddim", {}),
    "euler": (1, "euler", {}),
    "heun": (2, "heun", {}),
    "dpmpp_2m": (2, "dpmpp_2m", TO_FLOOR),
    "dpmpp_2m heun": (2, "dpmpp_2m", TO_FLOOR | {"form": "heun"}),
    "unipc without corrector": (2, "unipc", TO_FLOOR | {"corrector": False}),
    "unipc bh2": (3, "unipc", TO_FLOOR),  # UniC raises the order by one (Zhao et al., 2023)
    "unipc bh1": (3, "unipc", TO_FLOOR | {"form": "bh1"}),
}


def fits(kind, name):
    """DDIM keeps to trained times; there, multistep solvers round the time that they tell the network."""
    if name == "ddim":
        return kind.startswith(("vpsde", "cosine"))
    return kind != "discrete" or name in ("euler", "heun")


@pytest.mark.parametrize(
    ("kind", "solver"), [(kind, s) for kind in PROCESSES for s, (_, name, _) in SOLVERS.items() if fits(kind, name)]
)
def test_order_of_convergence(kind, solver):
    order, name, options = SOLVERS[solver]
    coarse, fine = (error(name, PROCESSES[kind], steps, **options) for steps in (160, 320))
    assert fine < 0.02
    assert order - 0.1 < math.log2(coarse / fine) < order + 0.2
