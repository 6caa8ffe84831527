"""`luthier data prepare`: each of the sixteen checks, the files it writes, and the published example byte for byte."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.prepare import Pair, examine, split
from luthier.data.table import Table, read_table
from luthier.spec.errors import BadData
from tests.cli.test_server_commands import called

SHARED = Path(__file__).parents[3] / "shared" / "data" / "openai" / "fork-sport2"
DIFFERENT = [f"{number} {'abcdefghij'[number % 10]}" for number in range(40)]


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rows_of(path: Path) -> list[tuple[str, str]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(record["prompt"], record["completion"]) for record in records]


def mends(pairs: list[tuple[str, str]]) -> list[str]:
    """The recommended mends of rows that are JSON Lines already."""
    table = Table(["prompt", "completion"], [list(pair) for pair in pairs], None)
    return [finding.mend for finding in examine(table).recommended]


def sound(count: int = 40) -> list[tuple[str, str]]:
    return [(f"{word} ->", f" {word}\n") for word in DIFFERENT[:count]]


# -- the checks --------------------------------------------------------------------------------------------------------


def test_nothing_to_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", sound())
    assert called("data", "prepare", file, "-q", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [str(file)]
    assert (told["rows"], told["task"]) == (40, "conditional generation")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        (sound() + sound(2), ["drop 2 repeated rows"]),
        ([*sound(), ("a" * 10_000 + " ->", " b\n")], ["drop 1 long rows"]),
        ([(prompt.upper(), said) for prompt, said in sound()], ["write the prompts in lower case"]),
        ([(prompt, said.upper()) for prompt, said in sound()], ["write the completions in lower case"]),
        ([(word, f" {word}\n") for word in DIFFERENT], ["end each prompt with ' ->'"]),
        ([(f"{word}\nx{word}", f" {word}\n") for word in DIFFERENT], ["end each prompt with '\\n\\n###\\n\\n'"]),
        ([(f"Say after me: {prompt}", said) for prompt, said in sound()], ["take 'Say after me: ' off the prompts"]),
        ([(f"Say: {prompt}", said) for prompt, said in sound()], []),
        ([(prompt, " Answer" + said) for prompt, said in sound()], ["take ' Answer ' off the completions"]),
        ([(prompt, " Ans" + said) for prompt, said in sound()], ["take ' Ans ' off the completions"]),
        ([(prompt, said[:-1]) for prompt, said in sound()], ["end each completion with '\\n'"]),
        ([(prompt, said[:-1] + "\n!") for prompt, said in sound()], []),
        ([(prompt, said[1:]) for prompt, said in sound()], ["begin each completion with a space"]),
    ],
)
def test_what_is_recommended(pairs: list[tuple[str, str]], wanted: list[str]) -> None:
    assert mends(pairs) == wanted


def test_endings_that_are_taken_are_left_alone() -> None:
    pairs = [(f"{word} -> {word}", f" {word}\n. {word}") for word in DIFFERENT]
    assert mends(pairs) == ["end each prompt with '\\n\\n###\\n\\n'", "end each completion with ' END'"]
    every = "".join(("\n", ".", " END", "***", "+++", "&&&", "$$$", "@@@", "%%%"))
    assert mends([(f"{word} ->", f" {every}{word}") for word in DIFFERENT])[-1] == "end each completion with ' [END]'"


def test_a_shared_last_letter_is_an_ending() -> None:
    pairs = [(f"{word} ->", f" {word} long {word}A") for word in DIFFERENT]
    table = Table(["prompt", "completion"], [list(pair) for pair in pairs], None)
    prepared = examine(table)
    assert prepared.completion_ending == "A"
    assert prepared.recommended == []


def test_long_endings_and_endings_inside_are_told() -> None:
    pairs = [(f"{word} ->->->->-> {word} ->->->->->", said) for word, (_, said) in zip(DIFFERENT, sound(), strict=True)]
    table = Table(["prompt", "completion"], [list(pair) for pair in pairs], None)
    told = next(finding.text for finding in examine(table).findings if "end with" in finding.text)
    assert "A shorter ending would do." in told
    assert "Warning: 40 of them have it inside" in told


@pytest.mark.parametrize(
    ("columns", "rows", "words"),
    [
        (["prompt"], [["a"]], "There is no column completion; the file has 'prompt'."),
        (["question", "completion"], [["a", "b"]], "There is no column prompt"),
        (["prompt", "completion"], [["a", ""]], "No row has a completion."),
        (["prompt", "completion"], [["a ->", word] for word in DIFFERENT], "All prompts are the same: 'a ->'."),
    ],
)
def test_beyond_mending(columns: list[str], rows: list[list[str]], words: str) -> None:
    with pytest.raises(BadData) as caught:
        examine(Table(columns, rows, None))
    assert words in str(caught.value)


def test_all_completions_the_same() -> None:
    with pytest.raises(BadData, match="All completions are the same"):
        examine(Table(["prompt", "completion"], [["a", "x"], ["b", "x"]], None))


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_mends_are_made_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"Prompt": f"TELL ME OF {word.upper()}", "completion": word, "source": 5} for word in DIFFERENT]
    records.append({"Prompt": "TELL ME OF NOTHING", "completion": "", "source": None})
    file = tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in [records[0], *records]))
    assert called("data", "prepare", file, "--yes") == 0
    told = capsys.readouterr().out
    assert "The column prompt is written Prompt. Mended: renamed to prompt." in told
    assert "Columns besides prompt and completion: 'source'. Mended: left out." in told
    assert "1 rows (42) without a completion. Mended: dropped 1 of them." in told
    assert "Its answers end with stop=['\\n']." in told
    made = rows_of(tmp_path / "b_prepared.jsonl")
    # "TELL ME OF " has 11 characters, so it is only told; the ending is added behind what was lowered.
    assert made == [(f"tell me of {word} ->", f" {word}\n") for word in DIFFERENT]
    assert called("data", "prepare", file, "-q") == 0
    assert rows_of(tmp_path / "b_prepared (1).jsonl") == made


def classed(count: int) -> list[tuple[str, str]]:
    return [(f"{number * 7919} ->", (" cat", " dog")[number % 3 == 0]) for number in range(count)]


def test_classes_are_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "c.jsonl", classed(50))
    assert called("data", "prepare", file, "-q", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    train, valid = (rows_of(Path(name)) for name in told["files"])
    assert (len(train), len(valid), told["task"]) == (40, 10, "classification")
    assert sorted(train + valid) == sorted(classed(50))
    # pandas: DataFrame(range(50)).sample(n=40, random_state=42) begins with these rows
    assert [classed(50).index(row) for row in train[:6]] == [13, 39, 30, 45, 17, 48]
    assert "--classification_positive_class ' cat'" in told["command"]
    three = write(tmp_path / "d.jsonl", [(prompt, f" {int(prompt[:-3]) % 3}") for prompt, _ in classed(50)])
    assert called("data", "prepare", three, "-q", "--json") == 0
    assert "--classification_n_classes 3" in json.loads(capsys.readouterr().out)["command"]


@given(st.integers(2, 3000))
def test_a_split_loses_nothing(count: int) -> None:
    pairs = [Pair(str(number), "a", number) for number in range(count)]
    train, valid = split(pairs)
    assert len(train) == max(count - 1000, int(0.8 * count))
    assert sorted(pair.row for pair in train + valid) == list(range(count))
    assert valid == sorted(valid, key=lambda pair: pair.row)


def test_published_example(tmp_path: Path) -> None:
    """sport2.jsonl of the cookbook's classification notebook, and what prepare_data made of it."""
    if not SHARED.is_dir():
        pytest.skip("the published example is not on this machine")
    file = shutil.copy(SHARED / "sport2.jsonl", tmp_path)
    assert called("data", "prepare", file, "-q") == 0
    for part in ("train", "valid"):
        name = f"sport2_prepared_{part}.jsonl"
        assert (tmp_path / name).read_bytes() == (SHARED / name).read_bytes()


