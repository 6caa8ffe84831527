"""Put a model folder under LUTHIER_HOME/models whole or not at all, one process at a time; check it; take it away.

A model is made in `.pull-NAME+XXXX` beside its place, synced, then renamed; whoever makes it holds the flock
`.lock-NAME`, which the kernel frees however that process ends, so the next one can sweep what it left.
Does not know: which models exist and where they come from (catalogue.py passes the sources in).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from luthier.engine.sources import Progress, SourceFailed, read_json, weight_files
from luthier.spec.errors import NotFound, NotNow
from luthier.spec.run import fsync_directory, write_json

NOTE = "luthier.json"

# Fills work/model and returns where it came from; raises SourceFailed when it cannot.
Source = Callable[[Path, Progress], str]


def is_model_folder(folder: Path) -> bool:
    """Whether `folder` holds what the engine loads: config.json, safetensors weights and tokenizer.json."""
    return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file() and bool(weight_files(folder))


def read_note(folder: Path) -> dict[str, Any]:
    """luthier.json of an installed model or of a result, {} when there is none."""
    path = folder / NOTE
    return read_json(path) if path.is_file() else {}


def sizes_agree(folder: Path) -> bool:
    """Whether every file of an installed model has the size it was installed with (cheap; `verify` reads them)."""
    files = read_note(folder).get("files", {})
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == known["bytes"] for name, known in files.items()
    )


def install(
    models: Path, key: str, sources: list[Source], progress: Progress, *, disk: int, name: str, licence: str
) -> Path:
    """models/`key`, made by the first of `sources` that answers; at once when it is there already.

    `disk` is the number of bytes needed while it works. Raises NotNow when no source answers (one sentence for each)
    or the disk is too full or not writable.
    """
    target = models / key
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _only_me(models, key, progress):
            if is_model_folder(target) and sizes_agree(target):
                return target
            _sweep(models, key)
            free = shutil.disk_usage(models).free
            if free < disk:
                raise _disk_full(name, models, disk, free)
            return _first_that_answers(key, target, sources, progress, name, licence)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(name, models, disk, shutil.disk_usage(models).free) from error
        raise NotNow(
            f"{name} cannot be written to {models}: {error.strerror or error}.",
            hint="Set LUTHIER_HOME to a folder that you may write to.",
        ) from error


def _first_that_answers(
    key: str, target: Path, sources: list[Source], progress: Progress, name: str, licence: str
) -> Path:
    failures: list[str] = []
    for source in sources:
        work = Path(tempfile.mkdtemp(prefix=f".pull-{key}+", dir=target.parent))
        try:
            came_from = source(work, progress)
            _publish(work / "model", target, {"name": name, "licence": licence, "source": came_from})
            return target
        except SourceFailed as error:
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            failures.append(str(error))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise NotNow(
        f"{name} cannot be had now; no source answered. " + " ".join(f"{why[0].upper()}{why[1:]}" for why in failures),
        hint="Try again when one can be reached, or give a local folder with config.json, *.safetensors and "
        "tokenizer.json (or a .gguf file) as the model.",
        param="model",
    )


def _publish(folder: Path, target: Path, note: dict[str, Any]) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    packages = {package: version(package) for package in ("transformers", "tokenizers", "safetensors", "gguf")}
    write_json(folder / NOTE, {**note, "files": files, "converted_with": packages})
    for path in folder.iterdir():
        if not path.is_symlink():
            path.chmod(0o644)
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_directory(folder)
    if target.exists():  # damaged, or not a model: set aside so that the rename is whole
        target.rename(folder.parent / "replaced")
    folder.rename(target)
    fsync_directory(target.parent)


def _disk_full(name: str, models: Path, need: int, free: int) -> NotNow:
    return NotNow(
        f"The disk of {models} is too full for {name}: it needs about {need / 1e6:.0f} MB, and {free / 1e6:.0f} MB "
        "are free.",
        hint="Free some space or set LUTHIER_HOME to a folder on another disk.",
    )


@contextmanager
def _only_me(models: Path, key: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of `key`; waits, and says so, while another process has it. The kernel frees a killed one's."""
    with open(models / f".lock-{key}", "a") as handle:
        waited = 0
        while not _try_lock(handle.fileno()):
            progress(f"waiting: another process is getting {key}", waited, 0)
            time.sleep(0.5)
            waited += 1
        yield


def _try_lock(handle: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _sweep(models: Path, held: str) -> None:
    """Remove what killed pulls left: work folders whose name's lock nobody holds, or that we hold."""
    for work in models.glob(".pull-*+*"):
        key = work.name.removeprefix(".pull-").rsplit("+", 1)[0]
        if key == held:
            shutil.rmtree(work, ignore_errors=True)
            continue
        with open(models / f".lock-{key}", "a") as handle:
            if _try_lock(handle.fileno()):
                shutil.rmtree(work, ignore_errors=True)


def remove(models: Path, key: str, name: str) -> int:
    """Delete models/`key`; the bytes freed. Raises NotFound, and NotNow while another process is making it."""
    target = models / key
    if not target.is_dir():
        raise NotFound(f"The model {name} is not installed.", hint="See `luthier models`.", param="model")
    with open(models / f".lock-{key}", "a") as handle:
        if not _try_lock(handle.fileno()):
            raise NotNow(f"Another process is getting {name}.", hint="Wait for it to finish, or end it.")
        if target.is_symlink():
            target.unlink()
            return 0
        freed = sum(path.lstat().st_size for path in target.rglob("*") if path.is_file())
        gone = Path(tempfile.mkdtemp(prefix=f".pull-{key}+", dir=models))
        target.rename(gone / "removed")
        shutil.rmtree(gone)
    return freed


def verify(folder: Path) -> list[str]:
    """One sentence for each file of an installed model that is not as it was installed; empty when all are.

    Raises NotFound for a folder without luthier.json.
    """
    note = read_note(folder)
    if "files" not in note:
        raise NotFound(f"{folder} has no {NOTE}, so there is nothing to compare it with.")
    wrong = []
    for name, known in note["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path} is missing.")
        elif (found := sha256(path)) != known["sha256"]:
            wrong.append(f"{path} has sha256 {found}, wanted {known['sha256']}.")
    return wrong


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
