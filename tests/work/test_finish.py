"""When a job will be over, as the API tells it: from the forecast on, ending included, until it is over."""

from __future__ import annotations

import json
import time
from pathlib import Path

from fastapi.testclient import TestClient

from luthier.api.app import create_app
from luthier.spec.run import RunFolder
from tests.api.conftest import FakeRouter, make_services
from tests.engine.runs import chats
from tests.work.ask import jsonl
from tests.work.conftest import Bench


def test_estimated_finish_counts_the_proof_and_the_meter(bench: Bench, tiny: Path) -> None:
    services = make_services(bench.settings, bench.database, FakeRouter(), {"tiny": tiny})  # type: ignore[arg-type]
    headers = {"Authorization": f"Bearer {services.keys.create('test', 'user')[1]}"}
    with TestClient(create_app(services), headers=headers) as client:
        asked = {
            "model": "tiny",
            "training_file": bench.file(jsonl(chats(12))),
            "validation_file": bench.file(jsonl(chats(4, start=50))),
            "hyperparameters": {"n_epochs": 2, "batch_size": 6, "replay": 0.5},
            "forgetting": 8,
            "must_improve": 0.5,
        }
        made = client.post("/v1/fine_tuning/jobs", json=asked).json()
        assert made["estimated_finish"] is None
        bench.start()
        told: set[int] = set()
        while (job := client.get(f"/v1/fine_tuning/jobs/{made['id']}").json())["finished_at"] is None:
            if job["estimated_finish"] is not None:
                told.add(job["estimated_finish"])
            time.sleep(0.05)
    assert job["status"] == "succeeded", job["error"]
    assert job["estimated_finish"] is None
    assert sum(part["items"] for part in job["forgetting"]["parts"]) == job["forgetting"]["items"] > 8
    assert job["gate"] == {
        "passed": False, "must_improve": 0.5, "max_forgetting": None, "reasons": job["gate"]["reasons"]
    }  # fmt: skip
    assert job["gate"]["reasons"][0].startswith("It is not shown to improve")
    assert job["hyperparameters"]["replay"] == 0.5
    with bench.files.open(job["result_files"][1]) as handle:
        assert json.load(handle)["replayed_rows"] == 6, "half of the twelve"
    run = RunFolder(bench.database.home / "runs" / made["id"])
    (forecast,) = [event for _, event in run.events() if event["type"] == "forecast"]
    assert forecast["prove_seconds"] > 0 and forecast["forget_seconds"] > 0
    first = round(forecast["time"] + forecast["seconds"] - forecast["load_seconds"])
    steps = [event for _, event in run.events() if event["type"] == "step"]
    ending = forecast["prove_seconds"] + forecast["forget_seconds"]
    assert abs(steps[-1]["eta_seconds"] - ending) < 0.06, "after the last step only the ending is left"
    assert [step["eta_seconds"] > ending - 0.06 for step in steps[:-1]] == [True] * 5, "in tenths of a second"
    assert told, "it was set while the job ran"
    assert all(job["created_at"] <= when <= max(first, job["finished_at"] + 600) for when in told)
