"""Tables read and written a row at a time: CSV, TSV, Excel workbooks, Parquet, and text of one row a line.

Cells come as texts; numbers and true/false as JSON writes them, what is missing as None. Lists and structs of Parquet
stay values. openpyxl and pyarrow come with the extra `tables` and are imported where they are needed.
Does not know: what columns mean (fields.py).
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib
import json
import os
import re
import types
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol

from luthier.data.read import MAX_RECORD, OnBytes
from luthier.spec.data import Problem
from luthier.spec.errors import BadData, BadSetting, NotFound, UserError

KINDS = ("csv", "tsv", "xlsx", "parquet")
LINE = "line"  # the column of a text file of one row a line
LONGEST_CELL = 32_767  # characters; Excel's own limit
MOST_SHEET_ROWS = 1_048_576
_BATCH = 1024  # rows of Parquet decoded and written at a time
_TOLD = 1 << 18
_ESCAPE = re.compile("_x(?![Dd][89A-Fa-f])[0-9A-Fa-f]{4}_")  # halves of a pair stay spelt
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")


@dataclass(frozen=True, slots=True)
class Cells:
    """One row: column -> text, value or None. `line`: the line it begins on; of workbooks and Parquet the row."""

    line: int
    row: int
    cells: dict[str, Any]


@dataclass
class Sheet:
    """An open table. `rows` gives Cells, or a Problem in place of a row that cannot be read."""

    columns: list[str]
    rows: Iterator[Cells | Problem]


@dataclass(frozen=True)
class Layout:
    """How a table lies in its file. `sheet`: of a workbook, None for the only one."""

    kind: str
    encoding: str = "utf-8-sig"
    sheet: str | None = None


def extra(module: str) -> types.ModuleType:
    """A module of the extra `tables`. Raises UserError when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"This needs the package {package}, which is not installed.", hint='Run: pip install "luthier[tables]"'
        ) from error


# -- reading -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_sheet(path: Path, layout: Layout, on_bytes: OnBytes | None = None) -> Iterator[Sheet]:
    """The table in `path`. Raises NotFound, BadSetting (encoding, sheet), BadData (columns), UserError (extra)."""
    if not path.is_file():
        raise NotFound(f"No data file {path}.", hint="Check the path.", param="in")
    openers = {"xlsx": _open_workbook, "parquet": _open_parquet}
    with openers.get(layout.kind, _open_text)(path, layout, on_bytes) as sheet:
        doubled = sorted({name for name in sheet.columns if sheet.columns.count(name) > 1})
        if doubled:
            raise BadData(
                f"{path}: the column {doubled[0]!r} is there {sheet.columns.count(doubled[0])} times, wanted once.",
                hint="Rename one of them.",
                param="in",
            )
        yield sheet


@contextlib.contextmanager
def _open_text(path: Path, layout: Layout, on_bytes: OnBytes | None) -> Iterator[Sheet]:
    with open(path, "rb") as handle:
        lines = _Lines(handle, path, layout.encoding, on_bytes)
        if layout.kind == "lines":
            yield Sheet([LINE], _line_rows(lines))
            return
        csv.field_size_limit(MAX_RECORD)
        reader = csv.reader(lines, delimiter="\t" if layout.kind == "tsv" else ",", strict=True)
        try:
            columns = next(reader, [])
        except csv.Error as error:
            raise BadData(f"{path}, line 1: {error}.", hint=_hint_csv(layout.kind), param="in") from error
        if not columns:
            raise BadData(f"{path} has no first line with the names of its columns.", param="in")
        yield Sheet(columns, _separated_rows(reader, columns, path, layout.kind))


class _Lines:
    """Lines of text, each with its line break, counted and told of. Raises BadData for bytes of another encoding."""

    def __init__(self, handle: BinaryIO, path: Path, encoding: str, on_bytes: OnBytes | None) -> None:
        self.path, self.encoding = path, encoding
        self.number = 0
        self._total, self._done, self._told = path.stat().st_size, 0, 0
        self._on_bytes = on_bytes
        try:
            byte_lines = "\n".encode(encoding).endswith(b"\n") and len("\n".encode(encoding)) in (1, 4)
        except LookupError as error:
            raise BadSetting(
                f"--encoding {encoding} is no known encoding.", hint="For instance cp1252 or gb18030.", param="encoding"
            ) from error
        wide = not byte_lines or encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))
        self._source: Iterator[Any] = iter(TextIOWrapper(handle, encoding=encoding, newline="")) if wide else handle

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            raw = next(self._source)
            self.number += 1
            text = raw if isinstance(raw, str) else raw.decode("utf-8" if self._later_utf8() else self.encoding)
        except UnicodeError as error:
            raise self._wrong(error) from error
        except StopIteration:
            self._tell(self._total)
            raise
        self._done += len(raw)
        if self._done - self._told >= _TOLD:
            self._tell(self._done)
        return text

    def _later_utf8(self) -> bool:
        return self.number > 1 and self.encoding == "utf-8-sig"  # a mark is one at the start of a file only

    def _tell(self, done: int) -> None:
        self._told = done
        if self._on_bytes is not None:
            self._on_bytes(min(done, self._total), self._total)

    def _wrong(self, error: UnicodeError) -> BadData:
        found = "bytes"
        if isinstance(error, UnicodeDecodeError):
            found = f"byte 0x{error.object[error.start]:02X}"
        name = "UTF-8" if self.encoding == "utf-8-sig" else self.encoding
        return BadData(
            f"{self.path}, line {self.number}: found {found}, which is not {name}.",
            hint="Name its encoding, for instance --encoding cp1252 (older Windows) or gb18030 (Chinese).",
            param="encoding",
        )


