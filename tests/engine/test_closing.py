"""What the end of a run was foretold to take: reckoned here again by hand, row by row and step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.data.formats import read_examples
from luthier.data.render import Renderer
from luthier.engine import closing, forget, pace
from luthier.engine.__main__ import carry_out
from luthier.engine.pace import Point, Price
from luthier.proof import probe
from luthier.proof.probe import Item
from luthier.spec.data import Message, Problem
from tests.engine import runs

START, EACH = 0.25, 0.5  # seconds of a step of decoding: for itself, and for each row in it
READ = 0.01  # seconds of a token that is read
ITEMS = [
    *(Item(f"c{n}", "knowledge", "en", pairs=((f"{n} is", " a"), (f"{n} is", " the fox"))) for n in range(5)),
    *(Item(f"t{n}", "instruction", "en", prompt=f"say {n}", check={"contains": [str(n)]}) for n in range(3)),
]


@pytest.fixture(autouse=True)
def paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known pace, a probe of eight items."""
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(probe, "general", lambda: list(ITEMS))
    monkeypatch.setattr(closing, "time_decoding", lambda *_: points())
    lines = {"forward": (0.0, 1 / READ), "decode": (START, 1 / EACH), "train": (0.0, 1e3), "first": (0.0, 1e3)}
    monkeypatch.setattr(pace.Known, "line", lambda _, kind: lines[kind])
    per_token = (Price(1.0, 0.0, 0.0), Price(1.0, 0.0, 0.0))
    monkeypatch.setattr("luthier.engine.forecast.prices", lambda _: per_token)


def points() -> list[Point]:
    return [Point("decode", rows, START + EACH * rows, 4) for rows in (8, 32)]


def test_steps_of_decoding_have_a_start_and_a_price_for_each_row() -> None:
    found, rate = pace.fit([(point.work, point.seconds) for point in points()])
    assert (found, 1 / rate) == pytest.approx((START, EACH))


def forecast_of(tmp_path: Path, tiny: Path, data: Path, **options: Any) -> tuple[dict[str, Any], float]:
    """(the forecast, seconds that loading the base took)."""
    loads: list[float] = []
    made = closing.foretell

    def seen(ready: Any, *given: Any) -> Any:
        loads.append(ready.base_seconds)
        return made(ready, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closing, "foretell", seen)
        run = runs.lay_out(tmp_path / "run", tiny, data, max_steps=2, **options)
        assert carry_out(run, estimate=True) == 0
    return runs.events(run, "forecast")[0], loads[0]


def answered(prompts: list[int], answers: list[int]) -> float:
    """All in one batch: everything read, then a token for each row that still writes."""
    seconds = READ * sum(prompts)
    for step in range(max(answers)):
        seconds += START + EACH * sum(length > step for length in answers)
    return seconds


def test_a_proof_of_so_many_rows(tmp_path: Path, tiny: Path) -> None:
    data = runs.write(tmp_path / "data.jsonl", runs.chats(24))
    held = runs.write(tmp_path / "held.jsonl", runs.chats(6, start=50))
    told, load = forecast_of(
        tmp_path, tiny, data, validation=str(held), proof_rows=6, proof_examples=0, forgetting="off"
    )
    renderer = Renderer.load(tiny)
    whole = [renderer.rows(example)[0] for example in read_examples(held) if not isinstance(example, Problem)]
    before = [next(n for n, weight in enumerate(row.weights) if weight >= 1) for row in whole]
    written = [len(row.ids) - first for row, first in zip(whole, before, strict=True)]
    most = max(written) + 16
    expected = load + answered(before, written) + answered(before, [most] * 6)
    assert told["prove_seconds"] == pytest.approx(expected, abs=0.01)
    assert told["forget_seconds"] == 0


def test_a_proof_keeps_to_a_third_of_the_training(tmp_path: Path, tiny: Path) -> None:
    data = runs.write(tmp_path / "data.jsonl", runs.chats(60))
    told: list[float] = []

    def seen(ready: Any, known: Any, forward: Any, train_seconds: float, published: int, heed: Any) -> closing.Closing:
        told.extend(made(ready, known, forward, seconds, published, heed).prove_seconds for seconds in (0, 2.1e3, 1e6))
        return made(ready, known, forward, train_seconds, published, heed)

    made = closing.foretell
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closing, "foretell", seen)
        run = runs.lay_out(tmp_path / "run", tiny, data, max_steps=1, validation="0.5", forgetting="off")
        assert carry_out(run, estimate=True) == 0
    least, third, whole = told
    assert least < third < whole
    assert third == pytest.approx(700)


def test_the_meter_is_reckoned_item_by_item(tmp_path: Path, tiny: Path) -> None:
    data = runs.write(tmp_path / "data.jsonl", runs.chats(12))
    told, load = forecast_of(tmp_path, tiny, data, forgetting=8)
    renderer = Renderer.load(tiny)
    choices = 0
    for item in ITEMS[:5]:
        first, second = (list(forget.row_of(renderer, *pair)[0]) for pair in item.pairs)
        shared = next(n for n, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
        choices += len(first) + len(second) - shared
    prompts = [len(renderer.prompt([Message("user", item.prompt)])) for item in ITEMS[5:]]
    room = max(forget.ROOMS)
    one = READ * choices + answered(prompts, [room, room // 2, room // 2])
    assert told["probe_items"] == 8
    assert told["forget_seconds"] == pytest.approx(load + 2 * one, rel=0.02)
