"""A TCP proxy between a process and the store that can delay, cut and swallow what passes."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

CHUNK = 65_536


class Proxy:
    """Listens on `port` of the loopback, forwards to `upstream` there; its own thread and loop.

    `delay_s` holds up every chunk; `cut` ends every connection and refuses new ones; `swallow` lets nothing through
    without telling anybody; `heal` undoes all of it.
    """

    def __init__(self, port: int, upstream: int) -> None:
        self.port, self.upstream, self.delay_s = port, upstream, 0.0
        self._cut = False
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._passing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def start(self) -> Proxy:
        started = threading.Event()
        self._loop.call_soon(self._loop.create_task, self._serve(started))
        self._thread.start()
        assert started.wait(10), "the proxy does not listen"
        return self

    def stop(self) -> None:
        self._call(self._server.close)
        self._call(self._close_all)
        self._call(self._loop.stop)
        self._thread.join(10)

    def cut(self) -> None:
        self._cut = True
        self._call(self._close_all)

    def swallow(self) -> None:
        self._call(self._passing.clear)

    def heal(self) -> None:
        self._cut, self.delay_s = False, 0.0
        self._call(self._passing.set)

    def _call(self, function: Any) -> None:
        self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._passing.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        started.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._cut:
                return
            there, back = await asyncio.open_connection("127.0.0.1", self.upstream)
            self._open |= {writer, back}
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, back))
                    group.create_task(self._pump(there, writer))
            finally:
                self._open -= {writer, back}
                back.close()
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK):
            await self._passing.wait()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError

    def _close_all(self) -> None:
        for writer in list(self._open):
            with suppress(Exception):
                writer.transport.abort()
