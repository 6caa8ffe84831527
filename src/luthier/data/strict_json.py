"""Strict JSON: what RFC 8259 allows and nothing else, with faults that say where and what to do.

Python's parser keeps the last of two equal keys, reads NaN, turns 1e999 into infinity and lets half a surrogate pair
through; each of those would change what is trained without a word. Does not know: files, lines, records.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

MAX_DEPTH = 100  # levels of nesting; recursive readers further on (templates, dumpers) give out near 1,000
MAX_DIGITS = 4000  # just under CPython's own limit for turning text into an integer
_SPACE = re.compile(r"[ \t\r\n]*")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}]|-?Infinity|NaN', re.DOTALL)
_CUT_MARGIN = 16  # a literal or an escape that the end of the text cuts is shorter than this


class JsonFault(ValueError):
    """Text that is not strict JSON.

    `position` is the 0-based character in the text that was given, None when it is not known; `field` the path of the
    value; `end` where the value ends when it could be skipped, None when the text after it cannot be trusted.
    """

    def __init__(
        self,
        found: str,
        wanted: str,
        hint: str = "",
        *,
        position: int | None = None,
        field: str = "",
        end: int | None = None,
    ) -> None:
        super().__init__(found)
        self.found = found
        self.wanted = wanted
        self.hint = hint
        self.position = position
        self.field = field
        self.end = end


class _Refused(Exception):
    """Raised inside the parser's hooks, which know what was wrong and not where."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text


def quote(text: str, length: int = 24) -> str:
    """The beginning of `text`, quoted, with control characters and surrogates escaped."""
    return repr(text[:length]) + ("..." if len(text) > length else "")


def skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def parse_json(text: str) -> Any:
    """The one JSON value that `text` holds. Raises JsonFault."""
    value, end = scan_value(text, skip_space(text, 0))
    end = skip_space(text, end)
    if end != len(text):
        raise JsonFault(
            f"more after the end of the value, {quote(text[end : end + 25])}", "one JSON value a line", position=end
        )
    return value


