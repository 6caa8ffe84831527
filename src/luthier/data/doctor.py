"""Findings over whole files: what each row shows, and what only rows beside rows show.

The files given together are one data set: a row can repeat a row of an earlier file. Validation files are looked at in
the same way, and compared with the training files.
Does not know: how files are scanned (scan.py), how a report is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.data import statistics
from luthier.data.characters import LANGUAGES
from luthier.data.columns import KEPT_PROBLEMS, Columns
from luthier.data.conversions import command
from luthier.data.duplicates import earlier_alike
from luthier.data.findings import KINDS, LEVELS, SHOWN_ROWS, Finding, Report, make_finding, plural_rows
from luthier.data.proposals import Proposer, fix_command, fixed
from luthier.data.render import Renderer
from luthier.data.scan import Progress, scan
from luthier.spec.job import auto_max_length

Rows = npt.NDArray[np.int64]
_OWN_LANGUAGE = 0.8  # the share of rows from which a language is the file's own


@dataclass(frozen=True, slots=True)
class Scanned:
    """A file with its columns; `start`: its first row in the columns of all files together."""

    path: Path
    columns: Columns
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + self.columns.examples


def check(
    paths: Sequence[str | Path],
    renderer: Renderer | None = None,
    validation: Sequence[str | Path] = (),
    progress: Progress | None = None,
    *,
    max_length: int | None = None,
    processes: int | None = None,
    model: str = "",
) -> Report:
    """The report on training files, and on validation files beside them.

    With a `renderer` (a model's tokenizer and template) rows are tokenised: lengths over `max_length` (None: what
    training would choose for the model), rows without a token to learn, rows that the template cannot express.
    `model`: the words that name this model in the commands that are proposed. `progress(done, total)` in bytes over
    all files. `processes`: see scan.scan. Raises NotFound.
    """
    longest = max_length if max_length or renderer is None else auto_max_length(renderer.tokenizer.context)
    training, held = [Path(path) for path in paths], [Path(path) for path in validation]
    files = _scan(training + held, renderer, longest, progress, processes)
    findings: list[Finding] = []
    for file in files:
        findings += _conversion(file)
        findings += _by_row(file)
        findings += _by_file(file)
    if files:
        border = sum(file.columns.examples for file in files[: len(training)])
        findings += _repeats(files[: len(training)])
        findings += _repeats(files[len(training) :])
        findings += _overlaps(files, border)
    findings.sort(key=lambda finding: LEVELS.index(finding.severity))
    proposers = {str(file.path): Proposer(file.path, file.columns, model, training) for file in files}
    findings = [proposers[finding.file].mended(finding) for finding in findings]
    return Report(
        files[0].columns.format if files else None,
        sum(file.columns.records for file in files[: len(training)]),
        findings,
        _statistics(files, longest, renderer is not None),
        [problem for file in files for problem in file.columns.problems][:KEPT_PROBLEMS],
        list(_together(findings, proposers)),
    )


def _together(findings: Sequence[Finding], proposers: Mapping[str, Proposer]) -> Iterator[dict[str, str]]:
    for name, proposer in proposers.items():
        words = proposer.together([finding for finding in findings if finding.file == name])
        if words is not None:
            yield {"file": name, "command": words}


def _scan(
    paths: Sequence[Path],
    renderer: Renderer | None,
    max_length: int | None,
    progress: Progress | None,
    processes: int | None,
) -> list[Scanned]:
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    files: list[Scanned] = []
    start = 0
    for n, path in enumerate(paths):

        def told(done: int, total: int, before: int = sum(sizes[:n])) -> None:
            if progress is not None:
                progress(before + min(done, total), sum(sizes))

        columns = scan(path, renderer, max_length, told, processes)
        files.append(Scanned(path, columns, start))
        start += columns.examples
    return files


def _statistics(files: Sequence[Scanned], max_length: int | None, tokenised: bool) -> dict[str, Any]:
    found = {str(file.path): statistics.of_file(file.columns, tokenised) for file in files}
    return {"files": found, "max_length": max_length if tokenised else None}


def _conversion(file: Scanned) -> Iterator[Finding]:
    """Files that training does not read as they are, and the command that makes one which it does."""
    conversion, columns = file.columns.conversion, file.columns
    if columns.format == "preference" and columns.examples:
        yield make_finding("pairs", file.path, columns.examples, [])
    elif conversion is not None:
        message = f"{conversion.found}, {plural_rows(conversion.rows)}: to be converted before training"
        details = [conversion.why] if conversion.why else []
        fix = None if conversion.options is None else command(file.path, conversion.options)
        if "invalid" in columns.tallies and columns.format == "moss":  # a conversion refuses such rows
            good = fixed(file.path)
            fix = f"{fix_command(file.path, '--drop invalid')} && {command(good, conversion.options or '')}"
        yield make_finding("convert", file.path, max(1, conversion.rows), [], details, message=message, fix=fix)


# -- what a row shows by itself ----------------------------------------------------------------------------------------


def _by_row(file: Scanned) -> Iterator[Finding]:
    tallies, conversion = file.columns.tallies, file.columns.conversion
    for kind in KINDS:
        if kind == "invalid" and conversion is not None and file.columns.format is None:
            continue  # that is said once
        if kind in tallies:
            shown = [(row, detail) for row, detail in tallies[kind].rows if row]
            details = [detail for _, detail in shown]
            rows = [row for row, _ in shown]
            yield make_finding(kind, file.path, tallies[kind].count, rows, details)
    for key, (_, row, count) in file.columns.unknown.items():
        message = f"{plural_rows(count)} with the key {key!r}, which no rule knows"
        yield make_finding("unknown_key", file.path, count, [row], [f"the key {key!r}"], message=message)


# -- what a file shows -------------------------------------------------------------------------------------------------


def _by_file(file: Scanned) -> Iterator[Finding]:
    yield from _systems(file)
    yield from _endings(file)
    yield from _classes(file)
    yield from _languages(file)
    yield from _outliers(file)


def _systems(file: Scanned) -> Iterator[Finding]:
    without, roles = file.columns.without_system, file.columns.roles
    if without.count and (roles["system"] or roles["developer"]):
        rows, details = [row for row, _ in without.rows], [detail for _, detail in without.rows]
        yield make_finding("missing_system", file.path, without.count, rows, details)


def _endings(file: Scanned) -> Iterator[Finding]:
    columns = file.columns
    if columns.format != "completion" or not columns.examples:
        return
    labels = statistics.classes(columns.answers, columns.examples)
    for kind, endings in (("separators", columns.prompt_endings), ("end_markers", columns.completion_endings)):
        common = endings.common()
        count, rows = endings.without(common)
        if kind == "end_markers" and not common and labels:
            continue  # a class is over when it is said
        if not common:
            count, rows = endings.total, endings.without("\0")[1]
        if count:
            detail = f"the others end with {common!r}" if common else "no ending is common to most rows"
            yield make_finding(kind, file.path, count, rows, [detail] * len(rows))
    spaced = columns.examples - columns.unspaced.count
    if columns.unspaced.count and spaced > columns.unspaced.count:
        rows = [row for row, _ in columns.unspaced.rows]
        message = f"{columns.unspaced.count:,} completions do not begin with a space, as the others do"
        details = [detail for _, detail in columns.unspaced.rows]
        yield make_finding("separators", file.path, columns.unspaced.count, rows, details, message=message)


def _classes(file: Scanned) -> Iterator[Finding]:
    labels = statistics.classes(file.columns.answers, file.columns.examples)
    if labels is None:
        return
    even = file.columns.examples / len(labels)
    rare = [(label, count) for label, count in labels if 3 * count < even]
    if rare or labels[0][1] > 3 * even:
        most, count = labels[0]
        least, few = labels[-1]
        message = f"{len(labels)} classes, from {few:,} rows ({least!r}) to {count:,} ({most!r})"
        details = [f"{label!r}: {count:,} rows" for label, count in rare]
        yield make_finding("label_balance", file.path, max(1, len(rare)), [], details, message=message)


def _languages(file: Scanned) -> Iterator[Finding]:
    columns = file.columns
    answers, prompts = columns.number("language"), columns.number("prompt_language")
    known = answers[answers > 0]
    if not len(known):
        return
    counts = np.bincount(known, minlength=len(LANGUAGES))
    own = int(counts.argmax()) if counts.max() >= _OWN_LANGUAGE * len(known) else 0
    foreign = (answers > 0) & (answers != own) & (own > 0)
    switched = (answers > 0) & (prompts > 0) & (answers != prompts)
    odd = np.flatnonzero(foreign | switched)
    if len(odd):
        details = [_spoken(int(answers[n]), int(prompts[n]), own) for n in odd[:SHOWN_ROWS]]
        yield make_finding("mixed_languages", file.path, len(odd), _numbers(columns, odd), details)


def _spoken(answer: int, prompt: int, own: int) -> str:
    if answer != prompt and prompt:
        return f"answer in {LANGUAGES[answer]}, prompt in {LANGUAGES[prompt]}"
    return f"answer in {LANGUAGES[answer]}, most are in {LANGUAGES[own]}"


def _outliers(file: Scanned) -> Iterator[Finding]:
    columns = file.columns
    if columns.examples < statistics.FEWEST_FOR_ODD or columns.format == "text":
        return
    distance, measure, names = statistics.oddness(columns)
    odd = np.flatnonzero(distance >= statistics.odd_from(distance))
    if len(odd):
        worst = np.sort(odd[np.argsort(-distance[odd], kind="stable")][:SHOWN_ROWS])
        details = [
            f"{names[measure[n]]}; {columns.number('prompt_characters')[n]:,} characters of prompt, "
            f"{columns.number('answer_characters')[n]:,} of answer"
            for n in worst
        ]
        yield make_finding("outlier", file.path, len(odd), _numbers(columns, worst), details)


def _numbers(columns: Columns, indices: Rows) -> list[int]:
    return [int(row) for row in columns.numbers["row"][indices[:SHOWN_ROWS]]]


# -- rows beside rows --------------------------------------------------------------------------------------------------


def _repeats(files: Sequence[Scanned]) -> Iterator[Finding]:
    """Exact and near duplicates, and prompts with different answers, over files that are one data set."""
    if not any(file.columns.examples for file in files):
        return
    offset = files[0].start
    prompts, answers = _key(files, "prompt"), _key(files, "answer")
    pairs = _groups(np.stack([prompts, answers], axis=1))
    yield from _pointing(files, "duplicate", offset, pairs, "repeats")
    firsts = np.flatnonzero(pairs < 0)
    near = earlier_alike(_sketches(files), among=firsts)
    points = np.full(len(pairs), -1, np.int64)
    points[firsts] = np.where(near >= 0, firsts[near], -1)
    yield from _pointing(files, "near_duplicate", offset, points, "is almost")
    yield from _contradictions(files, offset, prompts[firsts], firsts)


def _contradictions(files: Sequence[Scanned], offset: int, prompts: Rows, firsts: Rows) -> Iterator[Finding]:
    """Of distinct (prompt, answer) pairs, those whose prompt has another answer before; counted by prompt."""
    earlier = _groups(prompts[:, None])
    again = np.flatnonzero(earlier >= 0)
    heads, where = np.unique(earlier[again], return_inverse=True)
    for file in files:
        if file.columns.format in ("text", "preference"):  # a prompt may have several pairs of answers
            continue
        mine = [n for n, head in enumerate(heads) if file.start <= firsts[head] + offset < file.end]
        if not mine:
            continue
        rows, details = [], []
        for n in mine[:SHOWN_ROWS]:
            others = firsts[again[where == n]]
            rows.append(_place(files, int(firsts[heads[n]]) + offset)[1])
            shown = ", ".join(_named(files, int(row) + offset, file) for row in others[:5])
            details.append(f"answered differently in {shown}{' and others' if len(others) > 5 else ''}")
        yield make_finding("contradiction", file.path, len(mine), rows, details)


def _overlaps(files: Sequence[Scanned], border: int) -> Iterator[Finding]:
    total = files[-1].end
    if border in (0, total):
        return
    prompts = _key(files, "prompt")
    firsts = _groups(prompts[:, None], earliest=True)
    points = np.full(total, -1, np.int64)
    points[border:] = np.where(firsts[border:] < border, firsts[border:], -1)
    yield from _pointing(files, "overlap", 0, points, "has the prompt of")
    near = earlier_alike(_sketches(files), border)
    near[points >= 0] = -1
    yield from _pointing(files, "near_overlap", 0, near, "is almost")


def _key(files: Sequence[Scanned], name: str) -> Rows:
    parts = [file.columns.numbers[name] for file in files if name in file.columns.numbers]
    return np.concatenate(parts).view(np.int64) if parts else np.zeros(0, np.int64)


def _sketches(files: Sequence[Scanned]) -> npt.NDArray[np.uint16]:
    return files[0].columns.sketches if len(files) == 1 else np.concatenate([file.columns.sketches for file in files])


def _groups(keys: Rows, earliest: bool = False) -> Rows:
    """For each row of `keys` [rows, n] the first row that equals it, or -1 for that row itself (`earliest`: itself)."""
    order = np.lexsort(keys.T[::-1])  # stable: equal rows stay in order
    ordered = keys[order]
    opens = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)] if len(keys) else np.zeros(0, bool)
    first = np.maximum.accumulate(np.where(opens, np.arange(len(keys)), 0))
    found = np.empty(len(keys), np.int64)
    found[order] = order[first]
    return found if earliest else np.where(found == np.arange(len(keys)), -1, found)


def _pointing(files: Sequence[Scanned], kind: str, offset: int, points: Rows, words: str) -> Iterator[Finding]:
    """A finding in each file for the rows that point to an earlier one."""
    for file in files:
        start = file.start - offset
        mine = np.flatnonzero(points[start : start + file.columns.examples] >= 0)
        if len(mine):
            details = [f"{words} {_named(files, int(points[start + n]) + offset, file)}" for n in mine[:SHOWN_ROWS]]
            yield make_finding(kind, file.path, len(mine), _numbers(file.columns, mine), details)


def _place(files: Sequence[Scanned], index: int) -> tuple[Scanned, int]:
    """The file that holds a row of all columns together, and its number there."""
    file = next(file for file in files if file.start <= index < file.end)
    return file, int(file.columns.number("row")[index - file.start])


def _named(files: Sequence[Scanned], index: int, here: Scanned) -> str:
    file, row = _place(files, index)
    return f"row {row}" if file.path == here.path else f"row {row} of {file.path.name}"
