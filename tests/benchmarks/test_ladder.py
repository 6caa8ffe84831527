"""Rungs of the ladder change how a step is computed and not what comes out; the peers' loop is one of them here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from benchmarks.training import ladder, workloads
from benchmarks.training.drivers import flat, luthier_engine, luthier_profile, start
from benchmarks.training.drivers import job as jobs

from tests.benchmarks.test_workloads import a_job

PREFIX = list(range(10, 40))
ROWS = [([*PREFIX, *range(50 + 9 * number, 57 + 9 * number)], [0] * 30 + [1] * 7) for number in range(8)]


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows with a common prefix, and an adapter to start from."""
    folder = tmp_path_factory.mktemp("ladder")
    workloads.save(workloads.Workload(ROWS, ROWS[:1]), folder / "rows.safetensors")
    start.make(str(tiny), folder / "adapter")
    return folder


def job(place: Path, tiny: Path, name: str, setting: str, without: list[str]) -> jobs.Job:
    (place / name).mkdir(exist_ok=True)
    return a_job(
        place,
        model=str(tiny),
        adapter=str(place / "adapter"),
        out=str(place / name),
        setting=setting,
        rows_per_step=4,
        steps=2,
        micro=2,
        without=without,
    )


@pytest.fixture(scope="module")
def wanted(place: Path, tiny: Path) -> list[float]:
    """Losses by the float32 reference."""
    return flat.train(job(place, tiny, "reference", "reference", [])).losses


@pytest.mark.parametrize("rung", [None, *ladder.RUNGS])
def test_every_rung_trains_alike(place: Path, tiny: Path, wanted: list[float], rung: str | None) -> None:
    record = luthier_engine.train(job(place, tiny, f"without-{rung}", "tuned", [rung] if rung else []))
    assert record.losses == pytest.approx(wanted, rel=5e-3)
    settings = json.loads((place / f"without-{rung}" / "run" / "spec.json").read_text())["settings"]
    assert settings["precision"] == ("float32" if rung == "precision" else "bfloat16")
    assert record.notes["physical_tokens"] == (4 * 37 if rung in ("sharing", "packing") else 30 + 4 * 7)


def test_the_profile_of_a_step_names_attention_and_products(place: Path, tiny: Path) -> None:
    found: dict[str, float] = {}
    with luthier_profile.watched(found):
        luthier_engine.train(job(place, tiny, "profile", "tuned", []))
    assert {"attention", "matrix products", "loss"} <= set(found)
    assert sum(found.values()) == pytest.approx(1.0)


def test_the_flat_loop_trains_alike(place: Path, tiny: Path, wanted: list[float]) -> None:
    assert flat.train(job(place, tiny, "flat", "tuned", [])).losses == pytest.approx(wanted, rel=5e-3)


def test_a_job_whose_seconds_are_spent_ends_after_its_step(place: Path, tiny: Path) -> None:
    spent = dataclasses.replace(job(place, tiny, "spent", "tuned", []), seconds=0.0)
    assert len(luthier_engine.train(spent).steps) == 1
    assert len(flat.train(spent).steps) == 1


def test_an_unknown_rung_is_refused() -> None:
    with pytest.raises(KeyError, match="nothing"), ladder.without(["nothing"]):
        pass
