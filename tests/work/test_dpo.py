"""A job of method dpo on its way through a worker: request, events, checkpoints, table, tracker."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from luthier.store.jobs import Job
from luthier.work.findings import told
from luthier.work.layout import resolved
from luthier.work.results import result_table
from tests.work.ask import preferences
from tests.work.conftest import Bench
from tests.work.test_findings import finding
from tests.work.test_record import SETTINGS, checkpoint, recorder, running, step
from tests.work.test_worker import engine_of

DPO = {"method": {"type": "dpo"}}
NONE = {"token_accuracy": None, "sequence_accuracy": None}


def figures(accuracy: float, margin: float, likelier: float) -> dict[str, Any]:
    return {"reward_accuracy": accuracy, "reward_margin": margin, "preference_accuracy": likelier}


def run_of(bench: Bench, **asked: Any) -> Any:
    """A running job and its run, as an engine leaves it after three steps and a validation."""
    job, lease, run = running(bench, records=preferences(12), **DPO, **asked)
    run.emit("prepared", settings={**SETTINGS, "beta": 0.1}, steps=6)
    step(run, 1, preference=figures(0.0, 0.0, 0.25), **NONE)
    run.emit("validation", step=2, loss=0.625, preference=figures(0.5, 0.125, 0.75), **NONE)
    step(run, 2, preference=figures(0.75, 0.5, 0.5), **NONE)
    step(run, 3, loss=None, preference=None, **NONE)
    return job, lease, run


def test_a_job_becomes_a_request(bench: Bench) -> None:
    job, _, run = running(bench, records=preferences(12), beta=0.25, **DPO)
    asked = json.loads(run.request.read_text())
    assert (asked["objective"], asked["beta"], asked["epochs"]) == ("dpo", 0.25, 2)
    assert resolved(job, {**SETTINGS, "beta": 0.25})["beta"] == 0.25


def test_a_beta_that_is_auto_is_left_to_the_engine(bench: Bench) -> None:
    job, _, run = running(bench, records=preferences(12), beta="auto", **DPO)
    asked = json.loads(run.request.read_text())
    assert asked["objective"] == "dpo" and "beta" not in asked
    assert resolved(job, {**SETTINGS, "beta": 0.1})["beta"] == 0.1


def test_a_supervised_job_knows_nothing_of_it(bench: Bench) -> None:
    job, _, run = running(bench)
    assert not {"objective", "beta"} & set(json.loads(run.request.read_text()))
    assert "beta" not in resolved(job, {**SETTINGS, "beta": None})


def test_steps_tell_the_figures_of_pairs(bench: Bench) -> None:
    job, lease, run = run_of(bench)
    checkpoint(run, 2)
    reader = recorder(bench, job, lease, run)
    reader.read()
    reader.write()
    steps = [event for event in bench.events(job) if event.type == "metrics"]
    losses = "training loss=0.50, validation loss=0.62"
    assert [event.message for event in steps] == [
        "Step 1/6: training loss=1.00, training reward accuracy=0.00",
        f"Step 2/6: {losses}, training reward accuracy=0.75, validation reward accuracy=0.50",
        "Step 3/6",
    ]
    held_out = {"loss": 0.625, "reward_accuracy": 0.5, "reward_margin": 0.125, "preference_accuracy": 0.75}
    assert steps[1].data == {
        "step": 2,
        "total_steps": 6,
        "train_loss": 0.5,
        "train_reward_accuracy": 0.75,
        "train_reward_margin": 0.5,
        "train_preference_accuracy": 0.5,
        **{f"{part}_{name}": value for part in ("valid", "full_valid") for name, value in held_out.items()},
    }
    assert bench.jobs.get(job.id).hyperparameters == {
        "n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0, "beta": 0.1
    }  # fmt: skip


def test_checkpoints_and_trackers_have_them_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job, lease, run = run_of(bench)
    checkpoint(run, 3)
    step(run, 4, preference=figures(1.0, 2.0, 1.0), **NONE)
    checkpoint(run, 4)
    reader = recorder(bench, job, lease, run)
    logged: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(reader.trackers, "log", logged.__setitem__)
    reader.read()
    reader.write()
    pairs = {"train_reward_accuracy": 1.0, "train_reward_margin": 2.0, "train_preference_accuracy": 1.0}
    kept = {one.step: one.metrics for one in bench.history.checkpoints(job.id).data}
    assert kept == {3: {"step": 3}, 4: {"step": 4, "train_loss": 0.25, **pairs}}
    assert logged[4] == {"train_loss": 0.25, **pairs}
    assert logged[3] == {} and logged[2]["valid_reward_margin"] == 0.125


def test_the_table_has_no_accuracy_of_tokens(bench: Bench) -> None:
    job, _, run = run_of(bench)
    header, *rows = result_table(run, job).decode().splitlines()
    assert header == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,train_mean_token_accuracy,"
        "full_valid_loss,full_valid_mean_token_accuracy,"
        "train_reward_accuracy,train_reward_margin,train_preference_accuracy,"
        "valid_reward_accuracy,valid_reward_margin,valid_preference_accuracy,"
        "full_valid_reward_accuracy,full_valid_reward_margin,full_valid_preference_accuracy"
    )
    assert rows == [
        "1,1.00000,0.00000,,,,,,0.00000,0.00000,0.25000,,,,,,",
        "2,0.50000,0.75000,0.62500,,,0.62500,,0.75000,0.50000,0.50000,0.50000,0.12500,0.75000,0.50000,0.12500,0.75000",
        "3" + "," * 16,
    ]


def test_the_table_of_a_supervised_job_is_as_it_was(bench: Bench) -> None:
    job, _, run = running(bench)
    step(run, 1, preference=None)
    header, row = result_table(run, job).decode().splitlines()
    assert header.endswith(",full_valid_loss,full_valid_mean_token_accuracy")
    assert row == "1,1.00000,0.50000,,,0.50000,,"


def test_that_there_are_pairs_is_no_finding(bench: Bench) -> None:
    found = [finding("pairs"), finding("duplicate")]
    job = bench.submit(preferences(12), **DPO)
    assert [draft.data["kind"] for draft in told(found, {"t.jsonl": "f"}, job) if draft.data] == ["duplicate"]
    other = bench.submit()
    assert [draft.data["kind"] for draft in told(found, {"t.jsonl": "f"}, other) if draft.data] == [
        "pairs",
        "duplicate",
    ]


def test_good_pairs_queue(bench: Bench) -> None:
    job = bench.submit(preferences(12), validation=preferences(2, "completion"), **DPO)
    chat = bench.submit(**DPO)
    worker = bench.worker()
    while worker.once("validate", bench.stop):
        pass
    assert bench.jobs.get(job.id).status == "queued"
    failed = bench.jobs.get(chat.id)
    assert (failed.status, (failed.error or {})["code"]) == ("failed", "invalid_training_file")
    assert "is in the fine-tune-chat format, but the method is dpo" in str((failed.error or {})["message"])
    assert not [event.message for event in bench.events(job) if "two answers" in event.message]


def table_of(bench: Bench, job: Job) -> bytes:
    with bench.files.open(job.result_files[0]) as handle:
        return handle.read()


def test_a_job_becomes_a_model_whatever_happens_on_the_way(bench: Bench) -> None:
    """Paused once and its engine killed once, a job comes to the same numbers as one that was left alone."""
    bench.start()
    asked = {"validation": preferences(4, "completion"), "n_epochs": 40, "batch_size": 1, "beta": 0.2, **DPO}
    left_alone = bench.submit(preferences(12), **asked)
    disturbed = bench.submit(preferences(12), **asked)
    bench.stepped(disturbed, 3)
    bench.jobs.request_pause(disturbed.id)
    assert bench.until(disturbed, lambda found: found.status in ("paused", "succeeded")).status == "paused"
    snapshot = bench.history.checkpoints(disturbed.id).data[0].step
    bench.jobs.request_resume(disturbed.id)
    bench.stepped(disturbed, snapshot + 2)
    os.kill(engine_of(bench, disturbed), signal.SIGKILL)
    first, second = bench.ended(left_alone), bench.ended(disturbed)
    assert (first.status, second.status) == ("succeeded", "succeeded"), (first.error, second.error)
    assert table_of(bench, first) == table_of(bench, second)
    steps = [event.data["step"] for event in bench.events(disturbed) if event.type == "metrics"]
    assert steps == list(range(1, 481))
    assert second.hyperparameters == {"n_epochs": 40, "batch_size": 1, "learning_rate_multiplier": 1.0, "beta": 0.2}
    assert second.proof is not None and second.proof["metric"] == "preference"
    names = [bench.files.get(file_id).filename for file_id in second.result_files]
    assert names == ["step_metrics.csv", "report.json", "report.html"]
    model = bench.models.get(str(second.fine_tuned_model))
    assert (model.folder / "adapter_config.json").is_file()
