"""What every command says alike: consoles, JSON lines, numbers in words, errors and download bars.

Results go to stdout, everything about the way there (errors, bars) to stderr. Does not know: any room but the words.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.spec.data import Problem
from luthier.spec.errors import BadData, LuthierError

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_PROBLEMS = 20
Progress = Callable[[str, int, int], None]  # (message, done, total); total 0 when nobody knows it


def console(stderr: bool = False) -> Console:
    """A console that neither highlights numbers nor reads emoji codes: texts of users go through it."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, emoji=False)


def tolerate_narrow_encodings() -> None:
    """A character that the terminal's encoding lacks becomes `?` instead of an error (LC_ALL=C, ASCII pipes)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def speaks_unicode(stream: Any = None) -> bool:
    encoding = getattr(stream or sys.stdout, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "").startswith("utf")


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout, at once. Escaped to ASCII where stdout is not UTF-8: nothing is lost."""
    line = json.dumps(value, ensure_ascii=not speaks_unicode(), default=str)
    sys.stdout.write(line.encode("utf-8", "replace").decode("utf-8") + "\n")
    sys.stdout.flush()


# -- numbers and paths in words ----------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """75.2 -> 1:15, 3700 -> 1:01:40."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes in decimal units: 1_250_000 -> 1.25 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def plural(count: int, noun: str) -> str:
    """3, "row" -> "3 rows"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def number(value: Any, form: str, missing: str = "-") -> str:
    """`value` in `form`; `missing` for None."""
    return format(float(value), form) if value is not None else missing


def short(path: str | Path) -> str:
    """A path as one would type it here: relative when it lies below the working directory."""
    whole = Path(path).absolute()
    with contextlib.suppress(ValueError, OSError):
        return str(whole.relative_to(Path.cwd())) or str(whole)
    return str(whole)


def typed(*words: str | Path) -> str:
    """Words as a shell command that can be copied."""
    return shlex.join(str(word) for word in words)


# -- errors ------------------------------------------------------------------------------------------------------------


def error_object(error: LuthierError) -> dict[str, Any]:
    """What --json prints for an error."""
    problems = [problem.as_dict() for problem in error.problems] if isinstance(error, BadData) else []
    return {"status": "failed", **error.as_dict(), "problems": problems}


def print_error(message: str, hint: str | None = None, problems: list[Problem] | None = None) -> None:
    """A sentence in red, the first problems one a line, and the next step; all on stderr."""
    from rich.text import Text

    out = console(stderr=True)
    soft = not out.is_terminal  # a file gets whole lines, a terminal lines that break between words
    out.print(Text.assemble(("Error: ", "bold red"), (visible(message), "red")), soft_wrap=soft)
    for problem in (problems or [])[:SHOWN_PROBLEMS]:
        out.print(Text("  " + visible(str(problem))), soft_wrap=soft)
    if problems and len(problems) > SHOWN_PROBLEMS:
        out.print(f"  and {len(problems) - SHOWN_PROBLEMS:,} more.", soft_wrap=soft)
    if hint:
        out.print(Text(visible(hint)), soft_wrap=soft)


def visible(text: str) -> str:
    """`text` with control and direction-changing characters spelt out, so that no file can steer the terminal."""
    return "".join(_spelt(character) for character in text)


def _spelt(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or not (
        code < 32 or 127 <= code < 160 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    ):
        return character
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


# -- waiting -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting() -> Iterator[Progress]:
    """A bar on stderr for long work: one line for each new message where stderr is no terminal."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield _lines(out)
        return
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    with Bars(*columns, console=out, transient=True) as bars:
        known: dict[str, TaskID] = {}

        def tell(message: str, done: int, total: int) -> None:
            if message not in known:
                for task in known.values():
                    bars.update(task, visible=False)
                known[message] = bars.add_task(visible(message).replace("[", r"\["), total=None, shown="")
            shown = f"{size(done)} of {size(total)}" if total > 1000 else ""
            bars.update(known[message], completed=done, total=total if total > 1 else None, shown=shown)

        yield tell


def _lines(out: Console) -> Progress:
    last = ""

    def tell(message: str, done: int, total: int) -> None:
        nonlocal last
        del done, total
        if message != last:
            last = message
            out.print(visible(message), markup=False, soft_wrap=True)

    return tell


def resolve_model(name: str) -> Path:
    """The folder of model `name`, pulled with a bar when it is not here yet. Raises what catalogue.resolve raises."""
    from luthier.engine import catalogue

    with waiting() as progress:
        return catalogue.resolve(name, progress=progress)