def _line_rows(lines: _Lines) -> Iterator[Cells | Problem]:
    row = 0
    for line in lines:
        text = line.rstrip("\r\n")
        if text.strip():
            row += 1
            yield Cells(lines.number, row, {LINE: text})


def _separated_rows(reader: Any, columns: Sequence[str], path: Path, kind: str) -> Iterator[Cells | Problem]:
    row = 0
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Problem(line, "", str(error), f"a row of {kind.upper()}", _hint_csv(kind), row + 1, file=path.name)
            return
        if not cells:
            continue
        row += 1
        if len(cells) > len(columns):
            found, wanted = f"{len(cells)} cells", f"{len(columns)}, as in line 1"
            yield Problem(line, "", found, wanted, _hint_csv(kind), row, file=path.name)
            continue
        yield Cells(line, row, dict(zip(columns, cells, strict=False)))


def _hint_csv(kind: str) -> str:
    separator = "tabs" if kind == "tsv" else "commas"
    return f"Cells that hold {separator}, quotes or line breaks stand in double quotes."


@contextlib.contextmanager
def _open_workbook(path: Path, layout: Layout, on_bytes: OnBytes | None) -> Iterator[Sheet]:
    openpyxl = extra("openpyxl")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (OSError, ValueError, KeyError, openpyxl.utils.exceptions.InvalidFileException, zipfile.BadZipFile) as error:
        raise BadData(f"{path} is no Excel workbook (.xlsx): {error}.", param="in") from error
    with contextlib.closing(book):
        names = book.sheetnames
        if layout.sheet is not None and layout.sheet not in names:
            raise BadSetting(f"{path} has no sheet {layout.sheet!r}, only {', '.join(names)}.", param="sheet")
        if layout.sheet is None and len(names) > 1:
            raise BadSetting(
                f"{path} has {len(names)} sheets: {', '.join(names)}.", hint="Choose one with --sheet.", param="sheet"
            )
        page = book[layout.sheet or names[0]]
        page.reset_dimensions()  # what some programs write there is wrong
        rows = page.iter_rows(values_only=True)
        first = list(next(rows, ()))
        while first and first[-1] is None:
            first.pop()
        if not first:
            raise BadData(f"{path} has no first row with the names of its columns.", param="in")
        columns = [_unescaped(_cell(value)) or "" for value in first]
        yield Sheet(columns, _workbook_rows(rows, columns, path, on_bytes))


def _workbook_rows(
    rows: Iterator[tuple[Any, ...]], columns: Sequence[str], path: Path, on_bytes: OnBytes | None
) -> Iterator[Cells | Problem]:
    row = 0
    for number, values in enumerate(rows, 2):
        cells = [_unescaped(_cell(value)) for value in values]
        if not any(cell is not None for cell in cells):
            continue
        row += 1
        if any(cell is not None for cell in cells[len(columns) :]):
            found = f"a cell in column {len(columns) + 1}, which has no name"
            yield Problem(number, "", found, "names in the first row", "", row, file=path.name)
            continue
        yield Cells(number, row, dict(zip(columns, cells, strict=False)))
    if on_bytes is not None:
        on_bytes(path.stat().st_size, path.stat().st_size)


def _unescaped(value: Any) -> Any:
    """Workbooks spell characters that XML lacks as _x000D_."""
    if isinstance(value, str) and "_x" in value:
        return _ESCAPE.sub(lambda match: chr(int(match[0][2:6], 16)), value)
    return value


@contextlib.contextmanager
def _open_parquet(path: Path, layout: Layout, on_bytes: OnBytes | None) -> Iterator[Sheet]:
    parquet, arrow = extra("pyarrow.parquet"), extra("pyarrow")
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise BadData(f"{path} is no Parquet file: {error}.", param="in") from error
    with contextlib.closing(file):
        yield Sheet(list(file.schema_arrow.names), _parquet_rows(file, path, on_bytes))


