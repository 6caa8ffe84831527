"""Bytes under their own hash: `files/ab/abcdef...`, whole or not there, the same content once.

A blob is written beside (`files/incoming/`), synced, and renamed when its transaction says so. Which blobs are in use
is for the tables to say; a process killed between the rename and the commit leaves a blob that no row names, and
sweep() in files.py takes it away. A file in incoming/ is locked while its writer lives: the kernel lets go of the lock
however the writer ends, so what can be locked is litter.
Does not know: SQL, names, purposes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from luthier.spec.errors import Broken, NotNow, UserError
from luthier.spec.run import fsync_directory

PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Incoming:
    """A whole, synced file that is not in its place yet. `md5` is there for clients that declare one."""

    path: Path
    sha256: str
    md5: str
    size: int


class Blobs:
    """The blobs below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / "incoming"

    def path(self, sha256: str) -> Path:
        """Where the blob lies. Raises Broken for what is no hash: a path is never made from other text."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise Broken(f"{sha256[:80]!a} is not a SHA-256.")
        return self.root / sha256[:2] / sha256

    @contextlib.contextmanager
    def receive(self, pieces: Iterable[bytes], limit: int | None = None) -> Iterator[Incoming]:
        """Write `pieces` beside, one at a time. What is not moved into place by `keep` is gone after the block.

        Raises UserError above `limit` bytes, NotNow when the disk refuses.
        """
        handle = None
        try:
            with _disk("written"):
                handle = self._begin()
            sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
            for piece in pieces:
                size += len(piece)
                if limit is not None and size > limit:
                    raise UserError(f"The content is larger than the allowed {limit} bytes.", param="file")
                sha256.update(piece)
                md5.update(piece)
                with _disk("written"):
                    handle.write(piece)
            with _disk("written"):
                handle.flush()
                os.fsync(handle.fileno())
            yield Incoming(Path(handle.name), sha256.hexdigest(), md5.hexdigest(), size)
        finally:
            if handle is not None:
                Path(handle.name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # what a full disk did not take is being thrown away
                    handle.close()

    def _begin(self) -> BinaryIO:
        self.incoming.mkdir(parents=True, exist_ok=True)
        while True:
            handle = open(self.incoming / secrets.token_hex(16), "xb")  # noqa: SIM115 (closed by receive)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.exists(handle.name):  # else a sweep came between the two calls
                return handle
            handle.close()

    def keep(self, new: Incoming) -> None:
        """Move `new` into its place. Content that is there already stays: it is the same."""
        place = self.path(new.sha256)
        with _disk("kept"):
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(new.path, place)
            fsync_directory(place.parent)
            fsync_directory(self.root)

    def open(self, sha256: str) -> BinaryIO:
        """The blob for reading. Raises FileNotFoundError when it is not there."""
        return open(self.path(sha256), "rb")

    def drop(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def all(self) -> Iterator[str]:
        """The hash of every blob in its place."""
        for folder in sorted(self.root.glob("[0-9a-f][0-9a-f]")):
            for path in sorted(folder.iterdir()):
                if re.fullmatch("[0-9a-f]{64}", path.name):
                    yield path.name

    def sweep_incoming(self) -> int:
        """Take away what dead writers left; how many files that were."""
        gone = 0
        for path in self.incoming.glob("*"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                gone += 1
        return gone


@contextlib.contextmanager
def _disk(done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotNow(f"The content could not be {done}: {error.strerror}.", hint="Free some disk space.") from error


def pieces_of(open_each: Iterable[Callable[[], BinaryIO]]) -> Iterator[bytes]:
    """The contents of several files one behind the other, a piece at a time."""
    for opener in open_each:
        with opener() as handle:
            while piece := handle.read(PIECE):
                yield piece
