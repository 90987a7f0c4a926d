"""A POST to an address that a stranger named: checked, then connected to as checked, and not followed further.

The name is resolved once and the connection goes to the very address that passed, so a name that resolves
differently a moment later (DNS rebinding) gains nothing. No redirects, no proxies; of the answer only the status is
read, within `TIMEOUT_S` for everything.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv6Address, ip_address
from urllib.parse import SplitResult, urlsplit

import h11

from service.errors import BadRequest

TIMEOUT_S = 10.0
PORTS = {"https": 443, "http": 80}
RESOLVERS = ThreadPoolExecutor(4, "webhook-dns")  # of their own: slow names of strangers hold up nobody else


class Refused(Exception):
    """The name leads to no address that may be called."""


def checked_url(url: str, private: bool) -> SplitResult:
    """The parts of a URL that may be called; BadRequest otherwise. `private` also allows http."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise _bad(f"is not a URL: {error}") from None
    if not url.isascii() or not url.isprintable() or " " in url:
        raise _bad("must be ASCII without spaces: percent-encode the rest")
    if parts.scheme not in PORTS or (parts.scheme == "http" and not private):
        raise _bad("must begin with https:// (http:// where OFFRAMP_WEBHOOK_PRIVATE allows it)")
    if not host or port == 0:
        raise _bad("must name a host and, if any, a port from 1")
    if "@" in parts.netloc:
        raise _bad("must not carry a user or password: check the signature instead")
    if not private and _literal(host) and not public(host):
        raise _bad(f"must not point at {host}, which is no public address")
    return parts


def public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large; one that stands for another is judged by that."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        if inner := ip.ipv4_mapped or ip.sixtofour:
            return public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


async def post(url: str, headers: Mapping[str, str], body: bytes, private: bool, context: ssl.SSLContext) -> int:
    """The status that `url` answers.

    Raises:
        Refused: no address of the host may be called.
        OSError, TimeoutError, h11.RemoteProtocolError: nothing, or no HTTP, came back.
    """
    parts = checked_url(url, private)
    host, port = str(parts.hostname), parts.port or PORTS[parts.scheme]
    async with asyncio.timeout(TIMEOUT_S):
        addresses = await _resolve(host, port)
        allowed = [address for address in addresses if private or public(address)]
        if not allowed:
            raise Refused(f"{host} is {', '.join(addresses)}: no public address")
        secure = {"ssl": context, "server_hostname": host} if parts.scheme == "https" else {}
        reader, writer = await _connect(allowed, port, secure)
        try:
            return await _exchange(reader, writer, parts, headers, body)
        finally:
            writer.transport.abort()


async def _resolve(host: str, port: int) -> list[str]:
    ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(RESOLVERS, ask)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def _connect(
    addresses: Sequence[str], port: int, secure: Mapping[str, object]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To the first address that answers."""
    *others, last = addresses
    for address in others:
        try:
            async with asyncio.timeout(TIMEOUT_S / 4):
                return await asyncio.open_connection(address, port, **secure)  # type: ignore[arg-type]
        except (OSError, TimeoutError):
            continue
    return await asyncio.open_connection(last, port, **secure)  # type: ignore[arg-type]


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    parts: SplitResult,
    headers: Mapping[str, str],
    body: bytes,
) -> int:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    ours = {"Host": parts.netloc, "Content-Length": str(len(body)), "Connection": "close"}
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(method="POST", target=target, headers=list((ours | dict(headers)).items()))
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(http.send(event) or b"")
    await writer.drain()
    while True:
        answered = http.next_event()
        if answered is h11.NEED_DATA:
            http.receive_data(await reader.read(4096))
        elif isinstance(answered, h11.Response):
            return answered.status_code
        elif not isinstance(answered, h11.InformationalResponse):
            raise h11.RemoteProtocolError("the connection closed before an answer")


def _literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _bad(what: str) -> BadRequest:
    return BadRequest(f"the webhook's URL {what}", field="webhook")
