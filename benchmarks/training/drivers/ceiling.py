"""What this machine can do at most: matrix products of a step's own shapes, and memory traffic. Writes result.json.

Products are torch's in bfloat16 and float32, and ours of float16 numbers where there are any (0 where not). The
ceiling is the best of several tries of each shape, and of the shapes the best, in GFLOP/s.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.drivers import job as jobs
from luthier.engine import products

ROWS = 2048
TRIES = 12


def best(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """GFLOP/s of [rows, inner] x [inner, columns], the fastest of TRIES."""
    multiply = torch.nn.functional.linear
    if dtype == torch.float16:
        if products.absent():
            return 0.0
        multiply, dtype = (lambda a, b: products.halved(a, b.t())), torch.float32
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    fastest = float("inf")
    for _ in range(TRIES):
        begun = time.perf_counter()
        multiply(left, right)
        fastest = min(fastest, time.perf_counter() - begun)
    return 2 * rows * inner * columns / fastest / 1e9


def triad() -> float:
    """GB/s of a = b + s * c over arrays that no cache holds."""
    size = 32 * 1024 * 1024
    one, other, out = torch.ones(size), torch.ones(size), torch.empty(size)
    fastest = float("inf")
    for _ in range(TRIES):
        begun = time.perf_counter()
        torch.add(one, other, alpha=3.0, out=out)
        fastest = min(fastest, time.perf_counter() - begun)
    return 3 * 4 * size / fastest / 1e9


def machine() -> dict[str, Any]:
    """What it is: processor and cores, bytes of memory, and how busy others keep it."""
    said = Path("/proc/cpuinfo")
    lines = said.read_text(encoding="utf-8").splitlines() if said.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    job = jobs.read()
    config = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = [(ROWS, hidden, inner), (ROWS, inner, hidden), (ROWS, hidden, hidden)]
    record = jobs.Record(job)
    record.notes |= machine() | {
        "bfloat16": max(best(*shape, torch.bfloat16) for shape in shapes),
        "float32": max(best(*shape, torch.float32) for shape in shapes),
        "float16": max(best(*shape, torch.float16) for shape in shapes),
        "gigabytes": triad(),
        "torch": torch.__version__,
    }
    record.begin()
    record.finish()


if __name__ == "__main__":
    main()
