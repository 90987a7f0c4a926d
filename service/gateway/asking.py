"""What comes with a request beside its body: who asks, under which key, and whether to wait for the answer."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from models.api import ClassifyParams, GenerateParams
from service.errors import BadRequest
from service.keys import Caller
from service.protocol import encode

KEY = "Idempotency-Key"
_SANE_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_TOKEN = re.compile(r'\s*([A-Za-z-]+)\s*(?:=\s*"?([^";,]*)"?)?\s*')


@dataclass(frozen=True)
class Asking:
    """One request.

    Attributes:
        key: the Idempotency-Key; empty for none.
        wait_s: how long to wait for the answer before a 202; None: as long as it takes (no `respond-async`).
    """

    request: Request
    caller: Caller
    key: str
    wait_s: float | None

    @property
    def arrived(self) -> float:
        """time.monotonic() at which the request came in; its budget counts from there."""
        return float(self.request.state.arrived)

    def digest(self) -> str:
        """What stands for caller and key."""
        return hashlib.sha256(f"{self.caller.id}\0{self.key}".encode()).hexdigest()


def asking(request: Request) -> Asking:
    """The headers of a request that makes a job."""
    given = request.headers.get(KEY)
    key = "" if given is None else given.strip().strip('"')
    if given is not None and not _SANE_KEY.fullmatch(key):
        raise BadRequest(f"{KEY} must be 1 to 255 visible ASCII characters", field=KEY)
    prefer = request.headers.getlist("prefer")
    return Asking(request, request.state.caller, key, wait_of(prefer) if prefer else None)


def wait_of(prefer: Sequence[str]) -> float | None:
    """Seconds to wait, from Prefer headers (RFC 7240): None without `respond-async`, 0 without `wait`.

    Preferences that are unknown or malformed are ignored, as the RFC has it.
    """
    found: dict[str, str] = {}
    for part in ",".join(prefer).split(","):
        if match := _TOKEN.match(part.partition(";")[0]):
            found.setdefault(match[1].lower(), match[2] or "")
    if "respond-async" not in found:
        return None
    try:
        wait = float(found.get("wait", "0"))
    except ValueError:
        return 0.0
    return wait if math.isfinite(wait) and wait > 0 else 0.0


def fingerprint(params: GenerateParams | ClassifyParams, images: Sequence[bytes] = ()) -> str:
    """Digest of what was asked, the same for every encoding of the body."""
    return hashlib.sha256(encode([type(params).__name__, params, list(images)])).hexdigest()
