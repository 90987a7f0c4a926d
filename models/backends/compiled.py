"""torch.compile: one program a part for one row and one for any more, weights packed into it (`freezing`)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time

import torch

from models.backends.interface import Backend, BackendUnavailable, Executor, Setup
from models.backends.parts import Part, Program, make_programs

WARM_ROWS = (1, 2, 3)
PROGRAMS_A_PART = 4


def build(setup: Setup) -> Backend:
    """Compile every part now. Unavailable without what inductor needs: a C++ compiler (CPU), Triton (CUDA)."""
    began = time.monotonic()
    check_tools(setup.device)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(setup.cache / "inductor"))
    programs = make_programs(setup, setup.segments, _compile)
    took = time.monotonic() - began
    return Executor("compiled", f"torch.compile, {len(programs.programs)} parts in {took:.0f} s", setup, programs)


def check_tools(device: torch.device) -> None:
    """Raise BackendUnavailable where torch.compile has nothing to compile with."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise BackendUnavailable("torch.compile needs a C++ compiler: install g++, or name one in CXX")
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise BackendUnavailable("torch.compile on CUDA needs the package triton")


@torch.inference_mode()
def _compile(part: Part) -> Program:
    # All parts of a kind share a code object, and dynamo counts recompilations by code object.
    config = torch._dynamo.config
    config.recompile_limit += PROGRAMS_A_PART
    program: Program = torch.compile(part.run, dynamic=True, fullgraph=True, options={"freezing": True})
    try:
        for rows in WARM_ROWS:
            program(*part.example(rows))
    except Exception as error:
        raise BackendUnavailable(f"torch.compile of {part.name} failed: {str(error).strip().splitlines()[0]}") from error
    return program
