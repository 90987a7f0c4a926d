"""mosec. One stage of one worker; `max_batch_size`, `max_wait_time` (at least 1 ms), `timeout` and `capacity` as in
mosecorg.github.io/mosec/reference/interface.html and arguments.html. What waits longer than `--timeout` gets 408."""

from __future__ import annotations

import math
import sys
from typing import Any

from mosec import Server, Worker

from benchmarks.peers.work import Setup, load


class Model(Worker):
    """Batches of requests, as the server made them."""

    def __init__(self) -> None:
        super().__init__()
        self.setup = Setup.read()
        self.job = load(self.setup)

    def forward(self, data: Any) -> Any:
        return self.job(data) if self.setup.batch > 1 else self.job([data])[0]


def main() -> None:
    setup = Setup.read()
    sys.argv[1:] = [
        "--address", "127.0.0.1", "--port", str(setup.port), "--timeout", str(math.ceil(1000 * setup.timeout_s)),
        "--capacity", "8192", "--log-level", "error",
    ]  # fmt: skip
    server = Server()
    server.append_worker(
        Model, num=1, max_batch_size=setup.batch, max_wait_time=max(1, round(setup.wait_ms)), timeout=60
    )
    server.run()


if __name__ == "__main__":
    main()
