"""What a run forgot is asked at its end; the gate's verdict is in the report, and nothing of it can lose the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.engine import forget, meter
from luthier.engine.meter import items_worth
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
    assert found is not None
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
    def worth(tokens: int, **values: Any) -> int:
        return items_worth(make_request({"model": "a", "data": ["b"], **values}), tokens)

    per = meter.TOKENS_PER_ITEM
    assert [worth(tokens * per) for tokens in (0, 59, 60, 100, 9999)] == [0, 0, 60, 100, meter.MOST]
    assert worth(0, forgetting=7) == 7
    assert worth(10**9, forgetting="off") == 0
    assert worth(0, max_forgetting=0.1) == meter.GATED
