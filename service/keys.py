"""API keys: what each may ask for, where they come from, how one is recognised.

A key is `ofr_` and 32 random bytes in URL-safe base64. Only its SHA-256 is kept. A slow hash protects passwords, which
can be guessed; 256 random bits cannot, and a fast hash keeps the price of a wrong key low.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from ipaddress import ip_address
from math import ceil
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.api import Priority
from service.config import ConfigError, Settings
from service.errors import Forbidden

LOOK_S = 1.0
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
RANKS: tuple[Priority, ...] = get_args(Priority)
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_HASH_HELP = "must be the 64 hex digits of the key's SHA-256, as `offramp keys new` prints them"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Whoever asks, and what they may; the default is anybody, without limits.

    Attributes:
        id: name of the API key; empty without one.
        priority: the most it may ask for.
        rate_per_s, burst: requests a second in the long run and at once; rate 0: no limit.
        max_owed: cost that it may have queued and running on one model; 0: no limit.
    """

    id: str = ""
    priority: Priority = "high"
    rate_per_s: float = 0.0
    burst: int = 0
    max_owed: int = 0

    def allowed(self, priority: Priority | None) -> Priority:
        """The priority asked for; else the key's own, and normal without a key. Forbidden above the key's own."""
        if priority is None:
            return self.priority if self.id else "normal"
        if RANKS.index(priority) < RANKS.index(self.priority):
            raise Forbidden(f"this API key may ask for priority {self.priority} at most", field="priority")
        return priority


@dataclass(frozen=True)
class ApiKey:
    """A key as it is kept: its SHA-256, who it stands for, and the UTC day from which it is refused."""

    digest: bytes
    caller: Caller
    expires: date | None = None

    @property
    def expired(self) -> bool:
        """Whether its day has come."""
        return self.expires is not None and datetime.now(UTC).date() >= self.expires


