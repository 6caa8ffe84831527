"""What a run forgot is asked at its end; the gate's verdict is in the report, and nothing of it can lose the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.engine import closing, ending, forget, models, prove
from luthier.engine import train as train_module
from luthier.engine.closing import items_worth
from luthier.engine.optimizer import Masters
from luthier.proof import probe
from luthier.proof.probe import Item
from luthier.spec.job import make_request
from luthier.spec.report import Report
from luthier.spec.run import RunFolder
from tests.engine.runs import chats, events, train, write

ITEMS = [Item(f"c{n}", "knowledge", "en", pairs=((f"{n} is", " a"), (f"{n} is", " the fox"))) for n in range(12)]


@pytest.fixture(autouse=True)
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe of a dozen items, and a cache of the test's own."""
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(probe, "general", lambda: list(ITEMS))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "chats.jsonl", chats(8))


def report_of(run: RunFolder) -> Report:
    return Report.model_validate_json(run.report.read_text())


def test_the_meter_is_in_the_report_and_equals_the_command(tmp_path: Path, tiny: Path, data: Path) -> None:
    run = train(tmp_path / "run", tiny, data, max_steps=2, precision="float32", forgetting=12)
    found = report_of(run).forgetting
    assert found is not None and found.before == tiny.name, "a folder of this machine"
    assert (found.items, found.parts[0].kind) == (12, "knowledge")
    assert [event["name"] for event in events(run, "phase")][-1] == "forgetting"
    assert report_of(run).gate is None
    off = train(tmp_path / "off", tiny, data, max_steps=2, forgetting="off")
    assert report_of(off).forgetting is None


def test_a_model_that_misses_its_threshold_is_kept_and_said_not_to_be_promoted(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forget, "measure", lambda *_, name, **__: {item.id: float(name == "before") for item in ITEMS})
    run = train(tmp_path / "run", tiny, data, max_steps=2, max_forgetting=0.5)
    report = report_of(run)
    assert report.forgetting is not None and report.forgetting.loss == 1.0
    assert report.gate is not None and not report.gate.passed
    sentence = "Not to be promoted: It lost 100.0% of general ability, more than 50.0%."
    assert sentence in [event["message"] for event in events(run, "warning")]
    assert run.model.is_dir()
    kept = train(tmp_path / "kept", tiny, data, max_steps=2, max_forgetting=1.0)
    assert report_of(kept).gate is not None and report_of(kept).gate.passed  # type: ignore[union-attr]


def test_a_meter_that_fails_costs_only_its_number(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> dict[str, float]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(forget, "measure", fails)
    run = train(tmp_path / "run", tiny, data, max_steps=2, forgetting=12)
    assert run.model.is_dir() and report_of(run).forgetting is None
    assert any("no such kernel" in event["message"] for event in events(run, "warning"))
    assert [event["status"] for event in events(run, "finished")] == ["succeeded"]


def test_how_many_items_are_worth_their_time() -> None:
    """When one takes half a second of both models, and loading one takes four: a sixth of the training time."""

    def worth(seconds: float, **values: Any) -> int:
        return items_worth(make_request({"model": "a", "data": ["b"], **values}), seconds, 4.0, 0.5)

    asked = [0, 6 * 4, 6 * (4 + 29.9), 6 * (4 + 30), 6 * (4 + 49), 10**6]
    assert [worth(seconds) for seconds in asked] == [0, 0, 0, 60, 80, closing.MOST]
    assert worth(0, forgetting=7) == 7
    assert worth(10**9, forgetting="off") == 0
    assert worth(0, max_forgetting=0.1) == closing.GATED


def test_the_parts_are_reported_beside_their_forecast_and_the_training(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading what was published is all that takes time here: 3 seconds for each of proof and meter."""
    clock = Clock(monkeypatch)
    load = models.load_for_use

    def slow(*given: Any) -> Any:
        clock.now += 3.0
        return load(*given)

    monkeypatch.setattr(models, "load_for_use", slow)
    options: dict[str, Any] = {"validation": "0.25", "max_steps": 2, "forgetting": 12, "proof_rows": 2}
    run = train(tmp_path / "run", tiny, data, **options)
    report = report_of(run)
    (step_one, step_two) = (event["seconds"] for event in events(run, "step"))
    told = report.forecast
    assert told is not None and told.probe_items == 12
    training = step_one + step_two
    assert training == 20.0, "ten seconds a step, by this clock"
    assert [(part.name, part.seconds, part.share) for part in report.parts] == [
        ("training", 20.0, 1.0),
        ("proof", 3.0, 0.15),
        ("forgetting", 3.0, 0.15),
    ]
    assert [part.foretold for part in report.parts] == [told.train_seconds, told.prove_seconds, told.forget_seconds]
    assert told.prove_seconds > 0 and told.forget_seconds > 0
    assert report.seconds == pytest.approx(26.0)


class Clock:
    """A clock that only moves when the test says so, and by ten seconds for each optimizer step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        step = Masters.step

        def slow(masters: Masters, *given: Any) -> float:
            self.now += 10.0
            return step(masters, *given)

        monkeypatch.setattr(Masters, "step", slow)
        for module in (train_module, ending, prove):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now
