"""The micro-batch that took the least time a row is taken; one that failed is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.training import runs, stages, sweep, workloads
from benchmarks.training.sweep import Tried
from benchmarks.training.systems import SYSTEMS
from benchmarks.training.workloads import CASES


def test_the_best_of_what_ended_well() -> None:
    assert Tried({1: 3.0, 2: 2.0, 4: None}, 2).best == 2
    assert Tried({1: None}, None).best is None
    assert Tried({}, None).best is None


@pytest.mark.parametrize("case", CASES.values())
def test_every_candidate_divides_a_step(case: workloads.Case) -> None:
    rows = sweep.rows(case)
    assert rows <= case.rows_per_step
    for micro in sweep.candidates(case):
        assert rows % micro == case.rows_per_step % micro == 0


def test_what_was_tried_is_read_from_its_folders(tmp_path: Path) -> None:
    place, case, flat = runs.Place(tmp_path, ""), CASES["S3"], SYSTEMS["flat"]
    assert sweep.micro(place, case, flat) is None
    assert sweep.micro(place, case, SYSTEMS["trl"]) == 0
    for micro, seconds in ((4, 64.0),):
        folder = sweep.folder(place, case, flat, micro)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(
            json.dumps({"step_cpu_seconds": [seconds], "rows_per_step": 32, "threads": 1})
        )
    sweep.folder(place, case, flat, 16).mkdir()
    assert sweep.seen(place, case, flat) == Tried({4: 2.0, 16: None}, 1)
    assert sweep.micro(place, case, flat) == 4


def test_nobody_is_timed_without_a_gate_or_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, case = runs.Place(tmp_path, "false"), CASES["S3"]
    verdict = stages.gate_folder(place, case, SYSTEMS["flat"]) / "verdict.json"
    verdict.parent.mkdir(parents=True)
    verdict.write_text(json.dumps({"passed": True}))
    stages.take_turns(place, case, [SYSTEMS["luthier"], SYSTEMS["flat"]], "a", 0, 1.0, 1)
    assert capsys.readouterr().out.splitlines() == [
        "S3 luthier: no time, for it has not passed the gate",
        "S3 flat: no time, for its micro-batch has not been swept: --stage sweep",
    ]
