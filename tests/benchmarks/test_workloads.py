"""The frozen rows: their hashes, their shapes, and what a driver reads of them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from benchmarks.training import workloads
from benchmarks.training.drivers import job as jobs
from benchmarks.training.text import KINDS, sentences

SMOL_CASES = [case for case in workloads.CASES.values() if case.model == workloads.SMOL]


@pytest.fixture(scope="module")
def made(smollm2: Path) -> dict[str, workloads.Workload]:
    """Every case of the small model; making them checks their hashes."""
    return {case.name: workloads.make(case, smollm2 / "tokenizer.json") for case in SMOL_CASES}


def test_the_rows_are_the_frozen_ones(made: dict[str, workloads.Workload]) -> None:
    for case in SMOL_CASES:
        assert made[case.name].digest() == workloads.HASHES[case.shape, case.model]


def test_the_rows_have_the_lengths_that_their_titles_say(made: dict[str, workloads.Workload]) -> None:
    shared = made["S1"].train
    assert {len(ids) for ids, _ in shared} == {1200}
    assert {sum(mask) for _, mask in shared} == {120}
    assert len({tuple(ids[:1000]) for ids, _ in shared}) == 1
    assert len({tuple(ids[:1016]) for ids, _ in shared}) == len(shared)
    assert {len(ids) for ids, _ in made["C1"].train} == {2048}
    lengths = [len(ids) for ids, _ in made["S3"].train]
    assert min(lengths) >= 24
    assert max(lengths) <= 200
    assert len(set(lengths)) > 100


def test_no_case_holds_out_what_it_trains_on(made: dict[str, workloads.Workload]) -> None:
    for workload in made.values():
        assert not {tuple(ids) for ids, _ in workload.train} & {tuple(ids) for ids, _ in workload.held_out}


def test_other_rows_are_refused(smollm2: Path) -> None:
    case = dataclasses.replace(workloads.CASES["S1"], held_out=5)
    with pytest.raises(SystemExit, match="S1: the rows have the hash"):
        workloads.make(case, smollm2 / "tokenizer.json")


def test_text_follows_from_its_seed() -> None:
    for kind in KINDS:
        assert sentences(kind, "1", 5) == sentences(kind, "1", 5)
        assert sentences(kind, "1", 5) != sentences(kind, "2", 5)


def a_job(folder: Path, **changed: object) -> jobs.Job:
    fields = {
        "model": "",
        "workload": str(folder / "rows.safetensors"),
        "adapter": "",
        "out": str(folder),
        "setting": "default",
        "rows_per_step": 2,
        "steps": 2,
        "micro": 1,
        "rate": 1e-3,
        "full": False,
        "seconds": 60.0,
        "gradients": False,
        "keep_every": 0,
    }
    return jobs.Job(**{**fields, **changed})  # type: ignore[arg-type]


def test_the_first_micro_batch_of_a_step_that_was_broken_off_warms_up(tmp_path: Path) -> None:
    rows = [([5] * length, [1] * length) for length in (9, 8, 7, 6)]
    workloads.save(workloads.Workload(rows, rows), tmp_path / "rows.safetensors")
    record = jobs.Record(a_job(tmp_path, rows_per_step=4, steps=1))
    assert record.unfinished() is None
    record.parts = [(1, 5.0, 9.0)]
    assert record.unfinished() == (9, 30, 5.0, 9.0)
    record.parts += [(2, 7.0, 12.0), (3, 8.0, 15.0)]
    assert record.unfinished() == (15, 30, 3.0, 6.0)


def test_a_driver_reads_the_rows_of_its_steps(tmp_path: Path) -> None:
    train = [([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1]), ([1, 2], [0, 1]), ([3, 4, 5], [0, 0, 1]), ([9, 9], [0, 1])]
    workloads.save(workloads.Workload(train, [([4, 2], [0, 1])]), tmp_path / "rows.safetensors")
    job = a_job(tmp_path)
    taken = [([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9]), ([1, 2], [-100, 2]), ([3, 4, 5], [-100, -100, 5])]
    assert jobs.rows(job) == taken
    assert jobs.rows(job, "held_out") == [([4, 2], [-100, 2])]
    sorted_in_steps = [taken[1], taken[0], taken[2], taken[3]]
    assert jobs.rows(dataclasses.replace(job, setting="tuned")) == sorted_in_steps


def test_a_job_survives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job(tmp_path, without=["sharing"])
    (tmp_path / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    monkeypatch.setattr(sys, "argv", ["driver", str(tmp_path / "job.json")])
    assert jobs.read() == job


def test_the_record_of_a_run(tmp_path: Path) -> None:
    import torch

    rows = [([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])]
    workloads.save(workloads.Workload(rows * 3, rows), tmp_path / "rows.safetensors")
    record = jobs.Record(a_job(tmp_path, gradients=True, keep_every=2, steps=3))
    record.begin()
    record.gradients([("a.default.weight", torch.ones(2)), ("b", None)])
    for _ in range(2):
        record.part(1)
        record.step_done()
        record.learnt([("a.default.weight", torch.ones(2))])
    record.part(1)
    record.finish()
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["step_seconds"]) == 2
    assert result["unfinished"][:2] == [3, 5]
    assert result["peak_bytes"] > 0
    assert result["seconds_to_first_step"] > 0
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        "gradients.safetensors",
        "weights-2.safetensors",
        "rows.safetensors",
    }
