"""One attempt at a run, watched from outside: start the engine, pass its events on, end when it ends.

Ctrl-C asks the engine to stop at a checkpoint; a second one ends it at once. The engine lives in a session of its
own, so the terminal's Ctrl-C reaches only this process. Does not know: how events are shown (live.py), torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from luthier.cli.output import short, typed
from luthier.settings import child_environment
from luthier.spec.errors import Broken, LuthierError, NotNow
from luthier.spec.run import TERMINAL, UNTOLD, RunFolder

POLL = 0.1  # seconds between two looks at the events
GRACE = 15.0  # seconds that the engine has to leave after its last event
LOG_LINES = 12
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class View(Protocol):
    """Whoever shows a run."""

    def see(self, event: dict[str, Any]) -> None: ...

    def say(self, message: str) -> None: ...

    def tick(self) -> None: ...


@dataclass
class Outcome:
    """How an attempt ended. `event` is its last event, made up here when the engine died without one."""

    status: str  # succeeded | estimated | stopped | failed
    exit_code: int
    event: dict[str, Any] = field(default_factory=dict)
    log_tail: list[str] = field(default_factory=list)


def engine_command(run: RunFolder, processes: int = 1, estimate: bool = False, part: Sequence[str] = ()) -> list[str]:
    """The command that carries out `run`, in one process or in `processes` of them, or only its `estimate`, or only
    `part` of it: ("--part", share) or ("--score", share)."""
    engine = ["luthier.engine", *(["--estimate"] if estimate else []), *part, str(run.path)]
    if processes == 1:
        return [sys.executable, "-m", *engine]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", *torchrun, "-m", *engine]


def resume_command(run: RunFolder) -> str:
    return typed("luthier", "train", "--resume", short(run.path))


def follow(run: RunFolder, command: Sequence[str], view: View) -> Outcome:
    """Start `command` and stay with it to its end. Never leaves it running behind an error of ours."""
    offset, log_start = _size(run.events_file), _size(run.log)
    last: dict[str, Any] | None = None
    deadline: float | None = None
    with _interrupts() as interrupts, _engine(run, command) as process:
        stopping = _Stopping(run, view, process)
        while True:
            code = process.poll()  # before reading, so that what it wrote before it ended is read
            for after, event in run.events(offset):
                offset = after
                last = event if event["type"] in TERMINAL else last
                view.see(event)
            view.tick()
            if code is not None:
                break
            stopping.heed(len(interrupts), done=last is not None)
            if last is not None:
                deadline = deadline or time.monotonic() + GRACE
                if time.monotonic() > deadline:
                    end_at_once(process)
            time.sleep(POLL)
    if last is not None:
        return _ended(last, code, bool(interrupts))
    tail = _tail(run.log, log_start)
    if len(interrupts) > 1:
        event = {"type": "stopped", "status": "stopped", "step": None, "resume": resume_command(run)}
        return Outcome("stopped", INTERRUPTED, event)
    error = _death(run, code, tail)
    event = {"type": "failed", "status": "failed", **error.as_dict(), "problems": []}
    return Outcome("failed", error.exit_code, event, tail)


@contextlib.contextmanager
def _engine(run: RunFolder, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    environment = child_environment(PYTHONUNBUFFERED="1")  # engine.log is read when it dies
    with open(run.log, "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            end_at_once(process)
            process.wait()


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that grows with each Ctrl-C (or SIGTERM), instead of an exception in the middle of something."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stopping:
    """What each Ctrl-C does."""

    def __init__(self, run: RunFolder, view: View, process: subprocess.Popen[bytes]) -> None:
        self.run, self.view, self.process = run, view, process
        self.heard = 0

    def heed(self, count: int, done: bool) -> None:
        if count and not self.heard:
            self.view.say("Stopping after this step, at a checkpoint. Press Ctrl-C again to end at once.")
        if count and not done and not self.run.stop_asked:
            self.run.ask_to_stop()  # again when the engine, starting, took our note for one of an earlier attempt
        if count > 1 and self.heard < 2:
            self.view.say("Ending at once.")
            end_at_once(self.process)
        self.heard = count


def end_at_once(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the engine and everything below it. torchrun gives each worker a session of its own, so the process
    group alone would leave them behind."""
    from luthier.work.launch import descendants

    doomed = [process.pid, *descendants(process.pid)]
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _ended(event: dict[str, Any], code: int, interrupted: bool) -> Outcome:
    status = str(event["status"])
    if status == "failed":
        return Outcome(status, exit_code_of(str(event.get("code")), code), event)
    if status == "stopped":  # unfinished is no success: a script must not go on as if there were a model
        return Outcome(status, INTERRUPTED if interrupted else NotNow.exit_code, event)
    return Outcome(status, 0, event)


def exit_code_of(code: str, returned: int) -> int:
    """The exit code that belongs to an error's code word; for words of other rooms, what the engine returned."""
    waiting = [LuthierError]
    while waiting:
        kind = waiting.pop()
        if kind.code == code:
            return kind.exit_code
        waiting += kind.__subclasses__()
    return returned if returned in (1, 2, 75) else 1


def _death(run: RunFolder, code: int, tail: Sequence[str]) -> LuthierError:
    hint = f"Its output is in {short(run.log)}. Go on from the last checkpoint with: {resume_command(run)}"
    if code == NotNow.exit_code and tail:
        return NotNow(tail[-1])
    if code == UNTOLD:
        return NotNow("The disk is full or cannot be written: the engine could not say how far it came.", hint=hint)
    workers = re.findall(r"Signal (\d+) \(", "\n".join(tail))  # torchrun's words on what became of its workers
    code = -int(workers[-1]) if workers and code == 1 else code
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Broken("The engine was killed (signal 9), often because memory ran out.", hint=hint)
    if code < 0:
        return Broken(f"The engine was ended by signal {-code} ({signal.strsignal(-code)}).", hint=hint)
    return Broken(f"The engine ended with exit code {code} and did not say why.", hint=hint)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, start: int) -> list[str]:
    """The last lines that this attempt wrote to engine.log."""
    with open(path, "rb") as handle:
        handle.seek(max(start, _size(path) - 8_000))
        text = handle.read().decode("utf-8", "replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LOG_LINES:]
