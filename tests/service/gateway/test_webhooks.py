from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
from redis.asyncio import Redis

from service.broker.redis_streams import Broker
from service.config import ConfigError, load_settings
from service.errors import BadRequest
from service.gateway import outbound, webhooks
from service.gateway.outbound import Refused, checked_url, post, public
from service.gateway.schemas import HookBody
from tests.service.gateway.serving import Worker, client, expired, failing, gateway
from tests.support import require

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
OPEN = {"webhook_secret": SECRET, "webhook_private": True}
ASYNC = {"Prefer": "respond-async"}
PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
    "fec0::1", "ff02::1", "ff0e::1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::",
    "2001:0:1::1", "2001:db8::1",
]  # fmt: skip


class Receiver:
    """An HTTP server that keeps what it gets and answers `statuses` in turn, then 204."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.location = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.got.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(outer.statuses.pop(0) if outer.statuses else 204)
                if outer.location:
                    self.send_header("Location", outer.location)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook?x=1"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "PAUSE_S", (0.01, 1.0, 0.01))


async def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 20
    while not (found := what()):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    return found


async def counted(http: httpx.AsyncClient, outcome: str) -> float:
    text = (await http.get("/metrics")).text
    (line,) = [line for line in text.splitlines() if line.startswith(f'offramp_webhooks_total{{outcome="{outcome}"}}')]
    return float(line.split()[-1])


async def forgotten(redis: Redis, model: str = "drawer") -> None:
    end = time.monotonic() + 20
    while await redis.exists(f"offramp:{{m:{model}}}:hooks"):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    assert not [key async for key in redis.scan_iter(f"offramp:{{m:{model}}}:hook:*")]


def verified(message: tuple[str, dict[str, str], bytes]) -> dict[str, Any]:
    """The body of a message whose signature is right (Standard Webhooks, as a receiver checks it)."""
    _, headers, body = message
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    said: dict[str, Any] = json.loads(body)
    HookBody.model_validate(said)
    return said


async def test_the_end_of_a_job_is_told_signed_and_small(worker: Worker, valkey_url: str, receiver: Receiver) -> None:
    async with client(valkey_url, **OPEN) as http:
        body = {"n": 64, "steps": 1000, "webhook": receiver.url}
        job_id = (await http.post("/generate", json=body, headers=ASYNC)).json()["id"]
        ((path, headers, raw),) = await until(lambda: receiver.got)
        said = verified((path, headers, raw))
        assert (path, headers["content-type"], headers["webhook-id"]) == ("/hook?x=1", "application/json", job_id)
        assert headers["host"] == f"127.0.0.1:{receiver.port}"
        assert (said["type"], said["data"]["id"], said["data"]["model"]) == ("job.succeeded", job_id, "drawer")
        assert (said["data"]["status"], said["data"]["receipt"]["steps"]) == ("succeeded", 1000)
        assert len(raw) < 5000
        assert (await http.get(f"/jobs/{said['data']['id']}/result")).status_code == 200
        await until(lambda: worker.seen)
        assert await counted(http, "delivered") == 1


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [(failing("job_failed"), "failed", "job_failed"), (expired, "expired", "deadline_exceeded")],
)
async def test_other_ends_are_told_too(
    redis: Redis, valkey_url: str, receiver: Receiver, answer: Any, kind: str, code: str
) -> None:
    async with Worker(valkey_url, answer), client(valkey_url, **OPEN) as http:
        await http.post("/generate", json={"webhook": receiver.url})
        said = verified((await until(lambda: receiver.got))[0])
    assert (said["type"], said["data"]["status"], said["data"]["error"]["code"]) == (f"job.{kind}", kind, code)


async def test_a_cancelled_job_is_told(redis: Redis, valkey_url: str, receiver: Receiver) -> None:
    async with Worker(valkey_url, lambda _: None), client(valkey_url, **OPEN) as http:
        job_id = (await http.post("/generate", json={"webhook": receiver.url}, headers=ASYNC)).json()["id"]
        await http.delete(f"/jobs/{job_id}")
        assert verified((await until(lambda: receiver.got))[0])["type"] == "job.cancelled"


async def test_it_tries_again_after_errors_and_follows_no_redirect(
    worker: Worker, valkey_url: str, receiver: Receiver, redis: Redis
) -> None:
    receiver.statuses, receiver.location = [500, 503, 302], "/elsewhere"
    async with client(valkey_url, **OPEN) as http:
        await http.post("/generate", json={"webhook": receiver.url})
        await until(lambda: len(receiver.got) == 4)
        await forgotten(redis)
        assert [path for path, _, _ in receiver.got] == ["/hook?x=1"] * 4
        assert len({verified(message)["data"]["id"] for message in receiver.got}) == 1
        assert len({headers["webhook-id"] for _, headers, _ in receiver.got}) == 1
        assert [await counted(http, outcome) for outcome in ("retried", "delivered", "given_up")] == [3, 1, 0]


@pytest.mark.parametrize(("statuses", "tries", "outcome"), [([410], 1, "gone"), ([500] * 3, 3, "given_up")])
async def test_it_stops_when_told_so_or_tired(
    worker: Worker, valkey_url: str, receiver: Receiver, redis: Redis, monkeypatch: pytest.MonkeyPatch,
    statuses: list[int], tries: int, outcome: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(webhooks, "TRIES", 3)
    receiver.statuses = list(statuses)
    async with client(valkey_url, **OPEN) as http:
        await http.post("/generate", json={"webhook": receiver.url})
        await until(lambda: len(receiver.got) == tries)
        await forgotten(redis)
        assert (len(receiver.got), await counted(http, outcome)) == (tries, 1)


async def test_nobody_listening_is_tried_again(
    worker: Worker, valkey_url: str, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        if host == "nobody.test":
            raise socket.gaierror("no such name")
        return ["127.0.0.1"]

    monkeypatch.setattr(webhooks, "TRIES", 2)
    monkeypatch.setattr(outbound, "_resolve", resolve)
    async with client(valkey_url, **OPEN) as http:
        await http.post("/generate", json={"webhook": "http://127.0.0.1:1/"})
        await http.post("/generate", json={"webhook": "http://nobody.test/"})
        await forgotten(redis)
        assert [await counted(http, outcome) for outcome in ("retried", "given_up")] == [2, 2]


async def test_a_lost_gateway_leaves_its_hook_to_another(worker: Worker, valkey_url: str, receiver: Receiver) -> None:
    lost = Broker(valkey_url)
    with gateway(valkey_url, **OPEN) as base:
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            receiver.statuses = [500]
            await http.post("/generate", json={"webhook": receiver.url})
            await until(lambda: receiver.got)
    await asyncio.sleep(0.1)
    taken = await lost.due_hooks("drawer", 500)
    assert [hook.tries for hook in taken] == [2]
    await lost.aclose()
    async with client(valkey_url, **OPEN):
        await until(lambda: len(receiver.got) == 2)
    assert receiver.got[0][1]["webhook-id"] == receiver.got[1][1]["webhook-id"] == taken[0].id


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "https"),
        ("ftp://example.com/", "https"),
        ("example.com", "https"),
        ("https://", "host"),
        ("https://user:pw@example.com/", "password"),
        ("https://example.com:0/", "port"),
        ("https://example.com:99999/", "URL"),
        ("https://[::1/", "URL"),
        ("https://exa mple.com/", "ASCII"),
        ("https://example.com/\r\nX: y", "ASCII"),
        ("https://bücher.example/", "ASCII"),
        ("https://127.0.0.1/", "public"),
        ("https://[::ffff:10.0.0.1]/", "public"),
        ("https://169.254.169.254/latest/meta-data", "public"),
    ],
)
async def test_urls_that_cannot_be_called_are_refused_at_submit(
    worker: Worker, valkey_url: str, url: str, why: str
) -> None:
    async with client(valkey_url, webhook_secret=SECRET) as http:
        answer = await http.post("/generate", json={"webhook": url})
        assert (answer.status_code, answer.json()["field"]) == (422, "webhook")
        assert why in answer.json()["detail"]
    assert worker.seen == []


async def test_without_a_secret_there_are_no_webhooks(http: httpx.AsyncClient, worker: Worker) -> None:
    answer = await http.post("/generate", json={"webhook": "https://example.com/"})
    assert (answer.status_code, answer.json()["field"]) == (422, "webhook")
    assert "OFFRAMP_WEBHOOK_SECRET" in answer.json()["detail"]
    assert worker.seen == []


async def test_a_name_that_leads_inside_is_refused_at_delivery(
    worker: Worker, valkey_url: str, redis: Redis, receiver: Receiver
) -> None:
    async with client(valkey_url, webhook_secret=SECRET) as http:
        answer = await http.post("/generate", json={"webhook": f"https://localhost:{receiver.port}/"})
        assert answer.status_code == 200
        await forgotten(redis)
        assert await counted(http, "refused") == 1
    assert receiver.got == []


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


@pytest.mark.parametrize("secret", ["hunter2", "whsec_", "whsec_c2hvcnQ=", "whsec_" + "!" * 44, SECRET[6:]])
def test_a_wrong_secret_refuses_to_boot_and_is_not_shown(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("OFFRAMP_WEBHOOK_SECRET", secret)
    with pytest.raises(ConfigError) as stopped:
        load_settings()
    assert "OFFRAMP_WEBHOOK_SECRET=***: " in str(stopped.value)
    assert "openssl rand" in str(stopped.value)
    assert secret not in str(stopped.value) or secret == "whsec_"


def test_pauses_add_up_to_about_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pauses = [webhooks.pause_s(tries) for tries in range(1, webhooks.TRIES)]
    assert pauses[:-1] == sorted(pauses[:-1])
    assert 0.7 * 3600 < sum(pauses) < 1.3 * 3600
