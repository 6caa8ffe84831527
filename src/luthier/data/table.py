"""Tables of texts from files as people have them: CSV, TSV, JSON, JSON Lines, plain text. For prepare.py.

Every cell is text: numbers and true/false as JSON writes them, what is missing or null as "". Unlike pandas, a cell
that says NA or None stays that text. Does not know: what columns mean.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.spec.errors import BadData, NotFound

KINDS = (".csv", ".tsv", ".json", ".jsonl", ".txt")


@dataclass(frozen=True)
class Table:
    """`rows`: a list of cells each, as long as `columns`. `found`: what the file is, when it is no JSON Lines."""

    columns: list[str]
    rows: list[list[str]]
    found: str | None


def read_table(path: Path) -> Table:
    """The table in `path`. Raises NotFound for no file, BadData for what cannot be read as its ending says."""
    kind = path.suffix.lower()
    if not path.is_file():
        raise NotFound(f"No data file {path}.", param="file", hint="Check the path.")
    if kind in (".xlsx", ".xls"):
        raise BadData(
            f"{path} is a spreadsheet, which Luthier has no reader for.", hint="Save it as CSV (UTF-8).", param="file"
        )
    if kind not in KINDS:
        raise BadData(f"{path} ends with {kind or 'nothing'!r}, wanted one of {', '.join(KINDS)}.", param="file")
    text = _text(path)
    if kind in (".csv", ".tsv"):
        table = _separated(path, text, "," if kind == ".csv" else "\t")
    elif kind == ".txt":
        table = Table(["prompt", "completion"], [["", line] for line in text.splitlines()], "plain text")
    else:
        table = _json(path, text, kind)
    if not table.rows:
        raise BadData(f"{path} holds no rows.", param="file")
    return table


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadData(
            f"{path}, line {line}: found byte {raw[error.start]:#04x}, wanted UTF-8 text.",
            hint="Save the file as UTF-8.",
            param="file",
        ) from error


def _separated(path: Path, text: str, mark: str) -> Table:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        columns = next(reader, [])
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) > len(columns):
                raise BadData(
                    f"{path}, line {reader.line_num}: found {len(cells)} cells, wanted {len(columns)} as in line 1.",
                    hint="Put cells that hold the separator in double quotes.",
                    param="file",
                )
            rows.append(cells + [""] * (len(columns) - len(cells)))
    except csv.Error as error:
        raise BadData(f"{path}, line {reader.line_num}: {error}.", param="file") from error
    return Table(columns, rows, "CSV" if mark == "," else "TSV")


def _json(path: Path, text: str, kind: str) -> Table:
    """Lines or one array, whichever it is; the ending only decides what the other one is called."""
    try:
        records = [(number, json.loads(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        in_lines = len(records) != 1 or isinstance(records[0][1], dict)
    except ValueError as error:
        records, in_lines = [], False
        broken = error
    if not in_lines:
        try:
            whole = json.loads(text)
        except ValueError:
            line = _first_broken_line(text)
            raise BadData(f"{path}, line {line}: no JSON: {broken}.", param="file") from broken
        if not isinstance(whole, list):
            whole = [whole]
        records = [(number, record) for number, record in enumerate(whole, 1)]
    found = None if in_lines and kind == ".jsonl" else "JSON" if not in_lines else "JSON Lines named .json"
    return _of_records(path, records, "line" if in_lines else "record", found)


def _first_broken_line(text: str) -> int:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            json.loads(line or "0")
        except ValueError:
            return number
    return 1


def _of_records(path: Path, records: list[tuple[int, Any]], word: str, found: str | None) -> Table:
    columns: dict[str, None] = {}
    for number, record in records:
        if not isinstance(record, dict):
            raise BadData(
                f"{path}, {word} {number}: found {type(record).__name__}, wanted an object with prompt and completion.",
                param="file",
            )
        columns.update(dict.fromkeys(record))
    rows = [[_cell(path, f"{word} {number}", record.get(name)) for name in columns] for number, record in records]
    return Table(list(columns), rows, found)


def _cell(path: Path, where: str, value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise BadData(f"{path}, {where}: found half of a character ({half}), wanted text.", param="file") from error
    return text