def test_the_same_bytes_as_prepare_data(tmp_path: Path) -> None:
    """What openai 0.28.1 with pandas 3.1 wrote for this file: its sha256."""
    words = ["alpha", "beta/gamma", "\u00e9", "\u6f22", "tab\tx", "<&'\"", "\x7f", "\x01", "back\\slash"]
    pairs = [(f"{words[n % 9]} {n} {words[n * 5 % 9]}", ("baseball", "hockey")[n * n % 7 < 3]) for n in range(150)]
    assert called("data", "prepare", write(tmp_path / "s.jsonl", pairs), "-q") == 0
    digests = [hashlib.sha256((tmp_path / f"s_prepared_{part}.jsonl").read_bytes()) for part in ("train", "valid")]
    assert [digest.hexdigest()[:16] for digest in digests] == ["ad470ef154e9b0d2", "5c894dcb1ebf86a4"]


# -- asking ------------------------------------------------------------------------------------------------------------


def test_n_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "e.jsonl", [(word, word) for word in DIFFERENT])
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n\nN\n"))
    assert called("data", "prepare", file) == 0
    assert "end each prompt with ' ->'. [Y/n]" in capsys.readouterr().err
    assert rows_of(tmp_path / "e_prepared.jsonl") == [(word, f"{word}\n") for word in DIFFERENT]


