"""`luthier serve --database` on a private PostgreSQL, with a second worker in the same data folder: a whole life."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import rows
from tests.clients.served import Server, below, eventually
from tests.store import postgres

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("postgres")]

JOBS = "/v1/fine_tuning/jobs"
ASKED = {"messages": [{"role": "user", "content": "colour 1?"}], "max_tokens": 3}
NAMES = ("%00", "a%00b", "file-%00", "ftjob-%00", "%ED%A0%BD", "%5Cu0000", "..%2f..%2fetc%2fpasswd", "a" * 500)
PLACES = (
    ("GET", "/v1/models/{}"),
    ("DELETE", "/v1/models/{}"),
    ("GET", "/v1/files/{}"),
    ("DELETE", "/v1/files/{}"),
    ("GET", "/v1/files/{}/content"),
    ("GET", "/v1/files?after={}"),
    ("POST", "/v1/uploads/{}/cancel"),
    ("GET", JOBS + "/{}"),
    ("POST", JOBS + "/{}/cancel"),
    ("GET", JOBS + "/{}/events"),
    ("GET", JOBS + "?after={}"),
    ("GET", "/v1/fine_tuning/checkpoints/{}/permissions"),
    ("GET", "/v1/fine-tunes/{}"),
    ("GET", "/v1/engines/{}"),
    ("GET", "/v1/chat/completions/{}"),
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    bin = postgres.programs()
    if bin is None:
        pytest.skip("no PostgreSQL programs here (Debian: apt-get install postgresql)")
    with postgres.server(bin) as url:
        yield url


def job_of(server: Server, training: str, epochs: int) -> str:
    hyper = {"n_epochs": epochs, "batch_size": 1}
    status, made = server.ask(
        "POST", JOBS, {"model": "tiny", "training_file": training, "hyperparameters": hyper, "suffix": str(epochs)}
    )
    assert status == 200, made
    return str(made["id"])


def steps_of(server: Server, job: str) -> list[int]:
    told = server.ask("GET", f"{JOBS}/{job}/events?limit=1000")[1]["data"][::-1]
    return [event["data"]["step"] for event in told if event["type"] == "metrics"]


def strange_names_are_refused(server: Server) -> None:
    for method, place in PLACES:
        for name in NAMES:
            status, said = server.ask(method, place.format(name), {} if method == "POST" else None)
            assert status in (400, 404) and said["error"]["message"], (method, place, name, status, said)
    for word in ("\0", "a\0b", "\ud83d"):
        for path, body in (
            (JOBS, {"model": word, "training_file": "file-0"}),
            (JOBS, {"model": "tiny", "training_file": word}),
            ("/v1/chat/completions", {**ASKED, "model": word}),
            ("/v1/completions", {"model": word, "prompt": "one"}),
        ):
            status, said = server.ask("POST", path, body)
            assert status in (400, 404) and said["error"]["message"], (path, word, status, said)


def test_a_life_on_postgresql_with_two_workers(url: str, tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {**os.environ, "LUTHIER_HOME": str(home), "LUTHIER_BASES": f"tiny={tiny}"}
    command = [sys.executable, "-m", "luthier.cli", "worker", "--name", "second", "--database", url]
    with Server(home, "--base", f"tiny={tiny}", "--database", url) as server:
        strange_names_are_refused(server)
        content = rows.jsonl(rows.chat(12))
        training = server.upload(content, "a\0b.jsonl")
        assert server.ask("GET", f"/v1/files/{training}")[1]["filename"] == "a\0b.jsonl"
        assert server.ask("GET", f"/v1/files/{training}/content") == (200, content)

        second = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            jobs = [job_of(server, training, 30), job_of(server, training, 31)]
            eventually(lambda: all(len(steps_of(server, job)) > 12 for job in jobs))  # at the same time
            (engine,) = set(below(second.pid)) - set(server.pids()["engine"])
            assert len(server.pids()["engine"]) == 1
        finally:
            second.send_signal(signal.SIGKILL)
            second.wait()
        eventually(lambda: not Path(f"/proc/{engine}").exists(), 5)
        ended = [server.wait(job) for job in jobs]
        assert [job["status"] for job in ended] == ["succeeded", "succeeded"], ended
        assert [steps_of(server, job) for job in jobs] == [list(range(1, 361)), list(range(1, 373))]

        (worker,) = server.pids()["worker"]
        doomed = job_of(server, training, 50)
        eventually(lambda: steps_of(server, doomed))
        os.kill(worker, signal.SIGKILL)
        assert server.ask("POST", f"{JOBS}/{doomed}/cancel")[0] == 200
        assert server.wait(doomed)["status"] == "cancelled"
        eventually(lambda: not server.pids()["engine"], 10)

        for job in ended:
            status, answer = server.ask("POST", "/v1/chat/completions", {**ASKED, "model": job["fine_tuned_model"]})
            assert status == 200 and answer["model"] == job["fine_tuned_model"], answer
        assert server.ask("DELETE", f"/v1/models/{ended[0]['fine_tuned_model']}")[0] == 200
        status, said = server.ask("POST", "/v1/chat/completions", {**ASKED, "model": ended[0]["fine_tuned_model"]})
        assert (status, said["error"]["code"]) == (404, "model_not_found")
    secret = server.key.encode()
    assert not [path for path in home.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert not any(line.get("level") == "error" for line in server.log())
