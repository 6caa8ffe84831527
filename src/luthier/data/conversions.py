"""What `luthier data convert` would have to be told about a file that training does not read as it is.

Names of columns are looked at, and a few cells; where they do not tell question from answer, nothing is proposed.
Does not know: how a file is converted (convert.py), how a report is made (doctor.py).
"""

from __future__ import annotations

import codecs
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.data.fields import FIELDS, WHOLE
from luthier.data.read import read_records
from luthier.data.rows import kind_of
from luthier.data.sheets import Layout, open_sheet
from luthier.data.sources import kind_by_name
from luthier.spec.data import Problem
from luthier.spec.errors import LuthierError

# Names of columns that hold what is to be learnt, and of those that hold a text.
ANSWERS = (
    *("completion", "output", "answer", "response", "target", "reply", "label", "class", "classification"),
    *("category", "sentiment", "gold", "ground_truth", "solution", "translation", "summary", "intent"),
)
TEXTS = ("text", "content", "document", "article", "sentence", "body")
_ID = re.compile(r"(?i)|id|idx|index|uuid|source|split|.*_id|unnamed.*")  # columns that say which row it is
TARGETS = {"messages": "chat", "conversations": "sharegpt", "completion": "completion", "output": "alpaca"}
SAMPLE = 10_000  # records looked at
_ANSWER = re.compile("(?i)answer|label|gold|target|output|completion|response")  # would be told in the question
_CHUNK = 1 << 20
_SHORT = 12  # bytes a line; a text has more
_ENCODINGS = ("gb18030", "cp1252")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a file is, its rows (0 where they were not counted), and the options that convert it; None: unknown.

    `why`: what a person has to decide where `options` is None.
    """

    found: str
    rows: int
    options: str | None
    why: str = ""


def of_table(path: Path) -> Conversion | None:
    """For a table by its name (CSV, TSV, Excel, Parquet), and for lines of text; None for other files."""
    kind = kind_by_name(path)
    if kind == "json":
        return _lines(path)
    if kind == "text":
        return None
    encoding = _encoding(path) if kind in ("csv", "tsv") else None
    named = f" --encoding {encoding}" if encoding else ""
    titles = {"csv": "CSV", "tsv": "TSV", "xlsx": "an Excel workbook", "parquet": "Parquet"}
    try:
        with open_sheet(path, Layout(kind, encoding or "utf-8-sig")) as sheet:
            rows = 0
            sample: list[dict[str, Any]] = []
            bad: Problem | None = None
            for item in sheet.rows:
                rows += 1
                if isinstance(item, Problem):
                    bad = bad or item
                elif len(sample) < SAMPLE:
                    sample.append(item.cells)
            options, why = _mapping(sheet.columns, sample)
    except LuthierError as error:
        return Conversion(titles[kind], 0, None, error.message)
    if bad is not None:
        return Conversion(titles[kind], rows, None, f"correct this first: {bad}")
    return Conversion(titles[kind], rows, None if options is None else options + named, why)


def of_records(path: Path) -> str | None:
    """Options for JSON records of no known format, all of which have the same question and answer; else None."""
    records: list[dict[str, Any]] = []
    for item in islice(read_records(path), SAMPLE):
        if isinstance(item, Problem) or not isinstance(item.value, dict) or kind_of(item.value) is not None:
            return None
        records.append(item.value)
    if not records or not all(record and all(map(_is_cell, record.values())) for record in records):
        return None  # what the lists and objects mean, nobody knows
    shared = [key for key in records[0] if all(key in record for record in records)]
    if any(fields <= set(shared) for fields in WHOLE) or not {key.lower() for key in shared} & set(ANSWERS):
        return None
    return _mapping(shared, records)[0]


def command(path: Path, options: str) -> str:
    """The command that writes the converted file beside `path`."""
    return f"luthier data convert {shlex.quote(str(path))} {shlex.quote(str(converted(path)))} {options}"


def converted(path: Path) -> Path:
    suffix = ".converted.jsonl" if path.suffix in (".json", ".jsonl") else ".jsonl"
    return path.with_name(f"{path.stem}{suffix}")


def _is_cell(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _mapping(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> tuple[str | None, str]:
    """(options, why there are none) for columns with these names."""
    there = {name for name in columns if name in FIELDS}
    for fields in WHOLE:
        if fields <= there:
            target = next((name for key, name in TARGETS.items() if key in fields), "preference")
            return f"--to {'text' if fields == {'text'} else target}", ""
    known = {name.strip().lower(): name for name in reversed(columns)}
    answers = [known[name] for name in ANSWERS if name in known]
    if "question" in known and not answers:
        answers = [known[name] for name in ("sql", "query") if name in known]
    if not answers and len(columns) == 2:
        answers = [columns[1]]
    rest = [name for name in columns if name not in answers and not _ID.fullmatch(name.strip())]
    rest = [name for name in rest if any(str(row.get(name) or "").strip() for row in rows)]
    if len(answers) == 1 and rest and not any(map(_ANSWER.search, rest)):
        if len(rest) == 1:
            question = f"--map {shlex.quote(f'prompt={rest[0]}')}"
        else:
            question = "--set " + shlex.quote("prompt=" + ", ".join(f"{name}: {{{name}}}" for name in rest))
        return f"--to completion {question} --map {shlex.quote(f'completion={answers[0]}')}", ""
    if len(columns) == 1 and columns[0].lower() in TEXTS:
        return f"--to text --map {shlex.quote(f'text={columns[0]}')}", ""
    return None, f"the columns are {', '.join(map(repr, columns[:12]))}: which is asked, and which is the answer?"


# -- texts -------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Conversion | None:
    """A file that is neither JSON nor binary, by its first bytes: lines of text."""
    with open(path, "rb") as handle:
        head = handle.read(4096)
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson") or b"\0" in head or not head.strip():
        return None
    if head.lstrip()[:1] in (b"{", b"[") or head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"PAR1", b"ARROW1")):
        return None
    encoding = _encoding(path)
    rows, tabs, size = 0, 0, path.stat().st_size
    for piece in _pieces(path):
        rows, tabs = rows + piece.count(b"\n"), tabs + piece.count(b"\t")
    if 2 * tabs > rows or size < _SHORT * rows:
        why = "a table without names of columns" if 2 * tabs > rows else "lines of a few characters"
        return Conversion("lines of text", rows, None, f"{why}: what is asked in it, and what is the answer?")
    return Conversion("lines of text", rows, "--to text --from lines" + (f" --encoding {encoding}" if encoding else ""))


def _encoding(path: Path) -> str | None:
    """An encoding that reads all of the file, where UTF-8 does not; None for UTF-8, or where none is known."""
    if _decodes(path, "utf-8"):
        return None
    return next((name for name in _ENCODINGS if _decodes(path, name)), None)


def _decodes(path: Path, encoding: str) -> bool:
    """Whether all bytes are of that encoding; of gb18030, whether they spell Chinese and not a few accents."""
    decoder = codecs.getincrementaldecoder(encoding)()
    chinese = other = latin = 0
    try:
        for piece in _pieces(path):
            text = decoder.decode(piece)
            if encoding == "gb18030":
                chinese += sum("\u4e00" <= each < "\ua000" for each in text)
                other += sum(each > "\x7f" for each in text)
                latin += sum("A" <= each <= "z" for each in text)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return encoding != "gb18030" or (4 * chinese > 3 * other and 3 * chinese > latin)


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as handle:
        while piece := handle.read(_CHUNK):
            yield piece
