"""A child process that does not outlive us: own session, tied to this process, ended with all its descendants.

`python -m luthier.work.launch PARENT COMMAND...` asks the kernel to end it with its parent, then becomes COMMAND. Where
the kernel has no such call (it is Linux's prctl) a killed worker leaves its engine running; the run folder's lock still
keeps a second engine away from it. The kernel counts the *thread* that started the child as its parent, so children are
started by threads that last as long as they do.
Does not know: what the child does; jobs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
NICE = 10  # of 19: a job beside a busy server gets about a third of the machine, all of it when nobody asks
OOM_SCORE = 500  # of 1,000: as if it held half of all memory more than it does
POLL = 0.05


def tied(command: Sequence[str]) -> list[str]:
    """`command`, to be started by this process and to end with it."""
    return [sys.executable, "-m", "luthier.work.launch", str(os.getpid()), *command]


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies. Ends it now when that has happened already."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"The process {parent} that started this one is gone.")


class Child:
    """A running command, the leader of its own process group; leaving the block ends whatever is left of it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        input: bytes | None = None,
        output: Path | None = None,
    ) -> None:
        """Start it: what it prints is appended to `log`, or its standard output goes to `output`. Raises OSError."""
        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(open(log, "ab"))
            out = errors if output is None else stack.enter_context(open(output, "wb"))
            self.process = subprocess.Popen(
                tied(command),
                stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
                stdout=out,
                stderr=errors,
                start_new_session=True,
                env=dict(environment),
            )
        if input is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code tells
                self.process.stdin.write(input)
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end(0)

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), None while it runs."""
        return self.process.poll()

    def end(self, grace: float) -> int:
        """SIGTERM to the group, SIGKILL after `grace` seconds to it and every descendant; the exit code.

        Descendants are looked up while their parents live: one that left the group is known only by them.
        """
        below = descendants(self.process.pid)
        if grace > 0 and self.process.poll() is None:
            self._signal_group(signal.SIGTERM)
            deadline = time.monotonic() + grace
            while self.process.poll() is None and time.monotonic() < deadline:
                below |= descendants(self.process.pid)
                time.sleep(POLL)
        self._signal_group(signal.SIGKILL)
        for pid in below:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        return self.process.wait()

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def descendants(pid: int) -> set[int]:
    """The processes below `pid`, by /proc (none where there is no /proc)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            after_name = entry.read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(after_name[1]), []).append(int(entry.parent.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting.extend(below)
    return found


def volunteer() -> None:
    """When the machine's memory runs out, let the kernel end this process before those that serve."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def give_way() -> None:
    """Compute when those that serve do not. Where the kernel weighs sessions, not processes, ask that of ours, too."""
    os.nice(max(0, NICE - os.nice(0)))
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICE))


def main(arguments: Sequence[str]) -> None:
    die_with(int(arguments[0]))
    volunteer()
    give_way()
    os.execvp(arguments[1], list(arguments[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
