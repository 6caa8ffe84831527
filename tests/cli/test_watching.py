"""Following a job: a server that goes away, a job that goes back to a checkpoint, the picture on a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from luthier.cli import watching
from luthier.cli.watching import Screen, Watched, watch
from luthier.spec.errors import NotNow

JOB = {"id": "ftjob-1", "model": "tiny", "status": "running", "fine_tuned_model": None, "error": None}


def metrics(number: int, step: int, at: int = 0, total: int | None = 10, **more: Any) -> dict[str, Any]:
    data = {"step": step, "train_loss": 1.0 / step, "total_steps": total, **more}
    return {"id": f"ftevent-{number}", "created_at": at, "type": "metrics", "message": f"Step {step}", "data": data}


def message(number: int, words: str) -> dict[str, Any]:
    return {"id": f"ftevent-{number}", "created_at": 0, "type": "message", "message": words, "data": {}}


class Server:
    """Plays client.Client: one (job, events so far) for each look; an error is raised instead."""

    def __init__(self, *looks: tuple[dict[str, Any], list[dict[str, Any]]] | Exception) -> None:
        self.looks = list(looks)
        self.events: list[dict[str, Any]] = []

    def get(self, path: str) -> dict[str, Any]:
        look = self.looks.pop(0)
        if isinstance(look, BaseException):
            raise look
        job, self.events = look
        return job

    def pages(self, path: str, limit: int | None) -> Any:
        return reversed(self.events)


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(watching.time, "sleep", waits.append)
    return waits


def followed(*looks: Any, after: str | None = None) -> int:
    server: Any = Server(*looks)
    return watch(server, "/fine_tuning/jobs/ftjob-1", after, False)


def test_a_server_that_restarts_is_waited_for(slept: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    one, two = message(1, "Started"), message(2, "Done")
    gone = NotNow("No answer.")
    done = {**JOB, "status": "succeeded", "fine_tuned_model": "ft:tiny"}
    assert followed((JOB, []), (JOB, [one]), gone, gone, gone, gone, gone, (done, [one, two])) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == ["Started", "Done", "Tuned model: ft:tiny"]
    assert told.err.splitlines() == ["No answer. Trying again."] * 5 + ["The server answers again."]
    assert slept == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_ctrl_c_leaves_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    stop: Any = KeyboardInterrupt()
    assert followed((JOB, []), (JOB, [message(7, "Started")]), stop) == 130
    assert "luthier jobs follow ftjob-1 --after ftevent-7\n" in capsys.readouterr().err


def test_the_command_that_goes_on_names_the_server_and_keeps_a_curve_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watching, "console", lambda stderr=False: Console(stderr=stderr, force_terminal=not stderr))
    stop: Any = KeyboardInterrupt()
    server: Any = Server((JOB, []), (JOB, [message(7, "Started")]), stop)
    assert watch(server, "/fine_tuning/jobs/ftjob-1", None, False, "http://there:1/a b") == 130
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("luthier jobs follow ftjob-1 --server 'http://there:1/a b'"), said


def test_the_pace_tells_what_is_left() -> None:
    watched = Watched(JOB)
    watched.see(metrics(1, 1, at=100))
    assert watched.left is None
    watched.see(metrics(2, 3, at=110))
    assert watched.left == 35.0
    watched.job = {**JOB, "status": "succeeded"}
    assert watched.left is None


def test_an_attempt_from_a_checkpoint_takes_the_curve_back() -> None:
    watched = Watched(JOB)
    for number, step in enumerate((1, 2, 3, 4, 3), 1):
        watched.see(metrics(number, step, valid_loss=0.5))
    assert [step for step, _ in watched.curve] == [1, 2, 3]
    assert [step for step, _ in watched.marks] == [1, 2, 3]
    assert watched.last == "ftevent-5"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_picture(encoding: str) -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    out = Console(file=raw, force_terminal=True, width=80, height=24, legacy_windows=False)
    watched = Watched(JOB)
    watched.see(message(0, "Fine-tuning job started"))
    for step in range(1, 9):
        watched.see(metrics(step, step, at=10 * step, full_valid_loss=0.4 if step == 8 else None))
    screen = Screen(watched, out)
    screen.words = "No answer. Trying again."
    with out.capture() as drawn:
        out.print(screen)
    shown = drawn.get()
    for words in ("ftjob-1", "step 8 of 10", "loss 0.1250", "0:20 left", "Fine-tuning job started", "Trying again"):
        assert words in shown
    assert len(shown.splitlines()) <= 24
    shown.encode(encoding)


def test_steps_without_a_known_end() -> None:
    watched = Watched(JOB)
    watched.see(metrics(1, 3, total=None))
    out = Console(file=io.StringIO(), width=60)
    out.print(Screen(watched, out))
    assert watched.left is None


def test_steps_of_pairs_show_their_reward_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    first = metrics(1, 1, train_reward_accuracy=0.0)
    held_out = {"full_valid_loss": 0.5, "full_valid_reward_accuracy": 0.625}
    second = metrics(2, 2, train_reward_accuracy=0.75, **held_out)
    done = {**JOB, "status": "succeeded", "fine_tuned_model": "ft:tiny"}
    assert followed((JOB, []), (JOB, [first]), (done, [first, second])) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert shown == [
        "step 1/10: loss 1.0000, reward accuracy 0.0%",
        "step 2/10: loss 0.5000, validation loss 0.5000, reward accuracy 75.0%, validation reward accuracy 62.5%",
    ]
    watched = Watched(JOB)
    watched.see(second)
    out = Console(file=io.StringIO(), width=120, height=30)
    out.print(Screen(watched, out))
    assert "loss 0.5000  reward accuracy 75.0%  validation reward accuracy 62.5%" in out.file.getvalue()  # type: ignore[attr-defined]
