"""Tool calls beside the tools of their row: whether each is declared, and whether its arguments keep to the schema.

Schemas come from strangers: references are looked up nowhere, and patterns run on a linear-time engine.
Does not know: files, templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NoReturn

from jsonschema_rs import RegexOptions, ValidationError, Validator, validator_for

from luthier.data.strict_json import quote
from luthier.spec.data import Chat

_KEPT_SCHEMAS = 1024


def look_at_calls(chat: Chat) -> Iterator[tuple[str, str, str]]:
    """(kind, field, detail) of everything that is wrong with the calls of one chat."""
    called = [(n, m, call) for n, turn in enumerate(chat.messages) for m, call in enumerate(turn.tool_calls)]
    if not called and not chat.tools:
        return
    schemas: dict[str, str] = {}
    for n, tool in enumerate(chat.tools):
        function = tool["function"]
        schemas[function["name"]] = json.dumps(function.get("parameters"), sort_keys=True)
        wrong = _compiled(schemas[function["name"]])
        if isinstance(wrong, str):
            yield "tool_schema", f"tools[{n}].function.parameters", f"{quote(function['name'])}: {wrong}"
    for n, m, call in called:
        at = f"messages[{n}].tool_calls[{m}]"
        if call.name not in schemas:
            declared = "declares no tools" if not schemas else f"declares {', '.join(list(schemas)[:8])}"
            yield "undeclared_tool", f"{at}.function.name", f"calls {quote(call.name)}, and the row {declared}"
        if isinstance(call.arguments, str):
            yield "double_encoded", f"{at}.function.arguments", f"JSON text that holds the text {quote(call.arguments)}"
        elif call.name in schemas:
            broken = _breach(schemas[call.name], call.arguments)
            if broken:
                yield "tool_arguments", f"{at}.function.arguments", f"{quote(call.name)}: {broken}"


def _breach(schema: str, arguments: Any) -> str | None:
    """The first thing in `arguments` that breaks `schema`, in words."""
    validator = _compiled(schema)
    if validator is None or isinstance(validator, str):
        return None
    error = next(iter(validator.iter_errors(arguments)), None)
    if error is None:
        return None
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
    return f"{path.lstrip('.')}: {_short(error.message)}" if path else _short(error.message)


@lru_cache(maxsize=_KEPT_SCHEMAS)
def _compiled(schema: str) -> Validator | str | None:
    """The validator of JSON text of a schema; None for null; a sentence where it is no schema."""
    value = json.loads(schema)
    if value is None:
        return None
    try:
        return validator_for(value, retriever=_refuse, pattern_options=RegexOptions())
    except ValidationError as error:
        return _short(error.message)
    except ValueError as error:
        return _short(str(error))


def _refuse(address: str) -> NoReturn:
    raise ValueError(f"the reference {address} leads out of the file")


def _short(text: str) -> str:
    text = text.partition("\n")[0]
    return text if len(text) <= 160 else f"{text[:157]}..."
