"""A run carried out by engines, one after another if need be, and watched to its end.

An engine that is killed is started again from the last checkpoint, until DEATHS of them died without getting as far as
a new one. One that has said its last word and does not leave is ended. A pause, and the worker's own end, are a note in
the run folder: the engine saves and leaves by itself. A cancel is a signal. Where the engine of a worker that was lost
still runs (the worker was stopped, or cut off, but not dead), it is asked to save and leave first; then it is killed.
Does not know: the store's tables (record.py writes), files and models.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.spec.errors import NotNow
from luthier.spec.run import UNTOLD, RunFolder, is_out_of_memory
from luthier.store.leases import LeaseLost
from luthier.work.hold import Hold
from luthier.work.launch import Child
from luthier.work.layout import PARAMS
from luthier.work.record import Recorder

logger = logging.getLogger("luthier.work")

POLL = 0.1  # seconds between two looks at the run
WRITE_EVERY = 0.3  # seconds between two writes of what was seen: many steps then cost one commit
DEATHS = 3
TERM_SECONDS = 5.0  # from SIGTERM to SIGKILL
LEAVE_SECONDS = 5.0  # from the last event to SIGKILL
SAVE_SECONDS = 20.0  # that a worker which is to end leaves the engine to save; who ended it waits 30
ASK_SECONDS = 20.0  # that an engine of a lost worker has to save and leave before it is killed
BUSY_SECONDS = 120.0  # and to be gone, where it runs on another machine and cannot be killed from here
LOG_BYTES = 4000
DISK_FULL = "The disk of the data folder is full or cannot be written: the engine could not even say how far it came."


@dataclass(frozen=True, slots=True)
class Fate:
    """How it ended; the last three say why it failed. `released`: saved or broken off, for the queue, a pause, or the
    owner who wants it cancelled."""

    kind: Literal["finished", "released", "failed"]
    code: str = "internal"
    message: str = "The engine failed."
    param: str | None = None


class Attempt:
    """The attempts of one worker at one run."""

    def __init__(
        self,
        run: RunFolder,
        recorder: Recorder,
        hold: Hold,
        stop: threading.Event,
        command: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self.run, self.recorder, self.hold, self.stop = run, recorder, hold, stop
        self.command, self.environment = command, environment

    def to_the_end(self) -> Fate:
        """Raises LeaseLost, with no engine left running; OSError."""
        if not self._alone():
            return Fate("failed", "unavailable", "An engine of a lost worker still holds the job's run folder.")
        self.recorder.read()
        if self._has_result():  # by a worker that was lost before it could say so
            self._write_all()
            return Fate("finished")
        if self.hold.wanted == "cancel" or self.stop.is_set():
            return Fate("released")
        deaths, checkpoints = 0, self.recorder.checkpoints
        while True:
            code, ended = self._one()
            if ended:
                return Fate("released")
            fate = self._told()
            if fate is not None:
                return fate
            if code == UNTOLD:
                return Fate("failed", "unavailable", DISK_FULL)
            if code >= 0:
                logger.warning("%s: exit code %s: %s", self.run.path.name, code, self._last_words())
                why = "memory ran out." if is_out_of_memory(self._last_words()) else "it did not say why."
                return Fate("failed", message=f"The engine ended with exit code {code}: {why}")
            deaths = 1 if self.recorder.checkpoints > checkpoints else deaths + 1
            checkpoints = self.recorder.checkpoints
            logger.warning("%s: engine ended by signal %s, death %s", self.run.path.name, -code, deaths)
            if deaths >= DEATHS:
                return Fate("failed", "engine_killed", _killed(-code, deaths))

    def _alone(self) -> bool:
        """Wait until no engine of another worker holds the run: whether it is so, or nothing is wanted of us any more.

        Raises LeaseLost."""
        begun = time.monotonic()
        while not self._free():
            waited = time.monotonic() - begun
            cancelled = self.hold.wanted == "cancel"
            if cancelled or waited > ASK_SECONDS:
                self._kill_holder()
            elif not self.run.stop_asked:
                self.run.ask_to_stop()
            if self.stop.is_set() or (cancelled and waited > TERM_SECONDS):
                return True
            if waited > BUSY_SECONDS:
                return False
            self.hold.check()
            self.stop.wait(POLL)
        return True

    def _free(self) -> bool:
        try:
            with self.run.owned():
                return True
        except NotNow:
            return False

    def _kill_holder(self) -> None:
        """The engine that last said it began here, when it is a process of this machine and still of this run."""
        started = [event for _, event in self.run.events() if event["type"] == "started"]
        pid = int(started[-1]["pid"]) if started else 0
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if pid > 0 and os.fsencode(self.run.path.name) in b"/".join(words).split(b"/"):
                logger.warning("%s: killing the engine %s of a lost worker", self.run.path.name, pid)
                os.kill(pid, signal.SIGKILL)

    def _one(self) -> tuple[int, bool]:
        """One engine, to its end: its exit code; whether it was us, or the note, that ended it."""
        self.recorder.forget_the_end()
        self.run.stop_note.unlink(missing_ok=True)
        with Child(self.command, log=self.run.log, environment=self.environment) as child:
            last_word = stopping = None
            written = 0.0
            while True:
                code = child.poll()  # before reading: what it wrote before it ended is read
                self.recorder.read()
                if self.hold.wanted == "cancel":
                    child.end(TERM_SECONDS)
                    self.recorder.read()
                    self._write_all()
                    return 0, True
                self.hold.check()
                if code is not None:
                    break
                now = time.monotonic()
                if now - written >= WRITE_EVERY:
                    self._write()
                    written = now
                if self.recorder.terminal is not None:
                    last_word = last_word or now
                    if now - last_word > LEAVE_SECONDS:
                        code = child.end(0)
                        break
                elif self.stop.is_set() or self.hold.wanted == "pause":
                    if not self.run.stop_asked:  # again when the engine, starting, took it for an older note
                        self.run.ask_to_stop()
                    if self.stop.is_set():
                        stopping = stopping or now
                        if now - stopping > SAVE_SECONDS:
                            child.end(0)
                            return 0, True
                time.sleep(POLL)
        self._write_all()
        interrupted = self.stop.is_set() and self.recorder.terminal is None
        return code, interrupted

    def _write(self) -> None:
        """What the database does not take now it is offered again. Raises LeaseLost."""
        self.hold.check()
        try:
            self.recorder.write()
        except LeaseLost:
            raise
        except NotNow as error:
            self.hold.check()
            logger.warning("%s: %s", self.run.path.name, error)

    def _write_all(self) -> None:
        while True:
            self._write()
            if not self.recorder.waiting:
                return
            time.sleep(POLL)

    def _told(self) -> Fate | None:
        """What the engine's last event comes to; None when it wrote none."""
        event = self.recorder.terminal
        if event is None:
            return None
        if event["type"] == "finished":
            if self._has_result():
                return Fate("finished")
            return Fate("failed", message="The engine finished and left no model.")
        if event["type"] == "stopped":
            return Fate("released")
        return _failed(event)

    def _has_result(self) -> bool:
        return (self.recorder.terminal or {}).get("type") == "finished" and self.run.model.is_dir()

    def _last_words(self) -> str:
        if not self.run.log.is_file():
            return ""
        with open(self.run.log, "rb") as handle:
            handle.seek(max(0, self.run.log.stat().st_size - LOG_BYTES))
            return handle.read().decode("utf-8", "replace")


def _failed(event: dict[str, object]) -> Fate:
    code, param = str(event.get("code") or "internal"), PARAMS.get(str(event.get("param")))
    problems = event.get("problems")
    more = ""
    if isinstance(problems, list) and problems:
        param = param or "training_file"
        more = "".join(f" Line {one.get('line')}: found {one.get('found')}." for one in problems[:3])
    if code == "invalid_data":
        param = param or "training_file"
        code = f"invalid_{param}"
    return Fate("failed", code, f"{event.get('message') or 'The engine failed.'}{more}", param)


def _killed(number: int, deaths: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unknown"
    why = " This happens when memory runs out." if number == signal.SIGKILL else ""
    return f"The engine was killed {deaths} times without a new checkpoint, at last by signal {number} ({name}).{why}"
