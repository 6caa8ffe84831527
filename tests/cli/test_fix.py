"""`luthier data fix`: each option from the command line to the files."""

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
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: Any) -> Path:
    path = Path(name)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


PAIRS = [pair(f"p{n} ->", f" c{n} END") for n in range(6)]


def test_dedupe_drop_redact_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", *PAIRS, PAIRS[0], pair("me@acme.io ->", " x END"), "{", pair("z ->", " ") | {"completion": " "})
    words = ("--dedupe", "exact", "--drop", "unreadable", "--drop", "blank_answer", "--redact")
    assert called("data", "fix", "a.jsonl", "-o", "b.jsonl", *words) == 0
    assert rows("b.jsonl") == [*PAIRS, pair("[e-mail address] ->", " x END")]
    said = " ".join(capsys.readouterr().out.split())
    for part in ("duplicate 1", "unreadable 1", "blank_answer 1", "redacted 1", "unchanged 6", "7 rows of 10 records"):
        assert part in said
    assert len(rows("b.changes.jsonl")) == 4
    assert called("data", "fix", "a.jsonl", "-o", "b.jsonl", *words) == 2
    assert "there already" in capsys.readouterr().err
    assert called("data", "fix", "a.jsonl", "-o", "b.jsonl", *words, "--force", "--json") == 0
    (done,) = objects(capsys)
    assert (done["records"], done["rows"], done["dropped"]) == (
        10,
        7,
        {"blank_answer": 1, "duplicate": 1, "unreadable": 1},
    )
    assert "acme" not in Path("b.changes.jsonl").read_text()


def test_near(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "The committee meets on the first Monday of each month in the old town hall, and the clerk keeps the minutes."
    )
    write("a.jsonl", pair("p", text), pair("p", text + "!"))
    assert called("data", "fix", "a.jsonl", "--out", "b.jsonl", "--dedupe", "near", "--json") == 0
    assert objects(capsys)[0]["dropped"] == {"near_duplicate": 1}


def test_separators_and_end_markers(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", *PAIRS, pair("q", "d"))
    assert called("data", "fix", "a.jsonl", "-o", "b.jsonl", "--add-separators") == 0
    assert rows("b.jsonl")[-1] == pair("q ->", " d")
    assert "prompt: ' ->'" in capsys.readouterr().out
    assert called("data", "fix", "a.jsonl", "-o", "c.jsonl", "--add-end-markers") == 0
    assert rows("c.jsonl")[-1] == pair("q", "d END")


def test_normalise_roles() -> None:
    write("a.jsonl", {"messages": [{"role": "Human", "content": "q"}, {"role": "bot", "content": "a"}]})
    assert called("data", "fix", "a.jsonl", "-o", "b.jsonl", "--normalise-roles") == 0
    assert [turn["role"] for turn in rows("b.jsonl")[0]["messages"]] == ["user", "assistant"]


def test_split_share_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", *PAIRS, PAIRS[0])
    words = ("--dedupe", "exact", "--split", "v.jsonl", "--share", "0.34", "--force")
    assert called("data", "fix", "a.jsonl", "-o", "b.jsonl", *words) == 0
    assert (len(rows("b.jsonl")), len(rows("v.jsonl"))) == (4, 2)
    assert "v.jsonl: 2 rows" in capsys.readouterr().out
    held = {json.dumps(rows("v.jsonl"))}
    for seed in ("1", "2", "3"):
        assert called("data", "fix", "a.jsonl", "-o", "b.jsonl", *words, "--seed", seed) == 0
        held.add(json.dumps(rows("v.jsonl")))
    assert len(held) > 1


def test_model_template_and_max_length(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 60}]
    short = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write("a.jsonl", {"messages": long}, {"messages": short})
    words = ("data", "fix", "a.jsonl", "-o", "b.jsonl", "--force", "--model", model, "--json")
    assert called(*words, "--drop", "too_long") == 0
    assert objects(capsys)[0]["rows"] == 2  # the model's own length
    assert called(*words, "--drop", "too_long", "--max-length", "64") == 0
    assert objects(capsys)[0]["dropped"] == {"too_long": 1}
    assert called(*words, "--drop", "unrenderable", "--template", "plain") == 0
    assert objects(capsys)[0]["dropped"].get("unrenderable", 0) in (0, 2)


@pytest.mark.parametrize(
    ("words", "param"),
    [
        (("--redact", "--share", "0.2"), "share"),
        (("--redact", "--seed", "2"), "seed"),
        (("--redact", "--template", "plain"), "template"),
        (("--redact", "--max-length", "9"), "max-length"),
        (("--redact", "--model", "m"), "model"),
        (("--drop", "too_long"), "model"),
        (("--drop", "nonsense"), "drop"),
        (("--normalise-roles",), "normalise-roles"),
    ],
)
def test_options_without_a_use(words: tuple[str, ...], param: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", *PAIRS)
    assert called("data", "fix", "a.jsonl", "-o", "b.jsonl", *words, "--json") == 2
    assert objects(capsys)[0]["param"] == param
    assert not Path("b.jsonl").exists()


def test_without_a_choice_it_proposes(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", *PAIRS, PAIRS[0])
    assert called("data", "fix", "a.jsonl", "-o", "b.jsonl") == 2
    said = capsys.readouterr().err
    assert "No fix was chosen" in said and "luthier data fix a.jsonl --dedupe exact -o a.fixed.jsonl" in said
    assert not Path("b.jsonl").exists()
    write("c.jsonl", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    assert called("data", "fix", "c.jsonl", "-o", "b.jsonl") == 2
    assert "nothing was found to mend" in capsys.readouterr().err
