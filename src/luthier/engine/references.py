"""Log-probabilities of rows under the model that a run starts with, kept by content for other runs.

They are computed a chunk of rows at a time, and what a chunk comes to follows from it, the start and the micro-batches
alone: not from the run, its ranks or what was known before, so runs repeat to the bit. Chunks are appended as whole
lines, so a run that was killed goes on where it was; a line that is damaged is computed again.
Does not know: what the numbers are for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from luthier.data.dataset import Rows, digest
from luthier.engine import kernels, native, stream
from luthier.engine.setup import Ready
from luthier.settings import load_settings
from luthier.spec.run import append_line

CHUNK = 64  # examples
KEPT_FILES = 50

Floats = npt.NDArray[np.float64]


def of(ready: Ready, rows: Rows, share: slice, told: Callable[[int, int], None], heed: Callable[[], None]) -> Floats:
    """[rows], nats. `share`: which chunks this rank computes; all get all. The model must have the weights that it
    starts with. Raises what `heed` raises."""
    parts, place, leads = _chunks(rows), _place(ready), not share.start
    kept = _read(place) if leads else {}
    found = np.zeros(len(rows))
    there = np.array([len(kept.get(name, ())) == part.stop - part.start for part, name in parts])
    for (part, name), filled in zip(parts, there, strict=True):
        if filled:
            found[part] = kept[name]
    if dist.is_initialized():
        dist.broadcast(torch.from_numpy(there), src=0)
    missing = [chunk for chunk, filled in zip(parts, there, strict=True) if not filled]
    own = missing[share]
    for done, (part, name) in enumerate(own, 1):
        heed()
        chunk = [rows[index] for index in range(part.start, part.stop)]
        found[part] = stream.row_log_probs(ready.model, chunk, ready.settings.micro_tokens, each=rows.sides)
        if leads:
            _keep(place, name, found[part])
        told(done, len(own))
    if dist.is_initialized():
        dist.all_reduce(torch.from_numpy(found))
        for part, name in [chunk for chunk in missing if leads and chunk not in own]:
            _keep(place, name, found[part])
    return found


def known(ready: Ready, rows: Rows) -> bool:
    """Whether all are kept from before."""
    kept = _read(_place(ready))
    return all(name in kept for _, name in _chunks(rows))


def _chunks(rows: Rows) -> list[tuple[slice, str]]:
    """(which rows, the hash of their content)."""
    size = CHUNK * rows.sides
    parts = [slice(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]
    return [(part, digest(rows[index] for index in range(part.start, part.stop))) for part in parts]


def _place(ready: Ready) -> Path:
    """A file for each start and way to compute it: base, parent, numbers, kernels, micro-batches and our code."""
    code = hashlib.sha256()
    for path in sorted([*Path(__file__).parent.glob("*.py"), *native.SOURCES]):
        code.update(path.read_bytes())
    settings, weight = ready.settings, next(ready.model.parameters())
    parts = [
        ready.base_hash, ready.start, settings.precision, weight.device.type, kernels.whose(), settings.micro_tokens,
        code.hexdigest(),
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return load_settings().cache_dir / "references" / f"{name}.jsonl"


def _read(place: Path) -> dict[str, list[float]]:
    """By the hash of a chunk. What is damaged is not there."""
    kept: dict[str, list[float]] = {}
    with contextlib.suppress(OSError):
        os.utime(place)
        for line in place.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                kept[entry["rows"]] = [float(value) for value in entry["log_probs"]]
    return kept


def _keep(place: Path, name: str, values: Floats) -> None:
    """A cache that cannot be written costs the next run its forward passes."""
    with contextlib.suppress(OSError):
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            others = sorted(place.parent.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
            for old in others[: max(0, len(others) + 1 - KEPT_FILES)]:
                old.unlink(missing_ok=True)
        append_line(place, json.dumps({"rows": name, "log_probs": values.tolist()}))
