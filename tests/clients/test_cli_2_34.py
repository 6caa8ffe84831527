"""Acceptance check 51: `openai api` of 2.34.0, the last Python package with a command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients import rows
from tests.clients.environments import Client, environment
from tests.clients.served import Server

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("clients")]


@pytest.fixture(scope="module")
def last() -> Client:
    return environment("openai-2.34")


def test_51_every_command(last: Client, server: Server, given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(rows.jsonl(rows.chat(14)))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return last.run(last.tool, "api", *words, env=server.variables(), cwd=tmp_path)

    def listed(*words: str) -> list[dict[str, Any]]:
        """The objects that the command prints, one after another or as a page."""
        done = run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        found: list[dict[str, Any]] = []
        rest = done.stdout.strip()
        while rest:
            one, end = json.JSONDecoder().raw_decode(rest)
            found += one.get("data", [one])
            rest = rest[end:].lstrip()
        return found

    def api(*words: str) -> dict[str, Any]:
        (found,) = listed(*words)
        return found

    file = api("files.create", "-f", "x.jsonl", "-p", "fine-tune")
    assert (file["object"], file["filename"], file["purpose"]) == ("file", "x.jsonl", "fine-tune")
    assert file["id"] in [one["id"] for one in listed("files.list")]
    numbers = json.dumps({"n_epochs": 50, "batch_size": 1})
    job = api("fine_tuning.jobs.create", "-m", "tiny", "-F", file["id"], "-H", numbers, "-s", "last")
    assert (job["object"], job["hyperparameters"]["n_epochs"]) == ("fine_tuning.job", 50)
    assert api("fine_tuning.jobs.retrieve", "-i", job["id"])["id"] == job["id"]
    assert job["id"] in [one["id"] for one in listed("fine_tuning.jobs.list", "-l", "5")]
    events = listed("fine_tuning.jobs.list_events", "-i", job["id"], "-l", "50")
    assert events[-1]["message"] == f"Created fine-tuning job: {job['id']}"
    assert api("fine_tuning.jobs.cancel", "-i", job["id"])["status"] == "cancelled"
    assert "tiny" in [one["id"] for one in listed("models.list")]
    assert api("models.retrieve", "-i", "tiny")["id"] == "tiny"
    tuned = server.wait(given["jobs"]["muted"]["id"])["fine_tuned_model"]
    gone = api("models.delete", "-i", tuned)
    assert (gone["id"], gone["deleted"]) == (tuned, True)
    for words in (("-M", "3"), ("-M", "3", "--stream")):
        said = run("chat.completions.create", "-m", "tiny", "-g", "user", "hi", *words)
        assert said.returncode == 0, said.stderr
    completed = run("completions.create", "-m", "tiny", "-p", "one two", "-M", "3")
    assert completed.returncode == 0, completed.stderr
    refused = run("models.retrieve", "-i", "nothere:x")
    assert refused.returncode == 1 and "nothere:x" in refused.stderr, refused.stderr
