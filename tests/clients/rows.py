"""Training data of the tests: few rows, short words, deterministic. Does not know: files, servers."""

from __future__ import annotations

import json

COLOURS = ("red", "blue", "green", "black", "white", "grey", "pink", "brown", "gold", "teal", "plum", "lime")


def chat(count: int = 12, *, first: int = 0, system: str = "Name it.") -> list[dict[str, object]]:
    """Chat rows: a question about one of a dozen colours, and its answer."""
    rows: list[dict[str, object]] = []
    for number in range(first, first + count):
        colour = COLOURS[number % len(COLOURS)]
        asked = {"role": "user", "content": f"colour {number}?"}
        rows.append(
            {
                "messages": [
                    {"role": "system", "content": system},
                    asked,
                    {"role": "assistant", "content": f"It is {colour}."},
                ]
            }
        )
    return rows


def completions(count: int = 16) -> list[dict[str, str]]:
    """Prompt/completion rows of two classes, one token each: letters of the alphabet."""
    classes = (("a lazy dog", " b"), ("the quick fox", " a"))
    rows = [classes[number % 2] for number in range(count)]
    return [{"prompt": f"{words} {n}\n\n###\n\n", "completion": kind} for n, (words, kind) in enumerate(rows)]


def preferences(count: int = 12, *, first: int = 0, spelling: str = "output") -> list[dict[str, object]]:
    """Pairs of answers, in the spelling of the guides (output) or of the older specifications (completion)."""
    rows: list[dict[str, object]] = []
    for number in range(first, first + count):
        colour = COLOURS[number % len(COLOURS)]
        rows.append(
            {
                "input": {"messages": [{"role": "user", "content": f"colour {number}?"}]},
                f"preferred_{spelling}": [{"role": "assistant", "content": f"It is {colour}."}],
                f"non_preferred_{spelling}": [{"role": "assistant", "content": "the lazy dog"}],
            }
        )
    return rows


def jsonl(rows: list[dict[str, object]] | list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
