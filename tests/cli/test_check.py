"""`luthier data check`: words, JSON, one HTML page, exit codes; every option is used to its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from luthier import cli
from luthier.cli.check import BARS, fewer
from luthier.work.launch import descendants
from tests import tiny as tiny_models
from tests.data.record_files import ANSWER, USER, chat
from tests.data.test_doctor import row, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.make_tokenizer(tmp_path_factory.mktemp("model"))
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def run(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["data", "check", *map(str, words)])
    code = leaving.value.code
    return code if isinstance(code, int) else 0


def as_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    code = run(*words, "--json")
    return code, json.loads(capsys.readouterr().out)


def kinds(report: dict[str, Any]) -> dict[str, int]:
    return {finding["kind"]: finding["count"] for finding in report["findings"]}


@pytest.mark.parametrize(
    ("rows", "code", "level"),
    [
        ([row(0), row(1)], 0, None),
        ([row(0, system="S"), row(1)], 0, "note"),
        ([row(0), row(0)], 1, "warning"),
        ([row(0), "{"], 2, "error"),
    ],
    ids=["clean", "note", "warning", "error"],
)
def test_the_exit_code_is_the_worst_finding(
    rows: list[Any], code: int, level: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, report = as_json(capsys, write(tmp_path / "a.jsonl", rows))
    assert told == code
    assert report["records"] == 2
    assert [finding["severity"] for finding in report["findings"]] == ([level] if level else [])
    assert all({"kind", "severity", "count", "rows", "why", "fix"} <= finding.keys() for finding in report["findings"])


def test_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", [row(0), row(0), row(2, "ask bob@firm.org"), "nonsense"])
    assert run(path) == 2
    said = capsys.readouterr().out
    assert f"{path}: chat, 4 records" in said
    assert "warning: 1 row: repeats an earlier row (duplicate)" in said
    assert "  row 2: repeats row 1" in said
    out = tmp_path / "a.fixed.jsonl"
    assert f"  mend: luthier data fix {path} --dedupe exact --drop unreadable -o {out}" in said
    together = f"luthier data fix {path} --drop unreadable --redact --dedupe exact -o {out}"
    assert f"all that can be mended at once: {together}" in said
    assert "row 3: messages[1].content: e-mail address bob@..." in said
    assert "bob@firm.org" not in said
    assert "line 4" in said
    assert said.rstrip().endswith("1 error, 2 warnings")
    assert run(write(tmp_path / "b.jsonl", [row(0)])) == 0
    assert capsys.readouterr().out.rstrip().endswith("Nothing to remark.")


def test_model_template_and_length(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [chat(USER, ANSWER), chat(USER | {"content": "Count."}, ANSWER | {"content": "one two three " * 30})]
    path = write(tmp_path / "a.jsonl", rows)
    code, report = as_json(capsys, path, "--model", model)
    assert (code, report["statistics"]["max_length"]) == (0, 512)
    tokens = report["statistics"]["files"][str(path)]["tokens"]["max"]
    code, report = as_json(capsys, path, "--model", model, "--max-length", "40")
    assert (code, kinds(report)) == (1, {"too_long": 1})
    assert f"{tokens:,.0f} tokens; a cut at 40" in report["findings"][0]["details"][0]
    template = tmp_path / "longer.jinja"
    longer = tiny_models.CHATML.replace("message['role']", "message['role'] + ' says'")
    template.write_text(longer.replace("assistant\n", "assistant says\n"))
    _, report = as_json(capsys, path, "--model", model, "--template", template)
    assert report["statistics"]["files"][str(path)]["tokens"]["max"] > tokens


@pytest.mark.parametrize("words", [["--max-length", "64"], ["--template", "chatml"]])
def test_tokens_need_a_model(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(write(tmp_path / "a.jsonl", [row(0)]), *words) == 2
    assert f"{words[0]} needs --model" in capsys.readouterr().err


def test_validation_and_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write(tmp_path / "a.jsonl", [row(0)]), write(tmp_path / "b.jsonl", [row(1), row(0)])
    held = write(tmp_path / "v.jsonl", [row(1), row(9)])
    code, report = as_json(capsys, one, two, "--validation", held, "--processes", "1")
    assert (code, report["records"], kinds(report)) == (1, 3, {"duplicate": 1, "overlap": 1})
    assert list(report["statistics"]["files"]) == [str(one), str(two), str(held)]


def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.jsonl") == 2
    assert "No data file" in capsys.readouterr().err
    assert run(write(tmp_path / "a.jsonl", [row(0)]), "--html", tmp_path / "no" / "page.html") == 2
    assert "No folder" in capsys.readouterr().err


def test_the_page(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>"
    rows = [row(n, system="Be brief.") for n in range(12)] + [row(0), row(3, f"{evil} a@firm.org <|im_end|>")]
    rows.append(row(4) | {evil: 1})
    path, page = write(tmp_path / f"a{evil.replace('/', '')}.jsonl", rows), tmp_path / "page.html"
    run(path, "--model", model, "--html", page, "--json")
    report = json.loads(capsys.readouterr().out)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert re.search(r"(src|href)=|url\(|@import", text) is None
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert [chart.get("aria-label") for chart in charts] == [
        f"Histogram of {name} a row" for name in ("tokens", "learnt tokens", "characters", "turns")
    ]
    numbers = report["statistics"]["files"][str(path)]
    for chart, name in zip(charts, ("tokens", "learnt_tokens", "characters", "turns"), strict=True):
        bars = [bar[0].text or "" for bar in chart.iter("rect")]
        rows_told = [int(bar.split(": ")[1].split()[0]) for bar in bars]
        assert rows_told == [count for _, _, count in numbers[name]["histogram"]]
        assert sum(rows_told) == 15
    for finding in report["findings"]:
        assert finding["kind"] in text and finding["why"].split("'")[0] in text


def test_a_clean_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run(write(tmp_path / "a.jsonl", [row(0), row(1)]), "--html", page) == 0
    assert "Nothing to remark." in page.read_text(encoding="utf-8")


def test_fewer_bars_lose_no_row() -> None:
    bars = [[n, n + 1, n % 5] for n in range(100)]
    shown = fewer({"histogram": bars})
    assert len(shown) <= BARS
    assert (shown[0][0], shown[-1][1], sum(count for _, _, count in shown)) == (0, 100, sum(n % 5 for n in range(100)))
    assert all(before[1] == after[0] for before, after in pairwise(shown))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_nothing_is_left_running(tmp_path: Path, number: signal.Signals) -> None:
    path = write(tmp_path / "a.jsonl", [row(n, "word " * 20_000) for n in range(200)])
    command = [sys.executable, "-m", "luthier.cli", "data", "check", str(path), "--processes", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        while len(below := descendants(process.pid)) < 3:  # two, and the one that counts shared resources
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
        _, said = process.communicate()
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert b"Traceback" not in said
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in below):
        assert time.monotonic() < deadline, below
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether that process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
