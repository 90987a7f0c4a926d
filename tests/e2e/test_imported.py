"""A diffusers pipeline folder, imported by the command and served: mixed with other solvers over real HTTP."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from models.api import GenerateWork, Runtime, SolverOptions
from models.tasks.generator import load
from tests import support
from tests.models.pipelines import random_transformer, save

pytestmark = pytest.mark.e2e
ASKED = [
    {"solver": "dpmpp_2m", "steps": 6, "guidance": 3.0},
    {"solver": "ddim", "steps": 9, "guidance": 1.0},
    {"solver": "unipc", "steps": 5, "guidance": 2.0},
    {"solver": "heun", "steps": 4, "guidance": 1.5},
    {"solver": "ddpm", "steps": 11, "guidance": 1.0, "solver_options": {"variance": "learned_range"}},
    {"solver": "euler", "steps": 7, "guidance": 4.0, "solver_options": {"grid": "karras"}},
]


def expected(folder: Path, seed: int, asked: dict[str, Any]) -> np.ndarray:
    """The pixels of one request, drawn alone in this process."""
    task = load(folder, 1, "cpu", Runtime())
    gear = task.gears["full"]
    mine = gear.solver_options if asked["solver"] == gear.solver else SolverOptions()
    options = SolverOptions(**mine.given() | asked.get("solver_options", {}))
    request = {key: asked[key] for key in ("solver", "steps", "guidance")}
    work = GenerateWork(model="tiny", labels=(2,), seeds=(seed,), gear="full", **request, solver_options=options)
    for _ in range(task.admit(work, [0], [0])[0]):
        task.step([0])
    return task.collect([0])[0].pixels


def test_an_imported_pipeline_is_served(tmp_path: Path) -> None:
    transformer = random_transformer(out_channels=8, num_layers=3)
    pipeline = save(tmp_path / "pipeline", transformer, DPMSolverMultistepScheduler(use_karras_sigmas=True))
    models = tmp_path / "models"
    command = [str(Path(sys.executable).with_name("offramp")), "import", "--from", "diffusers"]
    subprocess.run([*command, str(pipeline), "--out", str(models / "tiny")], cwd=tmp_path, check=True)
    with support.offramp_up(tmp_path, models=str(models)) as service:

        def ask(index: int) -> dict[str, Any]:
            body = {"model": "tiny", "label": "class-2", "seed": index, **ASKED[index % len(ASKED)]}
            answer = httpx.post(f"{service.url}/generate", json=body, timeout=300)
            assert answer.status_code == 200, answer.text
            return answer.json()

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(12)))
        metrics = httpx.get(service.worker_metrics_url).text
    assert float(re.search(r'offramp_mixed_ticks_total\{.*model="tiny".*\} (\S+)', metrics)[1]) > 0
    for index, answer in enumerate(answers):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]["b64"]))), np.int64)
        alone = expected(models / "tiny", index, ASKED[index % len(ASKED)])
        assert np.abs(picture - alone).max() <= 1
        assert alone.std() > 1
