"""Plain FastAPI and uvicorn with a lock: one request at a time in a thread, no batching, no supervisor."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from fastapi import Body, FastAPI
from fastapi.concurrency import run_in_threadpool

from benchmarks.peers.work import Setup, load

app = FastAPI()
lock = asyncio.Lock()


@app.post("/predict")
async def predict(request: dict[str, Any] = Body()) -> Any:
    async with lock:
        [answer] = await run_in_threadpool(app.state.job, [request])
    return answer


if __name__ == "__main__":
    setup = Setup.read()
    app.state.job = load(setup)
    uvicorn.run(app, host="127.0.0.1", port=setup.port, log_level="warning", access_log=False)
