"""A disk that fills up and memory that runs out, under a real engine: the kernel's own limits on its process."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest

from luthier.engine.__main__ import carry_out
from luthier.spec.run import UNTOLD, RunFolder
from luthier.work.worker import EngineCommand, engine_command
from tests.work.conftest import Bench

LIMITED = """
import os, resource, sys
resource.setrlimit({}, ({}, {}))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def limited(limit: int, most: int) -> EngineCommand:
    """The real engine, which the kernel lets have no more than that."""
    code = LIMITED.format(limit, most, most)
    return lambda run: [sys.executable, "-c", code, *engine_command(run)[1:]]


@pytest.mark.parametrize(
    ("most", "said"),
    [(20_000, "The result cannot be written to the run folder"), (100_000, "could not be written to")],
)
def test_a_file_that_cannot_grow_fails_the_job_and_nothing_half_is_left(most: int, said: str, bench: Bench) -> None:
    """The first checkpoint as a model that can be used; and, with more room, the checkpoint itself."""
    command = limited(resource.RLIMIT_FSIZE, most)
    bench.start(command=lambda run: (command if run.path.name == job.id else engine_command)(run))
    job = bench.submit(n_epochs=3, batch_size=3)
    following = bench.submit(n_epochs=1)
    ended = bench.ended(job)
    assert ended.status == "failed" and ended.error is not None
    assert ended.error["code"] == "unavailable"
    assert said in str(ended.error["message"]) and str(bench.database.home) not in str(ended.error["message"])
    run = RunFolder(bench.database.home / "runs" / job.id)
    assert sum(event["type"] == "step" for _, event in run.events()) == 4
    assert not run.model.exists() and not list(run.checkpoints.glob("*"))
    assert bench.ended(following).status == "succeeded"


def test_an_engine_that_cannot_write_a_word_says_so_by_its_exit_code(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create({"model": "none", "data": ["none"]})
    run.events_file.mkdir()
    assert carry_out(run) == UNTOLD
