"""A data file to another format or layout: nothing is lost unless one agrees to it, and then it is counted.

The file is read twice: once to find everything that the target cannot hold, and once to write; so a refusal names all
of it and leaves nothing behind, and memory does not grow with the file.
Does not know: what formats hold (encode.py), how files are read (sources.py) and tables written (sheets.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier.data.encode import Losses, Unfit, encode
from luthier.data.formats import KEYS
from luthier.data.new_file import beside, check_free, new_file
from luthier.data.preference import KEYS as PREFERENCE_KEYS
from luthier.data.preference import known_keys
from luthier.data.read import OnBytes, is_plain_text
from luthier.data.rows import Lines, Row, kind_of
from luthier.data.sheets import KINDS, fault, write_sheet
from luthier.data.sources import Reading, checked_kind, columns_left_out, read_any
from luthier.spec.data import Problem
from luthier.spec.errors import BadData, BadSetting

Format = Literal["chat", "preference", "preference-completion", "completion", "alpaca", "sharegpt", "text"]
Target = Literal[Format, "csv", "tsv", "parquet", "xlsx"]
Tell = Callable[[str], OnBytes]
_SHOWN = 20
_KNOWN = {**KEYS, "preference": PREFERENCE_KEYS, "moss": frozenset({"meta_instruction", "chat"})}
_LIKE = {"moss": "chat", "conversational": "chat"}  # formats that tables hold as another one


@dataclass
class Count:
    """How many rows, and the lines of the first of them."""

    rows: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int) -> None:
        self.rows += 1
        if len(self.lines) < _SHOWN:
            self.lines.append(line)


@dataclass
class Converted:
    """What was written. `lost`: what was given up -> rows; `left_out`: why -> rows that are not in the file.

    `carried`: keys that belong to no format and came along -> rows; `dropped`: those that were left out as asked;
    `columns_left_out`: of the table that was read.
    """

    out: str
    format: str
    records: int = 0
    rows: int = 0
    lost: dict[str, Count] = field(default_factory=dict)
    left_out: dict[str, Count] = field(default_factory=dict)
    carried: dict[str, Count] = field(default_factory=dict)
    dropped: dict[str, Count] = field(default_factory=dict)
    columns_left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    warning_count: int = 0


@dataclass(frozen=True)
class Plan:
    """What was asked. `format`: of the records in a table, None for the source's own; `titles`: field -> the name of
    its column, where that is another one."""

    source: Path
    out: Path
    target: Target
    format: Format | None = None
    reading: Reading = field(default_factory=Reading)
    titles: Mapping[str, str] = field(default_factory=dict)
    lossy: bool = False
    drop_extra: bool = False
    force: bool = False


def convert(plan: Plan, tell: Tell | None = None) -> Converted:
    """Write the file. Raises BadData, with every problem found, for rows that cannot be read and, unless the plan is
    lossy, for rows that say something which the target cannot hold; BadSetting for options that have no use here."""
    _check(plan)
    check_free(plan.out, plan.force)
    done = Converted(str(plan.out), plan.target, columns_left_out=columns_left_out(plan.source, plan.reading))
    columns = _survey(plan, done, tell)
    made = _made(plan, done.format, tell("Writing") if tell else None)
    if plan.target in KINDS:
        _write_table(plan, columns, made)
    elif is_plain_text(plan.out):
        _write_text(plan, made)
    else:
        with new_file(plan.out, force=plan.force) as handle:
            lines = Lines(handle, array=plan.out.suffix.lower() == ".json")
            for record in made:
                lines.add_raw(json.dumps(record, ensure_ascii=False).encode())
            lines.end()
    return done


def _check(plan: Plan) -> None:
    table = plan.target in KINDS
    checked_kind(plan.source, plan.reading)
    if plan.format is not None and not table:
        raise BadSetting(f"--as says what a table holds, and --to {plan.target} is none.", param="as")
    if plan.titles and not table:
        raise BadSetting(f"--column names columns of a table, and --to {plan.target} is none.", param="column")
    if is_plain_text(plan.out) and plan.target != "text":
        raise BadSetting(f"{plan.out} would be plain text.", hint="Use --to text, or name it .jsonl.", param="to")


# -- the first reading -------------------------------------------------------------------------------------------------


def _survey(plan: Plan, done: Converted, tell: Tell | None) -> list[str]:
    """Fill in `done`; the columns of a table in the order in which they turn up. Raises BadData."""
    problems: list[Problem] = []
    count = 0
    columns: dict[str, None] = {}

    def refuse(problem: Problem) -> None:
        nonlocal count
        count += 1
        if len(problems) < _SHOWN:
            problems.append(problem)

    for row in read_any(plan.source, plan.reading, tell("Checking") if tell else None):
        if isinstance(row, Problem):
            refuse(row)
            continue
        _note_problems(row, done, refuse)
        if row.meaning is None:
            continue
        done.records += 1
        if plan.target in KINDS and done.records == 1:
            kind = kind_of(row.record.value) or "chat"
            done.format = plan.format or _LIKE.get(kind, kind)
        record, losses, why = _encoded(row, plan, done.format)
        if plan.target == "text" and is_plain_text(plan.out) and done.records > 1:
            losses.add("where one document ends and the next one begins")
        _account(row, record, losses, why, plan, done, refuse)
        columns |= dict.fromkeys(record or {})
    if count:
        raise _refusal(plan, problems, count)
    return list(columns)


def _note_problems(row: Row, done: Converted, refuse: Callable[[Problem], None]) -> None:
    for problem in row.problems:
        if problem.severity == "error":
            refuse(problem)
        else:
            done.warning_count += 1
            if len(done.warnings) < _SHOWN:
                done.warnings.append(str(problem))


def _account(
    row: Row,
    record: dict[str, Any] | None,
    losses: Losses,
    why: str,
    plan: Plan,
    done: Converted,
    refuse: Callable[[Problem], None],
) -> None:
    line, number, file = row.record.line, row.record.row, plan.source.name
    if record is None:
        done.left_out.setdefault(why, Count()).add(line)
        if not plan.lossy:
            hint = "--lossy leaves the row out."
            refuse(Problem(line, "", why, f"a record that {done.format} can hold", hint, number, file=file))
        return
    done.rows += 1
    for what in losses:
        done.lost.setdefault(what, Count()).add(line)
        if not plan.lossy:
            hint = "--lossy writes the row without it."
            refuse(Problem(line, "", what, f"only what {done.format} can hold", hint, number, file=file))
    for key in _extras(row):
        (done.dropped if plan.drop_extra else done.carried).setdefault(key, Count()).add(line)


def _refusal(plan: Plan, problems: list[Problem], count: int) -> BadData:
    return BadData(
        f"{plan.source}: {count:,} problem{'s' if count > 1 else ''}, so nothing was written; the first: {problems[0]}",
        problems=problems,
        param="in",
    )


# -- one row -----------------------------------------------------------------------------------------------------------


def _encoded(row: Row, plan: Plan, form: str) -> tuple[dict[str, Any] | None, Losses, str]:
    """(record or None, what it gives up, why there is none)."""
    assert row.meaning is not None
    try:
        record, losses = encode(row.meaning, form)
    except Unfit as unfit:
        return None, Losses(), str(unfit)
    _carry(row, record, form, plan, losses)
    if plan.target in KINDS:
        for key, value in record.items():
            wrong = fault(plan.target, cell(value))
            if wrong:
                return None, losses, f"{key}: {wrong}"
    return record, losses, ""


def _extras(row: Row) -> dict[str, Any]:
    """Keys of a record that its format does not know."""
    value = row.record.value
    kind = kind_of(value) or "text"
    known = known_keys(value) if kind == "preference" else _KNOWN[kind]
    return {key: each for key, each in value.items() if key not in known}


def _carry(row: Row, record: dict[str, Any], form: str, plan: Plan, losses: Losses) -> None:
    """What is beside the meaning: parallel_tool_calls, and keys that no format knows."""
    value = row.record.value
    holder = value["input"] if isinstance(value.get("input"), dict) else value
    if isinstance(holder.get("parallel_tool_calls"), bool):
        place = record["input"] if form.startswith("preference") else record if form == "chat" else None
        if place is None:
            losses.add("parallel_tool_calls")
        else:
            place["parallel_tool_calls"] = holder["parallel_tool_calls"]
    known = _KNOWN["preference" if form.startswith("preference") else form]
    for key, each in _extras(row).items():
        if plan.drop_extra:
            continue
        if is_plain_text(plan.out) or key in known or key in record:
            losses.add(f"the key {key}")
        else:
            record[key] = each


# -- writing -----------------------------------------------------------------------------------------------------------


def _made(plan: Plan, form: str, on_bytes: OnBytes | None) -> Iterator[dict[str, Any]]:
    """The records to write; problems were refused before."""
    for row in read_any(plan.source, plan.reading, on_bytes):
        if isinstance(row, Row) and row.meaning is not None:
            record, _, _ = _encoded(row, plan, form)
            if record is not None:
                yield record


def cell(value: Any) -> str:
    """A field as a cell of a table holds it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write_table(plan: Plan, columns: list[str], made: Iterator[dict[str, Any]]) -> None:
    titles = [plan.titles.get(name, name) for name in columns]
    doubled = next((title for title in titles if titles.count(title) > 1), None)
    if doubled is not None:
        raise BadSetting(f"--column gives two columns the name {doubled!r}.", param="column")
    unknown = plan.titles.keys() - set(columns)
    if unknown:
        raise BadSetting(
            f"--column {min(unknown)}=: the records have no such field, only {', '.join(columns)}.", param="column"
        )
    with (
        beside(plan.out, force=plan.force) as place,
        write_sheet(place, plan.target, titles) as sheet,
    ):
        for record in made:
            sheet.add([cell(record[name]) if name in record else None for name in columns])


def _write_text(plan: Plan, made: Iterator[dict[str, Any]]) -> None:
    with new_file(plan.out, force=plan.force) as handle:
        for number, record in enumerate(made):
            handle.write(("\n\n" if number else "").encode() + record["text"].encode())
