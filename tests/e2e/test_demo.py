"""`offramp demo`, as `make demo` runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [pytest.mark.e2e, pytest.mark.zoo]


def test_the_demo_draws_classifies_and_leaves(tmp_path: Path):
    picture = tmp_path / "demo.png"
    command = [str(Path(sys.executable).with_name("offramp")), "demo", "--out", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(picture) in done.stdout
    for row in ("full", "balanced", "single", "bridge", "cascade", "ensemble"):
        assert any(line.startswith(row) for line in done.stdout.splitlines()), done.stdout
    with Image.open(picture) as image:
        assert image.width > 2 * 280
