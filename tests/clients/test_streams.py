"""Acceptance checks 21, 49 and 50 where the test must see or break what lies behind the client: wire and processes."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from typing import Any

import pytest

from tests.clients.conftest import SCRIPTS
from tests.clients.environments import environment
from tests.clients.served import Server, eventually

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("clients")]


@pytest.mark.parametrize("client", ["openai-3.57", "openai-2.34"])
def test_49_the_replica_dies_in_the_middle_of_an_answer(server: Server, client: str) -> None:
    made = environment(client)
    with made.start(made.program, str(SCRIPTS / "broken.py"), env=server.variables()) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "begun\n", asking.communicate()
        (replica,) = server.pids()["replica"]
        os.kill(replica, signal.SIGKILL)
        said, errors = asking.communicate(timeout=60)
    assert asking.returncode == 0, errors
    told = json.loads(said)
    assert told["kind"] == "APIError" and told["message"], told
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert server.ask("POST", "/v1/chat/completions", body)[0] == 200  # another replica is there
    assert server.pids()["replica"] != [replica]


def test_50_lines_of_a_chat_stream(server: Server) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
    for path in ("/v1/chat/completions", "/v1/completions"):
        asked = {**body, "stream": True} if "chat" in path else {"model": "tiny", "prompt": "one", "stream": True}
        request = urllib.request.Request(server.url + path, data=json.dumps(asked).encode(), method="POST")
        request.add_header("Authorization", f"Bearer {server.key}")
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-cache"
            said = answer.read()
        assert b"\r" not in said and said.endswith(b"data: [DONE]\n\n")
        events = said.decode().split("\n\n")[:-1]
        assert all(event.startswith(("data: ", ": ")) and "\n" not in event for event in events), events
        assert all("error" not in json.loads(event[6:]) for event in events[:-1] if event.startswith("data: {"))


def test_21_a_refused_cancel_is_one_request(server: Server, given: dict[str, Any]) -> None:
    client = environment("openai-3.57")
    job = given["jobs"]["roleless"]["id"]
    assert server.wait(job)["status"] == "failed"
    eventually(lambda: server.log()[-1]["message"] == "request")
    before = len(server.log())
    done = client.run(client.program, str(SCRIPTS / "refused.py"), job, env=server.variables())
    assert (done.returncode, done.stdout) == (0, "BadRequestError\n"), done.stderr
    cancels = [line for line in server.log()[before:] if str(line.get("route")).endswith("/{job_id}/cancel")]
    assert [line["status"] for line in cancels] == [400]
