"""Checkpoints: all that is needed to go on, in folders that appear complete or not at all.

A checkpoint is written beside, fsynced, and renamed; `state.json` holds the size and hash of each file, so a checkpoint
that something damaged later is recognised and passed over. The order of the data and every random number follow from
(seed, step), so no generator state is stored. safetensors and JSON only: nothing here can run code.

Does not know: what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.spec.errors import NotNow
from luthier.spec.run import fsync_directory, is_full

TENSORS, STATE = "tensors.safetensors", "state.json"


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending; whether they are whole is for `load` to find out."""
    if not folder.is_dir():
        return []
    names = (path.name.removeprefix("step-") for path in folder.iterdir() if path.name.startswith("step-"))
    return sorted(int(name) for name in names if name.isdigit())


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`. Raises NotNow when the disk is full or cannot be written; the checkpoints that
    were there stay as they were."""
    final = path_of(folder, step)
    beside = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        file = beside / TENSORS
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        digest, size = _digest(file)
        record = {**state, "step": step, "files": {TENSORS: {"sha256": digest, "bytes": size}}}
        (beside / STATE).write_text(json.dumps(record, indent=2), encoding="utf-8")
        for written in (file, beside / STATE):
            _fsync(written)
        fsync_directory(beside)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
        os.rename(beside, final)
        fsync_directory(folder)
    except (OSError, SafetensorError) as error:
        raise _not_written(folder, step, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # not there any more when all went well
    return final


def _not_written(folder: Path, step: int, error: Exception) -> Exception:
    words = "the disk is full" if is_full(error) else str(error)
    kept = steps(folder)
    last = f"The checkpoint of step {kept[-1]} is intact." if kept else "There is no earlier checkpoint."
    return NotNow(
        f"The checkpoint of step {step} could not be written to {folder}: {words}. {last}",
        hint=f"Make room, then go on with `luthier train --resume {folder.parent}`.",
    )


def load(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, state) of one checkpoint, or None when any part of it is missing or damaged."""
    path = path_of(folder, step)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        wanted = state["files"][TENSORS]
        file = path / TENSORS
        if file.stat().st_size != wanted["bytes"] or _digest(file)[0] != wanted["sha256"]:
            return None
        return load_file(file), state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def newest(folder: Path) -> tuple[tuple[dict[str, Tensor], dict[str, Any]] | None, list[int]]:
    """(newest whole checkpoint or None, the damaged steps that were passed over)."""
    damaged: list[int] = []
    for step in reversed(steps(folder)):
        found = load(folder, step)
        if found is not None:
            return found, damaged
        damaged.append(step)
    return None, damaged


def prune(folder: Path, keep: set[int]) -> None:
    """Remove checkpoints other than `keep`, and what killed writers left; only after a newer one is whole."""
    for step in steps(folder):
        if step not in keep:
            shutil.rmtree(path_of(folder, step), ignore_errors=True)
    for left in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.work")]:
        shutil.rmtree(left, ignore_errors=True)


def _digest(path: Path) -> tuple[str, int]:
    total = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            total.update(chunk)
    return total.hexdigest(), path.stat().st_size


def _fsync(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
