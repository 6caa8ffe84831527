"""Acceptance checks 23, 31-37, 40 and 42: the `openai` command of before 1.0, and the cookbook's classification run.

Each test runs the command as a user would, in a folder with the user's files.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import rows
from tests.clients.environments import Client, environment
from tests.clients.served import Server, eventually

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("clients")]
STAMP = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] ", re.MULTILINE)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def old() -> Client:
    return environment("openai-0.28")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The user's folder: dir/x.jsonl, and a validation file."""
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "x.jsonl").write_bytes(rows.jsonl(rows.completions()))
    (tmp_path / "v.jsonl").write_bytes(rows.jsonl(rows.completions(6)))
    return tmp_path


@pytest.fixture
def api(old: Client, server: Server, folder: Path) -> Run:
    """`openai api WORDS...` there, against the server."""

    def run(*words: str, stdin: str = "", ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = old.run(old.tool, "api", *words, env=server.variables(), stdin=stdin, cwd=folder, timeout=300)
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        return done

    return run


def created(said: str) -> dict[str, Any]:
    """The job that `create` printed as JSON after its notices."""
    found: dict[str, Any] = json.loads(said[said.index("{\n") :])
    return found


def messages(said: str) -> list[str]:
    return [line.partition("] ")[2] for line in said.splitlines() if STAMP.match(line)]


def epochs(told: list[str]) -> list[str]:
    return [one for one in told if one.startswith("Completed epoch")]


def test_31_33_create_from_a_path_and_follow_twice(api: Run, old: Client, server: Server, folder: Path) -> None:
    before = len(server.log())
    path = ("-t", "dir/x.jsonl", "-m", "ada", "--n_epochs", "25", "--batch_size", "1")
    said = api("fine_tunes.create", *path, "--no_follow").stdout
    assert re.search(r"Uploaded file from dir/x\.jsonl: file-\w+", said), said
    job = created(said)
    assert job["object"] == "fine-tune" and job["id"].startswith("ft-")
    assert job["training_files"][0]["filename"] == "dir/x.jsonl"
    asked = [(line.get("method"), line.get("status")) for line in server.log()[before:] if "/files" in str(line)]
    assert asked[0] == ("GET", 404), asked  # the command asks whether the path is a file's id

    with old.start(old.tool, "api", "fine_tunes.follow", "-i", job["id"], env=server.variables()) as following:
        assert following.stdout is not None
        seen = following.stdout.readline()
        while "Fine-tune started" not in seen:
            line = following.stdout.readline()
            assert line, seen
            seen += line
        following.send_signal(signal.SIGINT)
        rest, errors = following.communicate(timeout=60)
    assert following.returncode == 0, errors
    assert "Job is still" in rest, rest
    assert server.ask("GET", f"/v1/fine-tunes/{job['id']}")[1]["status"] in ("pending", "running", "succeeded")

    again = api("fine_tunes.follow", "-i", job["id"]).stdout
    told = messages(again)
    assert told[0] == f"Created fine-tune: {job['id']}"
    assert told[-1] == "Fine-tune succeeded"
    assert epochs(told) == [f"Completed epoch {n}/25" for n in range(1, 26)]
    assert "Job complete! Status: succeeded" in again
    model = server.ask("GET", f"/v1/fine-tunes/{job['id']}")[1]["fine_tuned_model"]
    assert re.fullmatch(r"tiny:ft-luthier-\d{4}(-\d\d){5}", model), model
    assert f"openai api completions.create -m {model}" in again


def test_32_42_create_and_follow_to_the_end(api: Run, server: Server, folder: Path) -> None:
    """With 0.28.1 and with 0.27.8, which reads streams more strictly."""
    older = environment("openai-0.27")
    command = ("fine_tunes.create", "-t", "dir/x.jsonl", "-m", "ada", "--n_epochs", "2", "--suffix", "My Own! name")
    command += ("--no_check_if_files_exist",)
    first = api(*command)
    second = older.run(older.tool, "api", *command, env=server.variables(), cwd=folder, timeout=300)
    assert second.returncode == 0, second.stderr
    for said in (first.stdout, second.stdout):
        told = messages(said)
        assert told[0].startswith("Created fine-tune: ft-"), said
        wanted = ["Fine-tune started", "Completed epoch 1/2", "Completed epoch 2/2", "Fine-tune succeeded"]
        assert [one for one in told if one in wanted] == wanted, said
        assert any(one.startswith("Uploaded model: tiny:ft-luthier:my-own-name-") for one in told), said
        assert any(one.startswith("Uploaded result file: file-") for one in told), said
        assert "Stream interrupted" not in said
        assert "Job complete! Status: succeeded" in said
        assert "openai api completions.create -m tiny:ft-luthier:my-own-name-" in said


def test_34_the_server_restarts_while_the_command_follows(
    old: Client, small_base: Path, folder: Path, tmp_path: Path
) -> None:
    base = ("--base", f"tiny={small_base}")
    with Server(tmp_path / "home", *base, "--no-worker") as server:
        training = server.upload((folder / "dir" / "x.jsonl").read_bytes(), "x.jsonl")
        job = server.ask("POST", "/v1/fine-tunes", {"training_file": training, "n_epochs": 2})[1]["id"]
        follow = (old.tool, "api", "fine_tunes.follow", "-i", job)
        with old.start(*follow, env=server.variables()) as following:
            assert following.stdout is not None
            while "Created fine-tune" not in following.stdout.readline():
                pass
            server.stop()
            rest, errors = following.communicate(timeout=60)
        assert following.returncode == 0, errors
        assert "Stream interrupted (client disconnected)" in rest, rest
        server.words = base  # now with a worker
        server.start()
        done = old.run(*follow, env=server.variables(), timeout=200)
        told = messages(done.stdout)
        assert told[0] == f"Created fine-tune: {job}"
        assert told[-1] == "Fine-tune succeeded", done.stdout


def test_35_37_duplicates_and_what_becomes_of_a_job(api: Run, old: Client, server: Server, folder: Path) -> None:
    (folder / "dir" / "x.jsonl").write_bytes(rows.jsonl(rows.completions(19)))
    create = ("fine_tunes.create", "-t", "dir/x.jsonl", "-m", "ada", "--n_epochs", "50", "--no_follow")
    first = created(api(*create).stdout)
    file = first["training_files"][0]["id"]
    again = api(*create, stdin="\n")
    assert file in again.stdout, again.stdout
    second = created(again.stdout)
    assert second["training_files"][0]["id"] != file
    reused = created(api(*create, stdin=f"{file}\n").stdout)
    assert reused["training_files"][0]["id"] == file

    listed = json.loads(api("fine_tunes.list").stdout)
    assert listed["object"] == "list"
    assert {first["id"], second["id"], reused["id"]} <= {one["id"] for one in listed["data"]}
    assert all("events" not in one for one in listed["data"])
    found = json.loads(api("fine_tunes.get", "-i", first["id"]).stdout)
    assert found["events"][0]["message"] == f"Created fine-tune: {first['id']}"
    assert {"n_epochs", "batch_size", "prompt_loss_weight", "learning_rate_multiplier"} <= set(found["hyperparams"])

    with old.start(old.tool, "api", "fine_tunes.follow", "-i", first["id"], env=server.variables()) as following:
        eventually(lambda: server.ask("GET", f"/v1/fine-tunes/{first['id']}")[1]["status"] == "running", 200)
        gone = json.loads(api("fine_tunes.cancel", "-i", first["id"]).stdout)
        assert (gone["status"], gone["fine_tuned_model"]) == ("cancelled", None)
        said, errors = following.communicate(timeout=60)
    assert following.returncode == 0, errors
    assert messages(said)[-1] == "Fine-tune cancelled", said
    for one in (second, reused):
        assert json.loads(api("fine_tunes.cancel", "-i", one["id"]).stdout)["status"] == "cancelled"
    eventually(lambda: server.ask("DELETE", f"/v1/fine-tunes/{second['id']}")[0] == 200, 30)
    told = f"/v1/fine-tunes/{reused['id']}/events"  # a worker that has begun it takes a moment to let go
    eventually(lambda: server.ask("GET", told)[1]["data"][-1]["message"] == "Fine-tune cancelled", 30)
    gone = json.loads(api("fine_tunes.delete", "-i", reused["id"]).stdout)
    assert gone == {"id": reused["id"], "object": "fine-tune", "deleted": True}
    refused = api("fine_tunes.get", "-i", reused["id"], ok=False)
    assert f"Could not find fine tune: {reused['id']}" in refused.stderr


@pytest.fixture(scope="module")
def sport(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows as the classification notebook writes them before prepare_data: two sports, told apart by their words."""
    path = tmp_path_factory.mktemp("sport") / "sport2.jsonl"
    lines = []
    for number in range(40):
        sport = ("baseball", "hockey")[number % 2]
        thing = ("pitcher and bat", "goalie and puck")[number % 2]
        lines.append({"prompt": f"From: fan {number}\nThe {thing} of game {number}", "completion": sport})
    path.write_bytes(rows.jsonl(lines))
    return path


def test_40_36_32_the_classification_notebook(old: Client, server: Server, sport: Path) -> None:
    """Section 6.6, call by call: prepare, create with classification metrics, follow, results, ask."""
    done = old.run(old.tool, "tools", "fine_tunes.prepare_data", "-f", sport.name, "-q", env={}, cwd=sport.parent)
    assert done.returncode == 0, done.stderr
    train, valid = (sport.parent / f"sport2_prepared_{part}.jsonl" for part in ("train", "valid"))
    assert (train.read_text().count("\n"), valid.read_text().count("\n")) == (32, 8)
    suggested = re.search(r"openai api (fine_tunes\.create .*)", done.stdout)
    assert suggested, done.stdout
    words = [*shlex.split(suggested[1]), "-m", "ada", "--no_check_if_files_exist"]
    assert "--classification_positive_class" in words and "--compute_classification_metrics" in words, words
    made = old.run(old.tool, "api", *words, env=server.variables(), cwd=sport.parent, timeout=300)
    assert made.returncode == 0, made.stderr
    told = messages(made.stdout)
    assert epochs(told) == [f"Completed epoch {n}/4" for n in range(1, 5)]
    assert told[-1] == "Fine-tune succeeded", made.stdout
    job = told[0].rpartition(" ")[2]

    results = old.run(old.tool, "api", "fine_tunes.results", "-i", job, env=server.variables())
    assert results.returncode == 0, results.stderr
    table = list(csv.DictReader(io.StringIO(results.stdout)))
    wanted = ["step", "elapsed_tokens", "elapsed_examples", "training_loss", "training_sequence_accuracy"]
    wanted += ["training_token_accuracy", "validation_loss", "classification/accuracy", "classification/precision"]
    wanted += ["classification/recall", "classification/auroc", "classification/auprc", "classification/f1.0"]
    assert set(wanted) <= set(table[0]), list(table[0])
    scored = [row for row in table if row["classification/accuracy"]]
    assert len(scored) == 4
    assert all(0 <= float(row[name]) <= 1 for row in scored for name in wanted[-6:] if row[name] != "")

    model = server.ask("GET", f"/v1/fine-tunes/{job}")[1]["fine_tuned_model"]
    prompt = json.loads(valid.read_text().splitlines()[0])["prompt"]
    asked = ("-m", model, "-p", prompt, "-M", "1", "-t", "0", "--logprobs", "2")
    answer = old.run(old.tool, "api", "completions.create", *asked, env=server.variables())
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(prompt), answer.stdout  # the command always asks for the echo


def test_40_our_prepare_gives_what_theirs_gave(old: Client, sport: Path, tmp_path: Path) -> None:
    """Byte for byte, without answers to questions."""
    import os
    import sys

    outputs = []
    for name, command in (
        ("theirs", [old.tool, "tools", "fine_tunes.prepare_data", "-f", sport.name, "-q"]),
        ("ours", [sys.executable, "-m", "luthier.cli", "data", "prepare", sport.name, "--yes"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / sport.name).write_bytes(sport.read_bytes())
        environment = {} if name == "theirs" else {"PYTHONPATH": os.environ["PYTHONPATH"]}
        done = old.run(*command, env=environment, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append({path.name: path.read_bytes() for path in folder.glob("*_prepared*")})
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 2


def test_23_41_modern_jobs_with_the_old_command(api: Run, server: Server, folder: Path, given: dict[str, Any]) -> None:
    (folder / "chat.jsonl").write_bytes(rows.jsonl(rows.chat(13)))
    said = api("fine_tuning.job.create", "-t", "chat.jsonl", "-m", "tiny", "--n_epochs", "2").stdout
    made = created(said)
    assert made["object"] == "fine_tuning.job" and made["hyperparameters"]["n_epochs"] == 2, made
    assert json.loads(api("fine_tuning.job.cancel", "-i", made["id"]).stdout)["status"] == "cancelled"
    assert made["id"] in api("fine_tuning.job.list").stdout
    name = given["jobs"]["named"]["id"]
    server.wait(name)
    table = list(csv.DictReader(io.StringIO(api("fine_tuning.job.results", "-i", name).stdout)))
    assert [row["step"] for row in table] == [str(n) for n in range(1, 10)]
    told = api("fine_tuning.job.events", "-i", name).stdout
    assert "The job has successfully completed" in told and f"Created fine-tuning job: {name}" in told


def test_files_models_and_chat_with_the_old_command(api: Run, folder: Path) -> None:
    made = json.loads(api("files.create", "-f", "v.jsonl", "-p", "fine-tune").stdout)
    assert (made["filename"], made["object"]) == ("v.jsonl", "file")
    assert made["id"] in api("files.list").stdout
    assert json.loads(api("files.get", "-i", made["id"]).stdout)["id"] == made["id"]
    assert json.loads(api("files.delete", "-i", made["id"]).stdout)["deleted"] is True
    refused = api("files.get", "-i", made["id"], ok=False)
    assert "No such File object" in refused.stderr and "404" in refused.stderr
    assert '"tiny"' in api("models.list").stdout
    assert json.loads(api("models.get", "-i", "tiny").stdout)["id"] == "tiny"
    api("chat_completions.create", "-m", "tiny", "-g", "user", "hi", "-M", "3")
    api("chat_completions.create", "-m", "tiny", "-g", "user", "hi", "-M", "3", "--stream")
    assert api("completions.create", "-m", "tiny", "-p", "one two", "-M", "3").stdout.startswith("one two")


@pytest.fixture(autouse=True)
def _no_job_stays(server: Server) -> Iterator[None]:
    """A failed test must not leave the workers busy for the next."""
    before = {job["id"] for job in server.ask("GET", "/v1/fine-tunes")[1]["data"]}
    yield
    for job in server.ask("GET", "/v1/fine-tunes")[1]["data"]:
        if job["id"] not in before and job["status"] in ("pending", "running"):
            server.ask("POST", f"/v1/fine-tunes/{job['id']}/cancel", {})
