"""Are a job's files what its method needs? Read in a process of its own, bounded in memory and processor time.

What a stranger uploaded is parsed there, so that a file made to hurt hurts nobody else. The process gets one JSON
object on standard input (`training` and `validation`: paths, the second may be null; `kind`; `method`) and prints one
verdict: null, or the job's error {code, message, param}.
A file must hold chat records or prompt/completion pairs (the older fine-tunes: those pairs alone, and no other key;
method dpo: pairs of answers), all of them good; the newer jobs need ten examples to train on.
Does not know: the store; tokens: rows that are too long are cut by the engine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.checkup import bound
from luthier.data.formats import detect, read_examples
from luthier.data.pairs import read_pairs
from luthier.data.read import read_records
from luthier.spec.data import Example, Preference, Problem
from luthier.spec.errors import NotFound

FEWEST_EXAMPLES = 10
SHOWN = 3  # problems named in the message
MEMORY = 2 << 30  # bytes of address space
SECONDS = 600  # of processor time

WANTED: dict[str, frozenset[str]] = {
    "supervised": frozenset({"chat", "completion"}),
    "dpo": frozenset({"preference"}),
}
PUBLIC = {"chat": "fine-tune-chat", "completion": "fine-tune-completion", "preference": "fine-tune-preference"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a job fails."""

    code: str
    message: str
    param: str | None


def check_files(training: Path, validation: Path | None, kind: str, method: str) -> Refusal | None:
    """What is wrong with the files, the training file first; None when they are good."""
    count, refusal = _check(training, "training", kind, method)
    if refusal is not None:
        return refusal
    if kind == "modern" and count < FEWEST_EXAMPLES:
        wanted = f"must have at least {FEWEST_EXAMPLES} examples"
        found = f"Training file has {count} example(s), but {wanted}"
        return Refusal("invalid_n_examples", found, "training_file")
    return None if validation is None else _check(validation, "validation", kind, method)[1]


def _check(path: Path, which: str, kind: str, method: str) -> tuple[int, Refusal | None]:
    """Number of examples, and what is wrong with the file."""
    opening = f"The job failed due to an invalid {which} file. "

    def refuse(reason: str) -> tuple[int, Refusal]:
        return 0, Refusal(f"invalid_{which}_file", opening + reason, f"{which}_file")

    try:
        mismatch = _wrong_format(path, kind, method)
        if mismatch is not None:
            return refuse(mismatch)
        examples = read_pairs(path) if method == "dpo" else read_examples(path)
        count, errors, more = _read(examples, strict=kind == "legacy")
    except NotFound:
        return refuse("The file has been deleted.")
    except MemoryError:
        return refuse("Invalid file format. A record needs more memory than there is; split it.")
    if errors:
        also = f" There are {more} more problems." if more else ""
        return refuse("Invalid file format. " + " ".join(_sentence(problem) for problem in errors) + also)
    return count, None


def _wrong_format(path: Path, kind: str, method: str) -> str | None:
    """What the first record shows about the whole file."""
    first = next(iter(read_records(path)), None)
    if first is None or isinstance(first, Problem):
        return None  # _read tells it better
    found = detect(first.value)
    wanted = frozenset({"completion"}) if kind == "legacy" else WANTED[method]
    if found in wanted:
        return None
    if found in PUBLIC:
        names = " or ".join(PUBLIC[name] for name in sorted(wanted))
        asked = "fine-tunes need" if kind == "legacy" else f"the method is {method}, which needs"
        return f"The file is in the {PUBLIC[found]} format, but {asked} the {names} format."
    if kind == "legacy":
        return "Unexpected file format, expected prompt/completion pairs."
    if method == "dpo":
        return "Unexpected file format, expected input with preferred_output and non_preferred_output."
    return "Unexpected file format, expected either prompt/completion pairs or chat messages."


def _read(examples: Iterable[Example | Preference | Problem], strict: bool) -> tuple[int, list[Problem], int]:
    """Number of examples, the first errors, how many more there are. `strict`: an unknown key is one."""
    count = more = 0
    errors: list[Problem] = []
    for item in examples:
        if not isinstance(item, Problem):
            count += 1
        elif item.severity == "error" or (strict and item.found.startswith("the key ")):
            if len(errors) < SHOWN:
                errors.append(item)
            else:
                more += 1
    return count, errors, more


def _sentence(problem: Problem) -> str:
    """`Example 11, message 1, messages[0].role: found nothing, wanted a role.`"""
    place = f"Example {problem.row}" if problem.row else f"Line {problem.line}" if problem.line else "The file"
    index = problem.field.partition("messages[")[2].partition("]")[0]
    message = f", message {int(index) + 1}" if index.isdecimal() else ""
    field = f", {problem.field}" if problem.field else ""
    hint = f" {problem.hint}" if problem.hint and problem.row and problem.severity == "error" else ""
    return f"{place}{message}{field}: found {problem.found}, wanted {problem.wanted}.{hint}"


def unread(code: int, log: str) -> Refusal:
    """The verdict on files whose reader ended with exit code `code` and without one."""
    if code < 0 or "MemoryError" in log:
        reason = f"Reading it took more than {MEMORY >> 30} GiB of memory or {SECONDS} seconds (signal {-code})."
    else:
        reason = f"Its reader ended with exit code {code}."
    return Refusal("invalid_training_file", "The job failed due to an invalid training file. " + reason, None)


def verdict_of(text: str) -> Refusal | None:
    """What the process printed. Raises ValueError when that is no verdict."""
    value: Any = json.loads(text)
    return None if value is None else Refusal(**value)


def _main(asked: Mapping[str, Any]) -> None:
    bound(MEMORY, SECONDS)
    validation = asked["validation"]
    refusal = check_files(
        Path(asked["training"]), None if validation is None else Path(validation), asked["kind"], asked["method"]
    )
    told = None if refusal is None else {name: getattr(refusal, name) for name in Refusal.__slots__}
    print(json.dumps(told))


if __name__ == "__main__":
    _main(json.load(sys.stdin))
