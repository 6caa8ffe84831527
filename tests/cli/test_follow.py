"""Following an engine process to whatever end it takes, with an engine that only tells (fake_engine.py)."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from luthier.cli.follow import Outcome, end_at_once, engine_command, exit_code_of, follow
from luthier.cli.train import _print_failure, show_run
from luthier.spec.run import RunFolder
from tests.cli.fake_engine import REPORT

ROOT = Path(__file__).parents[2]
REQUEST = {"model": "tiny", "method": "lora", "data": ["a.jsonl"]}


class Watcher:
    """A view that remembers, and presses Ctrl-C when told to."""

    def __init__(self, press_at: int = 0, again: bool = False) -> None:
        self.events: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.press_at, self.again = press_at, again

    def see(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["type"] == "step" and event["step"] == self.press_at:
            os.kill(os.getpid(), signal.SIGINT)

    def say(self, message: str) -> None:
        self.said.append(message)
        if self.again and len(self.said) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def tick(self) -> None: ...

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.events]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    return RunFolder(tmp_path / "run").create(REQUEST)


def fake(run: RunFolder, ending: str = "finish", steps: int = 8, pause: float = 0.0) -> list[str]:
    options = ["--steps", str(steps), "--pause", str(pause), "--ending", ending]
    return [sys.executable, "-m", "tests.cli.fake_engine", str(run.path), *options]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_engine_commands(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert engine_command(run) == [sys.executable, "-m", "luthier.engine", str(tmp_path)]
    assert engine_command(run, 2) == [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "luthier.engine", str(tmp_path),
    ]  # fmt: skip


def test_success(run: RunFolder) -> None:
    view = Watcher()
    outcome = follow(run, fake(run), view)
    assert (outcome.status, outcome.exit_code) == ("succeeded", 0)
    assert outcome.event["report"] == REPORT
    assert view.types[0] == "started"
    assert view.types.count("step") == 8
    assert view.types[-1] == "finished"


def test_events_of_earlier_attempts_are_not_taken_for_this_one(run: RunFolder) -> None:
    run.emit("finished", status="succeeded", model="old", report={})
    with open(run.events_file, "ab") as events:
        events.write(b'{"type": "half')  # what a killed writer leaves
    view = Watcher()
    outcome = follow(run, fake(run, "fail"), view)
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert "finished" not in view.types
    assert view.types[0] == "started"


def test_a_failure_keeps_its_code_and_problems(run: RunFolder) -> None:
    outcome = follow(run, fake(run, "fail"), Watcher())
    assert outcome.exit_code == 2
    assert outcome.event["code"] == "invalid_data"
    assert len(outcome.event["problems"]) == 30


def test_an_engine_that_is_killed_is_said_to_be(run: RunFolder) -> None:
    outcome = follow(run, fake(run, "die"), Watcher())
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    assert outcome.event["message"] == "The engine was killed (signal 9), often because memory ran out."
    assert f"luthier train --resume {run.path}" in outcome.event["hint"]
    assert outcome.log_tail == ["last words of the engine"]


def test_an_engine_that_ends_without_a_word(run: RunFolder) -> None:
    outcome = follow(run, fake(run, "silent"), Watcher())
    assert outcome.event["message"] == "The engine ended with exit code 3 and did not say why."
    assert outcome.log_tail == ["half way, and no more"]


def test_a_run_that_someone_else_works_on(run: RunFolder) -> None:
    outcome = follow(run, fake(run, "locked"), Watcher())
    assert (outcome.exit_code, outcome.event["code"]) == (75, "unavailable")
    assert outcome.event["message"] == "Another process is working on it."


def test_ctrl_c_stops_at_a_checkpoint(run: RunFolder) -> None:
    view = Watcher(press_at=3)
    before = signal.getsignal(signal.SIGINT)
    outcome = follow(run, fake(run, steps=200, pause=0.05), view)
    assert (outcome.status, outcome.exit_code) == ("stopped", 130)
    assert view.said == ["Stopping after this step, at a checkpoint. Press Ctrl-C again to end at once."]
    assert view.types[-2:] == ["checkpoint", "stopped"]
    assert outcome.event["step"] < 200
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stop_note_of_someone_else_is_no_success(run: RunFolder) -> None:
    run.ask_to_stop()
    outcome = follow(run, fake(run), Watcher())
    assert (outcome.status, outcome.exit_code) == ("stopped", 75)


def test_a_stop_note_that_the_engine_removed_is_written_again(run: RunFolder) -> None:
    class Remover(Watcher):
        def tick(self) -> None:
            if self.said and not self.removed:
                self.removed = True
                run.stop_note.unlink(missing_ok=True)

        removed = False

    view = Remover(press_at=1)
    assert follow(run, fake(run, steps=400, pause=0.05), view).status == "stopped"


def test_a_second_ctrl_c_ends_at_once(run: RunFolder) -> None:
    view = Watcher(press_at=3, again=True)
    outcome = follow(run, fake(run, "hang", steps=50, pause=0.02), view)
    assert (outcome.status, outcome.exit_code) == ("stopped", 130)
    assert view.said[-1] == "Ending at once."
    assert not alive(view.events[0]["pid"])


def test_an_engine_that_stays_after_its_last_event_is_ended(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.cli.follow.GRACE", 0.3)
    code = (
        "import sys, time; from luthier.spec.run import RunFolder; "
        "RunFolder(sys.argv[1]).emit('finished', status='succeeded', model='m', report={}); time.sleep(600)"
    )
    outcome = follow(run, [sys.executable, "-c", code, str(run.path)], Watcher())
    assert (outcome.status, outcome.exit_code) == ("succeeded", 0)


def test_an_error_of_ours_leaves_no_engine_behind(run: RunFolder) -> None:
    class Clumsy(Watcher):
        def tick(self) -> None:
            if self.events:
                raise ValueError("view")

    view = Clumsy()
    with pytest.raises(ValueError, match="view"):
        follow(run, fake(run, "hang"), view)
    assert not alive(view.events[0]["pid"])


def test_workers_in_sessions_of_their_own_end_too(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        end_at_once(parent)
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or " Z " in Path(f"/proc/{worker}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the worker lives on")


@pytest.mark.parametrize(
    ("code", "returned", "wanted"),
    [("invalid_data", 1, 2), ("unavailable", 1, 75), ("internal", 1, 1), ("of_another_room", 2, 2), ("odd", -9, 1)],
)
def test_exit_codes(code: str, returned: int, wanted: int) -> None:
    assert exit_code_of(code, returned) == wanted


# -- what is printed at the end ----------------------------------------------------------------------------------------


def test_json_ends_with_the_outcome(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_run(run, REQUEST, fake(run), as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["type"] for line in lines[:-1]][:3] == ["started", "phase", "phase"]
    assert lines[-2]["type"] == "finished"
    assert lines[-1] == {"run": str(run.path), "status": "succeeded", "model": str(run.model), "report": REPORT}


def test_json_of_a_failure(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_run(run, REQUEST, fake(run, "die"), as_json=True) == 1
    told = capsys.readouterr()
    final = json.loads(told.out.splitlines()[-1])
    assert set(final) == {"run", "status", "model", "report", "code", "message", "hint", "param", "problems"}
    assert (final["status"], final["code"], final["model"], final["report"]) == ("failed", "internal", None, None)
    assert told.err == ""


def test_plain_failure_is_short(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert show_run(run, REQUEST, fake(run, "fail"), as_json=False) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Error: 30 problems in the data."
    assert lines[21] == "  and 10 more."
    assert lines[22] == f"Look at them. Once that is put right: luthier train --resume {run.path}"


def test_what_no_resume_can_change_is_not_resumed(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    event = {"message": "The loss became nan.", "hint": "Lower --learning-rate.", "code": "invalid_request"}
    _print_failure(run, {**event, "param": "learning_rate"}, [])
    told = capsys.readouterr().err
    assert "start another, with another --out" in told and "--resume" not in told
    _print_failure(run, {**event, "param": "data"}, [])
    assert f"Once that is put right: luthier train --resume {run.path}" in capsys.readouterr().err


def test_plain_lines_of_a_killed_engine(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    show_run(run, REQUEST, fake(run, "die"), as_json=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "The engine's last words:",
        "  last words of the engine",
        "Error: The engine was killed (signal 9), often because memory ran out.",
    ]


def test_outcome_is_plain_data() -> None:
    assert Outcome("succeeded", 0) == Outcome("succeeded", 0, {}, [])
