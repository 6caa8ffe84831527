"""A `luthier serve` of the tests' own: started, spoken to without any client, killed part by part, started again.

Does not know: the official clients.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

KEY = re.compile(r"sk-lu-[A-Za-z0-9_-]{20,}")
LISTENS = re.compile(r"listens at (\S+)\. ")
TERMINAL = ("succeeded", "failed", "cancelled")


class Server:
    """One server process over a home. `start` may be called again after its end: same port, same key."""

    def __init__(self, home: Path, *words: str, env: Mapping[str, str] | None = None) -> None:
        self.home, self.words, self.env = home, words, dict(env or {})
        self.port, self.key, self.said = "0", "", ""
        self.process: subprocess.Popen[str] | None = None
        self._reading: threading.Thread | None = None

    def start(self) -> Server:
        command = [sys.executable, "-m", "luthier.cli", "serve", "--port", self.port, *self.words]
        environment = {**os.environ, **self.env, "LUTHIER_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=nothing, stderr=pipe, text=True, env=environment, start_new_session=True
        )
        said = len(self.said)
        self._reading = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reading.start()
        eventually(lambda: LISTENS.search(self.said, said) or self.ended, 90)
        found = LISTENS.search(self.said, said)
        assert found, f"the server ended with {self.process.poll()}: {self.said[said:]}"
        self.url = found[1]
        self.port = self.url.rpartition(":")[2]
        shown = KEY.search(self.said)
        self.key = self.key or (shown[0] if shown else "")
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.said += line
        process.stderr.close()

    @property
    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it, wait for its end; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(60)
        if self._reading is not None:
            self._reading.join(10)
        return code

    def __enter__(self) -> Server:
        return self if self.process is not None else self.start()

    def __exit__(self, *_: object) -> None:
        if not self.ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
                return
            self.stop(signal.SIGKILL)

    def pids(self) -> dict[str, list[int]]:
        """Its living processes: server, worker, engine, replica. Only descendants of what we started are looked at."""
        found: dict[str, list[int]] = {"server": [], "worker": [], "engine": [], "replica": []}
        if self.process is None or self.process.poll() is not None:
            return found
        found["server"].append(self.process.pid)
        for pid in below(self.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"luthier.cli" in words and b"worker" in words:
                    found["worker"].append(pid)
                elif b"luthier.engine" in words:
                    found["engine"].append(pid)
                elif b"luthier.serve.replica" in words:
                    found["replica"].append(pid)
        return found

    def ask(self, method: str, path: str, body: object = None, timeout: float = 120, **headers: str) -> tuple[int, Any]:
        """(status, JSON or bytes) of one request without any client. Raises OSError when nobody answers."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data=data, method=method)
        asked.add_header("Authorization", f"Bearer {self.key}")
        if data is not None:
            asked.add_header("Content-Type", "application/json")
        for name, value in headers.items():
            asked.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(asked, timeout=timeout) as answer:
                status, kind, said = answer.status, answer.headers.get_content_type(), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, kind, said = error.code, error.headers.get_content_type(), error.read()
        return status, json.loads(said) if kind == "application/json" else said

    def upload(self, content: bytes, filename: str, purpose: str = "fine-tune") -> str:
        """The id of a new file."""
        edge = "----luthier-tests"
        body = (
            f'--{edge}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n--{edge}\r\n'
            f'Content-Disposition: form-data; name="file"; filename="{filename}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode() + content
        body += f"\r\n--{edge}--\r\n".encode()
        status, made = self.ask("POST", "/v1/files", body, Content_Type=f"multipart/form-data; boundary={edge}")
        assert status == 200, made
        return str(made["id"])

    def wait(self, job: str, path: str = "/v1/fine_tuning/jobs", seconds: float = 120) -> dict[str, Any]:
        """The job once it has ended."""
        deadline = time.monotonic() + seconds
        while True:
            found: dict[str, Any] = self.ask("GET", f"{path}/{job}")[1]
            if found["status"] in TERMINAL:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.2)

    def log(self) -> list[dict[str, Any]]:
        """The lines of its request log so far, oldest first."""
        lines: list[dict[str, Any]] = []
        for line in (self.home / "logs" / "server.log").read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last one may be half written
                lines.append(json.loads(line))
        return lines

    def variables(self) -> dict[str, str]:
        """The environment that points any generation of clients here."""
        base = f"{self.url}/v1"
        return {"OPENAI_API_KEY": self.key, "OPENAI_BASE_URL": base, "OPENAI_API_BASE": base}


def below(pid: int) -> list[int]:
    """The living descendants of a process, nearest first."""
    found, waiting = [], [pid]
    while waiting:
        for children in Path(f"/proc/{waiting.pop(0)}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                these = [int(word) for word in children.read_text().split()]
                found.extend(these)
                waiting.extend(these)
    return found


def resident(pid: int) -> int:
    """Bytes of memory that a process holds now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def eventually(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)
