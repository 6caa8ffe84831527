"""What events of a run become, without an engine; names and tables; trackers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from luthier.spec.errors import NotFound
from luthier.spec.run import RunFolder
from luthier.store.jobs import Job
from luthier.store.leases import Lease
from luthier.work.layout import lay_out
from luthier.work.record import Recorder, worth_an_event
from luthier.work.results import clean, final_name, metrics_of, result_table
from tests.work.ask import jsonl, pairs
from tests.work.conftest import Bench

SETTINGS = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3}


def running(bench: Bench, **request: Any) -> tuple[Job, Lease, RunFolder]:
    records = request.pop("records", pairs(12) if request.get("kind") == "legacy" else None)
    job = bench.submit(records, **request)
    taken = bench.leases.claim("w", 60, "validate")
    assert taken is not None
    bench.leases.validated(taken[1])
    claimed = bench.leases.claim("w", 60)
    assert claimed is not None and claimed[0].id == job.id
    return *claimed, lay_out(bench.database, bench.settings.offered, claimed[0])


def recorder(bench: Bench, job: Job, lease: Lease, run: RunFolder) -> Recorder:
    return Recorder(bench.database, job, lease, run, "Acme Inc.")


def prepare(run: RunFolder) -> None:
    run.emit("prepared", settings=SETTINGS, steps=6)


def step(run: RunFolder, number: int, **more: Any) -> None:
    values = {"loss": 1 / number, "epoch": number / 3, "tokens": 10, "examples": 4 * number, "eta_seconds": 30.0}
    values |= {"token_accuracy": 0.5, "sequence_accuracy": 0.25}
    run.emit("step", step=number, steps=6, **{**values, **more})


def checkpoint(run: RunFolder, number: int) -> Path:
    folder = run.path / "published" / f"step-{number:08d}"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(str(number))
    run.emit("checkpoint", step=number, path="", best=False, published=str(folder))
    return folder


FORECAST = {"load_seconds": 10.0, "seconds": 400.0, "train_seconds": 390.0, "peak_memory_bytes": 1_250_000_000}


@pytest.mark.parametrize("kind", ["modern", "legacy"])
def test_the_forecast_is_told_and_says_when_it_will_be_over(bench: Bench, kind: str) -> None:
    job, lease, run = running(bench, kind=kind)
    prepare(run)
    run.emit("forecast", **FORECAST)
    for _ in range(2):
        reader = recorder(bench, job, lease, run)
        reader.read()
        reader.write()
    told = [event for event in bench.events(job) if event.message.startswith("Forecast")]
    expected = [("Forecast: 6 min from now, at most 1.2 GB of memory", FORECAST)] if kind == "modern" else []
    assert [(event.message, event.data) for event in told] == expected
    (when,) = [event["time"] for _, event in run.events() if event["type"] == "forecast"]
    assert bench.jobs.get(job.id).estimated_finish == round(when + 390)


def test_events_are_told_once_however_often_they_are_read(bench: Bench) -> None:
    job, lease, run = running(bench)
    prepare(run)
    run.emit("validation", step=0, loss=3.0, token_accuracy=0.1)
    step(run, 1)
    run.emit("warning", message="2 rows were cut.", hint="Raise --max-length.")
    run.emit("validation", step=2, loss=0.75, token_accuracy=0.625)
    step(run, 2)
    for _ in range(2):  # the second is the next worker's
        reader = recorder(bench, job, lease, run)
        reader.read()
        reader.write()
    step(run, 2)  # an engine that was killed takes it again
    step(run, 3)
    reader.read()
    reader.write()
    told = [(event.level, event.type, event.message) for event in bench.events(job)][4:]
    assert told == [
        ("info", "metrics", "Step 1/6: training loss=1.00"),
        ("warn", "message", "2 rows were cut."),
        ("info", "metrics", "Step 2/6: training loss=0.50, validation loss=0.75"),
        ("info", "metrics", "Step 3/6: training loss=0.33"),
    ]
    assert bench.events(job)[6].data == {
        "step": 2,
        "total_steps": 6,
        "train_loss": 0.5,
        "train_mean_token_accuracy": 0.5,
        "valid_loss": 0.75,
        "valid_mean_token_accuracy": 0.625,
        "full_valid_loss": 0.75,
        "full_valid_mean_token_accuracy": 0.625,
    }
    now = bench.jobs.get(job.id)
    assert now.hyperparameters == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    assert now.estimated_finish is not None and 0 <= now.estimated_finish - bench.database.now() <= 30


def test_three_checkpoints_are_kept(bench: Bench) -> None:
    job, lease, run = running(bench)
    prepare(run)
    reader = recorder(bench, job, lease, run)
    for number in range(1, 6):
        step(run, number)
        checkpoint(run, number)
        reader.read()
        reader.write()
    kept = bench.history.checkpoints(job.id).data
    assert [one.step for one in kept] == [5, 4, 3]
    assert {model.name for model in bench.models.list(job_id=job.id)} == {one.model for one in kept}
    assert kept[0].metrics == {"step": 5, "train_loss": 0.2, "train_mean_token_accuracy": 0.5}
    assert kept[0].model == f"{final_name(job, 'Acme Inc.')}:ckpt-step-5"
    assert sum(text.startswith("Checkpoint created at step") for text in bench.said(job)) == 5


def test_a_name_that_is_anothers_is_passed_over(bench: Bench) -> None:
    job, lease, run = running(bench, kind="legacy")
    run.model.mkdir()
    (run.model / "x").write_text("x")
    name = final_name(job, "Acme Inc.")
    other = bench.database.home / "runs" / "other"
    other.mkdir()
    bench.models.register(name, base="tiny", folder=other, content_hash="1")
    reader = recorder(bench, job, lease, run)
    found = reader.register(run.model)
    assert found.name == final_name(job, "Acme Inc.", 1) != name
    assert reader.register(run.model) == found
    (run.model / "x").write_text("y")  # published again by a second attempt
    assert reader.register(run.model).content_hash != found.content_hash


def test_names(bench: Bench) -> None:
    job = replace(bench.submit(), started_at=1_700_000_000)
    assert clean("My Model!") == "my-model" and clean("a_B  c") == "a_b-c" and clean("🙂") == ""
    plain = final_name(job, "luthier")
    assert plain == final_name(job, "luthier") and plain.startswith("ft:tiny:luthier::") and len(plain) == 25
    legacy = replace(job, kind="legacy")
    assert final_name(legacy, "luthier") == "tiny:ft-luthier-2023-11-14-22-13-20"
    assert final_name(replace(legacy, suffix="My_Own"), "luthier") == "tiny:ft-luthier:my-own-2023-11-14-22-13-20"


def test_thinning() -> None:
    told = [number for number in range(1, 20_001) if worth_an_event(number, 19_999)]
    assert len(told) == 1000 + 900 + 100 + 1 and told[999:1002] == [1000, 1010, 1020] and 19_999 in told


def test_cells_are_numbers_or_empty(bench: Bench) -> None:
    job, _, run = running(bench, kind="legacy", validation=None)
    job = replace(job, validation_file="file-x")
    step(run, 1, loss=float("0.123456789"))
    found = {"classification/accuracy": 0.5, "classification/auroc": None}
    run.emit("validation", step=2, loss=0.5, token_accuracy=None, sequence_accuracy=1.0, classification=found)
    step(run, 2, token_accuracy=None)
    lines = result_table(run, job).decode().splitlines()
    assert lines[0] == (
        "step,elapsed_tokens,elapsed_examples,training_loss,training_sequence_accuracy,training_token_accuracy,"
        "validation_loss,validation_sequence_accuracy,validation_token_accuracy,"
        "classification/accuracy,classification/auroc"
    )
    assert lines[1:] == [
        "1,10,4,0.12346,0.25000,0.50000,,,,,",
        "2,20,8,0.50000,0.25000,,0.50000,1.00000,,0.50000,",
    ]
    assert metrics_of({"step": 1, "loss": float("nan")}, {"loss": None}) == {"step": 1}


WANDB = [{"type": "wandb", "wandb": {"project": "p", "tags": ["t"]}}]


def test_a_tracker_hears_of_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[Any, ...]] = []

    class Run:
        def log(self, metrics: dict[str, float], step: int) -> None:
            heard.append(("log", step, metrics))

        def finish(self, exit_code: int) -> None:
            heard.append(("finish", exit_code))

    def init(**given: Any) -> Run:
        heard.append(("init", given))
        return Run()

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    job, lease, run = running(bench, integrations=WANDB)
    prepare(run)
    step(run, 1)
    reader = recorder(bench, job, lease, run)
    reader.read()
    reader.trackers.finish("succeeded")
    assert [word for word, *_ in heard] == ["init", "log", "finish"]
    given = heard[0][1]
    assert (given["project"], given["name"], given["id"], given["tags"]) == ("p", job.id, job.id, ["t"])
    assert given["config"] == {
        "n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0, "seed": 7, "steps": 6
    }  # fmt: skip
    assert heard[1][1:] == (1, {"train_loss": 1.0, "train_mean_token_accuracy": 0.5})
    assert heard[2] == ("finish", 0)


@pytest.mark.parametrize("broken", [False, True])
def test_a_tracker_that_cannot_be_used_is_a_warning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    fake = ModuleType("wandb") if broken else None  # it has no init; or: it is not there
    monkeypatch.setitem(sys.modules, "wandb", fake)
    job, lease, run = running(bench, integrations=WANDB)
    prepare(run)
    step(run, 1)
    reader = recorder(bench, job, lease, run)
    reader.read()
    reader.trackers.finish("succeeded")
    reader.read()
    reader.write()
    [warning] = [event.message for event in bench.events(job) if event.level == "warn"]
    assert ("AttributeError" if broken else "pip install luthier[trackers]") in warning


def test_a_job_becomes_a_request(bench: Bench) -> None:
    job, _, run = running(
        bench,
        kind="legacy",
        validation=pairs(2),
        learning_rate_multiplier=0.05,
        prompt_loss_weight=0.01,
        n_epochs=4,
        batch_size="auto",
    )
    assert json.loads(run.request.read_text()) == {
        "model": bench.settings.offered.sources["tiny"],
        "data": [str(run.path / "data" / "training.jsonl")],
        "validation": str(run.path / "data" / "validation.jsonl"),
        "template": "auto",
        "epochs": 4,
        "learning_rate_multiplier": 0.5,
        "prompt_loss_weight": 0.01,
        "overlong": "truncate",
        "publish_checkpoints": 3,
        "proof_memory": "run",
        "seed": 7,
    }
    assert (run.path / "data" / "training.jsonl").read_bytes() == jsonl(pairs(12))
    assert lay_out(bench.database, bench.settings.offered, job).path == run.path  # again: the same


def test_classification_is_asked_for_with_its_switch(bench: Bench) -> None:
    _, _, run = running(
        bench,
        kind="legacy",
        validation=pairs(2),
        compute_classification_metrics=True,
        classification_positive_class=" even",
        classification_betas=[0.5],
    )
    asked = json.loads(run.request.read_text())
    assert (asked["classification_positive_class"], asked["classification_betas"]) == (" even", [0.5])


def test_a_gone_parent_is_named(bench: Bench) -> None:
    with pytest.raises(NotFound) as raised:
        running(bench, parent="ft:tiny:acme::gone")
    assert raised.value.param == "model"
