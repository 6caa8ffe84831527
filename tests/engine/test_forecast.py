"""The forecast: its counts are the run's, it leaves no trace in the run, it refuses what cannot fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.engine import forecast, machine, pace
from luthier.engine.__main__ import carry_out
from luthier.engine.pace import Point, fit
from luthier.spec.run import RunFolder
from tests.engine import runs


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is measured here is not remembered for the user."""
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return runs.write(tmp_path / "data.jsonl", runs.chats(40))


def report(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.report.read_text())
    return found


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / "cache" / "forecasts").glob("*"))


# -- the line through the points ---------------------------------------------------------------------------------------

works = st.lists(st.floats(1e9, 1e13), min_size=2, max_size=12, unique=True)


@given(works, st.floats(0, 10), st.floats(1e9, 1e12))
def test_a_line_is_found_again(work: list[float], start: float, rate: float) -> None:
    points = [(done, start + done / rate) for done in work]
    found, pace_ = fit(points)
    for done, seconds in points:
        assert math.isclose(found + done / pace_, seconds, rel_tol=1e-6)


@given(st.integers(3, 8), st.floats(1.3, 20))
def test_bursts_of_other_work_do_not_count(count: int, burst: float) -> None:
    calm = [(1e11 * n, 0.2 + 1e11 * n / 2e11) for n in range(1, 2 * count)]
    struck = [(work + 1e10, seconds * burst) for work, seconds in calm[: count // 2]]
    start, rate = fit([*calm, *struck])
    assert math.isclose(start + 5e11 / rate, 0.2 + 5e11 / 2e11, rel_tol=0.05)


def test_one_point_is_a_rate() -> None:
    assert fit([(3e11, 1.5)]) == (0.0, pytest.approx(2e11))


def test_memory_is_that_of_rows_of_their_size() -> None:
    """A run on short rows, after one on long rows of the same model, does not need what that one did."""
    known = object.__new__(pace.Known)
    known.resting = 1_000
    known.points = [Point("first", 9e9, 1.0, 8_000, 64_000), Point("first", 1e9, 0.2, 500, 3_000)]
    known.points += [Point("train", 1e9, 0.2, 500), Point("forward", 1e9, 0.1, 500)]
    assert [known.peak(tokens, 0, False) for tokens in (400, 500, 650, 8_000)] == [4_000, 4_000, 4_900, 65_000]
    assert known.covers([1e9], 500) and known.covers([1e9], 650)
    assert not known.covers([1e9], 300) and not known.covers([1e9], 2_000)


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_its_counts_are_those_of_the_run(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = runs.train(tmp_path / "run", tiny, data, epochs=2, batch_size=4, micro_tokens=64, validation="0.1")
    (told,) = runs.events(run, "forecast")
    (prepared,) = runs.events(run, "prepared")
    done = report(run)
    for name in ("tokens", "supervised_tokens", "tree_ratio", "steps", "dropped", "truncated", "lost_tokens"):
        assert told[name] == prepared[name], name
    assert told["rows"] == prepared["train_rows"] and told["steps"] == done["steps"]
    assert told["tokens"] * told["epochs"] == done["trained_tokens"]
    assert told["micro_batches"] > told["steps"], "64 tokens do not hold four rows"
    parts = ("load_seconds", "train_seconds", "validate_seconds", "save_seconds", "prove_seconds")
    assert told["forget_seconds"] == told["probe_items"] == 0, "a run of seconds asks nothing general"
    assert all(told[name] > 0 for name in parts)
    assert told["seconds"] == pytest.approx(sum(told[name] for name in parts), abs=0.02)
    assert done["forecast"] == {name: value for name, value in told.items() if name not in ("time", "type", "seconds")}
    held = sum(path.stat().st_size for path in run.path.rglob("*.safetensors"))
    assert held <= told["disk_bytes"] <= 2 * held, "two checkpoints at most; here the last was the best"
    kinds = [event["type"] for event in runs.events(run)]
    assert kinds.index("prepared") < kinds.index("forecast") < kinds.index("validation")


@pytest.mark.parametrize(
    "options", [{"validation": "0.2"}, {"dropout": 0.2}, {"method": "full", "precision": "bfloat16"}]
)
def test_it_leaves_no_trace(tmp_path: Path, tiny: Path, data: Path, options: dict[str, Any]) -> None:
    """A run that measured and one that knew end with the same weights, bit for bit."""
    first = runs.train(tmp_path / "first", tiny, data, epochs=1, **options)
    second = runs.train(tmp_path / "second", tiny, data, epochs=1, **options)
    assert [runs.events(run, "forecast")[0]["measured"] for run in (first, second)] == [True, False]
    for name, value in runs.weights(first).items():
        assert torch.equal(value, runs.weights(second)[name]), name
    assert runs.losses(first) == runs.losses(second)


def test_what_is_remembered_is_of_the_same_work(tmp_path: Path, tiny: Path, data: Path) -> None:
    def measured(name: str, **options: Any) -> bool:
        run = runs.train(tmp_path / name, tiny, data, max_steps=2, **options)
        return bool(runs.events(run, "forecast")[0]["measured"])

    assert measured("a")
    assert not measured("b", learning_rate=2e-3), "the rate of learning changes no work"
    assert measured("c", rank=4)
    assert measured("d", method="full")
    assert measured("e", batch_size=40), "micro-batches of another size"
    assert not measured("f", batch_size=40)
    before = kept(tmp_path)
    for path in before:
        path.write_text('[{"kind": "train"}]')
    assert measured("g"), "damaged points are made anew"
    assert kept(tmp_path) == before


def test_points_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = object.__new__(pace.Known)
    known.points, known._lines, known.path, known.resting = [], {}, tmp_path / "f" / "x.json", 0
    monkeypatch.setattr(pace, "KEPT_FILES", 2)
    for name in ("a", "b", "c"):
        known.path = tmp_path / "f" / f"{name}.json"
        known.add([Point("train", 1.0, 1.0, 1)] * 30)
    assert [path.name for path in sorted(known.path.parent.iterdir())] == ["b.json", "c.json"]
    assert len(json.loads(known.path.read_text())) == pace.KEPT_POINTS


def test_a_resumed_run_reports_what_was_foretold_at_first(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = runs.lay_out(tmp_path / "run", tiny, data, epochs=2, checkpoint_every=2)
    run.emit_was = run.emit  # type: ignore[attr-defined]

    def emit(type: str, **fields: Any) -> None:
        run.emit_was(type, **fields)  # type: ignore[attr-defined]
        if type == "step" and fields["step"] == 3:
            run.ask_to_stop()

    run.emit = emit  # type: ignore[method-assign]
    assert carry_out(run) == 0
    assert runs.events(run)[-1]["type"] == "stopped"
    again = RunFolder(run.path)
    assert carry_out(again) == 0
    (told,) = runs.events(again, "forecast")
    assert report(again)["forecast"]["train_seconds"] == told["train_seconds"]


def test_the_stop_note_is_heeded_while_measuring(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.lay_out(tmp_path / "run", tiny, data)
    measure = forecast._train_on

    def noted(*given: Any) -> None:
        run.ask_to_stop()
        measure(*given)

    monkeypatch.setattr(forecast, "_train_on", noted)
    assert carry_out(run) == 0
    assert runs.events(run)[-1]["type"] == "stopped" and not runs.events(run, "forecast")


# -- what cannot fit ---------------------------------------------------------------------------------------------------


def test_a_run_that_can_never_fit_is_refused(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = machine.memory_now()
    monkeypatch.setattr(machine, "memory_limit", lambda: now // 2)
    failed = runs.refused(tmp_path / "run", tiny, data)
    assert "of memory; this machine has" in failed["message"] and failed["hint"] == "Choose a smaller base."
    failed = runs.refused(tmp_path / "full", tiny, data, method="full")
    assert failed["hint"] == "Choose --method lora or a smaller base."


def test_the_setting_that_fits_is_named(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough for the model and half of the micro-batch that was asked for."""
    made = forecast.make

    def small(*given: Any) -> Any:
        found = made(*given)
        now = machine.memory_now()
        return found.model_copy(update={"peak_memory_bytes": now + 2_000_000_000, "memory_bytes": now + 1_000_000_000})

    monkeypatch.setattr(forecast, "make", small)
    failed = runs.refused(tmp_path / "run", tiny, data, micro_tokens=2048)
    assert failed["hint"] in {f"--micro-tokens {tokens} would fit." for tokens in (832, 896, 960)}


def test_a_full_disk_is_seen_before_the_first_step(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda folder: 1000)
    failed = runs.refused(tmp_path / "run", tiny, data)
    assert failed["code"] == "unavailable" and "are free there" in failed["message"]


def test_memory_that_others_hold_is_warned_of(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_free", lambda: -(10**12))
    run = runs.train(tmp_path / "run", tiny, data, max_steps=1)
    assert any("it may become slow or be killed" in event["message"] for event in runs.events(run, "warning"))


# -- the estimate alone ------------------------------------------------------------------------------------------------


def test_an_estimate_takes_no_step(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = runs.lay_out(tmp_path / "run", tiny, data)
    assert carry_out(run, estimate=True) == 0
    kinds = [event["type"] for event in runs.events(run)]
    assert kinds[-2:] == ["forecast", "finished"] and "step" not in kinds
    assert runs.events(run)[-1]["status"] == "estimated"
    assert not run.model.exists()
