"""A user's own grader, on the user's own machine: a Python function, or a command that reads JSON lines.

A grader gives each answer a score from 0 to 1. It runs with the rights of whoever runs the command line, so nothing
that comes over a network ever names one. Does not know: who asked.
"""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from luthier.data.rows import parts
from luthier.proof.metrics import Metric, Score, Scored, exact_match
from luthier.spec.data import Example
from luthier.spec.errors import BadSetting, UserError

TIMEOUT = 600  # seconds for all rows of one way
Function = Callable[[str, str, str], Any]  # (answer, wanted, prompt) -> score


def grader(function: str | None = None, command: str | None = None) -> Metric:
    """The metric of `module:function`, called as f(answer, wanted, prompt), or of a command that reads one object
    {"answer", "wanted", "prompt"} a line and writes one score a line. Raises BadSetting."""
    if (function is None) == (command is None):
        raise BadSetting("A grader is a function or a command: give one of the two.", param="grader")
    score = _by_function(_load(function)) if function is not None else _by_command(shlex.split(command or ""))
    return Metric("grader", f"the score of {function or command}", score)


def _load(name: str) -> Function:
    module, _, attribute = name.partition(":")
    hint = "Write module:function, and let Python find the module (PYTHONPATH)."
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadSetting(f"--grader {name} cannot be loaded: {error}.", param="grader", hint=hint) from error
    if not callable(found):
        raise BadSetting(f"--grader {name}: found a {type(found).__name__}; wanted a function.", param="grader")
    loaded: Function = found
    return loaded


def _by_function(function: Function) -> Score:
    def score(answers: Sequence[str], wanted: Sequence[str], examples: Sequence[Example]) -> Scored:
        triples = zip(answers, wanted, examples, strict=True)
        found = [
            _checked(function(answer, reference, parts(example)[0]), place)
            for place, (answer, reference, example) in enumerate(triples, 1)
        ]
        return Scored(found, _exact_details(answers, wanted, examples))

    return score


def _by_command(command: Sequence[str]) -> Score:
    def score(answers: Sequence[str], wanted: Sequence[str], examples: Sequence[Example]) -> Scored:
        lines = [
            json.dumps({"answer": answer, "wanted": reference, "prompt": parts(example)[0]}, ensure_ascii=False)
            for answer, reference, example in zip(answers, wanted, examples, strict=True)
        ]
        said = _run(command, "".join(line + "\n" for line in lines))
        if len(said) != len(lines):
            raise UserError(
                f"The grader wrote {len(said)} lines for {len(lines)} answers; wanted a score for each.",
                param="grader",
            )
        found = [_checked(_parsed(line, place), place) for place, line in enumerate(said, 1)]
        return Scored(found, _exact_details(answers, wanted, examples))

    return score


def _run(command: Sequence[str], text: str) -> list[str]:
    if not command:
        raise BadSetting("--grader-command is empty.", param="grader_command")
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadSetting(f"The grader {command[0]} cannot be run: {error}.", param="grader_command") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise UserError(f"The grader ended with exit code {done.returncode}: {last[0]}", param="grader_command")
    return done.stdout.splitlines()


def _parsed(line: str, place: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"The grader's line {place} is no score: found {line!r}.", param="grader") from error


def _checked(value: Any, place: int) -> float:
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    raise UserError(f"The grader gave answer {place} the score {value!r}; wanted a number from 0 to 1.", param="grader")


def _exact_details(
    answers: Sequence[str], wanted: Sequence[str], examples: Sequence[Example]
) -> dict[str, float | None]:
    found = exact_match(answers, wanted, examples).rows
    return {"exact_match": sum(found) / len(found) if found else None}
