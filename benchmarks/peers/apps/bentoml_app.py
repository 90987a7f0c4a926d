"""BentoML. A batchable API in one worker of one thread; `max_latency_ms` is the latency to keep, what cannot is refused
with 503: docs.bentoml.com/en/latest/get-started/adaptive-batching.html. The dispatcher finds its own waiting time.
Requests of a batchable API are lists, here of one."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import bentoml

from benchmarks.peers.work import Setup, load

SETUP = Setup.read()


@bentoml.service(
    workers=1, threads=1, traffic={"timeout": math.ceil(SETUP.timeout_s)}, logging={"access": {"enabled": False}}
)
class Work:
    """Batches of requests, as the dispatcher made them."""

    def __init__(self) -> None:
        self.job = load(SETUP)

    @bentoml.api(batchable=True, max_batch_size=SETUP.batch, max_latency_ms=math.ceil(1000 * SETUP.timeout_s))
    def predict(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self.job(requests)


def main() -> None:
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    os.execv(
        sys.executable,
        [
            sys.executable, "-m", "bentoml", "serve", "benchmarks.peers.apps.bentoml_app:Work",
            "--host", "127.0.0.1", "--port", str(SETUP.port),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
