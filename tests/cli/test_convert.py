"""`luthier data convert`: each option from the command line to the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from tests.cli.test_data import called, objects


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "a.csv"
    path.write_bytes("Frage,Antwort,Quelle\n2+2?,4,é\n".encode("cp1252"))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_map_set_and_encoding(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    words = ("--map", "instruction=Frage", "--map", "output=Antwort", "--set", "system=Aus {Quelle}.")
    assert called("data", "convert", table, out, "--to", "chat", "--encoding", "cp1252", *words) == 0
    (row,) = rows(out)
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == [
        ("system", "Aus é."),
        ("user", "2+2?"),
        ("assistant", "4"),
    ]
    assert "out.jsonl: 1 row of 1 record, as chat." in capsys.readouterr().out


def test_columns_that_are_not_taken_are_named(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--map", "prompt=Frage", "--map", "completion=Antwort", "--encoding", "cp1252")
    assert called("data", "convert", table, tmp_path / "o.jsonl", "--to", "completion", *words) == 0
    assert "Columns not taken: 'Quelle'." in capsys.readouterr().out
    assert rows(tmp_path / "o.jsonl") == [{"prompt": "2+2?", "completion": "4"}]


def test_the_name_says_the_kind_of_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(
        json.dumps({"messages": [{"role": r, "content": r} for r in ("user", "assistant")], "id": 1}) + "\n"
    )
    for kind in ("csv", "tsv", "xlsx", "parquet"):
        made, back = tmp_path / f"o.{kind}", tmp_path / f"{kind}.jsonl"
        assert called("data", "convert", source, made, "--as", "completion", "--column", "prompt=Q", "--json") == 0
        (done,) = objects(capsys)
        assert (done["rows"], done["format"], done["carried"]["id"]["rows"]) == (1, "completion", 1)
        words = ("--map", "prompt=Q", "--map", "completion=completion", "--from", kind)
        assert called("data", "convert", made, back, "--to", "chat", *words) == 0
        assert rows(back)[0]["messages"] == json.loads(source.read_text())["messages"]
        capsys.readouterr()
    assert (tmp_path / "o.csv").read_text() == "Q,completion,id\nuser,assistant,1\n"
    assert called("data", "convert", source, tmp_path / "o.jsonl") == 2
    assert "--to chat" in " ".join(capsys.readouterr().err.split())


def test_sheet(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.create_sheet("second").append(["text"])
    book["second"].append(["hello"])
    book.save(tmp_path / "a.xlsx")
    assert called("data", "convert", tmp_path / "a.xlsx", tmp_path / "o.txt", "--sheet", "second") == 0
    assert (tmp_path / "o.txt").read_text() == "hello"


def test_lossy_drop_extra_and_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "o.jsonl"
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    source.write_text(
        json.dumps({"messages": turns, "id": 1}) + "\n" + json.dumps({"messages": turns * 2, "id": 2}) + "\n"
    )
    assert called("data", "convert", source, out, "--to", "completion", "--json") == 2
    (refusal,) = objects(capsys)
    assert [(problem["line"], problem["found"][:15]) for problem in refusal["problems"]] == [
        (1, "system messages"),
        (2, "4 turns (user, "),
    ]
    assert not out.exists()
    out.write_text("mine")
    assert called("data", "convert", source, out, "--to", "completion", "--lossy", "--drop-extra") == 2
    assert out.read_text() == "mine"
    capsys.readouterr()
    assert called("data", "convert", source, out, "--to", "completion", "--lossy", "--drop-extra", "--force") == 0
    assert rows(out) == [{"prompt": "user", "completion": "assistant"}]
    said = capsys.readouterr().out
    assert "Given up in 1 row (line 1): system messages." in said
    assert "Left out 1 row (line 2): 4 turns" in said and "Left out: id (1 row)." in said


def test_from_lines(tmp_path: Path) -> None:
    (tmp_path / "a.neg").write_text("bad\nworse\n")
    words = ("--from", "lines", "--to", "completion", "--map", "prompt=line", "--set", "completion= no")
    assert called("data", "convert", tmp_path / "a.neg", tmp_path / "o.jsonl", *words) == 0
    assert rows(tmp_path / "o.jsonl") == [
        {"prompt": "bad", "completion": " no"},
        {"prompt": "worse", "completion": " no"},
    ]


@pytest.mark.parametrize(
    ("words", "param"),
    [
        (("--to", "chat", "--map", "prompt"), "map"),
        (("--to", "chat", "--set", "=x"), "set"),
        (("--to", "chat", "--map", "prompt=a", "--map", "prompt=b"), "map"),
        (("--to", "chat", "--as", "chat"), "as"),
        (("--to", "chat", "--column", "prompt=b"), "column"),
        (("--to", "chat", "--sheet", "b"), "sheet"),
        (("--to", "csv", "--column", "prompt=x", "--column", "completion=x"), "column"),
        (("--to", "csv", "--column", "system=x"), "column"),
    ],
)
def test_options_without_a_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], param: str
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"prompt": "p", "completion": "c"}))
    assert called("data", "convert", source, tmp_path / "o.x", *words, "--json") == 2
    assert objects(capsys)[0]["param"] == param
    assert not (tmp_path / "o.x").exists()
