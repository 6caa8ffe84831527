"""Words for the worker's tests: bytes of a file, and a worker in a process of its own, to be killed."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.settings import Settings
from luthier.spec.run import RunFolder
from luthier.store import db
from luthier.store.db import Database
from luthier.work.worker import Worker


def jsonl(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"number {n} ->", "completion": f" {'even' if n % 2 == 0 else 'odd'}"} for n in range(count)]


def preferences(count: int, spelling: str = "output") -> list[dict[str, Any]]:
    """Pairs of answers; `spelling`: output, or completion as the older specifications have it."""
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"colour {n}?"}]},
            f"preferred_{spelling}": [{"role": "assistant", "content": "It is red."}],
            f"non_preferred_{spelling}": [{"role": "assistant", "content": "blue blue blue"}],
        }
        for n in range(count)
    ]


def quick(run: RunFolder) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("quick_engine.py")), str(run.path)]


def command(home: Path, url: str | None, base: Path, name: str) -> list[str]:
    """`python -m tests.work.ask ...`: a worker that beats often and whose lease is short."""
    return [sys.executable, "-m", "tests.work.ask", str(home), url or "", str(base), name]


def main(home: str, url: str, base: str, name: str) -> None:
    db.IDLE_SECONDS = 3
    settings = Settings(home=Path(home), hub="off", bases=f"tiny={base}", organization="Acme Inc.")
    database = Database(Path(home), url or None)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    Worker(settings, database, settings.offered, name, lease=2.0, beat=0.3).run(stop)
    database.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
