"""LitServe. Batches of at most `max_batch_size`, which wait for `batch_timeout`: lightning.ai/docs/litserve, features,
batching. `fast_queue` is for more than 100 requests per second, `restart_workers` brings a dead worker back, `timeout`
drops what waited longer: the same, api-reference, litserver."""

from __future__ import annotations

from typing import Any

import litserve as ls

from benchmarks.peers.work import Setup, load


class Api(ls.LitAPI):
    """Batches of requests, as the server made them."""

    def setup(self, device: str) -> None:
        self.job = load(Setup.read())

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # an annotation would become the schema
        return request

    def batch(self, inputs: list[Any]) -> list[Any]:
        return list(inputs)

    def predict(self, x: Any) -> Any:
        return self.job(x)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> Any:
        return output


def main() -> None:
    setup = Setup.read()
    api = Api(max_batch_size=setup.batch, batch_timeout=setup.wait_ms / 1000)
    server = ls.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=1,
        timeout=setup.timeout_s,
        fast_queue=True,
        restart_workers=True,
    )
    server.run(host="127.0.0.1", port=setup.port, generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
