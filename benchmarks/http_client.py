"""A cheap HTTP/1.1 load client, a process of its own: a plan (JSON) on stdin, what it saw (JSON) on stdout.

    {"port": 8000, "requests": ["POST /...", ...], "connections": 16, "seconds": 5.0, "warmup_s": 1.0}
    {"port": 8000, "requests": [...], "rate": 200.0, "seconds": 20.0, "seed": 0}

With `connections` each of them sends its next request when it has its answer (closed loop). With `rate` requests are
sent at the times of a Poisson process, whatever became of earlier ones, over as many connections as that takes (open
loop); their latency counts from the time they were due. Keep-alive; answers have a Content-Length or come in chunks.

More of a plan: "cpus": [1] pins the client; "patience_s": 60 is how long it waits for answers at the end (what has
none by then, or lost its connection, has status 0); "uvloop": true makes it cheaper; "kill": [pid, 3.0] sends SIGKILL
to a process three seconds after the start (open loop). A connection that nobody takes has status -1.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

LINE_END, HEAD_END, LENGTH, CHUNKED = b"\r\n", b"\r\n\r\n", b"content-length:", b"transfer-encoding: chunked"
Seen = tuple[float, float, int]  # due (seconds from the start), latency (seconds), HTTP status (see above)
clock = time.perf_counter
PATIENCE_S = 60.0


def body_of(buffer: bytes) -> bytes | None:
    """The body of the answer in the buffer; None while it is not complete. ValueError where its end cannot be known."""
    head = buffer.find(HEAD_END)
    if head < 0:
        return None
    names, start = buffer[:head].lower(), head + len(HEAD_END)
    if (at := names.find(LENGTH)) >= 0:
        length = int(buffer[at + len(LENGTH) : buffer.find(b"\r", at)])
        return buffer[start : start + length] if len(buffer) >= start + length else None
    if CHUNKED not in names:
        raise ValueError(f"an answer without an end: {buffer[:head]!r}")
    parts, end = [], buffer.find(LINE_END, start)
    while end >= 0:
        size = int(buffer[start:end].split(b";")[0], 16)
        start = end + len(LINE_END) + size + len(LINE_END)
        if len(buffer) < start:
            break
        if not size:
            return b"".join(parts)
        parts.append(buffer[end + len(LINE_END) : start - len(LINE_END)])
        end = buffer.find(LINE_END, start)
    return None


class Connection(asyncio.Protocol):
    """One request at a time; `done(self, due, status)` is called with each answer."""

    def __init__(self, done: Callable[[Connection, float, int], None]) -> None:
        self._done, self._buffer, self._due = done, b"", -1.0
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def send(self, request: bytes, due: float) -> None:
        self._due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        body = body_of(self._buffer)
        if body is not None:
            self.body, status, self._buffer = body, int(self._buffer[9:12]), b""
            due, self._due = self._due, -1.0
            self._done(self, due, status)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._due >= 0:
            self._done(self, self._due, 0)


class Run:
    """The answers of one plan."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.port, self.seconds = plan["port"], plan["seconds"]
        self.requests: Sequence[bytes] = [request.encode() for request in plan["requests"]]
        self.warmup_s, self.patience_s = plan.get("warmup_s", 0.0), plan.get("patience_s", PATIENCE_S)
        self.kill = plan.get("kill")
        self.busy: dict[Connection, float] = {}
        self.seen: list[Seen] = []
        self.sent = 0
        self.bodies: dict[int, bytes] = {}
        self.over = asyncio.Event()

    def record(self, connection: Connection, due: float, status: int) -> None:
        self.busy.pop(connection, None)
        self.seen.append((due - self.began, clock() - due, status))
        if status and status not in self.bodies:
            self.bodies[status] = connection.body

    def next(self, connection: Connection, due: float) -> None:
        self.busy[connection] = due
        connection.send(self.requests[self.sent % len(self.requests)], due)
        self.sent += 1

    async def finish(self, seconds: float) -> None:
        """Wait for the last answers; what has none by then will have none."""
        try:
            await asyncio.wait_for(self.over.wait(), seconds)
        except TimeoutError:
            for connection, due in list(self.busy.items()):
                self.record(connection, due, 0)

    async def connect(self, done: Callable[[Connection, float, int], None]) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(done), "127.0.0.1", self.port)
        return connection

    async def closed(self, connections: int) -> None:
        """Every connection sends again as soon as it has its answer."""
        left = connections

        def done(connection: Connection, due: float, status: int) -> None:
            nonlocal left
            self.record(connection, due, status)
            if status and clock() - self.began < self.warmup_s + self.seconds:
                self.next(connection, clock())
                return
            left -= 1
            if not left:
                self.over.set()

        ready = [await self.connect(done) for _ in range(connections)]
        self.began = clock()
        for connection in ready:
            self.next(connection, clock())
        await self.finish(self.warmup_s + self.seconds + self.patience_s)

    async def open(self, rate: float, seed: int) -> None:
        """Poisson arrivals at `rate` per second; an arrival that finds every connection busy opens another."""
        draw, idle, opening = random.Random(seed), list[Connection](), set[asyncio.Task[None]]()

        def done(connection: Connection, due: float, status: int) -> None:
            self.record(connection, due, status)
            if status:
                idle.append(connection)
            if len(self.seen) == self.sent and self.finished:
                self.over.set()

        async def fresh(due: float) -> None:
            try:
                connection = await self.connect(done)
            except OSError:
                self.sent += 1
                self.seen.append((due - self.began, clock() - due, -1))
                return
            self.next(connection, due)

        self.finished = False
        self.began = due = clock()
        if self.kill:
            asyncio.get_running_loop().call_later(self.kill[1], os.kill, self.kill[0], signal.SIGKILL)
        while (due := due + draw.expovariate(rate)) < self.began + self.seconds:
            if (pause := due - clock()) > 0:
                await asyncio.sleep(pause)
            while idle and idle[-1].closed:  # the server closes what is idle for long
                idle.pop()
            if idle:
                self.next(idle.pop(), due)
            else:
                task = asyncio.create_task(fresh(due))
                opening.add(task)
                task.add_done_callback(opening.discard)
        await asyncio.gather(*opening)
        self.finished = True
        if len(self.seen) < self.sent:
            await self.finish(self.patience_s)

    def summary(self) -> dict[str, Any]:
        """Every answer of the measured time, and how many there were in all."""
        return {
            "requests": len(self.seen),
            "elapsed_s": clock() - self.began,
            "seen": [answer for answer in self.seen if answer[0] >= self.warmup_s],
            "bodies": {status: body.decode(errors="replace") for status, body in self.bodies.items()},
            "cpu_s": time.process_time(),
        }


def main() -> None:
    plan = json.load(sys.stdin)
    if "cpus" in plan:
        os.sched_setaffinity(0, plan["cpus"])
    run, start = Run(plan), asyncio.run
    if plan.get("uvloop"):
        import uvloop

        start = uvloop.run
    start(run.open(plan["rate"], plan.get("seed", 0)) if "rate" in plan else run.closed(plan["connections"]))
    json.dump(run.summary(), sys.stdout)


if __name__ == "__main__":
    main()
