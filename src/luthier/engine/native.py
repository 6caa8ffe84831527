"""Our kernels' sources as a library: compiled where a compiler is, by whoever first needs it, and kept.

Nothing has to be compiled for Luthier to work (kernels.py). The library lies beside Python's own compiled files, or in
the cache where those may not be written; its name is the hash of all that decides what is in it: the source, the
compiler and the processor. Does not know: what its functions do.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from luthier.engine.tiles import KEYS, QUERIES
from luthier.settings import load_settings

SOURCES = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "attention.cpp", "halves.cpp", "native.cpp"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
PATIENCE = 120  # seconds for the compiler, which needs four


class Unavailable(Exception):
    """Why there is no such library here."""


def built() -> Path:
    """The library, compiled if it is not there yet. Raises Unavailable where it cannot be made."""
    if load_settings().kernels == "torch":
        raise Unavailable("LUTHIER_KERNELS is torch")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"they are made for Linux on x86-64, not {sys.platform} on {platform.machine()}")
    if not torch.cpu.get_capabilities().get("avx2"):
        raise Unavailable("the processor has no AVX2")
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("no C++ compiler was found: g++ makes them in seconds, once")
    source = [path.read_bytes() for path in SOURCES]
    version = _run(compiler, "--version").stdout
    decides = repr((source, FLAGS, QUERIES, KEYS, compiler, version, _processor()))
    name = f"native-{hashlib.sha256(decides.encode()).hexdigest()[:24]}.so"
    places = [SOURCES[0].parent / "__pycache__", load_settings().cache_dir / "native"]
    for place in places:
        if (place / name).is_file():
            return place / name
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place, prefix="native-") as folder:
                beside = Path(folder) / "library.so"
                sizes = (f"-DLUTHIER_QUERIES={QUERIES}", f"-DLUTHIER_KEYS={KEYS}")
                done = _run(
                    compiler,
                    *FLAGS,
                    *sizes,
                    *(str(path) for path in SOURCES if path.suffix == ".cpp"),
                    "-o",
                    str(beside),
                )
                if done.returncode:
                    raise Unavailable(f"{compiler} failed: {' '.join(done.stderr.split())[:300]}")
                os.replace(beside, place / name)
            return place / name
        except OSError:
            continue
    raise Unavailable(f"neither {' nor '.join(map(str, places))} can be written")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error


def _processor() -> str:
    """What -march=native depends on."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return line
    return platform.processor()
