"""Kills at random moments: server, worker, engine and replica, at least 30 in one life of a home; nothing may be lost.

The moments and the order come from a seed (LUTHIER_KILL_SEED). Clients go on all the while: they upload, make jobs with
the official clients' retries, chat. Only processes of the server that the test itself started are ever signalled.
"""

from __future__ import annotations

import base64
import csv
import http.client
import io
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.clients import rows
from tests.clients.served import Server, eventually

SEED = os.environ.get("LUTHIER_KILL_SEED") or "luthier"
KILLS = {"server": 6, "worker": 7, "engine": 10, "replica": 9}  # 32
JOBS = 6
EPOCHS, STEPS = 6, 36  # 12 rows, two at a time
ASKED = {"messages": [{"role": "user", "content": "colour 1?"}], "max_tokens": 200, "logit_bias": {"2": -100}}
REASONS = {"worker_lost", "engine_killed"}  # of a job that lost three in a row


class Clients:
    """What goes on while processes die. Everything that the server said yes to is written down here."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, str] = {}  # mark in the metadata -> id
        self.wrong: list[str] = []
        self.answered = 0
        self.stop = threading.Event()
        self._threads = [threading.Thread(target=one) for one in (self._upload, self._chat)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(60)

    def asked(self, method: str, path: str, body: object = None, **headers: str) -> Any:
        """The answer, or None where a client would come again: nobody there, broken off, 503, or an error in 5xx that
        tells of a lost replica."""
        try:
            status, answer = self.server.ask(method, path, body, timeout=60, **headers)
        except (OSError, http.client.HTTPException, ValueError):
            return None
        if status == 200:
            return answer
        if status not in (500, 502, 503):
            self.wrong.append(f"{method} {path}: {status} {answer}")
        return None

    def begin(self, number: int) -> None:
        """Make one job, trying again as the official clients do, until it is acknowledged."""
        mark = f"job-{number}"
        content = rows.jsonl(rows.chat(12, first=12 * number))
        training = None
        while training is None:
            training = self.uploaded(content)
        hyper = {"n_epochs": EPOCHS, "batch_size": 2}
        asked = {"model": "tiny", "training_file": training, "hyperparameters": hyper, "metadata": {"mark": mark}}
        for tries in range(100):
            made = self.asked("POST", "/v1/fine_tuning/jobs", asked, x_stainless_retry_count=str(tries))
            if made is not None:
                self.jobs[mark] = made["id"]
                return
            time.sleep(0.2)
        raise AssertionError(f"{mark} was never made")

    def uploaded(self, content: bytes) -> str | None:
        try:
            made = self.server.upload(content, "kept.jsonl")
        except (OSError, http.client.HTTPException, ValueError, AssertionError):
            return None
        self.files[made] = content
        return made

    def _upload(self) -> None:
        number = 1000
        while not self.stop.wait(0.4):
            number += 1
            self.uploaded(rows.jsonl(rows.chat(3, first=number)))

    def _chat(self) -> None:
        while not self.stop.wait(0.05):
            self.answered += self.asked("POST", "/v1/chat/completions", {"model": "tiny", **ASKED}) is not None


def kill_all(server: Server, clients: Clients, dice: random.Random) -> dict[str, int]:
    """Each kind as often as KILLS says, in random order at random moments; a server that was killed starts again."""
    done = dict.fromkeys(KILLS, 0)
    waiting = [kind for kind, count in KILLS.items() for _ in range(count)]
    dice.shuffle(waiting)
    made = 0
    while waiting:
        time.sleep(dice.uniform(0.1, 2.0))
        there = server.pids()
        kind = next((kind for kind in waiting if there[kind]), None)
        if kind is None:  # only engines are left to kill and all jobs are done: one more
            clients.begin(JOBS + made)
            made += 1
            wanted = waiting[0]
            eventually(lambda wanted=wanted: server.pids()[wanted], 60)
            continue
        waiting.remove(kind)
        try:
            os.kill(dice.choice(there[kind]), signal.SIGKILL)
        except ProcessLookupError:
            waiting.append(kind)
            continue
        done[kind] += 1
        if kind == "server":
            assert server.process is not None
            assert server.process.wait(30) == -signal.SIGKILL
            server.start()
    return done


@pytest.mark.xdist_group("kills")
@pytest.mark.timeout(600)
def test_nothing_is_lost(tiny: Path, tmp_path: Path) -> None:
    dice = random.Random(SEED)
    with Server(tmp_path / "home", "--base", f"tiny={tiny}") as server:
        with Clients(server) as clients:
            for number in range(JOBS):
                clients.begin(number)
            killed = kill_all(server, clients, dice)
        assert killed == KILLS and sum(killed.values()) >= 30
        assert clients.wrong == []
        assert clients.answered > 0
        ended = [server.wait(job, seconds=180) for job in clients.jobs.values()]
        nothing_is_lost(server, clients, ended)


def nothing_is_lost(server: Server, clients: Clients, ended: list[dict[str, Any]]) -> None:
    said = {job["id"]: (job["status"], job["error"]["code"], job["error"]["message"]) for job in ended}
    assert all(status == "succeeded" or (code in REASONS and why) for status, code, why in said.values()), said
    # Three kills end a job that wrote no checkpoint between them, and where engines start slowly few write one.
    assert any(status == "succeeded" for status, _, _ in said.values()), said

    listed = server.ask("GET", "/v1/fine_tuning/jobs?limit=100")[1]["data"]
    marks = [job["metadata"]["mark"] for job in listed]
    assert sorted(marks) == sorted(clients.jobs), "a job is there twice, or not at all"
    assert {job["metadata"]["mark"]: job["id"] for job in listed} == clients.jobs

    kept = {file["id"]: file for file in server.ask("GET", "/v1/files?limit=10000")[1]["data"]}
    for file, content in clients.files.items():
        assert kept[file]["status"] == "processed"
        assert server.ask("GET", f"/v1/files/{file}/content") == (200, content), file

    for job in ended:
        events = server.ask("GET", f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100")[1]
        assert not events["has_more"]
        told = events["data"][::-1]
        assert len({event["id"] for event in told}) == len(told)
        assert [event["created_at"] for event in told] == sorted(event["created_at"] for event in told)
        steps = [event["data"]["step"] for event in told if event["type"] == "metrics"]
        assert steps == sorted(set(steps)), steps
        messages = [event["message"] for event in told]
        assert messages[0] == f"Created fine-tuning job: {job['id']}"
        assert [one for one in messages if one.startswith("Created fine-tuning job")] == messages[:1]
        if job["status"] != "succeeded":
            assert messages[-1] == job["error"]["message"]
            continue
        assert messages[-1] == "The job has successfully completed"
        assert messages.count(messages[-1]) == 1
        assert steps == list(range(1, STEPS + 1))
        (result,) = job["result_files"]
        table = csv.DictReader(
            io.StringIO(base64.b64decode(server.ask("GET", f"/v1/files/{result}/content")[1]).decode())
        )
        assert [row["step"] for row in table] == [str(step) for step in steps]
        answer = server.ask(
            "POST", "/v1/chat/completions", {"model": job["fine_tuned_model"], **ASKED, "max_tokens": 3}
        )
        assert answer[0] == 200, answer
    models = [model["id"] for model in server.ask("GET", "/v1/models")[1]["data"]]
    assert len(set(models)) == len(models)
    assert {job["fine_tuned_model"] for job in ended if job["status"] == "succeeded"} <= set(models)
