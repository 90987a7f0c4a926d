from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import support


@pytest.fixture(scope="session")
def offramp_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[support.Offramp]:
    """One `offramp up` for the whole session; tests that kill its parts start their own (support.offramp_up)."""
    with support.offramp_up(tmp_path_factory.mktemp("offramp-up")) as service:
        yield service
