"""The front door: help, version, and how errors become words, JSON and exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main

from luthier import __version__, cli
from luthier.cli import reference
from luthier.spec.data import Problem
from luthier.spec.errors import BadData, BadSetting, Broken, LuthierError, NotNow

ROOT = Path(__file__).parents[2]


def called(*words: str) -> int:
    """The exit code of `luthier WORDS`."""
    with pytest.raises(SystemExit) as leaving:
        cli.main(words)
    return int(leaving.value.code or 0)


def shell(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.run(
        [sys.executable, "-m", "luthier.cli", *words], capture_output=True, encoding="utf-8", env=here, timeout=120
    )


@pytest.fixture(autouse=True)
def _hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main() sets its own


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`luthier models list` raises `error`."""
    from luthier.engine import catalogue

    def entries() -> Any:
        raise error

    monkeypatch.setattr(catalogue, "entries", entries)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--version") == 0
    assert capsys.readouterr().out == f"luthier {__version__}\n"


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert called() == 0
    assert "Usage: luthier" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [(BadSetting("It is wrong.", hint="Do this."), 2), (NotNow("Disk full."), 75), (Broken("Our fault."), 1)],
)
def test_an_error_is_a_sentence_and_a_code(
    error: LuthierError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, error)
    assert called("models", "list") == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"Error: {error.message}\n" + (f"{error.hint}\n" if error.hint else "")


def test_with_json_an_error_is_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, BadSetting("It is wrong.", hint="Do this.", param="rank"))
    assert called("models", "list", "--json") == 2
    told = capsys.readouterr()
    assert told.err == ""
    assert json.loads(told.out.splitlines()[-1]) == {
        "status": "failed",
        "code": "invalid_setting",
        "message": "It is wrong.",
        "hint": "Do this.",
        "param": "rank",
        "problems": [],
    }


def test_twenty_problems_are_shown_and_the_rest_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [Problem(line, "messages", "null", "a list", file="a.jsonl") for line in range(1, 24)]
    raising(monkeypatch, BadData("23 problems.", problems=problems))
    assert called("models", "list") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "  a.jsonl: line 1, messages: found null, wanted a list."
    assert lines[20] == "  a.jsonl: line 20, messages: found null, wanted a list."
    assert lines[21:] == ["  and 3 more."]


def test_json_has_every_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, BadData("Bad.", problems=[Problem(line, "", "a", "b") for line in range(1, 24)]))
    called("models", "list", "--json")
    told = json.loads(capsys.readouterr().out)
    assert [problem["line"] for problem in told["problems"]] == list(range(1, 24))


def test_a_wrong_option_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("train", "--rnak", "3") == 2
    told = capsys.readouterr().err
    assert "--rnak" in told
    assert "See `luthier train --help`." in told
    assert "Traceback" not in told


def test_a_wrong_option_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("tokenize", "--json") == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["status"], told["code"]) == ("failed", "invalid_request")


def test_text_of_files_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, BadSetting("found \x1b]0;title\x07 and \u202e[bold]."))
    called("models", "list")
    assert capsys.readouterr().err == "Error: found \\x1b]0;title\\x07 and \\u202e[bold].\n"


def test_paths_that_the_system_refuses_are_no_fault_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that are too long, in every place where a path is asked for."""
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    long = str(tmp_path / ("x" * 300))
    for words in (
        ("train", "--model", "nothing", "--data", long),
        ("train", "--model", "nothing", "--data", str(file), "--out", long),
        ("train", "--resume", long),
        ("evaluate", long, "--data", str(file)),
        ("data", "show", long, "--model", "nothing"),
    ):
        assert called(*words) in (2, 75), words
        told = capsys.readouterr().err
        assert "Traceback" not in told and "File name too long" in told.replace("\n", " "), words


def test_an_unexpected_error_shows_where_and_one_sentence(tmp_path: Path) -> None:
    code = (
        "from luthier.engine import catalogue\nfrom luthier.cli import main\n"
        "catalogue.entries = lambda: 1 / 0\nmain(['models', 'list'])"
    )
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "LUTHIER_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=here, timeout=120)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "did not expect: ZeroDivisionError: division by zero" in done.stderr.splitlines()[-2]


def test_ctrl_c_leaves_with_130_and_no_traceback(tmp_path: Path) -> None:
    code = (
        "import time\nfrom luthier.engine import catalogue\nfrom luthier.cli import main\n"
        "def entries():\n    print('here', flush=True)\n    time.sleep(60)\n"
        "catalogue.entries = entries\nmain(['models', 'list'])"
    )
    here = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=here
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in told


def test_ascii_terminals_get_question_marks_not_errors(tmp_path: Path) -> None:
    done = shell("models", "pull", "größe/é→", LC_ALL="C", PYTHONIOENCODING="ascii", LUTHIER_HOME=str(tmp_path))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "gr??e" in done.stderr or "gr\\xf6" in done.stderr


def test_ascii_json_loses_nothing(tmp_path: Path) -> None:
    done = shell("models", "list", "--json", LC_ALL="C", PYTHONIOENCODING="ascii", LUTHIER_HOME=str(tmp_path / "größe"))
    assert done.returncode == 0
    assert [json.loads(line)["installed"] for line in done.stdout.splitlines()] == [False, False]


def test_the_cli_page_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == reference.reference(), "run `make docs`"


def test_the_reference_is_the_same_at_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = set()
    for width in ("20", "300"):
        monkeypatch.setenv("COLUMNS", width)
        pages.add(reference.reference())
    assert len(pages) == 1
    page = pages.pop()
    for words in (
        "## `luthier train`",
        "`--learning-rate` `X\\|auto`",
        "`--data` `TEXT` (repeatable)",
        "## `luthier data show`",
    ):
        assert words in page


PAGES = [ROOT / "docs" / "getting-started.md", ROOT / "README.md"]


def commands_of(page: Path) -> list[list[str]]:
    """Every `luthier ...` command in the page's shell blocks, as words."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.M | re.S)
    lines = [line.split("|")[0] for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("luthier ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    commands = commands_of(page)
    assert commands
    for words in commands:
        command: Any = typer.main.get_command(cli.app)
        rest = words[1:]
        while getattr(command, "commands", None) and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, words
            command, rest = command.commands[rest[0]], rest[1:]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        assert {word for word in rest if word.startswith("-")} <= known, words
