"""`luthier estimate`: the forecast of a real engine in words and in JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier.spec.forecast import Forecast
from tests.cli.test_train import data  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def estimate(home: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "luthier.cli", "estimate", *map(str, words)]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src"), "LUTHIER_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False, cwd=home.parent)


def test_in_words_then_in_json_with_money(home: Path, tiny: Path, data: Path) -> None:  # noqa: F811
    asked = ("--model", tiny, "--data", data, "--epochs", "2", "--batch-size", "8", "--seed", "1")
    done = estimate(home, *asked, "--per-hour", "3.6")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert lines["rows"].strip() == "30 rows"
    assert lines["steps"].strip() == "8 in 2 epochs, 8 micro-batches"
    assert lines["cost"].strip().endswith("at 3.6 an hour")
    assert lines["known from"].strip() == "measuring just now"
    assert {"tokens", "time", "memory", "disk"} <= lines.keys()
    assert "Measuring what the run will take ..." in done.stderr
    assert sorted(path.name for path in home.parent.iterdir()) == ["home"], "nothing else stays"

    done = estimate(home, *asked, "--per-hour", "3600", "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    told = answer["forecast"]
    assert answer["status"] == "estimated" and answer["warnings"] == []
    assert set(told) == {*Forecast.model_fields, "seconds", "cost"}
    assert told["measured"] is False and (told["rows"], told["steps"]) == (30, 8)
    assert told["cost"] == pytest.approx(told["seconds"], abs=0.01), "3600 an hour is 1 a second"
    assert done.stderr == ""


def test_what_cannot_be_trained_cannot_be_estimated(home: Path, tiny: Path, data: Path) -> None:  # noqa: F811
    bad = data.with_name("bad.jsonl")
    bad.write_text('{"messages": []}\n')
    done = estimate(home, "--model", tiny, "--data", bad, "--json")
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert (answer["forecast"], answer["status"], answer["code"]) == (None, "failed", "invalid_data")
    done = estimate(home, "--model", tiny, "--data", bad)
    assert done.returncode == 2 and "bad.jsonl" in done.stderr and done.stdout == ""
    done = estimate(home, "--data", bad)
    assert done.returncode == 2 and "--model is missing" in done.stderr
