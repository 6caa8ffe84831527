"""`luthier data mix`: each option from the command line to the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_data import called, objects
from tests.cli.test_data import model as model  # the fixture


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    for name, texts in (("a", ["1 2 3 4", "xx"]), ("b", ["aaaaaaaaaaaaaaaa", "5"])):
        rows = [json.dumps({"prompt": text, "completion": name}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_weights_rows_seed_and_json(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"

    def mixed(seed: int) -> dict[str, Any]:
        words = (f"{two[0]}:3", f"{two[1]}:1", "-o", out, "--rows", "8", "--seed", seed, "--json", "--force")
        assert called("data", "mix", *map(str, words)) == 0
        return objects(capsys)[0]

    done = mixed(0)
    assert (done["rows"], done["order"], done["seed"]) == (8, "shuffle", 0)
    assert [(each["taken"], each["distinct"], each["repeated"]) for each in done["sources"]] == [(6, 2, 4), (2, 2, 0)]
    first = prompts(out)
    mixed(0)
    assert prompts(out) == first
    mixed(3)
    assert prompts(out) != first and len(first) == 8


def test_words(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("data", "mix", *two, "--out", tmp_path / "out.jsonl") == 0
    said = capsys.readouterr().out
    assert "out.jsonl: 4 rows, shuffled." in said and "50.0%" in said
    assert called("data", "mix", *two, "--out", tmp_path / "out.jsonl") == 2
    assert "there already" in capsys.readouterr().err


def test_easy_to_hard_by_characters_tokens_and_losses(two: tuple[Path, Path], tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ("data", "mix", *two, "-o", out, "--order", "easy-to-hard", "--force")
    assert called(*words) == 0
    assert prompts(out) == ["5", "xx", "1 2 3 4", "aaaaaaaaaaaaaaaa"]
    assert called(*words, "--model", model) == 0
    from luthier.data.tokenizer import Tokenizer

    lengths = [len(Tokenizer(model).plain(text + "a")) for text in prompts(out)]
    assert lengths == sorted(lengths)
    losses = tmp_path / "losses.jsonl"
    rows = [("a.jsonl", 1, 0.1), ("b.jsonl", 1, 0.2), ("b.jsonl", 2, 0.3), ("a.jsonl", 2, 0.4)]
    losses.write_text("\n".join(json.dumps({"file": file, "row": row, "loss": loss}) for file, row, loss in rows))
    assert called(*words, "--loss", losses) == 0
    assert prompts(out) == ["1 2 3 4", "aaaaaaaaaaaaaaaa", "5", "xx"]


def test_a_measure_that_nobody_asks_for_is_refused(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("data", "mix", *two, "-o", tmp_path / "o.jsonl", "--model", "m", "--json") == 2
    assert objects(capsys)[0]["param"] == "model"
    words = ("--order", "easy-to-hard", "--model", "m", "--loss", "l")
    assert called("data", "mix", *two, "-o", tmp_path / "o.jsonl", *words, "--json") == 2
    assert objects(capsys)[0]["param"] == "loss"