def _parquet_rows(file: Any, path: Path, on_bytes: OnBytes | None) -> Iterator[Cells | Problem]:
    row, total, size = 0, max(1, file.metadata.num_rows), path.stat().st_size
    for batch in file.iter_batches(_BATCH):
        for values in batch.to_pylist():
            row += 1
            yield Cells(row, row, {name: _cell(value) for name, value in values.items()})
        if on_bytes is not None:
            on_bytes(size * row // total, size)


def _cell(value: Any) -> Any:
    """Text, a list or object of Parquet, or None."""
    if value is None or isinstance(value, str | list | dict):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value)


# -- writing -----------------------------------------------------------------------------------------------------------


class Writer(Protocol):
    def add(self, cells: Sequence[str | None]) -> None: ...


def fault(kind: str, cell: str) -> str | None:
    """Why a table of this kind cannot hold a text, or None."""
    if kind == "xlsx" and len(_UNSAFE.sub("_x0000_", cell)) > LONGEST_CELL:
        return f"a text of {len(cell):,} characters: a cell of Excel holds {LONGEST_CELL:,}"
    return None


@contextlib.contextmanager
def write_sheet(place: Path, kind: str, columns: Sequence[str]) -> Iterator[Writer]:
    """A table written to the new file `place`, its first row (of Parquet: its schema) the columns' names.

    Raises UserError when the extra is missing.
    """
    makers = {"csv": _write_separated, "tsv": _write_separated, "xlsx": _write_workbook, "parquet": _write_parquet}
    with makers[kind](place, kind, columns) as writer:
        yield writer


class _Separated:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def add(self, cells: Sequence[str | None]) -> None:
        self._writer.writerow(["" if cell is None else cell for cell in cells])


@contextlib.contextmanager
def _write_separated(place: Path, kind: str, columns: Sequence[str]) -> Iterator[Writer]:
    with open(place, "x", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t" if kind == "tsv" else ",")
        writer.writerow(columns)
        yield _Separated(writer)
        sync(handle)


class _Page:
    def __init__(self, page: Any, new_cell: Any) -> None:
        self._page, self._new_cell = page, new_cell
        self._rows = 0

    def add(self, cells: Sequence[str | None]) -> None:
        self._rows += 1
        if self._rows > MOST_SHEET_ROWS:
            raise BadData(f"A sheet of Excel holds {MOST_SHEET_ROWS:,} rows.", hint="Write CSV or Parquet.", param="to")
        self._page.append([None if cell is None else self._text(cell) for cell in cells])

    def _text(self, text: str) -> Any:
        """A cell of text, whatever it looks like: a leading = makes no formula."""
        cell = self._new_cell(self._page, _UNSAFE.sub(lambda match: f"_x{ord(match[0]):04X}_", text))
        cell.data_type = "s"
        return cell


@contextlib.contextmanager
def _write_workbook(place: Path, kind: str, columns: Sequence[str]) -> Iterator[Writer]:
    del kind
    openpyxl, cells = extra("openpyxl"), extra("openpyxl.cell")
    book = openpyxl.Workbook(write_only=True)
    page = _Page(book.create_sheet("data"), cells.WriteOnlyCell)
    page.add(columns)
    yield page
    with open(place, "xb") as handle:
        book.save(handle)
        sync(handle)


class _Batches:
    def __init__(self, writer: Any, schema: Any, arrow: Any) -> None:
        self._writer, self._schema, self._arrow = writer, schema, arrow
        self._waiting: list[list[str | None]] = []

    def add(self, cells: Sequence[str | None]) -> None:
        self._waiting.append(list(cells))
        if len(self._waiting) == _BATCH:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            columns = [
                self._arrow.array(column, self._arrow.large_string()) for column in zip(*self._waiting, strict=True)
            ]
            self._writer.write_batch(self._arrow.record_batch(columns, schema=self._schema))
            self._waiting = []


@contextlib.contextmanager
def _write_parquet(place: Path, kind: str, columns: Sequence[str]) -> Iterator[Writer]:
    del kind
    parquet, arrow = extra("pyarrow.parquet"), extra("pyarrow")
    schema = arrow.schema([(name, arrow.large_string()) for name in columns])
    with open(place, "xb") as handle:
        with parquet.ParquetWriter(handle, schema) as writer:
            batches = _Batches(writer, schema, arrow)
            yield batches
            batches.flush()
        sync(handle)


def sync(handle: IO[Any]) -> None:
    handle.flush()
    os.fsync(handle.fileno())