class KeyTable(BaseModel):
    """One table of the file of keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    hash: str
    priority: Priority = "normal"
    rate_per_s: float = Field(0.0, ge=0.0)
    burst: int = Field(0, ge=0)
    max_owed: int = Field(0, ge=0)
    expires: date | None = None

    @field_validator("hash")
    @classmethod
    def _is_a_hash(cls, value: str) -> str:
        if not _HASH.fullmatch(value):
            raise ValueError(_HASH_HELP)
        return value.lower()

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> KeyTable:
        if self.burst and not self.rate_per_s:
            raise ValueError("burst needs rate_per_s")
        return self

    def key(self, name: str) -> ApiKey:
        """The key; without `burst` as many requests at once as in a second."""
        burst = self.burst or ceil(self.rate_per_s)
        caller = Caller(name, self.priority, self.rate_per_s, burst, self.max_owed)
        return ApiKey(bytes.fromhex(self.hash), caller, self.expires)


class BrokenKeys(ValueError):
    """Keys that cannot be used: what is wrong and where, one line each; never a key or a hash."""


def new_key() -> str:
    """A fresh key."""
    return f"ofr_{secrets.token_urlsafe(32)}"


def digest(key: str) -> bytes:
    """SHA-256 of a key."""
    return hashlib.sha256(key.encode()).digest()


def find(key: str, keys: Iterable[ApiKey]) -> ApiKey | None:
    """The one that `key` is, expired or not. Every one is compared, in constant time, whichever it is."""
    asked, found = digest(key), None
    for known in keys:
        if hmac.compare_digest(known.digest, asked):
            found = known
    return found


def read_variable(text: str) -> list[ApiKey]:
    """Keys of `id:sha256hex,id:sha256hex`, with the rights of a table that says nothing."""
    tables = {}
    for number, entry in enumerate(text.split(","), 1):
        name, _, hashed = (part.strip() for part in entry.partition(":"))
        if not hashed or name in tables:
            raise BrokenKeys(f"OFFRAMP_API_KEYS: entry {number}: must be ID:HASH, each ID once")
        tables[name] = {"hash": hashed}
    return _keys(tables, "OFFRAMP_API_KEYS")


def read_file(path: Path) -> list[ApiKey]:
    """Keys of a TOML file, one table a key; one without tables lets nobody in."""
    where = f"OFFRAMP_API_KEYS_FILE={path}"
    try:
        return parse(path.read_text("utf-8"), where)
    except OSError as error:
        raise BrokenKeys(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BrokenKeys(f"{where}: {error}") from None


def parse(text: str, where: str) -> list[ApiKey]:
    """Keys of such a file's text; `where` begins the lines of BrokenKeys."""
    try:
        return _keys(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise BrokenKeys(f"{where}: {error}") from None


def _keys(tables: Mapping[str, Any], where: str) -> list[ApiKey]:
    keys, wrong = [], []
    for name, table in tables.items():
        if not NAME.fullmatch(name):
            wrong.append(f"{where}: {name!r}: a name has 1 to 64 letters, digits, _ or -")
        elif not isinstance(table, dict):
            wrong.append(f"{where}: {name}: must stand in a table, [ID]")
        else:
            try:
                keys.append(KeyTable.model_validate(table).key(name))
            except ValidationError as error:
                wrong += [f"{where}: [{name}] {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    if wrong:
        raise BrokenKeys("\n  ".join(wrong))
    return distinct(keys, where)


def distinct(keys: list[ApiKey], where: str) -> list[ApiKey]:
    """The keys, when no id and no hash stands twice among them."""
    ids: set[str] = set()
    hashes: dict[bytes, str] = {}
    for key in keys:
        name = key.caller.id
        if name in ids:
            raise BrokenKeys(f"{where}: [{name}] stands twice, in OFFRAMP_API_KEYS and OFFRAMP_API_KEYS_FILE")
        if key.digest in hashes:
            raise BrokenKeys(f"{where}: [{name}] hash: is that of [{hashes[key.digest]}]")
        ids.add(name)
        hashes[key.digest] = name
    return keys


class Keyring:
    """The keys that are in force. Their file is looked at once a second at most; a broken edit changes nothing.

    Raises:
        ConfigError: the settings' keys are broken.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = settings.api_keys_file, clock
        self.configured = bool(settings.api_keys) or self._path is not None
        self._looked_at = clock()
        try:
            self._stamp = self._stat()
            self._fixed = read_variable(settings.api_keys) if settings.api_keys else []
            self._keys = self._read()
        except BrokenKeys as error:
            raise ConfigError(f"wrong settings:\n  {error}") from None
        if self.configured and not self._keys:
            log.warning("no API key is known: every request is refused", extra={"file": self._path})

    def find(self, key: str) -> ApiKey | None:
        """The key's entry, expired or not."""
        if self._path is not None and self._clock() - self._looked_at >= LOOK_S:
            self._look()
        return find(key, self._keys)

    def _look(self) -> None:
        self._looked_at = self._clock()
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._read()
        except BrokenKeys as error:
            log.error("the API keys before this edit stay in force: %s", error)
        else:
            log.info("API keys read again", extra={"file": self._path, "keys": len(self._keys)})

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None

    def _read(self) -> list[ApiKey]:
        if self._path is None:
            return self._fixed
        return distinct([*self._fixed, *read_file(self._path)], f"OFFRAMP_API_KEYS_FILE={self._path}")


def gateway_keyring(settings: Settings) -> Keyring:
    """The keys of a gateway; ConfigError for one that others reach and that asks nobody for a key."""
    keyring = Keyring(settings)
    if not (keyring.configured or settings.allow_anonymous or is_loopback(settings.host)):
        raise ConfigError(
            f"wrong settings:\n  OFFRAMP_HOST={settings.host!r}: others reach this address and no API keys are set: "
            "make one with `offramp keys new NAME --file FILE` and set OFFRAMP_API_KEYS_FILE=FILE, "
            "or say OFFRAMP_ALLOW_ANONYMOUS=true"
        )
    return keyring


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost may be anything."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
