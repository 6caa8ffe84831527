"""Fifty clients at once on one server: uploads, job polling, streams, chat.

`python -m tests.clients.load [SECONDS]` runs 3 minutes unless told otherwise.
Each client is a thread that does one kind of thing, with a client's own pauses; every answer is checked and counted.
What the server holds in memory and how long GET /v1/models takes are measured by processes of their own.
Does not know: official clients (test_checks.py), kills (test_kills.py).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.clients import rows
from tests.clients.served import Server, resident

PROBE = Path(__file__).parent / "scripts" / "probe.py"
MIX = {"upload": 10, "poll": 20, "stream": 10, "chat": 10}
PAUSE = 0.2  # seconds between two probes, idle and under load: a process that has rested answers later
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "colour 1?"}], "max_tokens": 24}


@dataclass
class Report:
    """What came of it. Memory in bytes, times in milliseconds."""

    seconds: float
    statuses: Counter[str] = field(default_factory=Counter)  # "kind status" -> answers
    faults: list[str] = field(default_factory=list)  # answers that were wrong, connections that broke
    jobs: dict[str, str] = field(default_factory=dict)  # id -> the status it ended in
    idle_p95: float = 0.0
    busy_p95: float = 0.0
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)  # process -> (after the warm-up, at the end)

    @property
    def server_errors(self) -> list[str]:
        return [key for key in self.statuses if key.rpartition(" ")[2].startswith("5")]

    def __str__(self) -> str:
        lines = [f"{sum(self.statuses.values())} answers in {self.seconds:.0f} s to {sum(MIX.values())} clients"]
        lines += [f"  {key}: {count}" for key, count in sorted(self.statuses.items())]
        lines += [f"GET /v1/models p95: {self.idle_p95:.1f} ms idle, {self.busy_p95:.1f} ms under load"]
        lines += [f"{name}: {a / 2**20:.0f} -> {b / 2**20:.0f} MiB" for name, (a, b) in self.memory.items()]
        lines += [f"jobs: {dict(Counter(self.jobs.values()))}", *self.faults[:10]]
        return "\n".join(lines)


class Load:
    """The clients of one run. Each kind is a method that does its thing once and gives the pause that follows."""

    def __init__(self, server: Server, seconds: float, seed: int = 0) -> None:
        self.server, self.seconds, self.seed = server, seconds, seed
        self.report = Report(seconds)
        self.jobs: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> Report:
        self._jobs(1)  # one is there to be polled, and its replica warm
        self.server.ask("POST", "/v1/chat/completions", ASKED)
        self.server.wait(self.jobs[0])
        self.report.idle_p95 = p95(self._probe(150, PAUSE)())
        kinds: dict[str, Callable[[random.Random], float]] = {name: getattr(self, f"_{name}") for name in MIX}
        clients = [(kind, number) for kind, count in MIX.items() for number in range(count)]
        threads = [threading.Thread(target=self._client, args=(kinds[kind], kind, n)) for kind, n in clients]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        warm = min(30.0, self.seconds / 3)
        time.sleep(warm)
        before = self._memory()
        left = self.seconds - warm
        probed = self._probe(max(20, int(left / (PAUSE + 0.05))), PAUSE)
        for _ in range(max(1, int(left / 30))):
            self._jobs(1)
            time.sleep(left / max(1, int(left / 30)) - 0.1)
        self.report.busy_p95 = p95(probed())
        after = self._memory()
        self.report.memory = {name: (before[name], after[name]) for name in before if name in after}
        self._stop.set()
        for thread in threads:
            thread.join(120)
        self.report.seconds = time.monotonic() - began
        self.report.jobs = {job: self.server.wait(job)["status"] for job in self.jobs}
        return self.report

    def _client(self, once: Callable[[random.Random], float], kind: str, number: int) -> None:
        dice = random.Random(f"{self.seed} {kind} {number}")
        self._stop.wait(dice.random())
        while not self._stop.is_set():
            pause = 0.5
            try:
                pause = once(dice)
            except (OSError, http.client.HTTPException, AssertionError, KeyError, ValueError) as error:
                with self._lock:
                    self.report.faults.append(f"{kind}: {type(error).__name__}: {error}")
            self._stop.wait(pause * (0.5 + dice.random()))

    def _ask(self, kind: str, method: str, path: str, body: object = None) -> Any:
        status, answer = self.server.ask(method, path, body)
        self._count(kind, status)
        assert status == 200, f"{method} {path}: {status} {str(answer)[:300]}"
        return answer

    def _count(self, kind: str, status: int) -> None:
        with self._lock:
            self.report.statuses[f"{kind} {status}"] += 1

    def _jobs(self, count: int) -> None:
        for _ in range(count):
            training = self.server.upload(rows.jsonl(rows.chat()), "load.jsonl")
            hyper = {"n_epochs": 2, "batch_size": 4}
            asked = {"model": "tiny", "training_file": training, "hyperparameters": hyper}
            self.jobs.append(self._ask("job", "POST", "/v1/fine_tuning/jobs", asked)["id"])

    # -- the kinds ---------------------------------------------------------------------------------------------------

    def _upload(self, dice: random.Random) -> float:
        content = dice.randbytes(dice.randrange(1, 200_000))
        made = self.server.upload(content, "load.bin", "user_data")
        self._count("upload", 200)
        assert self._ask("upload", "GET", f"/v1/files/{made}/content") == content, f"{made} came back changed"
        self._ask("upload", "DELETE", f"/v1/files/{made}")
        return 1.0

    def _poll(self, dice: random.Random) -> float:
        job = dice.choice(self.jobs)
        assert self._ask("poll", "GET", f"/v1/fine_tuning/jobs/{job}")["id"] == job
        events = self._ask("poll", "GET", f"/v1/fine_tuning/jobs/{job}/events?limit=20")["data"]
        assert len({event["id"] for event in events}) == len(events)
        self._ask("poll", "GET", "/v1/fine_tuning/jobs?limit=5")
        return 1.0

    def _chat(self, dice: random.Random) -> float:
        answer = self._ask("chat", "POST", "/v1/chat/completions", {**ASKED, "seed": dice.randrange(2**31)})
        assert answer["usage"]["completion_tokens"] <= ASKED["max_tokens"]
        return 0.5

    def _stream(self, dice: random.Random) -> float:
        """Every fifth is left in the middle, as people do."""
        connection = http.client.HTTPConnection(urlsplit(self.server.url).netloc, timeout=120)
        with contextlib.closing(connection):
            body = json.dumps({**ASKED, "stream": True, "seed": dice.randrange(2**31)})
            headers = {"Authorization": f"Bearer {self.server.key}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            answer = connection.getresponse()
            self._count("stream", answer.status)
            assert answer.status == 200, answer.read()
            if dice.random() < 0.2:
                answer.readline()
                return 0.5
            said = answer.read()
        assert said.endswith(b"data: [DONE]\n\n") and b'"error"' not in said, said[-300:]
        return 0.5

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _probe(self, count: int, pause: float) -> Callable[[], list[float]]:
        """Begin to measure; the call that it gives waits for the milliseconds."""
        command = [sys.executable, str(PROBE), self.server.url, self.server.key, str(count), str(pause)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def milliseconds() -> list[float]:
            said, _ = process.communicate(timeout=self.seconds + 300)
            assert process.returncode == 0, said
            found: list[float] = json.loads(said)
            return found

        return milliseconds

    def _memory(self) -> dict[str, int]:
        return {name: resident(pids[0]) for name, pids in self.server.pids().items() if pids and name != "engine"}


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def main(seconds: float = 180.0) -> int:
    from tests import tiny

    with tempfile.TemporaryDirectory(prefix="luthier-load-") as folder:
        base = tiny.make_model(Path(folder) / "tiny")
        with Server(Path(folder) / "home", "--base", f"tiny={base}", env=UNLIMITED) as server:
            report = Load(server, seconds).run()
    print(report)
    lost = [job for job, status in report.jobs.items() if status != "succeeded"]
    return int(bool(report.server_errors or report.faults or lost or report.busy_p95 > 3 * report.idle_p95))


UNLIMITED = {"LUTHIER_REQUESTS_PER_MINUTE": "1000000"}

if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 180.0))
