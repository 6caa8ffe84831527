"""Jobs from the queue to their ends, with real engines on a tiny model."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from luthier.spec.run import RunFolder
from luthier.store.aliases import Aliases, GateClosed
from luthier.work.launch import descendants
from luthier.work.layout import lay_out
from luthier.work.record import Recorder
from luthier.work.results import final_name, folder_hash
from luthier.work.worker import engine_command
from tests.engine.runs import chats
from tests.work import ask
from tests.work.conftest import Bench

LONG = {"n_epochs": 50, "batch_size": 1}  # 600 steps: more than a test waits for


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def engine_of(bench: Bench, job: Any) -> int:
    run = RunFolder(bench.database.home / "runs" / job.id)
    return int([event["pid"] for _, event in run.events() if event["type"] == "started"][-1])


def table(bench: Bench, file_id: str) -> list[dict[str, str]]:
    with bench.files.open(file_id) as handle:
        return list(csv.DictReader(io.StringIO(handle.read().decode())))


def test_a_job_becomes_a_model(bench: Bench) -> None:
    bench.start()
    asked = {"suffix": "My Model!", "learning_rate_multiplier": 5}
    job = bench.ended(bench.submit(validation=chats(3, 50), **asked))
    assert job.status == "succeeded", job.error
    assert re.fullmatch(r"ft:tiny:acme-inc:my-model:[A-Za-z0-9]{8}", job.fine_tuned_model or "")
    assert job.hyperparameters == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 5.0}
    assert (job.trained_tokens or 0) > 0 and job.finished_at and job.estimated_finish is None
    said = bench.said(job)
    wanted = [
        f"Created fine-tuning job: {job.id}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/6: training loss=",
        "Step 6/6: training loss=",
        "Checkpoint created at step 6",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    places = [next(n for n, text in enumerate(said) if text.startswith(start)) for start in wanted]
    assert places == sorted(places)
    metrics = [event.data for event in bench.events(job) if event.type == "metrics"]
    assert [one["step"] for one in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(one["total_steps"] == 6 and one["train_loss"] > 0 for one in metrics)
    assert "full_valid_loss" in metrics[2] and "full_valid_loss" not in metrics[1]

    model = bench.models.get(str(job.fine_tuned_model))
    assert (model.base, model.job_id, model.content_hash) == ("tiny", job.id, folder_hash(model.folder))
    checkpoints = bench.history.checkpoints(job.id).data
    assert [one.step for one in checkpoints] == [6, 3]
    assert [one.model for one in checkpoints] == [f"{model.name}:ckpt-step-{step}" for step in (6, 3)]
    assert all((bench.models.get(one.model).folder / "adapter_config.json").is_file() for one in checkpoints)

    assert bench.files.get(job.result_files[0]).filename == "step_metrics.csv"
    rows = table(bench, job.result_files[0])
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert float(rows[0]["train_loss"]) == round(metrics[0]["train_loss"], 5)
    assert rows[1]["valid_loss"] == "" and float(rows[2]["full_valid_loss"]) > 0
    assert all(cell == "" or float(cell) == float(cell) for row in rows for cell in row.values())

    assert job.proof is not None
    assert {way["name"] for way in job.proof["ways"]} == {"base", "examples", "tuned"}
    assert "rows" not in job.proof
    assert f"Proof: {job.proof['sentence']}" in said
    names = [bench.files.get(file_id).filename for file_id in job.result_files]
    assert names == ["step_metrics.csv", "report.json", "report.html"]
    with bench.files.open(job.result_files[1]) as handle:
        assert [row["wanted"] for row in json.load(handle)["proof"]["rows"]] == [
            record["messages"][1]["content"] for record in chats(3, 50)
        ]
    left = {path.name for path in (bench.database.home / "runs" / job.id).iterdir()}
    assert left & {"data", "answers", "report.json", "report.html"} == set()  # they show held-out rows

    second = bench.ended(bench.submit(model=model.name, parent=model.name))
    assert second.status == "succeeded", second.error
    assert (second.proof, len(second.result_files)) == (None, 1)  # nothing was held out
    assert str(second.fine_tuned_model).startswith("ft:tiny:acme-inc::")
    assert float(table(bench, second.result_files[0])[0]["train_loss"]) < float(rows[0]["train_loss"])


def test_a_job_that_misses_its_thresholds_is_kept_and_not_promoted(bench: Bench) -> None:
    bench.start()
    job = bench.ended(bench.submit(validation=chats(4, 50), must_improve=1e9, forgetting="off", proof_rows=2))
    assert job.status == "succeeded" and job.fine_tuned_model is not None
    [refusal] = [text for text in bench.said(job) if text.startswith("Not to be promoted: ")]
    aliases = Aliases(bench.database)
    with pytest.raises(GateClosed) as closed:
        aliases.promote("shop@production", job.fine_tuned_model)
    assert refusal.removeprefix("Not to be promoted: ") in closed.value.message
    assert aliases.resolve(job.fine_tuned_model).folder.is_dir()


def test_what_a_job_asks_of_its_proof_reaches_the_engine(bench: Bench) -> None:
    bench.start()
    job = bench.ended(bench.submit(validation=chats(4, 50), metric="text", proof_rows=2))
    assert job.status == "succeeded", job.error
    assert job.proof is not None
    assert (job.proof["metric"], job.proof["why"]) == ("text", "Named by the request.")
    assert job.proof["chosen"].startswith("2 of 4 held-out rows")
    none = bench.ended(bench.submit(validation=chats(4, 50), proof_rows=0))
    assert (none.status, none.proof, len(none.result_files)) == ("succeeded", None, 1)


def test_a_job_that_keeps_general_ability_is_published_at_the_chosen_scale(bench: Bench) -> None:
    bench.start()
    job = bench.ended(bench.submit(validation=chats(8, 50), forgetting=8, keep_general=True))
    assert job.status == "succeeded", job.error
    (told,) = [event for event in bench.events(job) if "keeping" in (event.data or {})]
    kept = told.data["keeping"]
    assert told.message == kept["sentence"]
    assert [point["scale"] for point in kept["points"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    with bench.files.open(job.result_files[1]) as handle:
        assert json.load(handle)["keeping"] == kept
    model = bench.database.home / "runs" / job.id / "model"
    scale = json.loads((model / "adapter_config.json").read_text())["lora_alpha"] / 32
    assert scale == kept["chosen"], "what is served is what was chosen"


def test_a_legacy_job_becomes_a_model(bench: Bench) -> None:
    bench.start()
    request = {
        "n_epochs": 4,
        "batch_size": 2,
        "learning_rate_multiplier": 0.1,
        "prompt_loss_weight": 0.01,
        "compute_classification_metrics": True,
        "classification_positive_class": " even",
    }
    job = bench.ended(bench.submit(ask.pairs(4), validation=ask.pairs(2), kind="legacy", suffix="My_Model", **request))
    assert job.status == "succeeded", job.error
    assert re.fullmatch(r"tiny:ft-acme-inc:my-model-\d{4}(-\d\d){5}", job.fine_tuned_model or "")
    assert job.hyperparameters == request
    said = bench.said(job)
    epochs = [f"Completed epoch {n}/4" for n in (1, 2, 3, 4)]
    assert [text for text in said if text.startswith("Completed")] == epochs
    assert said[-3:] == [
        f"Uploaded model: {job.fine_tuned_model}",
        f"Uploaded result file: {job.result_files[0]}",
        "Fine-tune succeeded",
    ]
    assert not any(event.type == "metrics" for event in bench.events(job))
    rows = table(bench, job.result_files[0])
    assert len(rows) == 8 and rows[-1]["elapsed_examples"] == "16"
    assert rows[1]["validation_loss"] != "" and rows[0]["validation_loss"] == ""
    measured = [row["step"] for row in rows if row["classification/accuracy"] != ""]
    assert measured == ["2", "4", "6", "8"] and "classification/f1.0" in rows[0]


def test_cancel_ends_the_engine_and_the_next_job_starts(bench: Bench) -> None:
    bench.start(command=lambda run: ask.quick(run) if run.path.name == following.id else engine_command(run))
    job = bench.submit(**LONG)
    following = bench.submit()
    bench.stepped(job)
    pid = engine_of(bench, job)
    below = descendants(os.getpid())
    begun = time.monotonic()
    bench.jobs.request_cancel(job.id)
    ended = bench.ended(job)
    assert time.monotonic() - begun < 10
    assert (ended.status, ended.fine_tuned_model) == ("cancelled", None)
    assert pid in below and not alive(pid)
    assert bench.ended(following).status == "succeeded"


def test_cancel_while_the_model_loads(bench: Bench) -> None:
    bench.start()
    job = bench.submit(**LONG)
    bench.until(job, lambda found: found.status == "running")
    bench.jobs.request_cancel(job.id)
    assert bench.ended(job).status == "cancelled"
    assert not any("-m luthier.engine" in " ".join(line) for line in _commands(descendants(os.getpid())))


def _commands(pids: set[int]) -> list[list[str]]:
    return [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in pids if alive(pid)]


def test_pause_and_resume_take_the_same_steps(bench: Bench) -> None:
    bench.start()
    job = bench.submit(n_epochs=6, batch_size=1)
    bench.stepped(job, 3)
    bench.jobs.request_pause(job.id)
    paused = bench.until(job, lambda found: found.status in ("paused", "succeeded"))
    assert paused.status == "paused"
    snapshot = bench.history.checkpoints(job.id).data[0].step
    assert 3 <= snapshot < 72
    bench.jobs.request_resume(job.id)
    ended = bench.ended(job)
    assert ended.status == "succeeded", ended.error
    steps = [event.data["step"] for event in bench.events(job) if event.type == "metrics"]
    assert steps == list(range(1, 73))
    assert len(table(bench, ended.result_files[0])) == 72
    assert len(bench.history.checkpoints(job.id).data) == 3
    names = {model.name for model in bench.models.list(job_id=job.id)}
    assert names == {ended.fine_tuned_model, *(one.model for one in bench.history.checkpoints(job.id).data)}


def test_a_killed_engine_is_started_again(bench: Bench) -> None:
    bench.start()
    job = bench.submit(n_epochs=5, batch_size=1)
    bench.stepped(job, 2)
    os.kill(engine_of(bench, job), signal.SIGKILL)
    ended = bench.ended(job)
    assert ended.status == "succeeded", ended.error
    steps = [event.data["step"] for event in bench.events(job) if event.type == "metrics"]
    assert steps == list(range(1, 61))


@pytest.mark.parametrize("backend", ["bench", "postgres_bench"])
def test_a_killed_worker_leaves_nothing_and_the_next_goes_on(
    backend: str, request: pytest.FixtureRequest, tiny: Path
) -> None:
    bench: Bench = request.getfixturevalue(backend)
    url = None if bench.database.is_sqlite else bench.database.url.render_as_string(hide_password=False)
    process = subprocess.Popen(ask.command(bench.database.home, url, tiny, "doomed"), cwd=Path(__file__).parents[2])
    try:
        job = bench.submit(n_epochs=5, batch_size=1)
        bench.stepped(job, 15)
        pid = engine_of(bench, job)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    bench.start("second")
    ended = bench.ended(job)
    assert ended.status == "succeeded", ended.error
    steps = [event.data["step"] for event in bench.events(job) if event.type == "metrics"]
    assert steps == list(range(1, 61))
    if backend != "bench":
        return  # the bits have no database
    whole = bench.ended(bench.submit(n_epochs=5, batch_size=1))
    weights = [
        (bench.models.get(str(one.fine_tuned_model)).folder / "adapter_model.safetensors").read_bytes()
        for one in (ended, whole)
    ]
    assert weights[0] == weights[1]


def test_a_worker_that_is_to_end_gives_its_job_back(bench: Bench) -> None:
    bench.start()
    job = bench.submit(**LONG)
    bench.stepped(job, 2)
    bench.halt()
    given_back = bench.jobs.get(job.id)
    assert (given_back.status, given_back.worker, given_back.losses) == ("queued", None, 0)
    assert bench.history.checkpoints(job.id).data[0].step >= 2


def test_a_repeated_end_comes_to_the_same(bench: Bench) -> None:
    """A worker is lost after the engine finished, before it could say so; the next one trains nothing again."""
    job = bench.submit()
    worker = bench.worker(command=ask.quick)
    assert worker.once("validate", bench.stop)
    claimed = bench.leases.claim("lost", 60)
    assert claimed is not None
    run = lay_out(bench.database, bench.settings.offered, claimed[0])
    subprocess.run(worker.command(run), check=True, env=worker.environment)
    bench.leases.release(claimed[1])
    assert worker.once("run", bench.stop)
    ended = bench.jobs.get(job.id)
    assert ended.status == "succeeded", ended.error
    assert ended.fine_tuned_model == final_name(ended, "Acme Inc.")
    assert sum(event["type"] == "started" for _, event in run.events()) == 1
    assert len(bench.files.list(purpose="fine-tune-results").data) == 1


def test_a_cancel_that_comes_at_the_end_leaves_no_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    register = Recorder.register

    def slowly(self: Recorder, folder: Path, step: int | None = None) -> Any:
        if step is None:
            bench.jobs.request_cancel(self.job.id)
        return register(self, folder, step)

    monkeypatch.setattr(Recorder, "register", slowly)
    bench.start(command=ask.quick)
    job = bench.ended(bench.submit())
    bench.halt()  # what was made is removed after the end is told
    assert (job.status, job.fine_tuned_model, job.result_files) == ("cancelled", None, [])
    assert all(model.step is not None for model in bench.models.list(job_id=job.id))
    assert bench.files.list(purpose="fine-tune-results").data == ()


def test_a_missing_base_fails_its_job_alone(bench: Bench, tiny: Path, tmp_path: Path) -> None:
    bases = f"tiny={tiny},gone={tmp_path / 'nowhere'}"
    bench.settings = bench.settings.model_copy(update={"bases": bases})
    bench.start(command=lambda run: engine_command(run) if run.path.name == job.id else ask.quick(run))
    job = bench.submit(base="gone")
    unknown = bench.submit(base="never-offered")
    good = bench.submit()
    failed = bench.ended(job)
    assert failed.status == "failed" and failed.error is not None
    assert failed.error["param"] == "model"
    assert bench.ended(unknown).error == {
        "code": "not_found",
        "message": "The base model never-offered is not offered here.",
        "param": "model",
    }
    assert bench.ended(good).status == "succeeded"


def test_an_unwritable_run_folder_fails_its_job_alone(bench: Bench) -> None:
    (bench.database.home / "runs").write_text("a file, where a folder should be")
    bench.start(command=ask.quick)
    job = bench.ended(bench.submit())
    assert job.status == "failed" and job.error is not None
    assert "run folder" in str(job.error["message"])
    assert str(bench.database.home) not in str(job.error["message"])
    (bench.database.home / "runs").unlink()
    assert bench.ended(bench.submit()).status == "succeeded"


def test_a_file_deleted_before_the_start_fails_the_job(bench: Bench) -> None:
    early, late = bench.submit(), bench.submit()
    assert bench.worker().once("validate", bench.stop)
    for job in (early, late):
        bench.files.delete(job.training_file)
    bench.start(command=ask.quick)
    for job in (early, late):
        ended = bench.ended(job)
        assert ended.error is not None
        assert (ended.error["code"], ended.error["param"]) == ("invalid_training_file", "training_file")
        assert ended.error["message"] == f"The training file {job.training_file} has been deleted."
