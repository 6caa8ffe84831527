"""Workers that are lost without dying: stopped, or on a machine that mounts the data folder elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.spec.run import RunFolder
from luthier.store.db import Database
from luthier.store.jobs import Job
from luthier.work import attempt
from luthier.work.record import Recorder
from tests.engine.runs import chats
from tests.work import ask
from tests.work.conftest import Bench
from tests.work.test_worker import alive, engine_of

JOB = {"n_epochs": 40, "batch_size": 1}
STEPS = list(range(1, 481))


@contextlib.contextmanager
def another(home: Path, tiny: Path, url: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, with a lease of two seconds."""
    process = subprocess.Popen(ask.command(home, url, tiny, "other"), cwd=Path(__file__).parents[2])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def url_of(bench: Bench) -> str | None:
    return None if bench.database.is_sqlite else bench.database.url.render_as_string(hide_password=False)


def steps_of(bench: Bench, job: Job) -> list[int]:
    return [event.data["step"] for event in bench.events(job) if event.type == "metrics"]


def stop(worker: subprocess.Popen[bytes], bench: Bench) -> None:
    """Stop the worker; on SQLite not in the middle of a transaction, which nobody could take its lock from."""
    with bench.database.transaction() if bench.database.is_sqlite else contextlib.nullcontext():
        worker.send_signal(signal.SIGSTOP)


@pytest.mark.parametrize(
    ("backend", "engine"), [("bench", "runs on"), ("bench", "is stopped"), ("postgres_bench", "runs on")]
)
def test_a_worker_that_is_stopped_is_relieved_of_its_job(
    backend: str, engine: str, request: pytest.FixtureRequest, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine holds the run: it is asked to save and leave, and killed when it does not."""
    bench: Bench = request.getfixturevalue(backend)
    if engine == "is stopped":
        monkeypatch.setattr(attempt, "ASK_SECONDS", 0.5)
    with another(bench.database.home, tiny, url_of(bench)) as worker:
        job = bench.submit(**JOB)
        bench.stepped(job, 2)
        pid = engine_of(bench, job)
        stop(worker, bench)
        if engine == "is stopped":
            os.kill(pid, signal.SIGSTOP)
        bench.start("second")
        bench.until(job, lambda found: found.worker == "second")
        bench.until(job, lambda _: engine_of(bench, job) != pid)
        worker.send_signal(signal.SIGCONT)
        ended = bench.ended(job)
        assert ended.status == "succeeded", ended.error
        assert steps_of(bench, job) == STEPS
        assert not alive(pid)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    assert bench.jobs.get(job.id) == ended
    run = RunFolder(bench.database.home / "runs" / job.id)
    attempts = [event["resumed_from"] for _, event in run.events() if event["type"] == "started"]
    assert attempts[0] is None and len(attempts) == 2
    assert (attempts[1] or 0) >= (2 if engine == "runs on" else 0)


def test_cancel_reaches_the_engine_of_a_stopped_worker(bench: Bench, tiny: Path) -> None:
    with another(bench.database.home, tiny, url_of(bench)) as worker:
        job = bench.submit(**JOB)
        bench.stepped(job, 2)
        pid = engine_of(bench, job)
        stop(worker, bench)
        os.kill(pid, signal.SIGSTOP)
        bench.start("second")
        bench.until(job, lambda found: found.worker == "second")
        bench.jobs.request_cancel(job.id)
        assert bench.ended(job).status == "cancelled"
        assert not alive(pid)


def test_a_run_goes_on_where_the_data_folder_has_another_path(bench: Bench, tiny: Path, tmp_path: Path) -> None:
    """Two machines mount one data folder in different places; the first is lost with its mount."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.symlink_to(bench.database.home)
    second.symlink_to(bench.database.home)
    with another(first, tiny):
        job = bench.submit(validation=chats(2, 60), n_epochs=10, batch_size=1)
        bench.stepped(job, 30)
        assert bench.history.checkpoints(job.id).data
    first.unlink()
    there = Database(second, bench.database.url.render_as_string())
    relieved = Bench(there, bench.settings.model_copy(update={"home": second}))
    try:
        relieved.start("second")
        ended = bench.ended(job)
        assert ended.status == "succeeded", ended.error
        assert steps_of(bench, job) == list(range(1, 121))
    finally:
        relieved.halt()
        there.close()
    model = bench.models.get(str(ended.fine_tuned_model))
    assert model.folder == bench.database.home / "runs" / job.id / "model" and model.folder.is_dir()


def test_a_worker_that_can_only_half_work_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread that checks files has died: jobs would wait for ever, so whoever keeps workers starts another."""
    worker = bench.worker(command=ask.quick)

    def broken() -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(worker.leases, "reclaim_expired", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        worker.run(threading.Event())


def test_a_checkpoint_that_goes_while_it_is_read_is_passed_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine keeps the last three; a worker that is behind may be reading the fourth."""
    register = Recorder.register

    def gone(self: Recorder, folder: Path, step: int | None = None) -> object:
        if step in (4, 8):
            next(folder.iterdir()).unlink()
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            (folder / "adapter_config.json").read_bytes()  # FileNotFoundError
        return register(self, folder, step)

    monkeypatch.setattr(Recorder, "register", gone)
    bench.start()
    job = bench.ended(bench.submit(n_epochs=3, batch_size=3))
    assert job.status == "succeeded", job.error
    assert [one.step for one in bench.history.checkpoints(job.id).data] == [12]
