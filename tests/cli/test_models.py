"""`luthier models`: the list, and what pull and remove say. Getting models is tested in tests/engine."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from luthier import cli
from luthier.cli import output
from luthier.cli.output import Progress
from luthier.engine import catalogue


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def called(*words: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(words)
    return int(leaving.value.code or 0)


@pytest.fixture
def installed(tiny: Path, tmp_path: Path) -> str:
    shutil.copytree(tiny, tmp_path / "models" / "mine")
    return "mine"


def test_list_as_json(installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("models", "list", "--json") == 0
    shown = {entry["name"]: entry for entry in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(shown) == [*catalogue.BASES, installed]
    assert shown[installed]["installed"] is True
    assert shown[installed]["bytes_on_disk"] > 1000
    assert shown["smollm2-135m-instruct"]["installed"] is False
    assert shown["smollm2-135m-instruct"]["path"] is None
    assert shown["smollm2-135m-instruct"]["licence"] == "Apache-2.0"


@pytest.mark.parametrize("words", [("models", "list"), ("models",)])
def test_list(words: tuple[str, ...], installed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(*words) == 0
    told = capsys.readouterr().out
    for name in (*catalogue.BASES, installed, "Apache-2.0"):
        assert name in told


def test_pull_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pull(name: str, progress: Progress) -> Path:
        for done in range(3):
            progress("downloading [bold]x[/bold]", done * 1_000_000, 3_000_000)
        progress("converting", 0, 1)
        return tmp_path / "models" / name

    monkeypatch.setattr(catalogue, "pull", pull)
    assert called("models", "pull", "gemma3-270m") == 0
    told = capsys.readouterr()
    assert told.out == f"gemma3-270m is in {tmp_path}/models/gemma3-270m\n"
    assert told.err == "downloading [bold]x[/bold]\nconverting\n"


def test_remove(installed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("models", "remove", installed) == 0
    assert capsys.readouterr().out.startswith("Removed mine: ")
    assert not (tmp_path / "models" / "mine").exists()
    assert called("models", "remove", installed) == 2
    assert capsys.readouterr().err.startswith("Error: The model mine is not installed.")


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("models", "pull", "nope") == 2
    assert "The catalogue has no model 'nope'." in capsys.readouterr().err


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(output, "console", lambda stderr=False: terminal)
    with terminal.capture() as drawn, output.waiting() as progress:
        progress("waiting for another process", 0, 0)
        progress("downloading [bold]x[/bold]", 1_500_000, 3_000_000)
    assert "downloading [bold]x[/bold]" in drawn.get()
    assert "1.5 MB of 3 MB" in drawn.get()
