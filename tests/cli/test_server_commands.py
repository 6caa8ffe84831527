"""`luthier files|jobs|models --server` against a server in this process; jobs are carried out by hand."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier import cli
from luthier.api.services import Services
from luthier.settings import Settings
from luthier.store.aliases import Verdict
from luthier.store.db import Database
from tests import tiny as tiny_models
from tests.api import driving
from tests.api.conftest import BASE, FakeRouter, make_services, serving


def called(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(word) for word in words])
    return int(leaving.value.code or 0)


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_tokenizer(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def services(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """A running server that the environment names, with a key that opens it."""
    settings = Settings(home=tmp_path / "home", bases=BASE, hub="off")
    database = Database(settings.home)
    database.migrate()
    router: Any = FakeRouter()
    made = make_services(settings, database, router, {BASE: base_folder})
    with serving(made) as url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", made.keys.create("test", "user")[1])
        yield made
    database.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(driving.JSONL * 12)
    return path


def lines(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_goes_there_and_back(
    services: Services, data: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert called("files", "upload", data) == 0
    file_id = capsysbinary.readouterr().out.decode().strip()
    assert services.files.get(file_id).purpose == "fine-tune"
    assert called("files", "get", file_id) == 0
    shown = capsysbinary.readouterr().out.decode()
    assert file_id in shown
    assert "train.jsonl" in shown
    assert called("files", "content", file_id) == 0
    assert capsysbinary.readouterr().out == data.read_bytes()
    assert called("files", "content", file_id, "--out", tmp_path / "back.jsonl") == 0
    assert (tmp_path / "back.jsonl").read_bytes() == data.read_bytes()
    capsysbinary.readouterr()
    assert called("files", "delete", file_id) == 0
    assert capsysbinary.readouterr().out.decode() == f"Deleted {file_id}.\n"
    assert called("files", "get", file_id) == 2
    assert capsysbinary.readouterr().err.decode() == (
        f"Error: No such File object: {file_id}\n`luthier files list` shows the files.\n"
    )


def test_files_are_listed(services: Services, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for purpose in ("fine-tune", "user_data", "user_data"):
        assert called("files", "upload", data, "--purpose", purpose, "--json") == 0
    made = [one["id"] for one in lines(capsys)]
    assert called("files", "list", "--json") == 0
    assert [one["id"] for one in lines(capsys)] == made[::-1]
    assert called("files", "list", "--json", "--purpose", "user_data", "--limit", "1") == 0
    assert [one["id"] for one in lines(capsys)] == [made[2]]
    assert called("files", "list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == made[::-1]


def test_a_result_file_is_read_as_csv(services: Services, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    table = b"step,train_loss\n1,0.5\n"
    made = services.files.create([table], filename="step_metrics.csv", purpose="fine-tune-results")
    assert called("files", "content", made.id) == 0
    assert capsysbinary.readouterr().out == table


def test_a_refused_upload_says_where(services: Services, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_text('{"messages": []}\nno json\n')
    assert called("files", "upload", data) == 2
    assert "Line 2: found" in capsys.readouterr().err
    assert called("files", "upload", data.with_name("absent.jsonl")) == 2
    assert "No file" in capsys.readouterr().err


# -- which server ------------------------------------------------------------------------------------------------------


def test_no_server_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert called("jobs", "list") == 2
    assert capsys.readouterr().err.startswith("Error: No server is named.\nGive --server")


@pytest.mark.parametrize("url", ["ftp://a.b", "http://", "http:///x"])
def test_no_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("jobs", "list", "--server", url) == 2
    assert "wanted http://HOST:PORT" in capsys.readouterr().err


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("jobs", "list", "--server", "127.0.0.1:1", "--json") == 75
    told = lines(capsys)[-1]
    assert told["code"] == "unavailable"
    assert "http://127.0.0.1:1/v1" in told["message"]


def test_a_wrong_key(services: Services, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    assert called("files", "list") == 2
    told = capsys.readouterr().err
    assert "Set OPENAI_API_KEY" in told
    assert "sk-wrong" not in told


# -- models ------------------------------------------------------------------------------------------------------------


def test_models_of_a_server(
    services: Services, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(cli.models.connect(None).url)
    driving.register(services, "ft:tiny:luthier::12345678")
    assert called("models", "list", "--server", url, "--json") == 0
    assert {one["id"] for one in lines(capsys)} == {"tiny", "ft:tiny:luthier::12345678"}
    assert called("models", "list", "--server", url) == 0
    assert "ft:tiny:luthier::12345678" in capsys.readouterr().out
    assert called("models", "delete", "ft:tiny:luthier::12345678") == 0
    assert capsys.readouterr().out == "Deleted ft:tiny:luthier::12345678.\n"
    assert called("models", "delete", "ft:tiny:luthier::12345678", "--json") == 2
    assert lines(capsys)[-1]["code"] == "not_found"


def test_aliases_of_a_server(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    alias, one, two, bad = "shop@production", *(f"ft:tiny:luthier:{name}:12345678" for name in ("one", "two", "bad"))
    for name in (one, two, bad):
        driving.register(services, name)
    services.aliases.judge(bad, Verdict(False, ["It forgot too much."]))
    assert called("models", "aliases") == 0
    assert "No aliases" in capsys.readouterr().out
    assert called("models", "promote", alias, one, "--if-version", "0", "--json") == 0
    assert lines(capsys)[-1]["version"] == 1
    assert called("models", "promote", alias, two) == 0
    assert capsys.readouterr().out == f"{alias} means {two} now (version 2).\n"
    assert called("models", "promote", alias, bad) == 2
    assert "It forgot too much." in capsys.readouterr().err
    assert called("models", "rollback", alias, "--if-version", "1") == 2
    assert "its version is 2, not 1" in capsys.readouterr().err
    assert called("models", "rollback", alias) == 0
    assert called("models", "aliases") == 0
    assert f"{alias}  ->  {one}  (version 3" in capsys.readouterr().out
    assert called("models", "aliases", "--json") == 0
    assert lines(capsys)[-1]["model"] == one
    assert called("models", "aliases", alias) == 0
    assert [line.split()[-2:] for line in capsys.readouterr().out.splitlines()] == [
        ["promote", one],
        ["promote", two],
        ["rollback", one],
    ]
    assert called("models", "aliases", "shop@gone") == 2
    assert "luthier models aliases" in capsys.readouterr().err


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_create_with_every_option(services: Services, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = driving.training_file(services)
    assert called(
        "jobs", "create", "--model", "tiny", "-t", data, "-v", known, "--suffix", "mine", "--seed", "5",
        "--epochs", "2", "--batch-size", "4", "--learning-rate-multiplier", "0.5", "--metadata", "a=b=c",
        "--replay", "0.25", "--metric", "exact_match", "--proof-rows", "3", "--forgetting", "70",
        "--must-improve", "0.05", "--max-forgetting", "0.1", "--keep-general",
    ) == 0  # fmt: skip
    told = capsys.readouterr()
    job = services.jobs.get(told.out.strip())
    assert job.training_file in told.err
    assert services.files.get(job.training_file).bytes == data.stat().st_size
    assert job.validation_file == known
    assert (job.request["suffix"], job.request["seed"], job.request["metadata"]) == ("mine", 5, {"a": "b=c"})
    numbers = job.request["hyperparameters"]
    assert (numbers["n_epochs"], numbers["batch_size"], numbers["learning_rate_multiplier"]) == (2, 4, 0.5)
    wanted = {
        "metric": "exact_match", "proof_rows": 3, "forgetting": 70, "keep_general": True,
        "must_improve": 0.05, "max_forgetting": 0.1,
    }  # fmt: skip
    assert {name: job.request[name] for name in wanted} == wanted
    assert numbers["replay"] == 0.25
    assert called("jobs", "create", "--model", "tiny", "-t", known, "--forgetting", "off") == 0
    plain = services.jobs.get(capsys.readouterr().out.strip()).request
    assert (plain["forgetting"], plain["proof_rows"], plain["metric"]) == ("off", "auto", None)
    assert plain["keep_general"] is None
    assert "replay" not in plain["hyperparameters"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "two"),
        ("--batch-size", "1.5"),
        ("--learning-rate-multiplier", "x"),
        ("--proof-rows", "few"),
        ("--forgetting", "all"),
        ("--metadata", "nothing"),
    ],
)
def test_a_wrong_option(option: str, value: str, services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("jobs", "create", "--model", "tiny", "-t", "file-a", option, value) == 2
    assert f"{option}: found '{value}'" in capsys.readouterr().err


def test_create_with_method_dpo(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    known = driving.training_file(services)
    create = ("jobs", "create", "--model", "tiny", "-t", known, "--method", "dpo")
    assert called(*create, "--beta", "0.25", "--epochs", "2") == 0
    job = services.jobs.get(capsys.readouterr().out.strip())
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto", "beta": "auto"}
    assert (job.method, job.request["hyperparameters"]) == ("dpo", auto | {"n_epochs": 2, "beta": 0.25})
    assert called("jobs", "get", job.id) == 0
    told = capsys.readouterr().out.splitlines()
    assert "  method: dpo" in told and "  beta: 0.25" in told and "  n_epochs: 2" in told
    assert called(*create, "--beta", "auto") == 0
    job = services.jobs.get(capsys.readouterr().out.strip())
    assert job.request["hyperparameters"] == auto
    assert called(*create, "--beta", "3") == 2
    assert "wanted a number above 0 and at most 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--beta", "0.1"), "--beta is for --method dpo, not supervised."),
        (("--method", "dpo", "--replay", "0.1"), "--replay is for --method supervised, not dpo."),
        (("--method", "dpo", "--beta", "x"), "--beta: found 'x', wanted a number or auto."),
    ],
)
def test_options_of_another_method(
    words: tuple[str, ...], said: str, services: Services, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("jobs", "create", "--model", "tiny", "-t", "file-a", *words) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_checkpoints_of_pairs(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    job = made_job(services)
    lease = driving.start(services)
    name = "ft:tiny:luthier::12345678:ckpt-step-2"
    driving.register(services, name)
    measured = {"train_loss": 0.5, "train_reward_accuracy": 0.75, "full_valid_reward_accuracy": 0.5}
    services.leases.add_checkpoint(lease, step=2, model=name, metrics=measured)
    assert called("jobs", "checkpoints", job) == 0
    line = capsys.readouterr().out.rstrip()
    assert line.endswith(f"validation loss -  reward accuracy 75.0%  validation reward accuracy 50.0%  {name}")


def test_the_server_refuses(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    known = driving.training_file(services)
    assert called("jobs", "create", "--model", "nope", "-t", known, "--json") == 2
    told = lines(capsys)[-1]
    assert told["param"] == "model"
    assert "`nope`" in told["message"]


def made_job(services: Services) -> str:
    file = driving.training_file(services)
    return services.jobs.submit(
        request={
            "model": "tiny", "base": "tiny", "parent": None, "training_file": file, "validation_file": None,
            "suffix": None, "seed": 1, "metadata": None, "method": {"type": "supervised"}, "integrations": [],
            "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
        },
        model="tiny", training_file=file, validation_file=None, suffix=None, seed=1, metadata=None,
        owner=services.keys.list()[0].id, notes=[], retry_within=0,
    )[0].id  # fmt: skip


def test_list_get_cancel(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = made_job(services), made_job(services)
    assert called("jobs", "list", "--json") == 0
    assert [one["id"] for one in lines(capsys)] == [second, first]
    assert called("jobs", "list", "--limit", "1") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [second]
    assert called("jobs", "cancel", first) == 0
    assert "cancelled" in capsys.readouterr().out
    assert called("jobs", "cancel", first) == 2
    capsys.readouterr()
    assert called("jobs", "get", first, "--json") == 0
    assert lines(capsys)[0]["status"] == "cancelled"


def test_get_says_what_a_job_came_to(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    job = made_job(services)
    lease = driving.start(services)
    lost = {"loss": 0.0312, "low": 0.01, "high": 0.052}
    gate = {"passed": False, "reasons": ["It lost 3.1% of general ability, more than 1.0%."]}
    services.leases.record(lease, proof={"sentence": "Tuning helped."}, forgetting=lost, gate=gate)
    assert called("jobs", "get", job) == 0
    told = capsys.readouterr().out.splitlines()
    assert "  proof: Tuning helped." in told
    assert "  forgetting: lost +3.1% of general ability, 95% interval +1.0% to +5.2%" in told
    assert "  gate: closed: It lost 3.1% of general ability, more than 1.0%." in told
    services.leases.record(lease, gate={"passed": True, "reasons": []}, forgetting={"loss": None})
    assert called("jobs", "get", job) == 0
    told = capsys.readouterr().out.splitlines()
    assert "  gate: passed" in told and not any("forgetting:" in line for line in told)


def test_pause_and_resume(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    job = made_job(services)
    driving.validate(services)
    assert called("jobs", "pause", job) == 0
    assert services.jobs.get(job).status == "paused"
    assert called("jobs", "follow", job) == 75
    assert f"luthier jobs resume {job}" in capsys.readouterr().out
    assert called("jobs", "resume", job) == 0
    assert services.jobs.get(job).status == "queued"


def test_events_and_checkpoints(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    job = made_job(services)
    lease = driving.start(services)
    driving.steps(services, lease, 1, 3, 3)
    driving.register(services, "ft:tiny:luthier::12345678:ckpt-step-2")
    services.leases.add_checkpoint(
        lease, step=2, model="ft:tiny:luthier::12345678:ckpt-step-2", metrics={"train_loss": 0.5}
    )
    assert called("jobs", "events", job) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith(f"Created fine-tuning job: {job}")
    assert sum("training loss=0.50" in line for line in told) == 3
    assert called("jobs", "events", job, "--json", "--limit", "2") == 0
    assert len(lines(capsys)) == 2
    assert called("jobs", "checkpoints", job) == 0
    assert "step      2  training loss 0.5000  validation loss -" in capsys.readouterr().out
    assert called("jobs", "checkpoints", job, "--json") == 0
    assert lines(capsys)[0]["step_number"] == 2


def test_follow_to_the_end(services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    job = made_job(services)

    def work() -> None:
        lease = driving.start(services)
        driving.steps(services, lease, 1, 40, 40)
        driving.finish(services, lease)

    worker = threading.Timer(0.3, work)
    worker.start()
    assert called("jobs", "follow", job) == 0
    worker.join()
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"Created fine-tuning job: {job}"
    assert told[-1] == "Tuned model: ft:tiny:luthier::12345678"
    shown = [line for line in told if line.startswith("step ")]
    assert shown[0].startswith("step 1/40: loss 0.5000")
    assert len(shown) == 21

    assert called("jobs", "follow", job, "--json") == 0
    *events, last = lines(capsys)
    assert last["status"] == "succeeded"
    middle = events[20]["id"]
    assert called("jobs", "follow", job, "--json", "--after", middle) == 0
    assert lines(capsys)[:-1] == events[21:]


@pytest.mark.parametrize(("param", "code"), [("training_file", 2), (None, 1)])
def test_follow_a_failure(param: str | None, code: int, services: Services, capsys: pytest.CaptureFixture[str]) -> None:
    job = made_job(services)
    claimed = services.leases.claim("worker", 600, "validate")
    assert claimed is not None
    services.leases.fail(claimed[1], code="invalid_training_file", message="Example 3 is wrong.", param=param)
    assert called("jobs", "follow", job) == code
    assert capsys.readouterr().err == "Error: The job failed: Example 3 is wrong.\n"


def test_create_and_follow(services: Services, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cancel() -> None:
        while not (page := services.jobs.list(kind="modern").data):
            threading.Event().wait(0.02)
        services.jobs.request_cancel(page[0].id)

    other = threading.Thread(target=cancel)
    other.start()
    assert called("jobs", "create", "--model", "tiny", "-t", data, "--follow") == 75
    other.join()
    assert capsys.readouterr().out.splitlines()[-1] == "The job was cancelled."


def test_nothing_is_sent_for_a_model_that_is_not_there(
    services: Services, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("jobs", "create", "--model", "no/pe", "-t", data) == 2
    assert "luthier models list --server URL" in capsys.readouterr().err
    assert not services.files.list().data


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (("files", "get", "file-x"), "luthier files list"),
        (("files", "content", "file-x"), "luthier files list"),
        (("files", "delete", "../x"), "luthier files list"),
        (("jobs", "get", "ftjob-x"), "luthier jobs list"),
        (("jobs", "follow", "ftjob-x"), "luthier jobs list"),
        (("jobs", "create", "--model", "tiny", "-t", "file-x"), "luthier files list"),
        (("models", "delete", "ft:x"), "luthier models list --server URL"),
        (("chat", "nope", "-m", "hi", "--server", "URL"), "luthier models list --server URL"),
        (("jobs", "list", "--server", "URL/v2"), "--server: it ends in /v1"),
    ],
)
def test_what_is_not_there_comes_with_a_next_step(
    services: Services, words: tuple[str, ...], step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*(word.replace("URL", os.environ["OPENAI_BASE_URL"]) for word in words)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 2 and step in told[1], told
