"""/fine-tunes: its defaults, its objects with files inside, its classification checks."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from luthier.api.legacy_wire import CREATE_FIELDS, FineTuneRequest, default_batch_size, default_multiplier
from luthier.api.services import Services
from tests.api import driving

TUNES = "/v1/fine-tunes"
TUNED = "tiny:ft-luthier-2026-01-02-03-04-05"


def create(client: TestClient, services: Services, rows: int = 12, **changes: Any) -> dict[str, Any]:
    asked = {"training_file": driving.training_file(services, rows), **changes}
    answer = client.post(TUNES, json=asked)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_new_fine_tune_has_every_field(client: TestClient, services: Services) -> None:
    job = create(client, services)
    assert job["id"].startswith("ft-")
    assert job["hyperparams"] == {
        "n_epochs": 4,
        "batch_size": 1,
        "prompt_loss_weight": 0.01,
        "learning_rate_multiplier": 0.1,
    }
    assert (job["object"], job["model"], job["fine_tuned_model"], job["status"]) == (
        "fine-tune",
        "tiny",
        None,
        "pending",
    )
    assert (job["organization_id"], job["validation_files"], job["result_files"]) == ("luthier", [], [])
    assert job["training_files"][0] == client.get(f"/v1/files/{job['training_files'][0]['id']}").json()
    assert set(job["events"][0]) == {"object", "created_at", "level", "message"}
    assert job["events"][0]["object"] == "fine-tune-event"
    assert [event["message"] for event in job["events"]] == [
        f"Created fine-tune: {job['id']}",
        "The model curie is tiny on this server; the job trains that one.",
    ]
    assert job["updated_at"] == job["created_at"]


def test_what_reaches_the_worker(client: TestClient, services: Services) -> None:
    valid = driving.training_file(services)
    job = create(
        client,
        services,
        validation_file=valid,
        model="tiny",
        suffix="cats",
        batch_size=16,
        learning_rate_multiplier=0.02,
        prompt_loss_weight=0,
        compute_classification_metrics=True,
        classification_positive_class=" baseball",
        classification_betas=[0.5, 1],
        hyperparameters={"n_epochs": 2},
    )
    numbers = {
        "n_epochs": 2,
        "batch_size": 16,
        "learning_rate_multiplier": 0.02,
        "prompt_loss_weight": 0.0,
        "compute_classification_metrics": True,
        "classification_positive_class": " baseball",
        "classification_betas": [0.5, 1.0],
    }
    stored = services.jobs.get(job["id"])
    assert stored.request["hyperparameters"] == numbers
    assert (stored.kind, stored.suffix, stored.validation_file) == ("legacy", "cats", valid)
    assert job["hyperparams"] == numbers
    lease = driving.start(services)
    services.leases.record(lease, hyperparameters={"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 0.2})
    assert client.get(f"{TUNES}/{job['id']}").json()["hyperparams"] == numbers  # what the client said


def test_null_is_the_same_as_absent(client: TestClient, services: Services) -> None:
    optional = [name for name, field in FineTuneRequest.model_fields.items() if not field.is_required()]
    nulls = create(client, services, **dict.fromkeys(optional))
    assert nulls["hyperparams"] == create(client, services)["hyperparams"]


@pytest.mark.parametrize(
    ("rows", "size"), [(0, 1), (748, 1), (750, 2), (1499, 2), (1500, 4), (50_000, 128), (10**6, 256)]
)
def test_the_default_batch_is_a_power_of_two(rows: int, size: int) -> None:
    """0.2 % of the rows: 1.5, 3 and 100 among them, which lie half way (up) and nearer to 128."""
    assert default_batch_size(rows) == size


def test_the_default_multiplier() -> None:
    assert [default_multiplier("curie", size) for size in (1, 16, 32)] == [0.1, 0.1, 0.2]
    assert default_multiplier("davinci", 256) == 0.05
    assert default_multiplier("text-davinci-003", 1) == 0.05


def test_rows_decide_the_batch(client: TestClient, services: Services) -> None:
    assert create(client, services, rows=1500)["hyperparams"]["batch_size"] == 4


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"compute_classification_metrics": True}, "compute_classification_metrics"),
        ({"compute_classification_metrics": True, "classification_n_classes": 3}, "compute_classification_metrics"),
        ({"compute_classification_metrics": True, "validation_file": "GOOD"}, "compute_classification_metrics"),
        ({"compute_classification_metrics": 1}, "compute_classification_metrics"),
        ({"classification_betas": [1.0]}, "classification_betas"),
        ({"classification_n_classes": 3, "classification_positive_class": "a"}, "classification_n_classes"),
        ({"classification_betas": [1.0], "classification_n_classes": 3}, "classification_betas"),
        ({"classification_betas": [-1.0]}, "classification_betas[0]"),
        ({"classification_n_classes": 1}, "classification_n_classes"),
        ({"suffix": "s" * 41}, "suffix"),
        ({"n_epochs": 0}, "n_epochs"),
        ({"n_epochs": 1, "hyperparameters": {"n_epochs": 2}}, "n_epochs"),
        ({"batch_size": 257}, "batch_size"),
        ({"learning_rate_multiplier": 0}, "learning_rate_multiplier"),
        ({"prompt_loss_weight": -0.1}, "prompt_loss_weight"),
        ({"use_packing": True}, "use_packing"),
        ({"training_file": "file-" + "x" * 24}, "training_file"),
        ({"validation_file": "x.jsonl"}, "validation_file"),
    ],
)
def test_what_is_refused_names_its_field(
    client: TestClient, services: Services, changes: dict[str, Any], param: str
) -> None:
    good = driving.training_file(services)
    changes = {name: good if value == "GOOD" else value for name, value in changes.items()}
    answer = client.post(TUNES, json={"training_file": good, **changes})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_lists_are_whole_and_oldest_first(client: TestClient, services: Services) -> None:
    made = [create(client, services)["id"] for _ in range(25)]
    client.post("/v1/fine_tuning/jobs", json=driving.body(services))
    listed = client.get(TUNES).json()
    assert [job["id"] for job in listed["data"]] == made
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert "events" not in listed["data"][0]
    page = client.get(TUNES, params={"limit": 3, "starting_after": made[1]}).json()
    assert [job["id"] for job in page["data"]] == made[2:5]


def test_a_fine_tune_to_its_end(client: TestClient, services: Services) -> None:
    job = create(client, services)
    path = f"{TUNES}/{job['id']}"
    assert client.delete(path).status_code == 400  # not over
    lease = driving.start(services)
    assert client.get(path).json()["status"] == "running"
    driving.steps(services, lease, 1, 2, 2)
    result = driving.finish(services, lease, TUNED)
    done = client.get(path).json()
    assert (done["status"], done["fine_tuned_model"]) == ("succeeded", TUNED)
    assert (done["result_files"][0]["id"], done["result_files"][0]["object"]) == (result, "file")
    told = client.get(f"{path}/events").json()
    assert [event["message"] for event in told["data"]][2:] == [
        "Fine-tune enqueued. Queue number: 0",
        "Fine-tune started",
        f"Uploaded model: {TUNED}",
        f"Uploaded result file: {result}",
        "Fine-tune succeeded",
    ]
    services.files.delete(job["training_files"][0]["id"])
    gone = client.get(path).json()["training_files"][0]
    assert (gone["id"], gone["object"], gone["status"]) == (job["training_files"][0]["id"], "file", "deleted")
    assert client.delete(path).json() == {"id": job["id"], "object": "fine-tune", "deleted": True}
    assert client.get(path).status_code == 404


def test_cancel(client: TestClient, services: Services) -> None:
    job = create(client, services)
    path = f"{TUNES}/{job['id']}"
    lease = driving.start(services)
    answer = client.post(f"{path}/cancel").json()
    assert (answer["status"], answer["object"]) == ("cancelled", "fine-tune")
    services.leases.release(lease)
    assert client.get(path).json()["events"][-1]["message"] == "Fine-tune cancelled"
    assert client.post(f"{path}/cancel").status_code == 400


@pytest.mark.parametrize("path", ["", "/cancel", "/events", "/events?stream=true"])
def test_an_unknown_fine_tune_is_not_found(client: TestClient, services: Services, path: str) -> None:
    modern = client.post("/v1/fine_tuning/jobs", json=driving.body(services)).json()["id"]
    for job_id in ("ft-" + "x" * 24, modern, "x.jsonl"):
        answer = client.request("POST" if path == "/cancel" else "GET", f"{TUNES}/{job_id}{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "fine_tune_not_found"


def test_the_papers_tell_of_every_field() -> None:
    assert set(CREATE_FIELDS) == set(FineTuneRequest.model_fields)
