"""Ray Serve, with the settings for throughput, which contestants.py sets (HAProxy, RAY_SERVE_THROUGHPUT_OPTIMIZED):
docs.ray.io/en/master/kuberay/user-guides/serve-high-throughput.html and serve/advanced-guides/performance.html.
`serve.batch`, one batch at a time, the model in a thread so that the replica goes on taking requests:
dyn-req-batch.html and asyncio-best-practices.html there. `max_ongoing_requests` (5 unless told) must not starve the
batches."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.work import Setup, load

SETUP = Setup.read()


@serve.deployment(num_replicas=1, max_ongoing_requests=8192, ray_actor_options={"num_cpus": 1})
class Work:
    """Batches of requests, as serve.batch made them."""

    def __init__(self) -> None:
        self.job = load(SETUP)

    @serve.batch(max_batch_size=SETUP.batch, batch_wait_timeout_s=SETUP.wait_ms / 1000)
    async def batched(self, requests: list[Any]) -> list[Any]:
        return await asyncio.to_thread(self.job, requests)

    async def __call__(self, request: Request) -> Any:
        return await self.batched(await request.json())


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = os.environ.get("PEERS_FOLDER") or tempfile.mkdtemp()
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=folder, log_to_driver=False
    )
    serve.start(http_options={"host": "127.0.0.1", "port": SETUP.port, "request_timeout_s": SETUP.timeout_s})
    try:
        serve.run(Work.bind(), blocking=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
