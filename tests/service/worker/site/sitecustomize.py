"""On PYTHONPATH of a child process: its registry knows the toys of toy.py instead of the real tasks."""

from __future__ import annotations

import sys
from pathlib import Path

from models.registry import TASKS

sys.path.append(str(Path(__file__).resolve().parent.parent))
TASKS["generate"] = "toy:load_generate"
TASKS["classify"] = "toy:load_classify"
