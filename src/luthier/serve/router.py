"""Asks to replicas: a child process for each base that is asked, started when needed and again when it dies.

The protocol is spec/serving.py. At most `settings.replicas` processes live at once; the one that rested longest makes
room for another base. Whatever happens to a process, every ask gets a last Part: nothing waits for the dead, nor for
one that has stopped without dying, which is pinged, found silent and killed.
Does not know: HTTP, text, torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from luthier.settings import Settings, child_environment
from luthier.spec.errors import Broken, LuthierError, NotFound, NotNow
from luthier.spec.serving import Ask, Part

log = logging.getLogger("luthier.serve")

BUFFER = 4096  # parts that may wait for a reader; one that is further behind has its answer cancelled
LARGEST_LINE = 256 * 2**20
LARGEST_LOG = 10_000_000  # bytes; a longer log is set aside when its replica starts
GRACE = 3.0  # seconds that a replica has to leave when its stdin ends
PING_SECONDS = 2.0  # between two pings; counted, not timed: a server that was stopped itself must not blame the others
SILENT_PINGS = 6  # in a row without a word after which a replica is killed
SILENT_PINGS_LOADING = 90  # and before it is ready: imports and a cold disk may keep its threads for long
LONGEST_REST = 30.0  # seconds without a new try after replicas that did not come up
WHOLE = "folder:"  # a base of this name is the model in the folder that follows

Command = Callable[[Path, int], Sequence[str]]


def replica_command(folder: Path, adapters: int) -> Sequence[str]:
    return [sys.executable, "-m", "luthier.serve.replica", "--base", str(folder), "--adapters", str(adapters)]


class _Answer:
    """Parts on their way to one reader."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._parts: deque[Part] = deque()
        self._some = asyncio.Event()

    def put(self, part: Part) -> bool:
        """False when the reader is too far behind."""
        if len(self._parts) >= BUFFER and not part.finish:
            return False
        self._parts.append(part)
        self._some.set()
        return True

    def end(self, error: LuthierError) -> None:
        self.put(Part(id=self.name, finish="error", error=error.as_dict()))

    async def get(self) -> Part:
        while not self._parts:
            self._some.clear()
            await self._some.wait()
        return self._parts.popleft()


