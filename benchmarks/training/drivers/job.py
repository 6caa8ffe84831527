"""What every driver shares: the job it reads, the clock it keeps, and what it writes when it is done.

Runs in the trainers' own environments, so it needs torch, numpy and safetensors and nothing else.

A driver calls `begin` when its first step begins, `part` after each micro-batch if it can, `step_done` and `learnt`
after each optimizer step, and `finish`. What comes before is its cold start; while files are written the clock stands
still. `over` says when the seconds of a job are spent.
Does not know: any trainer, the gate, what a time is compared with.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOADED = time.time()
FULL_ROWS = 64  # of each gradient of a full fine-tuning this many rows are kept


@dataclass(frozen=True)
class Job:
    """What a driver is asked to do. `micro` is rows in a micro-batch (0: the trainer's own default)."""

    model: str
    workload: str
    adapter: str  # folder of the adapter that everybody starts from
    out: str
    setting: str  # default | tuned
    rows_per_step: int
    steps: int
    micro: int
    rate: float
    full: bool
    seconds: float  # after so many no further step is begun
    gradients: bool  # write those of the first step
    keep_every: int  # write what was learnt after each so many steps; 0: never
    without: list[str] = field(default_factory=list)  # engine features to turn off (the ladder)
    precision: str = "bfloat16"  # | float32: of weights and activations when tuned

    @property
    def tuned(self) -> bool:
        return self.setting == "tuned"

    @property
    def autocast(self) -> bool:
        """Whether float32 weights are multiplied in bfloat16: by default, and where tuned trains every weight in it."""
        return not self.tuned or (self.full and self.precision == "bfloat16")

    @property
    def dtype(self) -> str:
        """Of the weights when tuned."""
        return "float32" if self.full else self.precision


def read() -> Job:
    return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def rows(job: Job, name: str = "train") -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the rows of the job's steps in order; labels are ids, or -100 where nothing is learnt.

    When tuned, the rows of a step are sorted by length: the same step with less padding.
    """
    from safetensors.numpy import load_file

    tensors = load_file(job.workload)
    ids, mask, lengths = (tensors[f"{name}.{kind}"] for kind in ("ids", "mask", "lengths"))
    found, start = [], 0
    for length in lengths.tolist():
        part = slice(start, start + length)
        row = ids[part].tolist()
        found.append((row, [token if on else -100 for token, on in zip(row, mask[part].tolist(), strict=True)]))
        start += length
    if name != "train":
        return found
    found = found[: job.rows_per_step * job.steps]
    if job.tuned:
        steps = [found[at : at + job.rows_per_step] for at in range(0, len(found), job.rows_per_step)]
        found = [row for step in steps for row in sorted(step, key=lambda row: len(row[0]))]
    return found


def plain_name(name: str) -> str:
    """A parameter's name as PEFT's files have it: without the adapter's own name."""
    return name.replace(".default.", ".")


@dataclass
class Record:
    """What a run came to; times in seconds."""

    job: Job
    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # seconds of all threads together, by step
    parts: list[tuple[int, float, float]] = field(default_factory=list)  # of the step in progress: rows, times so far
    peak_bytes: int = 0
    began: float = 0.0
    last: float = 0.0
    last_cpu: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> None:
        self.began = self.last = time.time()
        self.last_cpu = time.process_time()

    def part(self, rows: int) -> None:
        before = self.parts[-1][0] if self.parts else 0
        self.parts.append((before + rows, time.time() - self.last, time.process_time() - self.last_cpu))

    def unfinished(self) -> tuple[int, int, float, float] | None:
        """(tokens computed, tokens of the whole step, seconds, CPU seconds) of the step that was broken off.

        The first micro-batch warms up, so it is left out if there is another.
        """
        if not self.parts:
            return None
        start = len(self.steps) * self.job.rows_per_step
        lengths = [len(ids) for ids, _ in rows(self.job)[start : start + self.job.rows_per_step]]
        first, last = self.parts[0] if len(self.parts) > 1 else (0, 0.0, 0.0), self.parts[-1]
        return sum(lengths[first[0] : last[0]]), sum(lengths), last[1] - first[1], last[2] - first[2]

    def step_done(self) -> None:
        now, cpu = time.time(), time.process_time()
        self.steps.append(now - self.last)
        self.cpu.append(cpu - self.last_cpu)
        self.last, self.last_cpu, self.parts = now, cpu, []
        self.peak_bytes = peak()

    @property
    def over(self) -> bool:
        return time.time() - self.began > self.job.seconds

    def gradients(self, named: Iterable[tuple[str, Any]]) -> None:
        """Called before each update with (name, gradient or None) of every weight that learns; the first are kept."""
        if self.job.gradients and not self.steps:
            self._save("gradients", named)

    def learnt(self, named: Iterable[tuple[str, Any]]) -> None:
        """Called after each step with (name, value) of every weight that learns."""
        if self.job.keep_every and len(self.steps) % self.job.keep_every == 0:
            self._save(f"weights-{len(self.steps)}", named)

    def _save(self, name: str, named: Iterable[tuple[str, Any]]) -> None:
        import torch
        from safetensors.torch import save_file

        begun, begun_cpu = time.time(), time.process_time()
        some = slice(FULL_ROWS if self.job.full and name == "gradients" else None)
        tensors = {
            plain_name(key): value.detach().float()[some].clone().contiguous()
            for key, value in named
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, Path(self.job.out) / f"{name}.safetensors")
        self.last += time.time() - begun
        self.last_cpu += time.process_time() - begun_cpu

    def finish(self) -> None:
        """Write result.json; it appears whole or not at all."""
        self.peak_bytes = self.peak_bytes or peak()
        threads: int | None = None
        if torch := sys.modules.get("torch"):
            threads = torch.get_num_threads()
        result = {
            "step_seconds": self.steps,
            "step_cpu_seconds": self.cpu,
            "losses": self.losses,
            "norms": self.norms,
            "unfinished": self.unfinished(),
            "rows_per_step": self.job.rows_per_step,
            "peak_bytes": self.peak_bytes,
            "seconds_to_first_step": self.began - born(),
            "threads": threads,
            **self.notes,
        }
        path = Path(self.job.out) / "result.json"
        path.with_suffix(".part").write_text(json.dumps(result, indent=1), encoding="utf-8")
        path.with_suffix(".part").rename(path)


def born() -> float:
    """time.time() at which this process was started."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except FileNotFoundError:  # no Linux: when this file was loaded is close enough
        return LOADED
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def peak() -> int:
    """Most bytes of memory that this process has held.

    The kernel's count of a process may start with that of the one that started it; the one of its memory does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
