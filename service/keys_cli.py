"""`offramp keys`: make API keys, and say which one a key is."""

from __future__ import annotations

import os
import sys
from datetime import date
from getpass import getpass
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="API keys: make one, recognise one.", no_args_is_help=True)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Id of the key: letters, digits, _ and -.")],
    priority: Annotated[str, typer.Option(help="The most that it may ask for: high, normal or low.")] = "normal",
    rate_per_s: Annotated[float, typer.Option(help="Requests a second; 0: no limit.")] = 0.0,
    burst: Annotated[int, typer.Option(help="Requests at once; 0: those of a second.")] = 0,
    max_owed: Annotated[int, typer.Option(help="Cost queued and running on one model; 0: no limit.")] = 0,
    expires: Annotated[str, typer.Option(help="UTC day from which it is refused, YYYY-MM-DD.")] = "",
    file: Annotated[Path | None, typer.Option(help="Append it to this file (made with mode 0600).")] = None,
) -> None:
    """Print a fresh key, which is kept nowhere, and the table for OFFRAMP_API_KEYS_FILE."""
    from service import keys

    if not keys.NAME.fullmatch(name):
        raise SystemExit(f"offramp keys new: {name!r}: a name has 1 to 64 letters, digits, _ or -")
    key = keys.new_key()
    rights = {"rate_per_s": rate_per_s, "burst": burst, "max_owed": max_owed}
    lines = [f"[{name}]", f'hash = "{keys.digest(key).hex()}"', f'priority = "{priority}"']
    lines += [f"{field} = {value}" for field, value in rights.items() if value]
    lines += [f"expires = {_day(expires)}"] if expires else []
    table = "\n".join(lines) + "\n"
    try:
        before = file.read_text("utf-8") if file and file.exists() else ""
        gap = "" if not before else "\n" if before.endswith("\n") else "\n\n"
        keys.parse(before + gap + table, f"offramp keys new: {file or name}")
        if file is not None:
            _append(file, gap + table)
    except (keys.BrokenKeys, UnicodeDecodeError) as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"offramp keys new: {file}: {error.strerror}") from None
    print(key)
    if file is None:
        print(f"\n{table}", end="")
    else:
        print(f"[{name}] stands in {file}; the key is kept nowhere", file=sys.stderr)


@app.command()
def check(
    file: Annotated[Path | None, typer.Option(help="Look here instead of where the settings say.")] = None,
) -> None:
    """Read a key from standard input and say whose it is; status 1 when it would be refused."""
    from service import keys
    from service.config import load_settings

    settings = load_settings()
    if file is not None:
        settings = settings.model_copy(update={"api_keys": "", "api_keys_file": file})
    keyring = keys.Keyring(settings)
    if not keyring.configured:
        raise SystemExit("offramp keys check: no keys: set OFFRAMP_API_KEYS_FILE or OFFRAMP_API_KEYS, or give --file")
    found = keyring.find((getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()).strip())
    if found is None:
        raise SystemExit("offramp keys check: this key is not known")
    if found.expired:
        raise SystemExit(f"offramp keys check: {found.caller.id} expired on {found.expires}")
    print(found.caller.id)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise SystemExit(f"offramp keys new: --expires {text!r}: must be a day, YYYY-MM-DD") from None


def _append(path: Path, text: str) -> None:
    """In one write, so that a gateway that reads meanwhile sees all of it or nothing."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as sink:
        sink.write(text)
