"""Clients as they should be: every request has an Idempotency-Key and is sent again until something final is said."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any

import numpy as np
from PIL import Image

from models.tasks.drill import answer

FINAL = {"job_failed": "failed", "cancelled": "cancelled", "bad_request": "failed", "key_reused": "conflict"}
PAUSE_S = (0.05, 1.0)
SOCKET_S = 15.0
LATE_ENOUGH = 3  # answers 504 to one key


@dataclass(frozen=True)
class Ask:
    """One request, `judge` of its answer (empty when right, else what is wrong), and the state it should end in."""

    path: str
    body: dict[str, Any]
    key: str
    judge: Callable[[dict[str, Any]], str]
    poll: bool = False
    expect: str = "ok"


@dataclass
class Told:
    """What came of an Ask: `state` is ok, failed, expired, cancelled, or unknown when nobody said."""

    ask: Ask
    state: str = "unknown"
    wrong: str = ""
    id: str = ""
    answer: dict[str, Any] = field(default_factory=dict)
    problem: dict[str, Any] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Client:
    """Sends asks to gateways in turn; a lost connection, 429, 502, 503 or 504 is tried again under the same key."""

    def __init__(self, ports: Sequence[int], patience_s: float = 60.0, seed: int = 0) -> None:
        self._ports, self._patience_s, self._draw = ports, patience_s, random.Random(seed)

    def get(self, ask: Ask) -> Told:
        """Ask until it is final, or `patience_s` have passed."""
        told, began, pause = Told(ask), time.monotonic(), PAUSE_S[0]
        while time.monotonic() - began < self._patience_s:
            status, body, headers = self.once("POST", ask.path, ask)
            if status == 202:
                status, body, headers = self._follow(headers.get("location", ""), began)
            if self._final(told, status, body):
                break
            told.troubles.append(f"{status or 'lost'} {body.get('code') or body.get('error', '')}")
            time.sleep(min(pause, float(headers.get("retry-after", pause))) * self._draw.uniform(0.5, 1.0))
            pause = min(2 * pause, PAUSE_S[1])
        told.seconds = time.monotonic() - began
        return told

    def _final(self, told: Told, status: int, body: dict[str, Any]) -> bool:
        if status == 200:
            told.state, told.answer, told.id = "ok", body, body["id"]
            told.wrong = told.ask.judge(body)
            return True
        told.problem = body
        told.state = FINAL.get(body.get("code", ""), "unknown")
        if status == 504 and sum(trouble.startswith("504") for trouble in told.troubles) >= LATE_ENOUGH:
            told.state = "expired"
        return told.state != "unknown"

    def _follow(self, location: str, began: float) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Poll an async job on any gateway until it has ended."""
        while time.monotonic() - began < self._patience_s:
            status, body, _ = self.once("GET", location)
            if status == 404:
                return 0, {"error": "the job is forgotten"}, {}
            if status == 200 and body.get("status") not in ("queued", "running"):
                return self.once("GET", f"{location}/result")
            time.sleep(0.2 * self._draw.uniform(0.5, 1.0))
        return 0, {"error": "polled in vain"}, {}

    def once(self, method: str, path: str, ask: Ask | None = None) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status (0: no answer), body and headers of one try."""
        headers = {"Content-Type": "application/json"}
        if ask is not None:
            headers["Idempotency-Key"] = ask.key
            if ask.poll:
                headers["Prefer"] = "respond-async"
        connection = HTTPConnection("127.0.0.1", self._draw.choice(self._ports), timeout=SOCKET_S)
        try:
            connection.request(method, path, None if ask is None else json.dumps(ask.body), headers)
            response = connection.getresponse()
            return (
                response.status,
                json.loads(response.read() or b"{}"),
                {k.lower(): v for k, v in response.headers.items()},
            )
        except (OSError, HTTPException, ValueError) as error:
            return 0, {"error": type(error).__name__}, {}
        finally:
            connection.close()


class Crowd:
    """Several clients that work off one list of asks; `told` grows as they go."""

    def __init__(self, ports: Sequence[int], asks: Iterable[Ask], size: int = 8, patience_s: float = 60.0) -> None:
        self._left, self.told = deque(asks), list[Told]()
        self._threads = [
            threading.Thread(target=self._work, args=(Client(ports, patience_s, seed),), daemon=True)
            for seed in range(size)
        ]

    def start(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Begin nothing new."""
        self._left.clear()

    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> list[Told]:
        for thread in self._threads:
            thread.join()
        return self.told

    def _work(self, client: Client) -> None:
        while self._left:
            try:
                ask = self._left.popleft()
            except IndexError:
                return
            self.told.append(client.get(ask))


def picture(pixels: Any) -> str:
    """Base64 PNG of a uint8 (H, W) picture."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def drill_ask(config: dict[str, Any], number: int, run: str, first: int | None = None, **more: Any) -> Ask:
    """Classify picture `number` by a drill; `first` sets its first pixel (a Fault)."""
    height, width, _ = config["image"]
    pixels = np.random.default_rng(number).integers(0, 250, (height, width), dtype=np.uint8)
    if first is not None:
        pixels[0, 0] = first
    right = answer(pixels.tobytes(), config["evaluations"], len(config["labels"]))

    def judge(body: dict[str, Any]) -> str:
        found = tuple(body["results"][0]["probabilities"][label] for label in config["labels"])
        return "" if found == right else f"picture {number}: {found}, not {right}"

    poll, expect = bool(more.pop("poll", False)), more.pop("expect", "ok")
    body = {"model": config["name"], "image": picture(pixels), **more}
    return Ask("/classify", body, f"{run}-{config['name']}-{number}", judge, poll, expect)


def summary(told: Sequence[Told]) -> dict[str, int]:
    """How many ended how."""
    return dict(Counter(one.state for one in told))
