"""What the older OpenAI client's `prepare_data` gave: sixteen looks at prompt and completion, and the mends.

A finding may carry a mend. Necessary ones are made at once; recommended ones are made afterwards, in order, each on
what the ones before it left, so what is found is found on the data as it came. The order and the rules are those of
section 3.6 of the API's reference, so that both programs write the same files.
Does not know: how one asks (cli), files' forms (table.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from luthier.data.table import Table
from luthier.spec.errors import BadData

Task = Literal["open-ended generation", "classification", "conditional generation"]

FEW_ROWS = 100
LONGEST = 10_000  # characters of prompt and completion together
LONG_ENDING, LONG_PREFIX, COMPLETION_PREFIX = 10, 12, 5  # characters
MOST_VALID = 1000  # rows
SEED = 42
PROMPT_ENDINGS = (" ->", *(f"\n\n{mark}\n\n" for mark in ("###", "===", "---", "===>", "--->")))
COMPLETION_ENDINGS = ("\n", ".", " END", "***", "+++", "&&&", "$$$", "@@@", "%%%")


@dataclass(frozen=True, slots=True)
class Pair:
    """One row; `row` counts from 1 in the file."""

    prompt: str
    completion: str
    row: int


Pairs = list[Pair]


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence about the data. `mend` says what changes it, `apply` does; `necessary` ones are done already."""

    text: str
    mend: str = ""
    necessary: bool = False
    apply: Callable[[Pairs], Pairs] | None = None


@dataclass
class Prepared:
    """The rows after the necessary mends, what was found, and the ending that prompts and completions have."""

    pairs: Pairs
    task: Task
    findings: list[Finding] = field(default_factory=list)
    prompt_ending: str = ""
    completion_ending: str = ""

    @property
    def recommended(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.apply is not None]

    @property
    def changed(self) -> bool:
        return any(finding.necessary for finding in self.findings)


def examine(table: Table) -> Prepared:
    """All sixteen checks. Raises BadData where no mend can help."""
    findings: list[Finding] = []
    if table.found:
        findings.append(Finding(f"The file is {table.found}.", "written as JSON Lines", necessary=True))
    findings.append(_count(len(table.rows)))
    pairs = _columns(table, findings)
    pairs = _without_empty(pairs, findings)
    prepared = Prepared(pairs, _task(pairs), findings)
    _say_task(prepared)
    _duplicates(prepared)
    _too_long(prepared)
    for column in ("prompt", "completion"):
        _capitals(prepared, column)
    if prepared.task != "open-ended generation":
        _prompt_ending(prepared)
    _prompt_prefix(prepared)
    _completion_prefix(prepared)
    if prepared.task == "conditional generation":
        _completion_ending(prepared)
    _leading_space(prepared)
    return prepared


# -- what the rows are -------------------------------------------------------------------------------------------------


def _count(rows: int) -> Finding:
    words = f"{rows} rows."
    if rows < FEW_ROWS:
        words += " A few hundred are advisable: quality tends to grow with every doubling."
    return Finding(words)


def _columns(table: Table, findings: list[Finding]) -> Pairs:
    place = {name: _column(table.columns, name, findings) for name in ("prompt", "completion")}
    others = [name for number, name in enumerate(table.columns) if number not in place.values()]
    if others:
        listed = ", ".join(map(repr, others))
        findings.append(Finding(f"Columns besides prompt and completion: {listed}.", "left out", necessary=True))
    return [Pair(row[place["prompt"]], row[place["completion"]], number) for number, row in enumerate(table.rows, 1)]


def _column(columns: Sequence[str], name: str, findings: list[Finding]) -> int:
    if name in columns:
        return columns.index(name)
    for number, column in enumerate(columns):
        if column.lower() == name:
            findings.append(Finding(f"The column {name} is written {column}.", f"renamed to {name}", necessary=True))
            return number
    raise BadData(
        f"There is no column {name}; the file has {', '.join(map(repr, columns)) or 'none'}.",
        hint=f"Name the column {name} and try again.",
        param="file",
    )


