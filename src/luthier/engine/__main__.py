"""`python -m luthier.engine [--estimate | --part N/D | --score N/D | --keep JSON] RUN`: a process's only way into the
engine. Carries out the run folder it is given; with --estimate only up to the forecast, with --part only up to that
share of its steps (rung.py), with --score the same, and what it answers by then is scored; with --keep it chooses a
scale for a run that is over (keep.py).

Ends with code 0 when the run succeeded or was stopped as asked, else with the error's own code; the last event says
which. When not even that can be written, the code is UNTOLD. Does not know: who started it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from luthier.spec.errors import BadData, Broken, LuthierError, NotNow
from luthier.spec.run import UNTOLD, RunFolder, is_full, is_out_of_memory


def main(arguments: list[str]) -> int:
    estimate, parted = arguments[:1] == ["--estimate"], arguments[:1] in (["--part"], ["--score"])
    keep = arguments[:1] == ["--keep"]
    if len(arguments) != 1 + estimate + 2 * (parted or keep):
        words = "[--estimate | --part N/D | --score N/D | --keep JSON]"
        print(f"usage: python -m luthier.engine {words} RUN", file=sys.stderr)
        return 2
    try:
        run = RunFolder.open(arguments[-1])
    except LuthierError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if keep:
        return keep_general(run, json.loads(arguments[1]))
    return carry_out(run, estimate, (Fraction(arguments[1]), arguments[0] == "--score") if parted else None)


def keep_general(run: RunFolder, asked: dict[str, Any]) -> int:
    """Choose a scale for a run that is over, as `asked` (the fields of keep.Search)."""
    from luthier.engine import keep

    def heed() -> None:
        if run.stop_asked:
            raise NotNow("Stopped.", hint="What was measured is remembered: the same command goes on.")

    def work() -> None:
        run.stop_note.unlink(missing_ok=True)
        keep.again(run, keep.Search(**{**asked, "scales": tuple(asked["scales"])}), run.emit, heed)

    try:
        with run.owned():
            return _told(run, work)
    except LuthierError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def carry_out(run: RunFolder, estimate: bool = False, rung: tuple[Fraction, bool] | None = None) -> int:
    from luthier.engine.ranks import join, leave
    from luthier.engine.rung import Part
    from luthier.engine.train import train

    part = Part(*rung) if rung is not None else None
    try:
        if join()[0]:
            train(run, estimate, part)
            return 0
        with run.owned():
            return _told(run, lambda: train(run, estimate, part))
    except LuthierError as error:  # the lock is held: that run's events are not ours to write
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        leave()


def _told(run: RunFolder, work: Callable[[], None]) -> int:
    """Do the work; whatever ends it is told in a last event. The one place that catches everything."""
    try:
        work()
        return 0
    except LuthierError as error:
        failure = error
    except Exception as error:  # noqa: BLE001, a process's edge: record it and end
        with contextlib.suppress(OSError):  # the log lies on the disk that may just have filled up
            traceback.print_exc()
        failure = _unforeseen(error, run)
    problems = [problem.as_dict() for problem in failure.problems] if isinstance(failure, BadData) else []
    try:
        run.emit("failed", status="failed", **failure.as_dict(), problems=problems)
    except OSError:
        with contextlib.suppress(OSError):
            print(failure, file=sys.stderr)
        return UNTOLD
    return failure.exit_code


def _unforeseen(error: Exception, run: RunFolder) -> LuthierError:
    """What was not raised on purpose is our fault, but for a full disk, and for memory, of which libraries tell only in
    their words."""
    if is_full(error):
        return NotNow("The disk is full.", hint="Make room, then go on from the last checkpoint.")
    if isinstance(error, MemoryError) or is_out_of_memory(str(error)):
        return Broken("Memory ran out.", hint="Lower --micro-tokens or --max-length, or choose a smaller base.")
    return Broken(f"{type(error).__name__}: {error}", hint=f"The whole story is in {run.log}.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
