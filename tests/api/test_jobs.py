"""/fine_tuning/jobs: what may be asked, what is refused and by which name, and how a job looks on its way."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from luthier.api.jobs import CREATE_FIELDS
from luthier.api.jobs_wire import JobRequest
from luthier.api.services import Services
from tests.api import driving

JOBS = "/v1/fine_tuning/jobs"
TUNED = "ft:tiny:luthier::12345678"


def create(client: TestClient, services: Services, **changes: Any) -> dict[str, Any]:
    answer = client.post(JOBS, json=driving.body(services, **changes))
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(client: TestClient, asked: Any, status: int = 400) -> dict[str, Any]:
    answer = client.post(JOBS, json=asked)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    return dict(answer.json()["error"])


def test_a_new_job_has_every_field(client: TestClient, services: Services) -> None:
    job = create(client, services)
    assert job.pop("id").startswith("ftjob-")
    assert 0 <= job.pop("seed") < 2**31
    assert job.pop("created_at") > 1_700_000_000
    numbers = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job.pop("training_file").startswith("file-")
    assert job == {
        "object": "fine_tuning.job",
        "finished_at": None,
        "estimated_finish": None,
        "model": "tiny",
        "fine_tuned_model": None,
        "organization_id": "luthier",
        "status": "validating_files",
        "validation_file": None,
        "result_files": [],
        "trained_tokens": None,
        "hyperparameters": numbers,
        "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}},
        "integrations": [],
        "metadata": None,
        "error": {"code": None, "message": None, "param": None},
        "user_provided_suffix": None,
        "usage_metrics": None,
        "shared_with_openai": False,
        "proof": None,
        "forgetting": None,
        "gate": None,
    }


def test_what_is_asked_of_a_proof_reaches_the_worker(client: TestClient, services: Services) -> None:
    job = client.post(JOBS, json=driving.body(services, metric="json", proof_rows=40)).json()
    known = services.jobs.get(job["id"])
    assert (known.request["metric"], known.request["proof_rows"]) == ("json", 40)
    assert refused(client, driving.body(services, metric="my_grader:score"))["param"] == "metric"
    assert refused(client, driving.body(services, proof_rows=-1))["param"] == "proof_rows"


def test_a_job_carries_thresholds(client: TestClient, services: Services) -> None:
    held_out = driving.training_file(services)
    asked = {"max_forgetting": 0.05, "forgetting": 200, "keep_general": True, "validation_file": held_out}
    job = client.post(JOBS, json=driving.body(services, **asked)).json()
    known = services.jobs.get(job["id"]).request
    assert {name: known[name] for name in asked} == asked
    for wrong, param in (
        ({"must_improve": 0.1}, "must_improve"),
        ({"max_forgetting": 0.1, "forgetting": "off"}, "max_forgetting"),
        ({"max_forgetting": 2}, "max_forgetting"),
        ({"must_improve": "much"}, "must_improve"),
        ({"keep_general": True}, "keep_general"),
        ({"keep_general": True, "validation_file": held_out, "proof_rows": 0}, "keep_general"),
        ({"keep_general": True, "validation_file": held_out, "forgetting": "off"}, "keep_general"),
        ({"forgetting": 0}, "forgetting"),
        ({"forgetting": "some"}, "forgetting"),
    ):
        assert refused(client, driving.body(services, **wrong))["param"] == param


def test_what_is_asked_comes_back_and_reaches_the_worker(client: TestClient, services: Services) -> None:
    asked = driving.body(
        services,
        validation_file=driving.training_file(services),
        suffix="My Model!",
        seed=7,
        metadata={"team": "a", "empty": ""},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3.0, "batch_size": "auto"}}},
        hyperparameters={"learning_rate_multiplier": 2},
        integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["x"]}}],
    )
    job = client.post(JOBS, json=asked).json()
    assert job["hyperparameters"] == {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 2.0}
    assert job["user_provided_suffix"] == "My Model!"
    assert (job["seed"], job["metadata"]) == (7, {"team": "a", "empty": ""})
    wandb = {"project": "p", "name": job["id"], "entity": None, "tags": ["x"]}
    assert job["integrations"] == [{"type": "wandb", "wandb": wandb}]
    stored = services.jobs.get(job["id"])
    assert stored.request == {
        "model": "tiny",
        "base": "tiny",
        "parent": None,
        "training_file": asked["training_file"],
        "validation_file": asked["validation_file"],
        "suffix": "My Model!",
        "seed": 7,
        "metadata": {"team": "a", "empty": ""},
        "method": {"type": "supervised"},
        "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 2.0},
        "metric": None,
        "proof_rows": None,
        "forgetting": None,
        "keep_general": None,
        "must_improve": None,
        "max_forgetting": None,
        "integrations": [{"type": "wandb", "wandb": {"project": "p", "name": None, "entity": None, "tags": ["x"]}}],
    }
    assert (stored.model, stored.suffix, stored.seed, stored.kind) == ("tiny", "My Model!", 7, "modern")


def test_null_is_the_same_as_absent(client: TestClient, services: Services) -> None:
    optional = [name for name, field in JobRequest.model_fields.items() if not field.is_required()]
    plain = create(client, services)
    nulls = create(client, services, **dict.fromkeys(optional))
    for name in set(plain) - {"id", "seed", "created_at", "training_file"}:
        assert nulls[name] == plain[name], name
    inner = {"n_epochs": None, "batch_size": None, "learning_rate_multiplier": None}
    method = {"type": "supervised", "supervised": {"hyperparameters": inner}, "dpo": None}
    assert create(client, services, method=method)["hyperparameters"] == plain["hyperparameters"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n_epochs": 3}, "n_epochs"),
        ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"learning_rate_multiplier": 1e300}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta"),
        ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method"),
        ({"method": {"type": "sft"}}, "method.type"),
        ({"method": {}}, "method.type"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"method": {"type": "supervised", "test_file": "x"}}, "method.test_file"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 0}}}},
            "method.supervised.hyperparameters.batch_size",
        ),
        (
            {
                "hyperparameters": {"n_epochs": 1},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
            },
            "hyperparameters.n_epochs",
        ),
        ({"suffix": ""}, "suffix"),
        ({"suffix": "s" * 65}, "suffix"),
        ({"suffix": 5}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": "auto"}, "seed"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"metadata": []}, "metadata"),
        ({"integrations": [{"type": "mlflow", "mlflow": {}}]}, "integrations[0].type"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations[0].wandb.project"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}] * 6}, "integrations"),
        ({"training_file": None}, "training_file"),
        ({"training_file": "file-" + "x" * 24}, "training_file"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
        ({"validation_file": "file-" + "x" * 24}, "validation_file"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_what_is_refused_names_its_field(
    client: TestClient, services: Services, changes: dict[str, Any], param: str
) -> None:
    assert refused(client, driving.body(services, **changes))["param"] == param
    assert services.jobs.list().data == ()


def test_what_is_missing_is_named(client: TestClient, services: Services) -> None:
    assert refused(client, {"model": "tiny"})["param"] == "training_file"
    assert refused(client, {"training_file": driving.training_file(services)})["param"] == "model"


def test_a_file_of_another_purpose_is_refused(client: TestClient, services: Services) -> None:
    batch = driving.training_file(services, purpose="batch")
    for param in ("training_file", "validation_file"):
        error = refused(client, driving.body(services, **{param: batch}))
        assert error["param"] == param
        assert "purpose batch" in error["message"]


def test_an_unknown_model_is_not_found(client: TestClient, services: Services) -> None:
    for name in ("llama-9000b", "ft:tiny:luthier::gone1234", "curie:ft-acme-2024-01-01-00-00-00"):
        error = refused(client, driving.body(services, model=name), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_another_name_for_a_base_is_told_in_an_event(client: TestClient, services: Services) -> None:
    job = create(client, services, model="gpt-4o-mini-2024-07-18")
    assert job["model"] == "tiny"
    said = [event.message for event in services.history.events(job["id"], order="asc").data]
    assert said[0] == f"Created fine-tuning job: {job['id']}"
    assert said[-1] == "The model gpt-4o-mini-2024-07-18 is tiny on this server; the job trains that one."
    assert services.jobs.get(job["id"]).request["model"] == "gpt-4o-mini-2024-07-18"


def test_a_tuned_model_is_gone_on_from(client: TestClient, services: Services) -> None:
    driving.register(services, TUNED)
    job = create(client, services, model=TUNED)
    stored = services.jobs.get(job["id"])
    assert job["model"] == TUNED
    assert (stored.request["base"], stored.request["parent"]) == ("tiny", TUNED)


def test_a_client_that_tries_again_makes_one_job(client: TestClient, services: Services) -> None:
    asked = driving.body(services)
    first = client.post(JOBS, json=asked, headers={"x-stainless-retry-count": "0"}).json()
    again = client.post(JOBS, json=asked, headers={"x-stainless-retry-count": "1"}).json()
    assert again == first
    anew = client.post(JOBS, json=asked, headers={"x-stainless-retry-count": "0"}).json()
    other = client.post(JOBS, json={**asked, "seed": 1}, headers={"x-stainless-retry-count": "2"}).json()
    strange = client.post(JOBS, json=asked, headers={"x-stainless-retry-count": "many"}).json()
    assert len({first["id"], anew["id"], other["id"], strange["id"]}) == 4


def test_the_life_of_a_job(client: TestClient, services: Services) -> None:
    job = create(client, services, integrations=[{"type": "wandb", "wandb": {"project": "p"}}])
    path = f"{JOBS}/{job['id']}"
    driving.validate(services)
    assert client.get(path).json()["status"] == "queued"
    claimed = services.leases.claim("worker", driving.SECONDS)
    assert claimed is not None
    services.leases.record(
        claimed[1],
        hyperparameters={**driving.RESOLVED, "extra": 1},
        estimated_finish=1_900_000_000,
        trained_tokens=5,
    )
    running = client.get(path).json()
    assert (running["status"], running["estimated_finish"], running["trained_tokens"]) == (
        "running",
        1_900_000_000,
        None,
    )
    assert running["hyperparameters"] == driving.RESOLVED
    assert running["method"]["supervised"]["hyperparameters"] == driving.RESOLVED
    assert running["integrations"][0]["wandb"]["tags"] == ["openai/finetune", "openai/tiny", f"openai/{job['id']}"]
    result = driving.finish(services, claimed[1])
    done = client.get(path).json()
    assert (done["status"], done["fine_tuned_model"], done["trained_tokens"]) == ("succeeded", TUNED, 99)
    assert done["result_files"] == [result]
    assert done["finished_at"] >= done["created_at"]
    assert done["estimated_finish"] is None


def test_a_failed_job_says_why(client: TestClient, services: Services) -> None:
    job = create(client, services)
    claimed = services.leases.claim("worker", driving.SECONDS, "validate")
    assert claimed is not None
    services.leases.fail(claimed[1], code="invalid_n_examples", message="Too few.", param="training_file")
    failed = client.get(f"{JOBS}/{job['id']}").json()
    assert failed["status"] == "failed"
    assert failed["error"] == {"code": "invalid_n_examples", "message": "Too few.", "param": "training_file"}
    newest = client.get(f"{JOBS}/{job['id']}/events").json()["data"][0]
    assert (newest["level"], newest["message"]) == ("error", "Too few.")


@pytest.mark.parametrize("path", ["", "/cancel", "/pause", "/resume", "/events", "/events?stream=true", "/checkpoints"])
@pytest.mark.parametrize("job_id", ["ftjob-" + "x" * 24, "nothing", "%00", "ft-" + "x" * 24])
def test_an_unknown_job_is_not_found(client: TestClient, path: str, job_id: str) -> None:
    method = "POST" if path in ("/cancel", "/pause", "/resume") else "GET"
    answer = client.request(method, f"{JOBS}/{job_id}{path}")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("fine_tune_id", "fine_tune_not_found")
    assert error["message"].startswith("Could not find fine tune: ")


def test_the_older_jobs_are_not_found_here(client: TestClient, services: Services) -> None:
    old = client.post("/v1/fine-tunes", json={"training_file": driving.training_file(services)}).json()
    assert client.get(f"{JOBS}/{old['id']}").status_code == 404
    assert client.get(JOBS).json()["data"] == []


def test_cancel_is_shown_at_once_and_the_second_says_the_same(client: TestClient, services: Services) -> None:
    job = create(client, services)
    lease = driving.start(services)
    path = f"{JOBS}/{job['id']}"
    first = client.post(f"{path}/cancel", json={})
    again = client.post(f"{path}/cancel")
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json() == again.json() == client.get(path).json()
    assert (first.json()["status"], first.json()["fine_tuned_model"]) == ("cancelled", None)
    assert client.post(f"{path}/pause").status_code == 400
    services.leases.release(lease)
    assert client.get(path).json()["finished_at"] is not None
    answer = client.post(f"{path}/cancel")
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_pause_and_resume(client: TestClient, services: Services) -> None:
    job = create(client, services)
    path = f"{JOBS}/{job['id']}"
    assert client.post(f"{path}/pause").status_code == 400  # its files are being checked
    lease = driving.start(services)
    assert client.post(f"{path}/pause").json()["status"] == "running"  # until the worker has saved it
    services.leases.release(lease)
    assert client.get(path).json()["status"] == "paused"
    assert client.post(f"{path}/pause").json()["status"] == "paused"
    assert client.post(f"{path}/resume", json={}).json()["status"] == "queued"
    claimed = services.leases.claim("worker", driving.SECONDS)
    assert claimed is not None
    driving.finish(services, claimed[1])
    for word in ("pause", "resume", "cancel"):
        assert client.post(f"{path}/{word}").status_code == 400


def test_lists_come_newest_first_in_pages(client: TestClient, services: Services) -> None:
    made = [create(client, services)["id"] for _ in range(5)]
    page = client.get(JOBS, params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == made[:-3:-1]
    assert page["has_more"] is True
    assert (page["object"], page["last_id"]) == ("list", made[3])
    for name in ("after", "starting_after"):
        rest = client.get(JOBS, params={"limit": 20, name: made[3]}).json()
        assert [job["id"] for job in rest["data"]] == made[2::-1]
        assert rest["has_more"] is False
    assert client.get(JOBS, params={"after": ""}).json()["has_more"] is False
    assert client.get(JOBS, params={"limit": 0}).json()["error"]["param"] == "limit"
    assert client.get(JOBS, params={"after": "ftjob-" + "x" * 24}).json()["error"]["param"] == "after"


def test_lists_can_be_filtered_by_metadata(client: TestClient, services: Services) -> None:
    both = create(client, services, metadata={"team": "a", "x y": "1&2"})["id"]
    one = create(client, services, metadata={"team": "a", "e": ""})["id"]
    none = create(client, services)["id"]

    def found(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"{JOBS}?{query}").json()["data"]]

    assert found("metadata%5Bteam%5D=a") == [one, both]
    assert found("metadata[team]=a&metadata%5Bx%20y%5D=1%262") == [both]
    assert found("metadata%5Be%5D=") == [one]
    assert found("metadata=null") == [none]
    assert found("metadata[team]=b") == []
    for query in ("metadata=x", "metadata[k]=%00", "metadata[k]=1&metadata[k]=2", "metadata[k]=" + "v" * 513):
        assert client.get(f"{JOBS}?{query}").status_code == 400, query


def test_events_and_checkpoints(client: TestClient, services: Services) -> None:
    job = create(client, services)
    lease = driving.start(services)
    driving.steps(services, lease, 1, 3, 3)
    services.leases.add_checkpoint(lease, step=1, model=f"{TUNED}:ckpt-step-1", metrics={"train_loss": 0.5})
    services.leases.add_checkpoint(lease, step=3, model=TUNED, metrics={"train_loss": 0.25})
    driving.finish(services, lease)
    path = f"{JOBS}/{job['id']}"
    page = client.get(f"{path}/events", params={"limit": 4}).json()
    assert [event["message"] for event in page["data"]] == [
        "The job has successfully completed",
        f"New fine-tuned model created: {TUNED}",
        "Step 3/3: training loss=0.50",
        "Step 2/3: training loss=0.50",
    ]
    assert page["has_more"] is True
    assert set(page["data"][0]) == {"object", "id", "created_at", "level", "message", "type", "data"}
    assert (page["data"][0]["type"], page["data"][0]["data"]) == ("message", {})
    assert (page["data"][2]["type"], page["data"][2]["data"]["step"]) == ("metrics", 3)
    rest = client.get(f"{path}/events", params={"after": page["data"][-1]["id"]}).json()
    assert [event["message"] for event in reversed(rest["data"])] == [
        f"Created fine-tuning job: {job['id']}",
        f"Validating training file: {job['training_file']}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/3: training loss=0.50",
    ]
    kept = client.get(f"{path}/checkpoints").json()
    assert [one["step_number"] for one in kept["data"]] == [3, 1]
    assert kept["data"][1] == {
        "object": "fine_tuning.job.checkpoint",
        "id": kept["last_id"],
        "created_at": kept["data"][1]["created_at"],
        "fine_tuned_model_checkpoint": f"{TUNED}:ckpt-step-1",
        "fine_tuning_job_id": job["id"],
        "step_number": 1,
        "metrics": {"step": 1, "train_loss": 0.5},
    }


def test_the_papers_tell_of_every_field() -> None:
    assert {name.split(".")[0] for name in CREATE_FIELDS} == set(JobRequest.model_fields)