class _Replica:
    """One child process, from its start to its end."""

    def __init__(self, folder: Path, process: Process) -> None:
        self.folder = folder
        self.process = process
        self.up = asyncio.Event()  # it is ready, or it is dead
        self.alive, self.ready, self.leaving = True, False, False
        self.error: LuthierError | None = None  # why it is dead
        self.used = time.monotonic()
        self.pings = 0  # since its last word
        self.answers: dict[str, _Answer] = {}
        self.idle = asyncio.Event()
        self.idle.set()
        self.reading: asyncio.Task[None] | None = None

    def say(self, value: dict[str, Any]) -> None:
        if self.alive and self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(json.dumps(value).encode() + b"\n")

    def ask(self, ask: Ask) -> _Answer:
        answer = _Answer(ask.id)
        if ask.id in self.answers:
            answer.end(Broken(f"The ask {ask.id} is open already."))
            return answer
        self.used = time.monotonic()
        self.answers[ask.id] = answer
        self.idle.clear()
        self.say({"do": "generate", **ask.model_dump(exclude_defaults=True)})
        return answer

    async def drain(self) -> None:
        """Wait until it has read most of what was said to it."""
        if self.process.stdin is not None:
            with contextlib.suppress(ConnectionError):  # the reader of its stdout tells everybody
                await self.process.stdin.drain()

    def leave(self, answer: _Answer) -> None:
        """The reader of `answer` has gone."""
        if self.answers.get(answer.name) is answer:
            self._close(answer.name)
            self.say({"do": "cancel", "id": answer.name})

    def _close(self, name: str) -> None:
        del self.answers[name]
        self.used = time.monotonic()
        if not self.answers:
            self.idle.set()

    async def read(self) -> None:
        """Its stdout until it ends; then everybody who waits is told."""
        error: LuthierError = _gone()
        watching = asyncio.create_task(self._watch())
        try:
            await self._lines()
        except _Garbage as fault:
            log.error(
                "A replica broke the protocol.", extra={"fields": {"folder": str(self.folder), "why": str(fault)}}
            )
            error = Broken(f"The model's process broke the protocol and was ended: {fault}")
            self.kill()
        except asyncio.CancelledError:
            self.kill()
        finally:
            watching.cancel()
            self.alive, self.ready = False, False
            self.error = self.error or error
            for name in list(self.answers):
                self.answers[name].end(self.error)
                self._close(name)
            self.up.set()
        await self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
            with contextlib.suppress(ConnectionError):
                await self.process.stdin.wait_closed()

    async def _watch(self) -> None:
        """Until it is killed for its silence, or cancelled."""
        while self.pings < (SILENT_PINGS if self.ready else SILENT_PINGS_LOADING):
            self.say({"do": "ping"})
            self.pings += 1
            await asyncio.sleep(PING_SECONDS)
        log.error("A replica does not answer and is killed.", extra={"fields": {"folder": str(self.folder)}})
        self.error = NotNow("The model's process did not answer any more.", hint="Ask again: another one starts.")
        self.kill()

    async def _lines(self) -> None:
        stdout = self.process.stdout
        assert stdout is not None
        pieces: list[bytes] = []
        size = 0
        while data := await stdout.read(2**16):
            self.pings = 0
            *lines, last = data.split(b"\n")
            if lines:
                lines[0], pieces, size = b"".join([*pieces, lines[0]]), [], 0
            pieces.append(last)
            size += len(last)
            if size > LARGEST_LINE:
                raise _Garbage(f"a line of more than {LARGEST_LINE} bytes")
            for line in lines:
                if line.strip():
                    self._line(line)

    def _line(self, line: bytes) -> None:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise _Garbage(f"a line that is not JSON: {line[:80]!r}") from None
        if not isinstance(value, dict):
            raise _Garbage(f"a line that is no object: {line[:80]!r}")
        if "ready" in value:
            self._started(value)
        elif isinstance(value.get("id"), str):
            self._part(value)
        elif "alive" not in value:
            log.warning(
                "A replica complains.", extra={"fields": {"folder": str(self.folder), "line": str(value)[:500]}}
            )

    def _started(self, value: dict[str, Any]) -> None:
        if value["ready"] is True:
            self.ready = True
            self.up.set()
        else:
            error = value.get("error")
            why = error.get("message") if isinstance(error, dict) else None
            self.error = NotNow(f"The model cannot be loaded: {why or 'no reason was given'}")

    def _part(self, value: dict[str, Any]) -> None:
        answer = self.answers.get(value["id"])
        if answer is None:
            return  # its reader has gone
        try:
            part = Part.model_validate(value)
        except ValidationError as error:
            raise _Garbage(f"a part that is none: {str(error)[:200]}") from None
        if not answer.put(part):
            answer.end(NotNow("The answer was read too slowly and has been given up."))
            self.leave(answer)
        elif part.finish:
            self._close(answer.name)

    def kill(self) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Let it leave, or make it."""
        self.leaving = True
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            async with asyncio.timeout(GRACE):
                await self.process.wait()
        except TimeoutError:
            self.kill()
        if self.reading is not None:
            await asyncio.wait({self.reading})


class _Garbage(Exception):
    """What came from a replica is not the protocol."""


def _gone() -> NotNow:
    return NotNow("The model's process ended in the middle of its work.", hint="Ask again: another one starts.")


class Router:
    """The replicas of one server. All of it runs in one event loop."""

    def __init__(self, settings: Settings, folders: Mapping[str, Path], *, command: Command = replica_command) -> None:
        self.settings = settings
        self.folders = folders
        self._command = command
        self._replicas: dict[str, _Replica] = {}
        self._reading: set[asyncio.Task[None]] = set()
        self._failures: dict[str, tuple[int, float, LuthierError]] = {}  # base -> how often, until when, why
        self._starting = asyncio.Lock()  # first come, first served: nobody is passed over when room is short
        self._closed = True

    async def start(self) -> None:
        """Replicas start when they are asked."""
        self._closed = False
        self._starting = asyncio.Lock()

    async def close(self) -> None:
        """End every replica. What is in flight ends with an error."""
        self._closed = True
        replicas = list(self._replicas.values())
        self._replicas.clear()
        await asyncio.gather(*(replica.end() for replica in replicas))
        if self._reading:  # of those that died, or that nobody waited for
            _, late = await asyncio.wait(set(self._reading), timeout=GRACE)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    def ready(self, base: str) -> bool:
        """Whether an ask would be taken at once."""
        replica = self._replicas.get(base)
        return replica is not None and replica.ready

    async def generate(self, base: str, ask: Ask) -> AsyncIterator[Part]:
        """The parts of the answer, the last with `finish`; `error` when it could not be given. Closing this iterator
        early cancels the ask."""
        try:
            replica = await self._replica(base)
        except LuthierError as error:
            yield Part(id=ask.id, finish="error", error=error.as_dict())
            return
        answer = replica.ask(ask)  # at once: between the look and the ask it must not die or leave
        try:
            await replica.drain()
            while True:
                part = await answer.get()
                yield part
                if part.finish:
                    return
        finally:
            replica.leave(answer)

    async def _replica(self, base: str) -> _Replica:
        """The running replica of `base`, waited for. Raises LuthierError."""
        while True:
            replica = self._replicas.get(base)
            if replica is None or not replica.alive or replica.leaving:
                async with self._starting:
                    replica = await self._started(base)
            await replica.up.wait()
            if replica.ready and not replica.leaving:
                self._failures.pop(base, None)
                return replica
            if not replica.alive and not replica.leaving:
                raise self._failed(base, replica)

    def _failed(self, base: str, replica: _Replica) -> LuthierError:
        """Remember that `replica` did not come up, so that the next try waits a while."""
        error = replica.error or _gone()
        if self._replicas.get(base) is replica:
            del self._replicas[base]
            times = self._failures.get(base, (0, 0.0, error))[0] + 1
            self._failures[base] = times, time.monotonic() + min(2.0 ** (times - 1), LONGEST_REST), error
            log.error("A replica did not start.", extra={"fields": {"base": base, "why": str(error)}})
        return error

    async def _started(self, base: str) -> _Replica:
        """The replica of `base`, on its way at least. Only under the lock."""
        there = self._replicas.get(base)
        if there is not None and there.alive and not there.leaving:
            return there
        self._check_open()
        if base in self._failures and self._failures[base][1] > time.monotonic():
            raise self._failures[base][2]
        folder = self._folder(base)
        if there is not None:
            await there.idle.wait()  # one that is to leave ends its answers first
            self._replicas.pop(base, None)
            await there.end()
        await self._make_room()
        process = await self._spawn(folder)
        replica = _Replica(folder, process)
        replica.reading = asyncio.create_task(replica.read())
        self._reading.add(replica.reading)
        replica.reading.add_done_callback(self._reading.discard)
        self._replicas[base] = replica
        try:
            self._check_open()
        except NotNow:  # closed meanwhile: close() did not see this one
            self._replicas.pop(base, None)
            await replica.end()
            raise
        return replica

    def _check_open(self) -> None:
        if self._closed:
            raise NotNow("The server is stopping.")

    def _folder(self, base: str) -> Path:
        folder = Path(base.removeprefix(WHOLE)) if base.startswith(WHOLE) else self.folders.get(base)
        if folder is None:
            raise NotFound(f"This server has no base {base[:100]!a}.", param="model")
        return folder

    async def _make_room(self) -> None:
        """End replicas until another may start: the one idle for longest first; else the one asked longest ago, which
        takes nothing new from now on and ends when its answers have."""
        for base in [base for base, replica in self._replicas.items() if not replica.alive]:
            await self._replicas.pop(base).end()
        while len(self._replicas) >= self.settings.replicas:
            base, oldest = min(self._replicas.items(), key=lambda item: (bool(item[1].answers), item[1].used))
            oldest.leaving = True
            await oldest.idle.wait()
            self._replicas.pop(base, None)
            await oldest.end()

    async def _spawn(self, folder: Path) -> Process:
        logs = self.settings.home / "logs"
        name = re.sub("[^A-Za-z0-9._-]", "-", folder.name)[:40]
        path = logs / f"replica-{name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}.log"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > LARGEST_LOG:
                path.replace(path.with_suffix(".log.1"))
            with open(path, "ab") as errors:
                return await asyncio.create_subprocess_exec(
                    *self._command(folder, self.settings.adapters),
                    stdin=PIPE,  # its end tells the replica that this process is gone
                    stdout=PIPE,
                    stderr=errors,
                    start_new_session=True,
                    env=child_environment(PYTHONUNBUFFERED="1"),
                )
        except OSError as error:
            raise NotNow(f"No process for the model could be started: {error}.") from error