def scan_value(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start` (no space before it) and the position after it. Raises JsonFault."""
    found = scan_partial(text, start, final=True)
    assert found is not None
    return found


def scan_partial(text: str, start: int, *, final: bool) -> tuple[Any, int] | None:
    """Like scan_value; None when the text ends inside the value and is not `final`, so more must be read first."""
    try:
        value, end = _STRICT.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if not final and _cut(text, error):
            return None
        raise _explain(text, error) from None
    except _Refused as refused:
        _skip_refused(text, start, final, refused)
        return None
    except RecursionError:
        raise _too_deep(None) from None
    if not final and isinstance(value, int | float) and end > len(text) - 3:
        return None  # a number may go on, past a "." or "e+" that says so only with the digit behind it
    _check(text, start, end, value)
    return value, end


def _skip_refused(text: str, start: int, final: bool, refused: _Refused) -> None:
    """Find where a value with a duplicate key or the like ends, then raise; returns when it is not all here yet."""
    try:
        _, end = _LENIENT.raw_decode(text, start)
    except json.JSONDecodeError as error:
        if not final and _cut(text, error):
            return
        raise _explain(text, error) from None
    except RecursionError:
        raise _too_deep(None) from None
    if final or end <= len(text) - 3:  # else it may be a number that goes on
        _raise_refused(text, start, end, refused)


def _cut(text: str, error: json.JSONDecodeError) -> bool:
    if error.msg.startswith("Invalid control character"):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - _CUT_MARGIN


def _raise_refused(text: str, start: int, end: int, refused: _Refused) -> NoReturn:
    at = _locate(text, start, end, refused)
    if refused.kind == "key":
        raise JsonFault(
            f"the key {quote(refused.text)} twice in one object",
            "each key once",
            "Readers would keep only the last one: remove or rename one of them.",
            position=at,
            end=end,
        )
    if refused.kind == "constant":
        raise JsonFault(f"the literal {refused.text}", "a JSON value", "Write null or a number.", position=at, end=end)
    raise JsonFault(
        f"the number {quote(refused.text)}, out of range",
        "a number that a 64-bit float can hold, or an integer of at most 4,000 digits",
        "Write it as a string.",
        position=at,
        end=end,
    )


def _locate(text: str, start: int, end: int, refused: _Refused) -> int | None:
    """Position of the first duplicate key, or of the literal, outside strings."""
    if refused.kind == "number":
        return text.find(refused.text, start, end)
    open_keys: list[set[str]] = []
    for token in _TOKEN.finditer(text, start, end):
        word = token.group()
        if word == "{":
            open_keys.append(set())
        elif word == "}":
            open_keys.pop()
        elif word[0] != '"':
            if refused.kind == "constant":
                return token.start()
        elif refused.kind == "key" and text.startswith(":", skip_space(text, token.end())):
            key = json.loads(word)
            if key in open_keys[-1]:
                return token.start()
            open_keys[-1].add(key)
    return None


def _explain(text: str, error: json.JSONDecodeError) -> JsonFault:
    """A parser error in words a person can act on."""
    at = error.pos
    here = text[at : at + 25]
    before = text[max(0, at - 200) : at].rstrip()
    wanted, hint = "JSON", ""
    if before.endswith(",") and here[:1] in ("}", "]"):
        found, wanted, hint = f"a trailing comma before {here[0]}", "no comma after the last item", "Remove the comma."
    elif "trailing comma" in error.msg:  # Python 3.13 and later point at the comma
        found, wanted, hint = "a trailing comma", "no comma after the last item", "Remove the comma."
    elif here.startswith("'"):
        found, wanted = f"a single quote, {quote(here)}", "double quotes"
        hint = "Python's print writes single quotes; write the file with json.dumps."
    elif here.startswith(("True", "False", "None")):
        found, wanted = f"the Python word {quote(here)}", "true, false or null"
        hint = "Write the file with json.dumps."
    elif here.startswith("\ufeff"):
        found, hint = "a byte-order mark", "Two files were probably joined; remove the mark."
    elif error.msg.startswith("Unterminated string"):
        found, wanted = f"a string that does not end, {quote(here)}", "a closing double quote"
    elif error.msg.startswith("Invalid control character"):
        found, wanted = f"a raw control character, {quote(here)}", "an escape such as \\n or \\t inside a string"
        hint = "A line break inside a string must be written as \\n."
    elif "escape" in error.msg:
        found, wanted = f"a wrong escape, {quote(here)}", "one of the JSON escapes"
        hint = "Write a backslash as two backslashes."
    elif not here:
        found, wanted, hint = "the end of the text", "the rest of a JSON value", "The value was cut off."
    else:
        found = quote(here)
        wanted = error.msg[0].lower() + error.msg[1:] if error.msg.startswith("Expecting") else "JSON"
        wanted = wanted.replace("expecting ", "").replace("value", "a JSON value")
    return JsonFault(found, wanted, hint, position=at)


def _check(text: str, start: int, end: int, value: Any) -> None:
    if text.count("{", start, end) + text.count("[", start, end) > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise _too_deep(end)
    if text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0:
        path = _lone_surrogate(value)
        if path is not None:
            raise JsonFault(
                "half of a surrogate pair (an escape such as \\ud83d alone)",
                "whole characters",
                "An emoji was probably cut in two when the file was made: write the text again without the half.",
                field=path,
                end=end,
            )


def _too_deep(end: int | None) -> JsonFault:
    return JsonFault(f"more than {MAX_DEPTH} levels of nesting", f"at most {MAX_DEPTH}", end=end)


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner
    return any(isinstance(item, dict | list) for item in level)


def _lone_surrogate(value: Any) -> str | None:
    """Path of the first string or key that is not whole characters; "" is the value itself."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, str):
            if _broken(item):
                return path
        elif isinstance(item, dict):
            for key in item:
                if _broken(key):
                    return f"{path} (a key)".strip()
            stack.extend((f"{path}.{key}" if path else key, inner) for key, inner in reversed(item.items()))
        elif isinstance(item, list):
            stack.extend((f"{path}[{index}]", item[index]) for index in range(len(item) - 1, -1, -1))
    return None


def _broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused("key", key)
            seen.add(key)
    return made


def _constant(text: str) -> NoReturn:
    raise _Refused("constant", text)


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Refused("number", text)
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused("number", text)
    return int(text)


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_integer)
_LENIENT = json.JSONDecoder(parse_float=len, parse_int=len)
