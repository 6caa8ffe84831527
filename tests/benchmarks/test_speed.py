"""A small case of the benchmark: the engine beside a hand-tuned flat loop, on the same rows.

The gate is asserted. Times are told at the end of the test run and never asserted, for a test machine has neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.training import gate, ratios, workloads
from benchmarks.training.drivers import flat, judge, luthier_engine, start
from benchmarks.training.drivers import job as jobs
from safetensors.numpy import load_file

from tests.benchmarks.test_workloads import a_job

STEPS = 2


@pytest.fixture(scope="module")
def place(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of S3 and the adapter to start from."""
    folder = tmp_path_factory.mktemp("speed")
    workload = workloads.make(workloads.CASES["S3"], smollm2 / "tokenizer.json")
    workload.held_out = workload.held_out[:3]
    workloads.save(workload, folder / "rows.safetensors")
    start.make(str(smollm2), folder / "adapter")
    return folder


def job_of(place: Path, smollm2: Path, name: str, setting: str) -> jobs.Job:
    (place / name).mkdir()
    return a_job(
        place,
        model=str(smollm2),
        adapter=str(place / "adapter"),
        out=str(place / name),
        setting=setting,
        precision="float32",  # bfloat16, which a busy machine may choose, is noisier than the gate allows on few rows
        rows_per_step=4,
        steps=STEPS,
        micro=2,
        rate=5e-4,
        gradients=True,
        keep_every=STEPS,
    )


def test_the_engine_trains_as_a_flat_loop_does(
    place: Path, smollm2: Path, record_property: Callable[[str, object], None]
) -> None:
    wanted_job, ours_job = (
        job_of(place, smollm2, name, setting) for name, setting in (("reference", "reference"), ("luthier", "tuned"))
    )
    wanted, ours = flat.train(wanted_job), luthier_engine.train(ours_job)
    wanted_losses, losses = judge.losses(wanted_job), judge.losses(ours_job)
    verdict = gate.judge(
        losses=ours.losses,
        gradients=load_file(Path(ours_job.out) / "gradients.safetensors"),
        held_out=losses[str(STEPS)],
        reference_losses=wanted.losses,
        reference_gradients=load_file(Path(wanted_job.out) / "gradients.safetensors"),
        reference_held_out=wanted_losses[str(STEPS)],
        start_held_out=wanted_losses["0"],
    )
    assert verdict.passed, verdict.failures
    rival = flat.train(job_of(place, smollm2, "flat", "tuned"))
    mine, theirs = (ratios.step_time(record.steps, None)[0] for record in (ours, rival))
    record_property("told", f"S3 in small: luthier {mine:.2f} s a step, {theirs / mine:.2f} x as fast as a flat loop")
