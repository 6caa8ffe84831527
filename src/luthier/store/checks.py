"""Reports of the data doctor, kept by the content that they are about: a file is looked at once.

A report goes when the last file with its content does. It names the file as its owner does, so the name is part of the
key; and the version, whose rules it was made by.
Does not know: how a report is made, what is in it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path

from luthier import __version__
from luthier.spec.errors import Broken

_NAME = re.compile(r"([0-9a-f]{64})-[0-9a-f]{16}\.json")


class Checks:
    """The reports below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, sha256: str, name: str) -> Path:
        """Where the report on that content under that name lies, or will. The folder is made. Raises Broken for what
        is no hash: a path is never made from other text."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise Broken(f"{sha256[:80]!a} is not a SHA-256.")
        self.root.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(f"{__version__}\0{name}".encode()).hexdigest()[:16]
        return self.root / f"{sha256}-{key}.json"

    def read(self, sha256: str, name: str) -> bytes | None:
        """The report as JSON, None when there is none yet."""
        try:
            return self.path(sha256, name).read_bytes()
        except FileNotFoundError:
            return None

    def drop(self, sha256: str) -> None:
        for path in self.root.glob(f"{sha256}-*.json"):
            path.unlink(missing_ok=True)

    def sweep(self, used: Collection[str]) -> int:
        """Take away reports on content that is none of `used`; how many those were."""
        gone = 0
        for path in self.root.glob("*.json"):
            named = _NAME.fullmatch(path.name)
            if named is not None and named[1] not in used:
                path.unlink(missing_ok=True)
                gone += 1
        return gone
