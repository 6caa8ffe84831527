"""JSON answers, field by field: how many of the wanted fields are there with the wanted values, and how many others.

A field is a path to a value that is no object and no list; a list of plain values counts as a bag, since most lists of
names or tags mean one, and a list of objects keeps its order, so that fields of different objects never mix. Whether an
answer has the references' form is judged by a JSON Schema that all of them keep to.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jsonschema_rs import Validator, validator_for

from luthier.proof.calls import canonical
from luthier.proof.metrics import Scored, is_exact, mean
from luthier.spec.data import Example

_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)
_TYPES = {bool: "boolean", int: "number", float: "number", str: "string", type(None): "null"}


class NotJson:
    """What an answer that is no JSON comes to; JSON's own null is None."""


NOT_JSON = NotJson()


def value_of(text: str) -> Any:
    """The JSON value of an answer, a fence of ``` around it aside; NOT_JSON when it is none."""
    fenced = _FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NOT_JSON


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def fields_of(value: Any) -> Counter[tuple[str, str]]:
    """(path, value) of every field; an empty object or list is a field itself."""
    return Counter(_fields(value, ""))


def _fields(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _fields(item, f"{path}.{json.dumps(key)}")
    elif isinstance(value, list) and value:
        nested = any(isinstance(item, dict | list) for item in value)
        for place, item in enumerate(value):
            yield from _fields(item, f"{path}[{place if nested else ''}]")
    else:
        yield path, canonical(value)


def json_fields(answers: Sequence[str], wanted: Sequence[str], examples: Sequence[Example]) -> Scored:
    """The F1 of each row's fields: 2 x right / (answered + wanted); an answer that is no JSON has none right."""
    del examples
    values = [(value_of(answer), value_of(reference)) for answer, reference in zip(answers, wanted, strict=True)]
    rows, right, said, asked = [], 0, 0, 0
    for value, reference in values:
        there = Counter() if value is NOT_JSON else fields_of(value)
        should = fields_of(reference)
        both = (there & should).total()
        rows.append(2 * both / (there.total() + should.total()))
        right, said, asked = right + both, said + there.total(), asked + should.total()
    schema = _compiled(infer([reference for _, reference in values]))
    equal = [float(value is not NOT_JSON and canonical(value) == canonical(wish)) for value, wish in values]
    valid = [float(value is not NOT_JSON and schema.is_valid(value)) for value, _ in values]
    details = {
        "equal_json": mean(equal),
        "valid_json": mean([float(value is not NOT_JSON) for value, _ in values]),
        "valid_by_schema": mean(valid),
        "field_precision": right / said if said else None,
        "field_recall": right / asked if asked else None,
        "field_f1_over_all": 2 * right / (said + asked) if said + asked else None,
        "exact_match": mean([float(is_exact(*pair)) for pair in zip(answers, wanted, strict=True)]),
    }
    return Scored(rows, details)


# -- the form of the references ----------------------------------------------------------------------------------------


def infer(values: Sequence[Any]) -> dict[str, Any]:
    """A JSON Schema that all `values` keep to: their types, the keys that all objects at a place have, no others than
    were seen there."""
    found: list[dict[str, Any]] = []
    kinds = sorted({_TYPES[type(value)] for value in values if type(value) in _TYPES})
    if kinds:
        found.append({"type": kinds})
    if objects := [value for value in values if isinstance(value, dict)]:
        keys = sorted({key for value in objects for key in value})
        parts = {key: infer([value[key] for value in objects if key in value]) for key in keys}
        required = [key for key in keys if all(key in value for value in objects)]
        found.append({"type": "object", "properties": parts, "required": required, "additionalProperties": False})
    if lists := [value for value in values if isinstance(value, list)]:
        items = [item for value in lists for item in value]
        found.append({"type": "array", "items": infer(items)} if items else {"type": "array", "maxItems": 0})
    return found[0] if len(found) == 1 else {"anyOf": found}


def _compiled(schema: dict[str, Any]) -> Validator:
    return validator_for(schema)
