"""Any data file as rows: JSON in its layouts, tables by their columns, plain text as one row or a row a line.

Does not know: what rows are turned into (convert.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from luthier.data.fields import ColumnMap, Columns, check_fields, from_keys
from luthier.data.read import MAX_RECORD, OnBytes, Record, read_records
from luthier.data.rows import Row, rows_of
from luthier.data.sheets import KINDS, LINE, Layout, open_sheet
from luthier.spec.data import Problem
from luthier.spec.errors import BadData, BadSetting, NotFound

Kind = Literal["auto", "json", "csv", "tsv", "xlsx", "parquet", "text", "lines"]
TABLES = (*KINDS, "lines")


@dataclass(frozen=True)
class Reading:
    """How a file is to be read. `kind` "auto": as its name ends. `encoding`: of CSV, TSV and text, None for UTF-8."""

    kind: Kind = "auto"
    encoding: str | None = None
    sheet: str | None = None
    columns: ColumnMap = field(default_factory=ColumnMap)


def kind_by_name(path: Path) -> str:
    """What the ending of a name says a file is: a table's kind, "text" or "json"."""
    ending = path.suffix.lower().removeprefix(".")
    return ending if ending in KINDS else "text" if ending == "txt" else "json"


def read_any(path: Path, reading: Reading, on_bytes: OnBytes | None = None) -> Iterator[Row | Problem]:
    """The rows of `path`. Raises NotFound, BadSetting for an option that this kind of file has no use for, and BadData
    for a file that is not what its name says."""
    kind = checked_kind(path, reading)
    if kind in TABLES:
        yield from rows_of(_table_records(path, kind, reading, on_bytes), path.name)
    elif kind == "text":
        yield from rows_of([_whole_text(path, reading.encoding)], path.name)
    else:
        yield from rows_of(_json_records(path, reading.columns, on_bytes), path.name)


def columns_left_out(path: Path, reading: Reading) -> list[str]:
    """Columns of a table that no field takes; [] for other files. Raises as read_any does."""
    kind = checked_kind(path, reading)
    if kind not in TABLES:
        return []
    with open_sheet(path, _layout(kind, reading)) as sheet:
        return Columns(sheet.columns, _mapping(kind, reading), path.name).left_out


def checked_kind(path: Path, reading: Reading) -> str:
    kind = kind_by_name(path) if reading.kind == "auto" else reading.kind
    if not path.is_file():
        raise NotFound(f"No data file {path}.", hint="Check the path.", param="in")
    if reading.sheet is not None and kind != "xlsx":
        raise BadSetting(f"--sheet is for Excel workbooks, and {path} is read as {kind}.", param="sheet")
    if reading.encoding is not None and kind not in ("csv", "tsv", "lines", "text"):
        raise BadSetting(f"--encoding is for CSV, TSV and text, and {path} is read as {kind}.", param="encoding")
    if reading.columns and kind == "text":
        raise BadSetting(
            f"--map and --set need rows, and {path} is one text.", hint="--from lines makes rows.", param="map"
        )
    check_fields(reading.columns)
    return kind


def _layout(kind: str, reading: Reading) -> Layout:
    return Layout(kind, reading.encoding or "utf-8-sig", reading.sheet)


def _mapping(kind: str, reading: Reading) -> ColumnMap:
    """Lines without a mapping are texts."""
    return reading.columns if kind != "lines" or reading.columns else ColumnMap({"text": LINE})


def _json_records(path: Path, mapping: ColumnMap, on_bytes: OnBytes | None) -> Iterator[Record | Problem]:
    for record in read_records(path, on_bytes):
        if not mapping or isinstance(record, Problem) or not isinstance(record.value, dict):
            yield record
            continue
        made = from_keys(record.value, mapping, (record.line, record.row, path.name))
        yield made if isinstance(made, Problem) else Record(record.line, record.row, made)


def _table_records(path: Path, kind: str, reading: Reading, on_bytes: OnBytes | None) -> Iterator[Record | Problem]:
    count = 0
    with open_sheet(path, _layout(kind, reading), on_bytes) as sheet:
        columns = Columns(sheet.columns, _mapping(kind, reading), path.name)
        for cells in sheet.rows:
            count += 1
            if isinstance(cells, Problem):
                yield cells
                continue
            record = columns.record(cells.cells, cells.line, cells.row)
            yield record if isinstance(record, Problem) else Record(cells.line, cells.row, record)
    if not count:
        yield Problem(0, "", "no rows", "at least one", "Check that the export has finished.", file=path.name)


def _whole_text(path: Path, encoding: str | None) -> Record | Problem:
    """A text file as one record. Raises BadData for more than one record may hold."""
    size = path.stat().st_size
    if size > MAX_RECORD:
        raise BadData(
            f"{path} has {size:,} bytes, and one record holds {MAX_RECORD:,}.",
            hint="Train on the .txt file as it is, or take each line for a row with --from lines.",
            param="in",
        )
    raw = path.read_bytes()
    try:
        text = raw.decode(encoding or "utf-8-sig")
    except LookupError as error:
        raise BadSetting(
            f"--encoding {encoding} is no known encoding.", hint="For instance cp1252.", param="encoding"
        ) from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{raw[error.start]:02X}, which is not {encoding or 'UTF-8'}"
        return Problem(line, "", found, "text", "Name its encoding, for instance --encoding cp1252.", 1, file=path.name)
    return Record(1, 1, {"text": text})
