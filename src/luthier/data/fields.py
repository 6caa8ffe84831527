"""Rows of a table to records and back: which column is which field, and how a field that is no text stands in a cell.

A field that holds a list or an object (messages, tools) is JSON text in its cell. Nothing is guessed from cells: the
names of columns, or the mapping that was asked for, decide.
Does not know: how tables lie in files (sheets.py), what fields mean (formats.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data.strict_json import JsonFault, parse_json, quote
from luthier.spec.data import Problem
from luthier.spec.errors import BadSetting

# Fields of each format by what their cells hold. The sets that make a record of the format come first.
TEXTS = ("prompt", "completion", "instruction", "input", "output", "system", "text", "chosen", "rejected")
VALUES = (
    "messages",
    "conversations",
    "tools",
    "functions",
    "history",
    "parallel_tool_calls",
    "preferred_output",
    "non_preferred_output",
    "preferred_completion",
    "non_preferred_completion",
)
FIELDS = frozenset((*TEXTS, *VALUES))
WHOLE = (  # fields that a record must have, one of these sets
    {"messages"},
    {"conversations"},
    {"prompt", "completion"},
    {"instruction", "output"},
    {"text"},
    {"input", "preferred_output", "non_preferred_output"},
    {"input", "preferred_completion", "non_preferred_completion"},
    {"prompt", "chosen", "rejected"},
)
_PLACE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class ColumnMap:
    """`named`: field -> column. `written`: field -> text with {column} in places. Other columns: see Columns."""

    named: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.named or self.written)


def from_keys(value: dict[str, Any], mapping: ColumnMap, record: tuple[int, int, str]) -> dict[str, Any] | Problem:
    """The record that a mapping makes of a JSON object, whose keys are its columns; `record`: line, row and file.

    Other keys are left out. A Problem where the object has no such key.
    """
    line, row, file = record
    made: dict[str, Any] = {}
    for name, key in mapping.named.items():
        if key not in value:
            found = "the keys " + ", ".join(list(value)[:12])
            return Problem(line, key, found, f"the key {key}, which --map asks for", "", row, file=file)
        each = value[key]
        plain = isinstance(each, bool | int | float) and name in TEXTS
        made[name] = json.dumps(each) if plain else each
    for name, text in mapping.written.items():
        made[name] = _PLACE.sub(lambda match: _shown(value.get(match[1])), text)
    return made


class Columns:
    """How records come out of the rows of one table.

    Without a mapping each column is the field of its name, and other columns come along as they are. With one, only
    what it names is taken, with columns that have the name of a field.
    """

    def __init__(self, columns: Sequence[str], mapping: ColumnMap, file: str) -> None:
        self.file = file
        _check(columns, mapping, file)
        self.named = {name: name for name in columns if name in FIELDS and name not in mapping.named.values()}
        self.named |= mapping.named
        self.named = {name: column for name, column in self.named.items() if name not in mapping.written}
        self.written = dict(mapping.written)
        used = set(self.named.values()) | {place for text in self.written.values() for place in _PLACE.findall(text)}
        rest = [name for name in columns if name not in used]
        self.carried = [] if mapping else rest
        self.left_out = rest if mapping else []
        self._values = set(VALUES)
        if {"preferred_output", "preferred_completion"} & self.named.keys():
            self._values.add("input")
        have = self.named.keys() | self.written.keys()
        if not any(fields <= have for fields in WHOLE):
            listed = ", ".join(map(repr, columns[:20])) + (", ..." if len(columns) > 20 else "")
            raise BadSetting(
                f"{file} has the columns {listed}; wanted the fields of a record, such as prompt and completion.",
                hint="Say which column is which: --map prompt=COLUMN --map completion=COLUMN",
                param="map",
            )

    def record(self, cells: Mapping[str, Any], line: int, row: int) -> dict[str, Any] | Problem:
        """The record of one row, or a Problem for a cell that does not hold what its field needs."""
        made: dict[str, Any] = {}
        for name, column in self.named.items():
            cell = cells.get(column)
            if name not in self._values:
                if isinstance(cell, list | dict):
                    return Problem(line, column, "a list or an object", f"text for {name}", "", row, file=self.file)
                made[name] = "" if cell is None else cell
            elif cell is not None and cell != "":
                value = self._value(name, column, cell, line, row)
                if isinstance(value, Problem):
                    return value
                made[name] = value
        for name, text in self.written.items():
            made[name] = _PLACE.sub(lambda match: _shown(cells.get(match[1])), text)
        for column in self.carried:
            if cells.get(column) is not None:
                made[column] = cells[column]
        return made

    def _value(self, name: str, column: str, cell: Any, line: int, row: int) -> Any:
        if isinstance(cell, str):
            try:
                return parse_json(cell)
            except JsonFault as fault:
                found = f"{quote(cell)}, which has {fault.found}"
                return Problem(line, column, found, f"JSON text for {name}", fault.hint, row, file=self.file)
        cleaned, doubt = _without_nulls(cell, name)
        if doubt:
            hint = "Parquet cannot tell an absent key from a null: save the column as JSON text."
            return Problem(line, column, f"null at {doubt}", "a value or no such key", hint, row, file=self.file)
        return cleaned


def check_fields(mapping: ColumnMap) -> None:
    """Raises BadSetting for a mapping that names a field which no record has, or one twice."""
    for option, fields in (("map", mapping.named), ("set", mapping.written)):
        for name in fields:
            if name not in FIELDS:
                raise BadSetting(
                    f"--{option} {name}=: there is no field {name!r}.",
                    hint=f"Fields: {', '.join((*TEXTS, *VALUES))}.",
                    param=option,
                )
    both = mapping.named.keys() & mapping.written.keys()
    if both:
        raise BadSetting(f"{sorted(both)[0]} stands in --map and in --set, wanted one of them.", param="set")


def _check(columns: Sequence[str], mapping: ColumnMap, file: str) -> None:
    asked = [*mapping.named.values(), *(place for text in mapping.written.values() for place in _PLACE.findall(text))]
    for column in asked:
        if column not in columns:
            raise BadSetting(
                f"{file} has no column {column!r}, only {', '.join(map(repr, columns[:20]))}.",
                hint="Write column names as the first row has them.",
                param="map",
            )


def _shown(cell: Any) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)


def _without_nulls(value: Any, at: str, inside: bool = False) -> tuple[Any, str]:
    """Structs of Parquet without the keys that other rows have (null here), and where a null could be the user's own.

    In a message a null key means the same as none. Within tools and arguments it may not: those are not touched.
    """
    if isinstance(value, list):
        made = [_without_nulls(item, f"{at}[{n}]", inside) for n, item in enumerate(value)]
        return [item for item, _ in made], next((doubt for _, doubt in made if doubt), "")
    if not isinstance(value, dict):
        return value, ""
    inside = inside or at.partition("[")[0] in ("tools", "functions")
    if inside:
        null = next((key for key, item in value.items() if item is None), None)
        if null is not None:
            return value, f"{at}.{null}"
    kept: dict[str, Any] = {}
    for key, item in value.items():
        if item is None:
            continue
        kept[key], doubt = _without_nulls(item, f"{at}.{key}", inside or key == "arguments")
        if doubt:
            return value, doubt
    return kept, ""
