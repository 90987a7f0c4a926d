from __future__ import annotations

import hmac
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from service import keys
from service.config import ConfigError, Settings
from service.errors import Forbidden
from service.gateway.app import create_app
from service.keys import Caller, Keyring, digest, new_key
from tests.service.gateway.serving import client
from tests.service.gateway.test_gateway_errors import problem

NOWHERE = "unix:///nonexistent/offramp.sock"
GUARDED = [("POST", "/generate"), ("POST", "/classify"), ("GET", "/models"), ("GET", "/models/drawer")]
OPEN = ["/healthz", "/metrics", "/docs", "/openapi.json"]
ALICE, BOB = new_key(), new_key()


def table(name: str, key: str, rest: str = "") -> str:
    return f'[{name}]\nhash = "{digest(key).hex()}"\n{rest}\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", ALICE, 'priority = "high"') + table("old", BOB, "expires = 2020-01-01"))
    return path


def write(path: Path, text: str | None) -> None:
    """An edit; None deletes."""
    path.unlink() if text is None else path.write_text(text)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_work_needs_a_key(file: Path, method: str, path: str) -> None:
    async with client(NOWHERE, api_keys_file=file) as http:
        for headers in ({}, bearer(new_key()), bearer(BOB), {"X-API-Key": "é"}, {"Authorization": f"Basic {ALICE}"}):
            sent = {name: value.encode() for name, value in headers.items()}
            refused = await http.request(method, path, headers=sent, content=b"{")
            body = problem(refused, 401, "unauthorized")
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert ("expired on 2020-01-01" in body["detail"]) == (headers == bearer(BOB))
        for headers in (bearer(ALICE), {"authorization": f"bearer {ALICE}"}, {"X-API-Key": ALICE}):
            assert (await http.request(method, path, headers=headers)).status_code in (422, 503)


@pytest.mark.parametrize("path", OPEN)
async def test_probes_and_documentation_need_none(file: Path, path: str) -> None:
    async with client(NOWHERE, api_keys_file=file, allow_anonymous=True) as http:
        assert (await http.get(path)).status_code == 200
        assert (await http.get("/readyz")).json()["code"] == "unavailable"


def test_every_route_is_listed_above_and_names_its_schemes() -> None:
    page = create_app(Settings(redis_url=NOWHERE)).openapi()
    schemes = page["components"]["securitySchemes"]
    assert {(s["type"], s.get("scheme"), s.get("name")) for s in schemes.values()} == {
        ("http", "bearer", None), ("apiKey", None, "X-API-Key"),
    }  # fmt: skip
    locked = {path for path, verbs in page["paths"].items() for verb in verbs.values() if verb.get("security")}
    assert set(page["paths"]) - locked == {"/healthz", "/readyz", "/metrics"}
    assert page["paths"]["/models"]["get"]["security"] == [{"bearer": []}, {"apiKey": []}]


async def test_without_keys_anybody_may_ask(redis: Redis, valkey_url: str) -> None:
    async with client(valkey_url) as http:
        assert (await http.get("/models")).json() == {"models": []}


async def test_a_key_is_held_to_its_rate(redis: Redis, valkey_url: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("slow", ALICE, "rate_per_s = 0.001\nburst = 2") + table("free", BOB))
    async with client(valkey_url, api_keys_file=path) as http:
        statuses = [(await http.get("/models", headers=bearer(ALICE))).status_code for _ in range(2)]
        refused = await http.get("/models", headers=bearer(ALICE))
        assert statuses == [200, 200]
        problem(refused, 429, "rate_limited")
        assert 900 <= int(refused.headers["Retry-After"]) <= 1000
        assert (await http.get("/models", headers=bearer(BOB))).status_code == 200


async def test_an_edit_is_followed_and_a_broken_one_is_not(
    redis: Redis, valkey_url: str, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "LOOK_S", 0.0)
    async with client(valkey_url, api_keys_file=file) as http:

        async def status(key: str) -> int:
            return (await http.get("/models", headers=bearer(key))).status_code

        assert (await status(ALICE), await status(BOB)) == (200, 401)
        for broken in ('[alice\nhash = "', table("alice", BOB, "speed = 9"), None):
            write(file, broken)
            assert (await status(ALICE), await status(BOB)) == (200, 401)
            assert "before this edit stay in force" in caplog.text
            caplog.clear()
            await status(ALICE)
            assert not caplog.records
        write(file, table("bob", BOB))
        assert (await status(ALICE), await status(BOB)) == (401, 200)
        write(file, "")
        assert (await status(BOB), (await http.get("/models")).status_code) == (401, 401)


def test_the_file_is_looked_at_once_a_second(file: Path) -> None:
    now = [0.0]
    keyring = Keyring(Settings(api_keys_file=file), clock=lambda: now[0])
    file.write_text(table("bob", BOB))
    now[0] = 0.9
    assert keyring.find(ALICE)
    now[0] = 1.0
    assert not keyring.find(ALICE)


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    several = [new_key() for _ in range(5)]
    text = ",".join(f"k{i}:{digest(key).hex()}" for i, key in enumerate(several))
    keyring, seen = Keyring(Settings(api_keys=text)), []

    def counted(a: bytes, b: bytes) -> bool:
        seen.append(a)
        return real(a, b)

    real = hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", counted)
    for key, name in [*zip(several, ("k0", "k1", "k2", "k3", "k4"), strict=True), (new_key(), None)]:
        seen.clear()
        found = keyring.find(key)
        assert (found.caller.id if found else None) == name
        assert seen == [digest(known) for known in several]


