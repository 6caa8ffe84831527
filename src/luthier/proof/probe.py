"""The general probe: short items that any model of use can do some of, and how suites of others become such items.

Three forms. A choice has a score 1 when the right answer is the likeliest of its choices per byte; a task has 1 when
its answer passes the item's checks; a text has the mean negative log-likelihood of its tokens, nats.
Does not know: models, tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from luthier.data.read import read_records
from luthier.proof.checks import CHECKS, passes
from luthier.spec.data import Problem
from luthier.spec.errors import BadData, BadSetting, NotFound

SCORING = 1  # counts up when an item's score would come out otherwise
MIN_PART = 8  # items of a part that a sample keeps at least, if it has them


@dataclass(frozen=True, slots=True)
class Item:
    """`id` is unique within a probe. A choice has (context, continuation) pairs, of which `gold` is right; a task has
    a prompt and checks; a text is its continuation alone."""

    id: str
    kind: str
    language: str = ""
    pairs: tuple[tuple[str, str], ...] = ()
    gold: int = 0
    prompt: str = ""
    check: dict[str, Any] = field(default_factory=dict)

    @property
    def part(self) -> tuple[str, str]:
        return self.kind, self.language

    @property
    def form(self) -> str:
        """choice, exact (one continuation, which must be the model's own), task or text."""
        if not self.pairs:
            return "task"
        if self.kind == "text":
            return "text"
        return "choice" if len(self.pairs) > 1 else "exact"

    @property
    def chance(self) -> float | None:
        """What guessing scores; None for text, whose score is no share."""
        return {"choice": 1 / max(1, len(self.pairs)), "text": None}.get(self.form, 0.0)

    @property
    def longest(self) -> str | None:
        """The longest right answer of a task; None where there is no one right answer."""
        names = ("one_of", "contains_any", "equals", "equals_case", "lines", "json", "json_within")
        name = next((name for name in names if name in self.check), None)
        if name is None:
            return None
        value = self.check[name]
        if name.startswith("json"):
            return json.dumps(value, ensure_ascii=False)
        if name == "lines":
            return "".join(f"- {line}\n" for line in value)
        return max(value, key=len) if isinstance(value, list) else str(value)

    def passes(self, answer: str) -> bool:
        return passes(answer, self.check)

    def plain(self) -> list[Any]:
        return [self.id, self.kind, self.language, self.pairs, self.gold, self.prompt, self.check]


def general() -> list[Item]:
    """Our own probe, in the package's order."""
    folder = resources.files("luthier.proof") / "probe"
    items = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".jsonl"):
            records = map(json.loads, entry.read_text(encoding="utf-8").splitlines())
            items += [_own(record) for record in records]
    return items


def _own(record: dict[str, Any]) -> Item:
    known = {"id": record["id"], "kind": record["kind"], "language": record["language"]}
    if "text" in record:
        return Item(**known, pairs=(("", record["text"]),))
    if "choices" in record:
        space = "" if record["language"] == "zh" else " "
        pairs = tuple((record["query"], space + choice) for choice in record["choices"])
        return Item(**known, pairs=pairs, gold=record["gold"])
    assert record["check"].keys() <= CHECKS.keys(), record["id"]
    return Item(**known, prompt=record["prompt"], check=record["check"])


# -- suites of others --------------------------------------------------------------------------------------------------


def suite(folder: Path) -> list[Item]:
    """The items of every *.jsonl in `folder`, a kind for each file. Raises NotFound, BadData with every problem."""
    paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder] if folder.suffix == ".jsonl" else []
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise NotFound(f"--probe: no *.jsonl in {folder}.", param="probe", hint="Give a folder of suites, or one file.")
    items: list[Item] = []
    problems: list[Problem] = []
    for path in paths:
        for found in _records(path):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                items.append(found)
    if problems:
        raise BadData(f"{len(problems)} records are no probe items; the first: {problems[0]}", problems=problems)
    return items