def test_nobody_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "e.jsonl", [(word, word) for word in DIFFERENT])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert called("data", "prepare", file) == 2
    assert "Give --yes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["e.jsonl"]


# -- reading -----------------------------------------------------------------------------------------------------------


def test_all_forms_are_read_alike(tmp_path: Path) -> None:
    pairs = [('a, "b"\nc', "NA"), ("", "é"), ("None", "1")]
    write(tmp_path / "a.jsonl", pairs)
    write(tmp_path / "lines.json", pairs)
    records = [{"prompt": prompt, "completion": said} for prompt, said in pairs]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "array.jsonl").write_text(json.dumps(records))
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=mark).writerows([("prompt", "completion"), *pairs])
    found = {}
    for path in tmp_path.iterdir():
        table = read_table(path)
        assert [tuple(row) for row in table.rows] == pairs, path
        found[path.name] = table.found
    assert found == {
        "a.jsonl": None, "lines.json": "JSON Lines named .json", "a.json": "JSON", "array.jsonl": "JSON",
        "a.csv": "CSV", "a.tsv": "TSV",
    }  # fmt: skip


def test_text_and_values_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_table(tmp_path / "a.txt").rows == [["", "one"], ["", ""], ["", "two"]]
    (tmp_path / "a.jsonl").write_text('{"prompt": 1.5, "completion": true}\n{"completion": null}\n')
    assert read_table(tmp_path / "a.jsonl").rows == [["1.5", "true"], ["", ""]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xlsx", b"PK", "is a spreadsheet, which Luthier has no reader for. Save it as CSV"),
        ("a.doc", b"x", "ends with '.doc', wanted one of .csv"),
        ("a.jsonl", b'{"prompt": "a"}\nno\n', "line 2: no JSON"),
        ("a.jsonl", b"[1, 2]\n", "record 1: found int, wanted an object"),
        ("a.jsonl", b"1\n2\n", "line 1: found int, wanted an object"),
        ("a.json", b'{"prompt": "\\ud800", "completion": "x"}', "line 1: found half of a character (U+D800)"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b'{"a": 1}\n\xff', "line 2: found byte 0xff, wanted UTF-8"),
        ("a.csv", b"prompt,completion\na,b,c\n", "line 2: found 3 cells, wanted 2"),
        ("a.csv", b'prompt,completion\n"a', "line 2: "),
    ],
)
def test_files_that_cannot_be_read(
    name: str, content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert called("data", "prepare", tmp_path / name, "-q") == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    assert called("data", "prepare", tmp_path / "no.csv") == 2
    assert "No data file" in capsys.readouterr().err
