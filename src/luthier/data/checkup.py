"""The data doctor in a process of its own, bounded in memory and processor time: what servers and workers start.

What strangers uploaded is looked at there, so that a file made to hurt hurts nobody else. Standard input holds one line
of JSON: `training` and `validation`, lists of {path, name}; `folder`, an empty one for the process's own use; `out`,
where the report goes, whole or not at all. With `tied`, the process ends when its standard input does, which is when
whoever asked is gone.
Does not know: the store, who asks; what is looked for (doctor.py).
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.data.doctor import check

MEMORY = 2 << 30  # bytes of address space
SECONDS = 600  # of processor time
LIMITS = f"{MEMORY >> 30} GiB of memory or {SECONDS} seconds"
_PLAIN_NAME = re.compile(r"[\w(+][\w.()+ -]{0,99}")


def checked_name(filename: str) -> str:
    """What an uploaded training file is called in its report: its own name where that is a plain one.

    Training files are JSON Lines whatever they are called, and so they are read.
    """
    name = re.split(r"[/\\]", filename)[-1]
    if not _PLAIN_NAME.fullmatch(name) or len(name.encode()) > 200:
        name = "file.jsonl"
    return name if name.endswith(".jsonl") else f"{name}.jsonl"


def asking(
    training: Sequence[tuple[Path, str]],
    out: Path,
    folder: Path,
    validation: Sequence[tuple[Path, str]] = (),
    *,
    tied: bool = False,
) -> bytes:
    """The line for the process's standard input. Each file is (where it lies, what it is called)."""
    files = {
        which: [{"path": str(path), "name": name} for path, name in pairs]
        for which, pairs in (("training", training), ("validation", validation))
    }
    return json.dumps({**files, "out": str(out), "folder": str(folder), "tied": tied}).encode() + b"\n"


def command() -> list[str]:
    return [sys.executable, "-m", "luthier.data.checkup"]


def bound(memory: int, seconds: int) -> None:
    """Bound this process's address space (bytes) and processor time (seconds), below what bounds it already."""
    for limit, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
        hard = resource.getrlimit(limit)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (least, hard))


def _end_with_asker() -> None:
    """Not through sys.stdin: a thread that waits in it would hold its lock when the process ends."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def run(asked: Mapping[str, Any]) -> None:
    """Make the report. Names are those of links in `folder`, so that the commands in it name what the owner has."""
    os.chdir(asked["folder"])
    training, validation = (_linked(asked[which], which) for which in ("training", "validation"))
    report = check(training, validation=validation, processes=1)
    out = Path(asked["out"])
    part = Path("report.part").absolute()
    part.write_text(json.dumps(report.json(), ensure_ascii=False), encoding="utf-8")
    os.replace(part, out)


def _linked(files: Sequence[Mapping[str, str]], which: str) -> list[Path]:
    links = []
    for file in files:
        link = Path(file["name"])
        if link.is_symlink():  # two files of one name
            link = Path(f"{which}-{link}")
        link.symlink_to(file["path"])
        links.append(link)
    return links


if __name__ == "__main__":
    wanted = json.loads(sys.stdin.buffer.readline())
    bound(MEMORY, SECONDS)
    if wanted["tied"]:
        threading.Thread(target=_end_with_asker, daemon=True).start()
    run(wanted)
