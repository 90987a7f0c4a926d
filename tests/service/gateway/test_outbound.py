"""Whom the gateway calls for a stranger, and how it is cut off from what it must not wait for."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import h11
import pytest

from service.errors import BadRequest
from service.gateway import outbound
from service.gateway.outbound import Refused, checked_url, post, public
from tests.service.gateway.receiver import Receiver
from tests.support import require

PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
    "fec0::1", "ff02::1", "ff0e::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::",
    "2001:0:1::1", "2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str) -> None:
    assert public(address)


def test_private_addresses_only_where_allowed() -> None:
    assert checked_url("http://127.0.0.1:8080/x", private=True).port == 8080
    with pytest.raises(BadRequest, match="public"):
        checked_url("https://127.0.0.1:8080/x", private=False)


async def test_what_was_checked_is_what_is_called(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that first shows a public face is not asked a second time; of several only public ones are called."""
    answers = [["8.8.8.8"], ["10.0.0.1", "8.8.8.8", "::1"], ["127.0.0.1"]]
    called: list[list[str]] = []

    async def resolve(host: str, port: int) -> list[str]:
        return answers.pop(0)

    async def connect(addresses: list[str], port: int, secure: dict[str, Any]) -> Any:
        called.append(addresses)
        assert (port, secure["server_hostname"]) == (443, "rebind.test")
        raise ConnectionRefusedError

    monkeypatch.setattr(outbound, "_resolve", resolve)
    monkeypatch.setattr(outbound, "_connect", connect)
    for expected in (ConnectionRefusedError, ConnectionRefusedError, Refused):
        with pytest.raises(expected):
            await post("https://rebind.test/", {}, b"{}", False, ssl.create_default_context())
    assert called == [["8.8.8.8"], ["8.8.8.8"]]


@pytest.fixture
async def talker() -> AsyncIterator[Callable[[list[bytes], float], Any]]:
    """A server that answers chunks with a pause before each."""
    servers: list[asyncio.Server] = []

    async def start(chunks: list[bytes], pause: float) -> str:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                for chunk in chunks:
                    writer.write(chunk)
                    await writer.drain()
                    await asyncio.sleep(pause)
            except ConnectionError:
                pass
            finally:
                writer.close()

        servers.append(await asyncio.start_server(answer, "127.0.0.1", 0))
        return f"http://127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}/"

    yield start
    for server in servers:
        server.close()
        await server.wait_closed()


async def test_answers_that_never_end_are_cut_off(
    talker: Callable[[list[bytes], float], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "TIMEOUT_S", 0.5)
    context = ssl.create_default_context()

    async def status(chunks: list[bytes], pause: float = 0.0) -> int:
        return await post(await talker(chunks, pause), {}, b"{}", True, context)

    assert await status([b"HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + b"x" * 10**6]) == 200
    with pytest.raises(TimeoutError):
        await status([b"H"] * 100, pause=0.05)
    for broken in ([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10**5], [b"SSH-2.0-x\r\n"], []):
        with pytest.raises((h11.RemoteProtocolError, OSError)):
            await status(broken)


@pytest.fixture
def certified(tmp_path: Path) -> Iterator[tuple[str, int, list[str]]]:
    """A TLS server for hooks.test: its certificate, port, and the names that it was called by."""
    cert, key, names = tmp_path / "cert.pem", tmp_path / "key.pem", list[str]()
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = [
        "-subj",
        "/CN=hooks.test",
        "-addext",
        "subjectAltName=DNS:hooks.test",
        "-keyout",
        str(key),
        "-out",
        str(cert),
    ]
    subprocess.run([require("openssl"), *made, *name], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    found = Receiver()
    found.server.socket = context.wrap_socket(found.server.socket, server_side=True)
    found.server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield str(cert), found.port, names
    found.server.shutdown()
    found.server.server_close()
    thread.join()


async def test_the_certificate_must_be_of_the_name(
    certified: tuple[str, int, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, port, names = certified

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(outbound, "_resolve", resolve)
    trusting = ssl.create_default_context(cafile=cert)
    assert await post(f"https://hooks.test:{port}/", {}, b"{}", True, trusting) == 204
    assert names == ["hooks.test"]
    for host, context in (("other.test", trusting), ("hooks.test", ssl.create_default_context())):
        with pytest.raises(ssl.SSLCertVerificationError):
            await post(f"https://{host}:{port}/", {}, b"{}", True, context)
