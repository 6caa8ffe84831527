"""What this machine is and has: memory, processor, room on the disk, and what this process has taken of them.

Memory is the GPU's where there is one, for there a run may not fit; units are bytes and seconds. Does not know: models,
runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from luthier.settings import fix_product_workspace

SAMPLE = 8_000_000  # bytes written to time the disk
ROWS = 128  # of the products that are timed
USUAL = 5e-9  # seconds a byte: 200 MB/s

_peak = 0  # of before the last `forget_peak`


def peak_memory() -> int:
    """Most bytes of memory this process has held; on a GPU, of its tensors."""
    return max(_peak, _peak_now())


def forget_peak() -> bool:
    """From here on a new peak can be seen, although it be lower than an earlier one (which `peak_memory` remembers).
    False where the system cannot do it."""
    global _peak
    _peak = max(_peak, _peak_now())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Documentation/filesystems/proc.rst of the Linux kernel
    except OSError:
        return False
    return True


def peak_since() -> int:
    """Most bytes held since `forget_peak`."""
    return _peak_now()


def memory_now() -> int:
    """Bytes that this process holds; its peak where the system does not tell."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return _peak_now()


def trim() -> None:
    """Give memory that was freed, and that the C library keeps for later, back to the system. It keeps it in pieces:
    forests of other sizes find no piece that fits, and the process grows. Taking it anew costs a step some per cent of
    its time. Does nothing where the C library is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While inside, what takes more than a few pages is mapped by itself, so that it leaves no hole when it goes: a
    model's weights, which are put together into other matrices, would leave holes as large as themselves, into which
    the small change of every step is spread until all of them are full of it. Afterwards the C library keeps what is
    freed until `trim`, for taking memory anew costs time. Does nothing where it is not glibc."""
    _allocate(mapped_from=256 * 1024, returned_from=128 * 1024)
    try:
        yield
    finally:
        _allocate(mapped_from=32 * 1024 * 1024, returned_from=2**31 - 1)
        trim()


def _allocate(mapped_from: int, returned_from: int) -> None:
    """Bytes from which on glibc maps a piece by itself, and gives back what is free at its heap's end (mallopt(3))."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(-3, mapped_from)
        library.mallopt(-1, returned_from)


def _peak_now() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_limit() -> int | None:
    """The most that this process can ever have: the machine's memory, or less where a control group says so."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1])
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if "SC_PHYS_PAGES" in os.sysconf_names else []
    for place in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups 2 and 1
        with contextlib.suppress(OSError, ValueError):
            found.append(int((Path("/sys/fs/cgroup") / place).read_text()))
    return min(found, default=None)


def memory_free() -> int | None:
    """What could be taken now without swapping, beside what this process holds already."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def memory_room() -> int | None:
    """Bytes that this process can still take: of what is free and allowed."""
    limit = memory_limit()
    found = [memory_free(), None if limit is None else limit - memory_now()]
    return min((room for room in found if room is not None), default=None)


def repeatable() -> None:
    """Have a GPU add in one order, or a resumed run would not come to the bits of one that went through. To be called
    before the first product. Measured: docs/experiments.md."""
    if not torch.cuda.is_available():
        return
    fix_product_workspace()
    torch.set_deterministic_debug_mode("warn")  # the few that have one order only are told in the log
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def clock() -> float:
    """time.monotonic(), once a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """While inside, torch computes with so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of one thread in a product as a step has many of (ROWS rows, 1,536 x 576), in
    bfloat16 or float32. On the CPU."""
    return _product_rates()[dtype]


@functools.cache
def _product_rates() -> dict[torch.dtype, float]:
    """The best of many, the dtypes in turn: short enough to end before another process gets the core, and by one
    thread, as two would wait for each other there and make everything equally slow."""
    kinds = (torch.bfloat16, torch.float32)
    made = {kind: (torch.ones(ROWS, 576, dtype=kind), torch.ones(1536, 576, dtype=kind)) for kind in kinds}
    best = dict.fromkeys(kinds, math.inf)
    with threads(1), torch.inference_mode():
        for _ in range(60):
            for kind, (rows, weight) in made.items():
                begun = time.perf_counter()
                torch.nn.functional.linear(rows, weight)
                best[kind] = min(best[kind], time.perf_counter() - begun)
    return {kind: 2 * ROWS * 576 * 1536 / seconds for kind, seconds in best.items()}


def description() -> list[str]:
    """What decides how fast one and the same work goes here."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no gpu"
    return [platform.machine(), processor, str(os.cpu_count()), str(torch.get_num_threads()), gpu, torch.__version__]


def free_disk(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def disk_seconds_per_byte(folder: Path) -> float:
    """Of writing, hashing and syncing a file in `folder`; a usual figure where that cannot be tried (no room, a limit
    on file sizes), as the run may still need less."""
    sample = os.urandom(SAMPLE // 8) * 8
    path = folder / f".speed.{os.getpid()}.tmp"
    begun = time.monotonic()
    try:
        with open(path, "wb") as file:
            file.write(sample)
            file.flush()
            os.fsync(file.fileno())
        hashlib.sha256(sample)
        return (time.monotonic() - begun) / len(sample)
    except OSError:
        return USUAL
    finally:
        path.unlink(missing_ok=True)
