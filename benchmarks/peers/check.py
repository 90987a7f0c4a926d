"""Whether a contestant gives the right answers, before its speed counts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.peers.contestants import Contestant, Offramp, requests, variants
from benchmarks.peers.work import CLASSES, MODELS, Job, Json, noop, sleep
from models.tasks import drill

TOLERANCE = 1e-5
LIKE_PEERS = ("", "full", "ensemble")  # variants that must answer as work.py does


@lru_cache(1)
def reference(work: str) -> Job:
    """The job in this process, one request a batch."""
    return {"noop": noop, "sleep": sleep}.get(work) or MODELS[work](1)


def pixels(b64: str) -> bytes:
    """Of a picture in base64."""
    return Image.open(io.BytesIO(base64.b64decode(b64))).convert("L").tobytes()


def expected(contestant: Contestant, request: Json) -> Json:
    """The right answer; Offramp decodes pictures before a drill digests them, and echoes nothing."""
    if isinstance(contestant, Offramp) and contestant.work in ("noop", "sleep"):
        evaluations = int(contestant.work == "sleep")
        return {"probabilities": drill.answer(pixels(request["image"]), evaluations, CLASSES)}
    [answer] = reference(contestant.work)([request])
    return answer


def differs(found: Json, right: Json) -> str:
    """How an answer differs from the right one; empty when it does not."""
    if "probabilities" in right:
        gap = np.abs(np.array(found["probabilities"]) - np.array(right["probabilities"])).max()
        return "" if gap <= TOLERANCE else f"probabilities are off by {gap:.2g}"
    if "b64" in right:
        return "" if pixels(found["b64"]) == pixels(right["b64"]) else "other pixels"
    return "" if found == right else "no echo"


def wrong(contestant: Contestant, sample: int = 6) -> str:
    """What is wrong with answers to some requests sent at once, so that they share batches; empty if nothing."""
    sent = requests(contestant.work)[:sample]
    for variant in variants(contestant.name, contestant.work):
        with ThreadPoolExecutor(sample) as pool:
            calls = [contestant.body(request, variant, 60.0) for request in sent]
            bodies: Sequence[Any] = list(pool.map(contestant.ask, calls))
        if not all(bodies):
            return f"{variant}: no answer to {sum(not body for body in bodies)} of {sample} requests"
        for request, body in zip(sent, bodies, strict=True):
            if variant in LIKE_PEERS and (why := differs(contestant.answer(body), expected(contestant, request))):
                return f"{variant}: {why}"
    return ""