def _records(path: Path) -> Iterator[Item | Problem]:
    for record in read_records(path):
        if isinstance(record, Problem):
            yield Problem(**{**record.as_dict(), "file": str(path)})
            continue
        item = _suite_item(f"{path.stem}-{record.row}", path.stem, record.value)
        wanted = "query, choices, gold; context_options, continuation, gold; context, continuation; or question, "
        yield item or Problem(
            record.line, "", "a record that is no item", wanted + "options, answer", row=record.row, file=str(path)
        )


def _suite_item(id: str, kind: str, record: Any) -> Item | None:
    """One record of the four forms that public suites have; None when it has none of them."""
    if not isinstance(record, dict):
        return None
    match record:
        case {"query": str(query), "choices": [_, _, *_] as choices, "gold": int(gold)} if all(
            isinstance(choice, str) for choice in choices
        ):
            pairs = [_joined(_asked(query), choice) for choice in choices]
        case {"context_options": [_, _, *_] as contexts, "continuation": str(answer), "gold": int(gold)} if all(
            isinstance(context, str) for context in contexts
        ):
            pairs = [_joined(context, answer) for context in contexts]
        case {"context": str(context), "continuation": str(answer)}:
            pairs, gold = [_joined(context, answer)], 0
        case {"question": str(question), "options": str(options), "answer": str(answer)}:
            choices = options.split("\n")
            gold = choices.index(answer) if answer in choices and len(choices) > 1 else -1
            letters = [choice.partition(".")[0] for choice in choices]
            pairs = [_joined(f"Question: {question}\n{options}\nAnswer:", letter) for letter in letters]
        case _:
            return None
    if not 0 <= gold < len(pairs) or not all(continuation.strip() for _, continuation in pairs):
        return None
    return Item(id, kind, pairs=tuple(pairs), gold=gold)


def _asked(query: str) -> str:
    """A question without its "Answer:" gets one: as the suites' own harness asks."""
    query = query.rstrip()
    return f"{query}\nAnswer:" if query.startswith("Question:") and not query.endswith("Answer:") else query


def _joined(context: str, continuation: str) -> tuple[str, str]:
    """A space between, unless there is one or the context ends as arithmetic does."""
    bare = context.rstrip()
    gap = "" if bare.endswith("=") or continuation[:1].isspace() else " "
    return bare, gap + continuation


# -- samples -----------------------------------------------------------------------------------------------------------


def sample(items: Sequence[Item], count: int | None) -> list[Item]:
    """About `count` of the items, each part in proportion and MIN_PART of it at least; the same ones every time, and
    a smaller sample lies within a larger one. None: all of them. Raises BadSetting for less than 1."""
    if count is None or count >= len(items):
        return list(items)
    if count < 1:
        raise BadSetting(f"--sample: found {count}; wanted 1 or more.", param="sample")
    parts: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        parts.setdefault(item.part, []).append(item)
    kept: set[str] = set()
    for members in parts.values():
        share = max(MIN_PART, round(count * len(members) / len(items)))
        kept |= {item.id for item in sorted(members, key=lambda item: _draw(item.id))[:share]}
    return [item for item in items if item.id in kept]


def half(items: Sequence[Item], which: int) -> list[Item]:
    """One half of the items, 0 or 1, every other one of each part: what chooses a model must not measure it."""
    ranks: dict[tuple[str, str], list[str]] = {}
    for item in items:
        ranks.setdefault(item.part, []).append(item.id)
    chosen = {id for ids in ranks.values() for id in sorted(ids, key=_draw)[which::2]}
    return [item for item in items if item.id in chosen]


def _draw(id: str) -> bytes:
    return hashlib.sha256(f"sample:{id}".encode()).digest()


def digest(items: Sequence[Item]) -> str:
    """SHA-256 of the items and of how they are scored."""
    text = json.dumps([SCORING, [item.plain() for item in items]], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
