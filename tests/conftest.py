"""Fixtures that every part uses: a real server, and hypothesis without its clock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from service.broker.embedded import Embedded

# Tests and the services that they start share few cores: threads of one matmul that wait for each other waste them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("offramp", deadline=None)
settings.load_profile("offramp")


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real embedded server for the whole session; tests empty it or use names of their own."""
    folder: Path = tmp_path_factory.mktemp("valkey")
    server = Embedded(folder)
    server.start()
    yield server.url
    server.stop()
