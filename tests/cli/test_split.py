"""`luthier data split`: each option from the command line to the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.test_data import called, objects


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"p{n}", "completion": "yes" if n % 2 else "no"}) for n in range(40)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_words(rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rows.parent)
    assert called("data", "split", rows.name) == 0
    said = capsys.readouterr().out
    assert "rows.train.jsonl: 36 rows (90.0%), 36 prompts" in said
    assert "rows.validation.jsonl: 4 rows (10.0%), 4 prompts" in said
    assert "yes" in said and "18" in said
    assert "luthier train --data rows.train.jsonl --validation rows.validation.jsonl --model MODEL" in said
    assert len((rows.parent / "rows.train.jsonl").read_text().splitlines()) == 36


def test_share_seed_stratify_and_names(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def split(*more: str) -> tuple[dict[str, object], bytes]:
        names = ("--train", tmp_path / "t.jsonl", "--validation", tmp_path / "v.jsonl", "--force", "--json")
        assert called("data", "split", rows, *names, *more) == 0
        return objects(capsys)[0], (tmp_path / "v.jsonl").read_bytes()

    first, held = split("--share", "0.25")
    assert first["train"] == {"file": str(tmp_path / "t.jsonl"), "rows": 30, "prompts": 30}
    assert first["validation"] == {"file": str(tmp_path / "v.jsonl"), "rows": 10, "prompts": 10}
    assert (first["share"], first["seed"], first["stratified"]) == (0.25, 0, True)
    assert first["classes"] == {"no": [15, 5], "yes": [15, 5]}
    assert split("--share", "0.25") == (first, held)
    assert split("--share", "0.25", "--seed", "1")[1] != held
    assert split("--stratify", "none")[0]["classes"] == {}
    assert split("--stratify", "label")[0]["classes"] == {"no": [18, 2], "yes": [18, 2]}


def test_what_is_there_stays(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (rows.parent / "rows.validation.jsonl").write_text("mine")
    assert called("data", "split", rows) == 2
    assert "rows.validation.jsonl is there already" in " ".join(capsys.readouterr().err.split())
    assert (rows.parent / "rows.validation.jsonl").read_text() == "mine"
    assert not (rows.parent / "rows.train.jsonl").exists()
    assert called("data", "split", rows, "--force") == 0
    assert (rows.parent / "rows.validation.jsonl").read_text() != "mine"