def test_priority_is_capped_by_the_key() -> None:
    assert (Caller().allowed(None), Caller().allowed("high")) == ("normal", "high")
    low = Caller("a", "low")
    assert (low.allowed(None), low.allowed("low"), Caller("a", "high").allowed(None)) == ("low", "low", "high")
    with pytest.raises(Forbidden, match="priority low at most") as refused:
        low.allowed("normal")
    assert refused.value.field == "priority"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[alice]\nhash = ?\n", "line 2"),
        ("[alice]\n", "[alice] hash: Field required"),
        ('[alice]\nhash = "abc"', "[alice] hash: Value error, must be the 64 hex digits"),
        (table("alice", ALICE, 'priority = "urgent"'), "[alice] priority: Input should be 'high'"),
        (table("alice", ALICE, "rate_per_s = nan"), "[alice] rate_per_s: "),
        (table("alice", ALICE, "burst = 2"), "burst needs rate_per_s"),
        (table("alice", ALICE, 'expires = "2030-01-01"'), "[alice] expires: "),
        (table("alice", ALICE, "quota = 2"), "[alice] quota: Extra inputs"),
        (table('"a b"', ALICE), "'a b': a name has"),
        ("hash = 3", "hash: must stand in a table"),
        (table("a", ALICE) + table("b", ALICE), "[b] hash: is that of [a]"),
        (None, "No such file"),
    ],
)
def test_a_broken_file_refuses_to_boot(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        create_app(Settings(redis_url=NOWHERE, api_keys_file=path))
    assert f"OFFRAMP_API_KEYS_FILE={path}: " in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize("text", [ALICE, f"alice:{ALICE}", "alice", ",", f"a:{'0' * 64},a:{'1' * 64}"])
def test_a_broken_variable_refuses_to_boot_and_keeps_its_secret(text: str) -> None:
    with pytest.raises(ConfigError, match="OFFRAMP_API_KEYS: ") as refused:
        Keyring(Settings(api_keys=text))
    assert ALICE not in str(refused.value)


def test_one_id_in_both_places_refuses_to_boot(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[alice\] stands twice"):
        Keyring(Settings(api_keys_file=file, api_keys=f"alice:{'0' * 64}"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "offramp.example"])
def test_others_are_not_let_in_by_omission(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"OFFRAMP_HOST='{host}'.*offramp keys new.*OFFRAMP_ALLOW_ANONYMOUS=true"):
        create_app(Settings(redis_url=NOWHERE, host=host))
    create_app(Settings(redis_url=NOWHERE, host=host, allow_anonymous=True))
    create_app(Settings(redis_url=NOWHERE, host=host, api_keys=f"alice:{'0' * 64}"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_open(host: str) -> None:
    create_app(Settings(redis_url=NOWHERE, host=host))


def offramp(*args: str, stdin: str = "", **environment: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "service.cli", *args],
        env={**os.environ, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("command", ["up", "gateway"])
def test_commands_refuse_to_boot(command: str, tmp_path: Path) -> None:
    run = offramp(command, OFFRAMP_HOST="0.0.0.0", OFFRAMP_DATA_DIR=str(tmp_path))
    assert (run.returncode, "Traceback" in run.stderr) == (1, False)
    assert "OFFRAMP_HOST='0.0.0.0'" in run.stderr


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "made.toml"
    return path, offramp("keys", "new", "alice", "--file", str(path)).stdout.strip()


def test_a_new_key_works(made: tuple[Path, str]) -> None:
    path, key = made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key.startswith("ofr_")
    assert key not in path.read_text()
    second = offramp("keys", "new", "bob", "--file", str(path), "--priority", "low", "--rate-per-s", "1.5")
    assert [k.caller for k in keys.read_file(path)] == [Caller("alice", "normal"), Caller("bob", "low", 1.5, 2)]
    checked = offramp("keys", "check", stdin=second.stdout, OFFRAMP_API_KEYS_FILE=str(path))
    assert (checked.returncode, checked.stdout) == (0, "bob\n")
    assert offramp("keys", "check", "--file", str(path), stdin=new_key()).returncode == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["alice"], "twice"),
        (["bob", "--priority", "urgent"], "[bob] priority"),
        (["bob", "--expires", "soon"], "--expires 'soon'"),
        (["b b"], "a name has"),
    ],
)
def test_what_would_break_the_file_is_not_written(made: tuple[Path, str], args: list[str], said: str) -> None:
    before = made[0].read_text()
    run = offramp("keys", "new", *args, "--file", str(made[0]))
    assert (run.returncode, run.stdout, "Traceback" in run.stderr) == (1, "", False)
    assert said in run.stderr
    assert made[0].read_text() == before


def test_without_a_file_the_table_is_printed() -> None:
    key, _, text = offramp("keys", "new", "alice", "--max-owed", "9", "--expires", "2999-01-01").stdout.partition("\n")
    (found,) = keys.parse(text, "stdout")
    assert (found.digest, found.caller) == (digest(key), Caller("alice", "normal", max_owed=9))
