"""torch.compile: one program a part for one row and one for any more, on a CPU with packed weights (`freezing`)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
import warnings

import torch

from models.backends.interface import Backend, BackendUnavailable, Executor, Setup
from models.backends.parts import Part, Program, make_programs

COMPILER = "inductor"
WARM_ROWS = (1, 2, 3)
PROGRAMS_A_PART = 4


def build(setup: Setup) -> Backend:
    """Compile every part now. Unavailable without what inductor needs: a C++ compiler (CPU), Triton (CUDA)."""
    began = time.monotonic()
    check_tools(setup.device)
    programs = make_programs(setup, setup.segments, compile_part)
    took = time.monotonic() - began
    return Executor("compiled", f"torch.compile, {len(programs.programs)} parts in {took:.0f} s", setup, programs)


def check_tools(device: torch.device) -> None:
    """Raise BackendUnavailable where torch.compile has nothing to compile with."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise BackendUnavailable("torch.compile needs a C++ compiler: install g++, or name one in CXX")
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise BackendUnavailable("torch.compile on CUDA needs the package triton")


@torch.inference_mode()
def compile_part(part: Part) -> Program:
    """Compile for one row and for several, now: freezing reads its setting when a program is traced.

    Programs are compiled for inference tensors; others are made into such, or dynamo would compile again.
    """
    # All parts of a kind share a code object, and dynamo counts recompilations by code object.
    torch._dynamo.config.recompile_limit += PROGRAMS_A_PART
    program: Program = torch.compile(part.run, dynamic=True, fullgraph=True, backend=COMPILER)
    packed = part.example(1)[0].device.type == "cpu"
    try:
        with warnings.catch_warnings(action="ignore"), torch._inductor.config.patch(freezing=packed):
            for rows in WARM_ROWS:
                program(*part.example(rows))
    except Exception as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise BackendUnavailable(f"torch.compile of {part.name} failed: {reason}") from error
    return lambda *tensors: program(*(tensor if tensor.is_inference() else tensor.clone() for tensor in tensors))