def _without_empty(pairs: Pairs, findings: list[Finding]) -> Pairs:
    empty = [pair.row for pair in pairs if not pair.completion]
    if empty:
        findings.append(
            Finding(f"{_rows(empty)} without a completion.", f"dropped {len(empty)} of them", necessary=True)
        )
    left = [pair for pair in pairs if pair.completion]
    if not left:
        raise BadData("No row has a completion.", param="file")
    return left


def _task(pairs: Pairs) -> Task:
    if not any(pair.prompt for pair in pairs):
        return "open-ended generation"
    return "classification" if 3 * len({pair.completion for pair in pairs}) < len(pairs) else "conditional generation"


def _say_task(prepared: Prepared) -> None:
    words = f"The data looks like {prepared.task}."
    if prepared.task == "classification":
        words += " A small base model is often enough for it; keep some rows to measure on."
    prepared.findings.append(Finding(words))


def _duplicates(prepared: Prepared) -> None:
    first = set(_first_of_each(prepared.pairs))
    twice = [pair.row for pair in prepared.pairs if pair not in first]
    if twice:
        text = f"{_rows(twice)} that repeat an earlier row."
        prepared.findings.append(Finding(text, f"drop {len(twice)} repeated rows", apply=_first_of_each))


def _first_of_each(pairs: Pairs) -> Pairs:
    first: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        first.setdefault((pair.prompt, pair.completion), pair)
    return list(first.values())


def _too_long(prepared: Prepared) -> None:
    if prepared.task == "open-ended generation":
        return
    long = [pair.row for pair in prepared.pairs if _is_long(pair)]
    if long:
        text = f"{_rows(long)} of more than {LONGEST:,} characters, which may exceed a model's context."
        prepared.findings.append(
            Finding(text, f"drop {len(long)} long rows", apply=lambda pairs: [p for p in pairs if not _is_long(p)])
        )


def _is_long(pair: Pair) -> bool:
    return len(pair.prompt) + len(pair.completion) > LONGEST


def _capitals(prepared: Prepared, column: str) -> None:
    letters = "".join(getattr(pair, column) for pair in prepared.pairs)
    if 2 * sum(map(str.isupper, letters)) > sum(map(str.islower, letters)):
        text = f"More than a third of the letters of the {column}s are capitals, which models read less well."
        mend = f"write the {column}s in lower case"
        prepared.findings.append(Finding(text, mend, apply=lambda pairs: _each(pairs, column, str.lower)))


# -- how prompts and completions begin and end -------------------------------------------------------------------------


def _prompt_ending(prepared: Prepared) -> None:
    prompts = [pair.prompt for pair in prepared.pairs]
    ending = _common_suffix(prompts)
    if len(set(prompts)) == 1:
        raise BadData(
            f"All prompts are the same: {ending!r}.",
            hint="For texts without prompts leave the prompts empty; otherwise give each row its own.",
            param="file",
        )
    if ending:
        prepared.prompt_ending = ending
        prepared.findings.append(_ending_found("prompt", ending, prompts))
        return
    options = PROMPT_ENDINGS[1:] if any("\n" in prompt for prompt in prompts) else PROMPT_ENDINGS
    prepared.findings.append(_ending_missing(prepared, "prompt", options, "\n\n### =>\n\n", prompts))


def _completion_ending(prepared: Prepared) -> None:
    completions = [pair.completion for pair in prepared.pairs]
    ending = _common_suffix(completions)
    if len(set(completions)) == 1:
        raise BadData(f"All completions are the same: {ending!r}.", hint="Give each row its own.", param="file")
    if ending:
        prepared.completion_ending = ending
        prepared.findings.append(_ending_found("completion", ending, completions))
        return
    finding = _ending_missing(prepared, "completion", COMPLETION_ENDINGS, " [END]", completions)
    prepared.findings.append(finding)


def _ending_found(column: str, ending: str, texts: Sequence[str]) -> Finding:
    words = f"All {column}s end with {ending!r}."
    if len(ending) > LONG_ENDING:
        words += " A shorter ending would do."
    inside = sum(ending in text[: -len(ending)] for text in texts)
    if inside:
        words += f" Warning: {inside} of them have it inside, too; use an ending that occurs nowhere else."
    return Finding(words)


