"""MLServer. A custom runtime with adaptive batching (`max_batch_size`, `max_batch_time`) in one parallel worker, the
default: docs.seldon.ai/mlserver/user-guide/adaptive-batching, parallel-inference and custom. Requests and answers are
strings of JSON in BYTES tensors of the Open Inference Protocol, one row each, so that batches can be merged."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from benchmarks.peers.work import Setup, load


class Work(MLModel):
    """Batches of requests, as the batcher merged them."""

    async def load(self) -> bool:
        self.job = load(Setup.read())
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        data: Any = getattr(payload.inputs[0].data, "root", payload.inputs[0].data)
        texts = [text if isinstance(text, str) else bytes(text).decode() for text in data]
        answers = [json.dumps(answer) for answer in self.job([json.loads(text) for text in texts])]
        output = ResponseOutput(name="answer", shape=[len(answers), 1], datatype="BYTES", data=answers)  # type: ignore[arg-type]
        return InferenceResponse(model_name=self.name, outputs=[output])


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def serve() -> None:
    setup = Setup.read()
    grpc, metrics = (free_port() for _ in range(2))
    settings = Settings(
        debug=False, host="127.0.0.1", http_port=setup.port, grpc_port=grpc, metrics_port=metrics,
        parallel_workers=1, use_structured_logging=False, load_models_at_startup=False,
    )  # fmt: skip
    server = MLServer(settings)
    model = ModelSettings(
        name="peer", implementation=Work, max_batch_size=setup.batch, max_batch_time=setup.wait_ms / 1000
    )
    await server.start([model])


if __name__ == "__main__":
    asyncio.run(serve())
