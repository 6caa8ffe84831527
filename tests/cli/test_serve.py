"""`luthier serve` and `luthier worker` as processes: the first key, the lock, workers that come back, the end."""

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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luthier.cli import running
from luthier.cli.running import Workers
from luthier.cli.serve import configured, is_loopback
from luthier.settings import Settings
from luthier.spec.errors import BadSetting
from tests.cli.test_server_commands import called

KEY = re.compile(r"sk-lu-[A-Za-z0-9_-]{20,}")


class Server:
    """A `luthier serve` with what it has said so far."""

    def __init__(self, home: Path, *words: str) -> None:
        command = [sys.executable, "-m", "luthier.cli", "serve", "--port", "0", *words]
        self.home = home
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "LUTHIER_HOME": str(home)}
        )
        self.said = ""
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line
        self.process.stderr.close()

    @property
    def url(self) -> str:
        eventually(lambda: "listens at" in self.said or self.process.poll() is not None)
        found = re.search(r"listens at (\S+)\. ", self.said)
        assert found, self.said
        return found[1]

    def status(self, path: str, key: str | None = None) -> int:
        asked = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reading.join(10)
        return code


def eventually(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextlib.contextmanager
def serving(home: Path, *words: str) -> Iterator[Server]:
    server = Server(home, *words)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [int(word) for path in children for word in path.read_text().split()]
    return [pid for pid in pids if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_life_of_a_server(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    base = ("--base", f"small={tiny}", "--alias", "other=small")
    with serving(home, *base) as server:
        assert server.status("/healthz") == 200
        assert server.status("/v1/models") == 401
        key = KEY.findall(server.said)[0]
        assert server.status("/v1/models", key) == 200
        assert server.status("/v1/models/small", key) == 200
        assert key.encode() not in b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
        assert f"OPENAI_BASE_URL={server.url}/v1" in server.said

        with serving(home, *base) as second:
            assert second.process.wait(60) == 75
            second._reading.join(10)
            assert f"Another server uses {home} (process {server.process.pid})" in second.said

        eventually(lambda: len(workers_of(server.process)) == 1)
        worker = workers_of(server.process)[0]
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: workers_of(server.process) not in ([], [worker]))
        assert "Worker 1 ended with exit code -9" in server.said
        worker = workers_of(server.process)[0]
        assert server.end() == 0
        assert gone(worker)
    log = [json.loads(line) for line in (home / "logs" / "server.log").read_text().splitlines()]
    assert {"/healthz"} <= {line.get("route") for line in log}

    with serving(home, *base, "--no-worker") as server:
        assert server.status("/healthz") == 200
        assert not KEY.findall(server.said)
        assert workers_of(server.process) == []
        assert server.status("/v1/models", key) == 200
        assert server.end(signal.SIGINT) == 0


def test_workers_end_with_a_killed_server(tiny: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "home", "--base", f"small={tiny}", "--workers", "2") as server:
        eventually(lambda: "listens at" in server.said and len(workers_of(server.process)) == 2)
        log = tmp_path / "home" / "logs"
        eventually(lambda: all("waits" in path.read_text() for path in log.glob("worker-*.log")))
        workers = workers_of(server.process)
        server.end(signal.SIGKILL)
        eventually(lambda: all(map(gone, workers)))


def test_a_worker_that_is_stopped_is_killed_with_its_locks_and_another_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "SILENT_PULSES", 8)
    settings = Settings(home=tmp_path, hub="off")
    log = tmp_path / "logs" / "worker-1.log"
    log.mkdir(parents=True)  # no worker can start so
    said: list[str] = []
    monkeypatch.setattr(running, "say", said.append)
    with Workers(settings, 1) as workers:
        eventually(lambda: any("Worker 1 did not start: Is a directory" in words for words in said))
        log.rmdir()
        eventually(lambda: log.exists() and "waits for jobs" in log.read_text())
        stopped = workers._running[1].pid
        os.kill(stopped, signal.SIGSTOP)
        eventually(lambda: workers._running[1].pid != stopped)
        assert gone(stopped)
        eventually(lambda: log.read_text().count("waits for jobs") == 2)
    assert said[-2] == "Worker 1 does not answer and is killed."
    assert said[-1].startswith("Worker 1 ended with exit code -9; another starts in ")
    assert gone(workers._running[1].pid)


def test_a_worker_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "luthier.cli", "worker", "--name", "bee"]
    environment = {**os.environ, "LUTHIER_HOME": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"Worker bee waits for jobs in {tmp_path}.\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_no_open_door_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert called("serve", "--host", "0.0.0.0", "--port", "0") == 2
    told = capsys.readouterr().err
    assert "it has no API key yet" in told
    assert "luthier keys create --role admin" in told
    assert not KEY.findall(told)


def test_a_base_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert called("serve", "--port", "0", "--base", f"x={tmp_path}/nothing") == 2
    assert f"{tmp_path}/nothing" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--base", "a,b"), "wanted NAME[=MODEL]"),
        (("--alias", "a"), "wanted NAME=BASE"),
        (("--alias", "a=nothing"), "which LUTHIER_BASES does not offer"),
        (("--database", "mysql://x/y"), "wanted postgresql://"),
    ],
)
def test_wrong_options(
    words: tuple[str, ...],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert called("serve", *words) == 2
    assert wanted.lower() in capsys.readouterr().err.lower()


def test_a_port_in_use(tiny: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "a", "--base", f"small={tiny}", "--no-worker") as server:
        port = server.url.rpartition(":")[2]
        with serving(tmp_path / "b", "--base", f"small={tiny}", "--port", port) as second:
            assert second.process.wait(60) == 75
            second._reading.join(10)
            assert f"Port {port} of 127.0.0.1 is in use." in second.said


def test_options_stand_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    monkeypatch.setenv("LUTHIER_BASES", "one")
    monkeypatch.setenv("LUTHIER_REPLICAS", "3")
    settings = configured(["two"], ["x=two"])
    assert settings.offered.resolve("x") == "two"
    assert (settings.replicas, settings.home) == (3, tmp_path)
    assert configured().offered.default == "one"
    with pytest.raises(BadSetting, match="does not offer"):
        configured(None, ["x=two"])


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_what_is_loopback(host: str, inside: bool) -> None:
    assert is_loopback(host) is inside


def test_the_server_loads_no_torch(tiny: Path) -> None:
    code = "import sys, luthier.cli.running, luthier.cli.serve, luthier.api.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
