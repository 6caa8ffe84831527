"""The run folder: the only thing that crosses the border between the engine and whoever started it.

    RUN/
      request.json      what was asked ("auto" allowed)
      spec.json         what it came to, with hashes of data, base model and tokenizer
      events.jsonl      one JSON object a line, appended whole
      metrics.csv       one row an optimizer step
      checkpoints/      step-00000012/ ...: appear complete, by rename
      published/        step-00000012/ ...: checkpoints as models that can be used, when asked for
      model.scale-1/    the result as it was trained, when model/ is at another scale
      model/            the result: adapter or full model, tokenizer, template, generation_config
      report.json       what was measured
      report.html       the same as a page
      answers/          answers of the proof, when they are not to be shared with other runs
      engine.log        what the engine process printed
      stop              the stop note: the engine checkpoints and leaves when it sees it
      lock              held (flock) by the engine that owns the run

Writers replace whole files (write beside, fsync, rename) or append whole lines; readers ignore a last half line.
Does not know: what training is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.spec.errors import NotFound, NotNow

# Events, in the order a run emits them; the value says which keys each carries beside `time` and `type`.
EVENTS: dict[str, str] = {
    "started": "pid, run, version, resumed_from (step or null)",
    "phase": "name (load | data | plan | forecast | reference | train | validate | save | keep | prove | curve | "
    "forgetting), message",
    "progress": "name, done, total: long work that is not a training step",
    "prepared": "rows, train_rows, validation_rows, tokens, supervised_tokens, physical_tokens, tree_ratio, "
    "dropped, truncated, steps, settings (the resolved ones)",
    "forecast": "what the run will take: the fields of spec/forecast.py, and seconds (their sum)",
    "warning": "message, hint",
    "step": "step, steps, epoch, loss, learning_rate, grad_norm, tokens, supervised_tokens, seconds, "
    "token_accuracy, sequence_accuracy (share of the rows whose answer is right in every token; both of this step's "
    "rows, before its update; null with dpo), preference (with dpo reward_accuracy and preference_accuracy, shares of "
    "this step's pairs, and reward_margin; else null), examples (rows so far, repeats counted), memory_bytes, "
    "eta_seconds (until the run is over, ending included)",
    "validation": "step, epoch, loss, token_accuracy, sequence_accuracy, supervised_tokens, "
    "classification (name: number or null; null when it was not asked for), preference (as in step)",
    "checkpoint": "step, path, best (bool), published (a servable folder, or null)",
    "rung": "share (N/D, of all steps), step, steps, loss, metric, higher_is_better, score (null unless it was asked "
    "for), base and forgetting (the base's score, and what was forgotten; null unless that decides too), rows: a part "
    "of a run that others are compared with ended here, and `stopped` follows",
    "finished": "status (succeeded; or estimated: nothing was asked for but the forecast), model, report (without the "
    "rows of its proof)",
    "stopped": "status (stopped), step, resume (the command that goes on)",
    "failed": "status (failed), code, message, hint, param, problems",
}
TERMINAL = frozenset({"finished", "stopped", "failed"})
UNTOLD = 74  # exit code of an engine whose disk did not take its last event (EX_IOERR of sysexits.h)


def is_full(error: BaseException) -> bool:
    """Whether `error` tells of a disk without room. Libraries that are not Python's own tell in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


NO_MEMORY = (  # as Python, torch, oneDNN, OpenBLAS and the dynamic linker say it, in lower case
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc", "memoryerror",
    "memory allocation", "could not create a primitive", "failed to map segment",
)  # fmt: skip


