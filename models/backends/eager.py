"""The network itself, op by op: what every other backend is compared with."""

from __future__ import annotations

from models.backends.interface import Backend, Executor, Setup


def build(setup: Setup) -> Backend:
    """Works wherever torch does."""
    return Executor("eager", "the network op by op", setup, setup.backbone)