def _ending_missing(
    prepared: Prepared, column: str, options: Sequence[str], otherwise: str, texts: Sequence[str]
) -> Finding:
    ending = next((each for each in options if not any(each in text for text in texts)), otherwise)

    def append(pairs: Pairs) -> Pairs:
        if column == "prompt":
            prepared.prompt_ending = ending
        else:
            prepared.completion_ending = ending
        return _each(pairs, column, lambda text: text + ending)

    why = "where the answer begins" if column == "prompt" else "where to stop"
    return Finding(
        f"The {column}s have no common ending, by which the model learns {why}.",
        f"end each {column} with {ending!r}",
        apply=append,
    )


def _prompt_prefix(prepared: Prepared) -> None:
    prefix = _common_prefix([pair.prompt for pair in prepared.pairs])
    if not prefix:
        return
    text = f"All prompts begin with {prefix!r}."
    if len(prefix) <= LONG_PREFIX:
        prepared.findings.append(Finding(text))
        return
    text += " A tuned model needs no instruction that is the same in every row."
    mend = f"take {prefix!r} off the prompts"
    prepared.findings.append(
        Finding(text, mend, apply=lambda pairs: _each(pairs, "prompt", lambda prompt: prompt[len(prefix) :]))
    )


def _completion_prefix(prepared: Prepared) -> None:
    prefix = _common_prefix([pair.completion for pair in prepared.pairs])
    if len(prefix) < COMPLETION_PREFIX:
        return
    space = " " if prefix.startswith(" ") else ""
    text = f"All completions begin with {prefix!r}, which a model would only repeat."
    mend = f"take {prefix!r} off the completions"
    prepared.findings.append(
        Finding(text, mend, apply=lambda pairs: _each(pairs, "completion", lambda said: space + said[len(prefix) :]))
    )


def _leading_space(prepared: Prepared) -> None:
    if all(pair.completion.startswith(" ") for pair in prepared.pairs):
        return
    prepared.findings.append(
        Finding(
            "Not every completion begins with a space, as words do in most models' tokens.",
            "begin each completion with a space",
            apply=lambda pairs: _each(pairs, "completion", lambda said: said if said.startswith(" ") else " " + said),
        )
    )


def _common_suffix(texts: Sequence[str]) -> str:
    return _common_prefix([text[::-1] for text in texts])[::-1]


def _common_prefix(texts: Sequence[str]) -> str:
    least, most = min(texts), max(texts)  # what these two share, all between them share
    return least[: next((n for n, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))]


def _each(pairs: Pairs, column: str, change: Callable[[str], str]) -> Pairs:
    if column == "prompt":
        return [replace(pair, prompt=change(pair.prompt)) for pair in pairs]
    return [replace(pair, completion=change(pair.completion)) for pair in pairs]


def _rows(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
    return f"{len(numbers)} rows ({shown})"


# -- what is written ---------------------------------------------------------------------------------------------------


def split(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """(train, valid): four fifths drawn with a fixed seed, all but 1,000 when that is more; the rest in its order.

    The draw is numpy's legacy permutation, which pandas' `sample(random_state=42)` takes its rows from.
    """
    import numpy

    train = max(len(pairs) - MOST_VALID, int(0.8 * len(pairs)))
    drawn = numpy.random.RandomState(SEED).permutation(len(pairs))[:train].tolist()
    taken = set(drawn)
    return [pairs[number] for number in drawn], [pair for number, pair in enumerate(pairs) if number not in taken]


def classes(pairs: Pairs) -> list[tuple[str, int]]:
    """Each completion with its number of rows, the most frequent first."""
    return Counter(pair.completion for pair in pairs).most_common()


def new_names(path: Path, parts: Sequence[str]) -> list[Path]:
    """NAME_prepared.jsonl beside `path`, one for each of `parts`; numbered alike when one of them is there already."""
    number = 0
    while True:
        again = f" ({number})" if number else ""
        names = [path.with_name(f"{path.stem}_prepared{part}{again}.jsonl") for part in parts]
        if not any(name.exists() for name in names):
            return names
        number += 1


def write(path: Path, pairs: Pairs) -> None:
    """One object a line, written as pandas writes it (compact, slashes escaped). Raises FileExistsError."""
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            cells = {"prompt": pair.prompt, "completion": pair.completion}
            line = json.dumps(cells, ensure_ascii=False, separators=(",", ":"))
            file.write(line.replace("/", "\\/") + "\n")