def is_out_of_memory(words: str) -> bool:
    """Whether what a process said at its end tells that memory ran out."""
    return any(sign in words.lower() for sign in NO_MEMORY)


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes | str) -> None:
    """Replace `path` so that a reader, or a crash at any instant, sees the old bytes or the new ones, never a part."""
    raw = data.encode() if isinstance(data, str) else data
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as handle:
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def append_line(path: Path, text: str) -> None:
    """Append one whole line in a single write, one writer at a time, so that lines of two processes never mix.

    A half line that a killed writer left is closed first: it stays one broken line instead of eating ours. Raises
    OSError, also when the disk took only a part.
    """
    raw = text.encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # else the end of a line that is being written looks like a half one
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            raw = b"\n" + raw
        if os.write(handle, raw) != len(raw):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


class RunFolder:
    """Paths and safe writes of one run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.request = self.path / "request.json"
        self.spec = self.path / "spec.json"
        self.events_file = self.path / "events.jsonl"
        self.metrics = self.path / "metrics.csv"
        self.checkpoints = self.path / "checkpoints"
        self.published = self.path / "published"
        self.model = self.path / "model"
        self.report = self.path / "report.json"
        self.answers = self.path / "answers"
        self.page = self.path / "report.html"
        self.log = self.path / "engine.log"
        self.stop_note = self.path / "stop"
        self.lock_file = self.path / "lock"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """An existing run. Raises NotFound when `path` is not one."""
        run = cls(path)
        if not run.request.is_file():
            raise NotFound(
                f"{run.path} is not a run folder: it has no request.json.",
                hint="Give the folder that `luthier train --out` named, or start a run with `luthier train`.",
            )
        return run

    def create(self, request: dict[str, Any]) -> RunFolder:
        """Lay out a new run. Raises NotNow when the folder already holds one or cannot be written.

        A run that failed before its first step has nothing to lose: correcting the command and giving the same folder
        again replaces it.
        """
        self.refuse_taken()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.request, request)
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def refuse_taken(self) -> None:
        """Raises NotNow when no new run can be laid out here: there is one, or there can be no such folder."""
        try:
            taken = self.request.exists()
        except OSError as error:  # a name that is too long, for one
            raise self._unwritable(error) from error
        if taken and not self._cleared():
            raise NotNow(
                f"{self.path} already holds a run.",
                hint=f"Go on with it (`luthier train --resume {self.path}`) or name another --out.",
                param="out",
            )

    def _unwritable(self, error: OSError) -> NotNow:
        return NotNow(
            f"The run folder {self.path} cannot be written: {error.strerror}.",
            hint="Choose a folder that you may write to with --out.",
            param="out",
        )

    def _cleared(self) -> bool:
        """Remove what is left of a run that failed before its first step; False when there is more than that."""
        kinds = [event["type"] for _, event in self.events()]
        kept = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        if kept or "step" in kinds or self.model.exists() or kinds[-1:] != ["failed"]:
            return False
        with self.owned():
            for left in (
                self.request,
                self.spec,
                self.events_file,
                self.metrics,
                self.report,
                self.page,
                self.log,
                self.stop_note,
            ):
                left.unlink(missing_ok=True)
        return True

    def emit(self, type: str, **fields: Any) -> None:
        """Append one event. `type` is one of EVENTS."""
        assert type in EVENTS, type
        event = {"time": round(time.time(), 3), "type": type, **fields}
        append_line(self.events_file, json.dumps(event, ensure_ascii=False, allow_nan=False, default=str))

    def events(self, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Whole events from byte `offset` on, each with the offset after it. A last half line is left for later."""
        if not self.events_file.exists():
            return
        with open(self.events_file, "rb") as handle:
            handle.seek(offset)
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # a half line left by a killed writer, closed by the next append_line
                yield offset, event

    def ask_to_stop(self) -> None:
        write_whole(self.stop_note, "stop\n")

    @property
    def stop_asked(self) -> bool:
        return self.stop_note.exists()

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the run's lock; the kernel lets go of it however this process ends. Raises NotNow when it is held."""
        with open(self.lock_file, "a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise NotNow(
                    f"Another process is working on {self.path}.",
                    hint="Wait for it, or end it; then try again.",
                ) from error
            yield
