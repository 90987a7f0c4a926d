"""What bench_queue compares with: FastAPI and uvicorn alone, the same body in, the same bytes out, no work between."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

ANSWER = Path(sys.argv[2]).read_bytes() if __name__ == "__main__" else b""
app = FastAPI()


class Body(BaseModel):
    model: str
    image: str
    deadline_ms: int | None = None


@app.post("/classify")
async def classify(body: Body) -> Any:
    return Response(ANSWER, media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_config=None, access_log=False)
