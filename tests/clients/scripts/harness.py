"""Runs the checks of a script in the client's own environment: prints one JSON object, check name -> what came of it.

A script defines functions `check_NN_words(given)`; `given` is the JSON object of argv[1]. A check that raises is
reported with its traceback and stops no other. Runs on every client's Python; imports only the standard library.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
import traceback
from typing import Any


class Missing(Exception):
    """Data that the check needs are not at hand: its test is skipped."""


def run(names: dict[str, Any]) -> None:
    """Run each `check_*` of `names` in the order of their definition."""
    given = json.loads(sys.argv[1])
    wanted = given.get("only")
    outcome = {}
    for name, check in list(names.items()):
        if not name.startswith("check_") or (wanted and name not in wanted):
            continue
        began = time.monotonic()
        try:
            made = check(given)
            if inspect.iscoroutine(made):
                import asyncio

                made = asyncio.run(made)
            outcome[name] = {"ok": True, "made": made}
        except Missing as missing:
            outcome[name] = {"ok": False, "missing": str(missing)}
        except BaseException:  # noqa: BLE001 - the report is the point: whatever it was is told to the test
            outcome[name] = {"ok": False, "error": traceback.format_exc()}
        outcome[name]["seconds"] = round(time.monotonic() - began, 2)
    print(json.dumps(outcome))


class Raised:
    """`with raises(Kind) as error:` for scripts: the block must raise it; `error.value` is it."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind
        self.value: Any = None

    def __enter__(self) -> Raised:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: object) -> bool:
        assert kind is not None, f"{self.kind.__name__} was not raised"
        self.value = value
        return issubclass(kind, self.kind)


def raises(kind: type[BaseException]) -> Raised:
    return Raised(kind)


def until(holds: Any, seconds: float = 120, every: float = 0.2) -> Any:
    """What `holds()` gives once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        found = holds()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(every)
