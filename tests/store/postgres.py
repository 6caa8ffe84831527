"""A private PostgreSQL server in a temporary folder, on a unix socket only, gone with the tests.

Its own programs refuse to run as root; then they run as the account `postgres` (or `nobody`).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def programs() -> Path | None:
    """The folder with initdb and postgres: on PATH, or where Debian keeps the newest."""
    found = shutil.which("initdb")
    if found and shutil.which("postgres"):
        return Path(found).resolve().parent
    kept = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(kept, key=lambda path: int(path.parent.name), default=None)


def _account() -> dict[str, Any]:
    """What subprocess needs to leave root; nothing when we are somebody else."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise AssertionError("root, and no account to run PostgreSQL as")


@contextlib.contextmanager
def server(bin: Path) -> Iterator[str]:
    """A running server; yields the URL of its only database."""
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="luthier-pg-", dir="/tmp"))  # a socket's path has room for 100 characters
    try:
        if account:
            os.chown(folder, account["user"], account["group"])
        data, log = folder / "data", folder / "log"
        asked = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(
            [bin / "initdb", "-D", data, *asked], check=True, capture_output=True, cwd=folder, timeout=120, **account
        )
        settings = {"listen_addresses": "", "unix_socket_directories": folder, "fsync": "off", "max_connections": "200"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with open(log, "wb") as output:
            running = subprocess.Popen(
                [bin / "postgres", "-D", data, *options], stdout=output, stderr=output, cwd=folder, **account
            )
        try:
            _wait(running, data / "postmaster.pid", log)
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            running.send_signal(signal.SIGINT)  # its "fast" shutdown
            running.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(running: subprocess.Popen[bytes], note: Path, log: Path) -> None:
    """The server writes `ready` as the eighth line of its own note when it takes connections."""
    for _ in range(600):
        assert running.poll() is None, log.read_text()
        with contextlib.suppress(FileNotFoundError):
            if "ready" in note.read_text():
                return
        time.sleep(0.05)
    raise AssertionError(f"PostgreSQL did not start:\n{log.read_text()}")
