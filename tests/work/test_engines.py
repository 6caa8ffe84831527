"""Engines that misbehave: they do not leave, die again and again, or say nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from luthier.spec.run import UNTOLD, RunFolder
from luthier.work import attempt
from tests.work.conftest import Bench

OPENING = """
import json, os, signal, sys, time
from luthier.spec.run import UNTOLD, RunFolder
run = RunFolder(sys.argv[1])
"""


def engine(tmp_path: Path, code: str) -> object:
    file = tmp_path / "engine.py"
    file.write_text(OPENING + code)

    def command(run: RunFolder) -> list[str]:
        return [sys.executable, str(file), str(run.path)]

    return command


def test_one_that_does_not_leave_is_ended(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "LEAVE_SECONDS", 0.3)
    code = """
run.model.mkdir()
(run.model / "adapter_config.json").write_text("{}")
run.emit("finished", status="succeeded", model=str(run.model), report={"trained_tokens": 5})
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
    bench.start(command=engine(tmp_path, code))
    job = bench.ended(bench.submit())
    assert (job.status, job.trained_tokens) == ("succeeded", 5)


def test_one_that_ignores_a_cancel_is_killed_with_its_children(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "TERM_SECONDS", 0.5)
    code = """
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
run.emit("warning", message=str(child.pid), hint="")
time.sleep(600)
"""
    bench.start(command=engine(tmp_path, code))
    job = bench.submit()
    bench.until(job, lambda _: bench.said(job)[-1].isdigit())
    pid = int(bench.said(job)[-1])
    bench.jobs.request_cancel(job.id)
    assert bench.ended(job).status == "cancelled"
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_one_that_is_killed_again_and_again_fails_the_job(bench: Bench, tmp_path: Path) -> None:
    bench.start(command=engine(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"))
    job = bench.ended(bench.submit())
    assert job.error == {
        "code": "engine_killed",
        "message": "The engine was killed 3 times without a new checkpoint, at last by signal 9 (SIGKILL). "
        "This happens when memory runs out.",
        "param": None,
    }


def test_they_give_way_to_those_that_serve(bench: Bench, tmp_path: Path) -> None:
    code = """
path = "/proc/self/autogroup"
session = open(path).read() if os.path.exists(path) else "nice 10"
run.emit("warning", message=f"{os.nice(0)}, {session.split()[-1]}", hint="")
time.sleep(600)
"""
    bench.start(command=engine(tmp_path, code))
    job = bench.submit()
    bench.until(job, lambda _: bench.said(job)[-1] == f"{max(10, os.nice(0))}, 10")
    bench.jobs.request_cancel(job.id)
    assert bench.ended(job).status == "cancelled"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("sys.exit(3)", "exit code 3: it did not say why."),
        ("raise MemoryError", "exit code 1: memory ran out."),
        ("raise ImportError('libtorch_cpu.so: failed to map segment')", "exit code 1: memory ran out."),
    ],
)
def test_one_that_says_nothing_fails_the_job(code: str, why: str, bench: Bench, tmp_path: Path) -> None:
    bench.start(command=engine(tmp_path, code))
    job = bench.ended(bench.submit())
    assert job.error is not None
    assert job.error["message"] == f"The engine ended with {why}"


def test_the_reason_of_a_failed_run_is_the_jobs_without_paths(bench: Bench, tmp_path: Path) -> None:
    code = """
run.emit("failed", status="failed", code="unavailable", message=f"{run.path}/x: the disk is full.", hint="",
         param="learning_rate", problems=[])
sys.exit(75)
"""
    bench.start(command=engine(tmp_path, code))
    job = bench.ended(bench.submit())
    assert job.error == {
        "code": "unavailable",
        "message": "the run folder/x: the disk is full.",
        "param": "learning_rate_multiplier",
    }


def test_one_that_could_not_write_its_last_word_fails_the_job(bench: Bench, tmp_path: Path) -> None:
    bench.start(command=engine(tmp_path, f"sys.exit({UNTOLD})"))
    job = bench.ended(bench.submit())
    assert job.error is not None
    assert (job.error["code"], job.error["message"]) == ("unavailable", attempt.DISK_FULL)


def test_none_gets_the_databases_password(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_DATABASE", "postgresql://luthier:hush@/luthier")
    code = 'run.emit("failed", status="failed", code="internal", message=os.environ.get("LUTHIER_DATABASE"), hint="")'
    bench.start(command=engine(tmp_path, code))
    job = bench.ended(bench.submit())
    assert job.error is not None
    assert job.error["message"] == "The engine failed."
