"""The page shows what was found: times only of those that the gate let through, and why the others have none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmarks.training import figures, report, runs, stages, sweep
from benchmarks.training.systems import SYSTEMS
from benchmarks.training.workloads import CASES, HASHES

from luthier.engine import native

PASSED: dict[str, Any] = {
    "passed": True,
    "failures": [],
    "loss_distance": 1e-5,
    "cosine": 0.9994,
    "worst_cosine": 0.995,
    "held_out_distance": 0.001,
}
FAILED: dict[str, Any] = {**PASSED, "passed": False, "failures": ["gradients: 3 of 4 are zero, a first"]}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def result(step: float, **more: object) -> dict[str, object]:
    return {
        "step_seconds": [9.0, step],
        "step_cpu_seconds": [18.0, 2 * step],
        "unfinished": None,
        "rows_per_step": 16,
        "peak_bytes": 2e9,
        "seconds_to_first_step": 5.0,
        **more,
    }


@pytest.fixture
def place(tmp_path: Path) -> runs.Place:
    """Two rounds of S1: Luthier takes 2 s, the flat loop 6 and 8, TRL a quarter of a step, and Trainer has failed."""
    place = runs.Place(tmp_path, "")
    case = CASES["S1"]
    for name, verdict in (("luthier", PASSED), ("flat", PASSED), ("trl-tuned", PASSED), ("trainer", FAILED)):
        write(stages.gate_folder(place, case, SYSTEMS[name]) / "verdict.json", verdict)
    for number, flat in enumerate((6.0, 8.0), 1):
        folder = stages.series_folder(place, "a", case) / f"round-{number}"
        ceiling: dict[str, object] = {"bfloat16": 400.0, "float32": 200.0, "float16": 300.0, "gigabytes": 30.0}
        ceiling |= {"processor": "One", "capability": "AVX512", "cores": 2, "memory_bytes": 24e9, "load": 0.25}
        ceiling |= {"torch": "2.13.0", "threads": 2}
        write(folder / "ceiling" / "result.json", ceiling)
        write(folder / "luthier" / "result.json", result(2.0, physical_tokens=4800))
        write(folder / "flat" / "result.json", result(flat))
        write(
            folder / "trl-tuned" / "result.json",
            result(0, step_seconds=[], step_cpu_seconds=[], unfinished=[4800, 19200, 10.0, 15.0]),
        )
    for micro, seconds in ((1, 32.0), (4, 24.0)):
        tried = result(0, step_cpu_seconds=[seconds], rows_per_step=4, threads=2)
        write(sweep.folder(place, case, SYSTEMS["flat"], micro) / "result.json", tried)
    losses = {"0": 4.0, "2": 3.0}
    write(stages.target_folder(place, case, SYSTEMS["luthier"], 2) / "judged.json", losses)
    write(stages.target_folder(place, case, SYSTEMS["flat"], 2) / "judged.json", losses | {"2": 2.0})
    return place


def test_the_figures_of_a_case(place: runs.Place, smollm2: Path) -> None:
    found = figures.of_case(place, "a", CASES["S1"])
    assert found is not None
    lines = {line["system"]: line for line in found["systems"]}
    assert set(lines) == {"luthier", "flat", "trl-tuned", "trainer"}
    assert (found["logical_tokens"], found["supervised_tokens"]) == (19_200, 1_920)
    assert lines["luthier"]["tokens_per_second"] == 9600.0
    assert lines["luthier"]["tree_ratio"] == 4.0
    assert lines["luthier"]["mfu_effective"] == pytest.approx(11.32e12 / (2.0 * 400e9), rel=1e-3)
    assert lines["luthier"]["mfu_physical"] < lines["luthier"]["mfu_effective"]
    assert lines["flat"]["ratio"] == {"median": 3.5, "low": 3.0, "high": 4.0, "rounds": 2}
    assert lines["trl-tuned"]["seconds_per_step"] == 40.0
    assert "seconds_per_step" not in lines["trainer"]
    assert found["rows"] == HASHES["shared", "smollm2-135m-instruct"]


def test_seconds_to_a_loss_are_steps_at_the_pace_of_the_rounds(place: runs.Place, smollm2: Path) -> None:
    found = figures.of_case(place, "a", CASES["S1"])
    assert found is not None
    assert found["target"] == [
        {"system": "luthier", "losses": [4.0, 3.0], "seconds": [0.0, 4.0]},
        {"system": "flat", "losses": [4.0, 2.0], "seconds": [0.0, 14.0]},
    ]
    page = report.page(figures.of_series(place, "a"))
    assert "Time to a held-out loss of 3.000 (from 4.000):" in page
    assert "| Luthier | 4 |" in page
    assert "| flat loop tuned by hand | 7 |" in page


def test_the_page_tells_what_was_swept_and_what_was_reached(place: runs.Place, smollm2: Path) -> None:
    page = report.page(figures.of_series(place, "a"))
    assert "  * S1: CPU seconds a row with a micro-batch of 1 rows 8.00, 4 rows 6.00; taken 4 (threads: 2)." in page
    fastest = "times as fast as flat loop tuned by hand, the fastest timed of torchtune and the flat loop"
    assert f"| S1 | {fastest} | at least 5 | 3.50 | missed | " in page
    assert "| S1 | peak memory, as a share of TRL's, tuned | at most 0.5 | 1.00 | missed |  |" in page


def test_the_page_shows_no_time_of_who_failed(place: runs.Place, smollm2: Path) -> None:
    page = report.page(figures.of_series(place, "a"))
    assert "| Trainer + PEFT | failed the gate | | | | | | | | |" in page
    assert "* Trainer + PEFT failed the gate: gradients: 3 of 4 are zero, a first." in page
    assert "* TRL 1.16, tuned: timed by 4,800 of a step's 19,200 tokens, scaled." in page
    assert "Machine: One (AVX512), 2 cores, 24 GB, no GPU used; torch 2.13.0, threads: 2." in page
    assert "| flat loop tuned by hand | 3.50x (3.00 to 4.00) | 7.00 | 2743 | 274 |" in page


def test_on_a_busy_machine_cpu_seconds_count(place: runs.Place, smollm2: Path) -> None:
    found = figures.of_series(place, "a", "cpu")
    lines = {line["system"]: line for line in found["cases"][0]["systems"]}
    assert lines["luthier"]["seconds_per_step"] == 4.0
    assert lines["trl-tuned"]["seconds_per_step"] == 60.0
    assert "Others used the machine during these rounds" in report.page(found)
    assert "Others used" not in report.page(figures.of_series(place, "a"))


def test_the_page_names_who_was_not_run(place: runs.Place, smollm2: Path) -> None:
    page = report.page(figures.of_series(place, "a"))
    others = "TRL 1.16; Trainer + PEFT, tuned; LLaMA-Factory 0.9.5, tuned; LLaMA-Factory 0.9.5; torchtune 0.6.1, tuned"
    assert f"* S1: {others}." in page
    assert "* G1: nobody was run." in page
    assert "* G1 is nothing that the benchmark's driver of torchtune 0.6.1, tuned can train." in page


def test_a_system_that_was_never_at_the_gate_is_not_shown(place: runs.Place, smollm2: Path) -> None:
    write(stages.series_folder(place, "a", CASES["S1"]) / "round-1" / "trl" / "result.json", result(1.0))
    found = figures.of_case(place, "a", CASES["S1"])
    assert found is not None
    assert "trl" not in {line["system"] for line in found["systems"]}


def test_a_series_without_times_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="The series b has no times yet"):
        report.write(runs.Place(tmp_path, ""), "b", tmp_path)


def test_the_seconds_to_a_loss_lie_on_the_line_between_two_measurements() -> None:
    line = {"losses": [4.0, 3.0, 2.5], "seconds": [0.0, 10.0, 20.0]}
    assert figures.to_reach(line, 3.5) == 5.0
    assert figures.to_reach(line, 2.75) == 15.0
    assert figures.to_reach(line, 2.0) is None


def test_a_run_that_was_ended_from_outside_is_no_verdict(tmp_path: Path) -> None:
    place = runs.Place(tmp_path, "sh -c 'exit 143'")
    with pytest.raises(SystemExit, match="ended from outside"):
        runs.start(place, "flat", tmp_path, None)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("source", native.SOURCES, ids=lambda path: path.name)
def test_times_of_other_kernels_are_of_another_series(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their headers too."""
    before = runs.engine_code()
    place = Path("src", "luthier", "engine")
    shutil.copytree(source.parent.parent / "data", tmp_path / place.with_name("data"))
    shutil.copytree(source.parent, tmp_path / place)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.engine_code() == before
    (tmp_path / place / source.name).write_bytes(source.read_bytes() + b"\n")
    assert runs.engine_code() != before
