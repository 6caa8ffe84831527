"""One record at a time into columns: its problems, its marks, its numbers, its sketch and, with a model, its tokens.

Does not know: where records come from (scan.py), other records.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from luthier.data import lints
from luthier.data.characters import COMMON_CONTROL, control_pattern, language
from luthier.data.columns import KEPT_PROBLEMS, NUMBERS, Columns
from luthier.data.duplicates import identity, sketch
from luthier.data.endings import completion_ending, prompt_ending
from luthier.data.pairs import Meaning, as_chats, render_all
from luthier.data.render import Renderer
from luthier.data.rows import Row
from luthier.spec.data import Chat, Completion, Preference, Problem, Rendered, Text

_PLAIN = (string.ascii_letters + string.digits + string.whitespace).encode() + bytes(range(128, 256))
_LOOKED_AT = 4000  # characters of a text of which signs are counted


class Look:
    """Made once for a file, in each process. With a `renderer`, rows are tokenised and fitted to `max_length`."""

    def __init__(self, file: str, renderer: Renderer | None, max_length: int | None) -> None:
        self.file = file
        self.renderer = renderer
        self.max_length = max_length
        self.control = COMMON_CONTROL if renderer is None else control_pattern(renderer.tokenizer.control_ids)

    def unreadable(self, part: Columns, problem: Problem) -> None:
        part.tally("unreadable", problem.row, f"{problem.found}, wanted {problem.wanted}")
        _keep(part, problem)

    def row(self, part: Columns, row: Row) -> Iterator[Meaning]:
        """What a row means, if it means anything; its errors are counted."""
        return self.read(part, row.problems if row.meaning is None else (*row.problems, row.meaning))

    def read(self, part: Columns, items: Iterable[Meaning | Problem]) -> Iterator[Meaning]:
        """The examples of one or more records; their errors are counted, a row once. (Warnings: lints.py has them.)"""
        refused = -1
        for item in items:
            if not isinstance(item, Problem):
                yield item
            elif item.severity == "error":
                if item.row != refused:
                    part.tally("invalid", item.row, f"{item.field or 'record'}: {item.found}, wanted {item.wanted}")
                refused = item.row
                _keep(part, item)
            elif not item.field:
                part.tally("other", item.row, f"{item.found}, wanted {item.wanted}")

    def fill(self, part: Columns, examples: Iterable[Meaning]) -> None:
        """Look at `examples` and put their numbers into the columns of `part`."""
        numbers: dict[str, list[Any]] = {name: [] for name in NUMBERS}
        sketches = []
        for example, rendered in self._rendered(examples):
            part.examples += 1
            self._marks(part, example)
            same = identity(example)
            drawn, distinct = sketch(same.text)
            sketches.append(drawn)
            row = _numbers(example) | {
                "prompt": same.prompt,
                "answer": same.answer,
                "distinct": distinct,
                "signs": _signs(same.text),
            }
            row |= self._tokens(part, example, rendered)
            for name, value in row.items():
                numbers[name].append(value)
            _shape(part, example)
        part.numbers = {name: np.asarray(values, NUMBERS[name]) for name, values in numbers.items()}
        if sketches:
            part.sketches = np.stack(sketches)

    def _marks(self, part: Columns, example: Meaning) -> None:
        seen: set[str] = set()
        for mark in lints.look(example, self.control):
            if mark.kind not in seen:
                part.tally(mark.kind, example.row, f"{mark.field}: {mark.detail}")
            seen.add(mark.kind)

    def _rendered(self, examples: Iterable[Meaning]) -> Iterator[tuple[Meaning, list[Rendered] | Problem]]:
        if self.renderer is None:
            return ((example, []) for example in examples)
        return render_all(self.renderer, examples)

    def _tokens(self, part: Columns, example: Meaning, rendered: list[Rendered] | Problem) -> dict[str, int]:
        if isinstance(rendered, Problem):
            part.tally("unrenderable", example.row, f"{rendered.field}: {rendered.found}, wanted {rendered.wanted}")
            _keep(part, rendered)
            return {"tokens": 0, "learnt": 0}
        tokens, learnt = sum(len(row.ids) for row in rendered), sum(row.supervised for row in rendered)
        if self.max_length is not None and rendered and not isinstance(example, Text):
            self._fit(part, example, rendered, self.max_length)
        return {"tokens": tokens, "learnt": learnt}

    def _fit(self, part: Columns, example: Meaning, rendered: list[Rendered], longest: int) -> None:
        over = [row for row in rendered if len(row.ids) > longest]
        kept = [sum(1 for weight in row.weights[:longest] if weight >= 1) for row in rendered]
        if not all(kept):
            why = "its prompt fills the whole length" if over else "no token of an answer"
            part.tally("nothing_supervised", example.row, f"{why} ({len(rendered[kept.index(0)].ids):,} tokens)")
        if over:
            lost = sum(len(row.ids) - longest for row in over)
            learnt = sum(row.supervised for row in rendered) - sum(kept)
            part.lost_tokens += lost
            part.lost_learnt += learnt
            size = max(len(row.ids) for row in over)
            detail = f"{size:,} tokens; a cut at {longest:,} would lose {lost:,} of them, {learnt:,} of the answer"
            part.tally("too_long", example.row, detail)


def _keep(part: Columns, problem: Problem) -> None:
    if len(part.problems) < KEPT_PROBLEMS:
        part.problems.append(problem)


def _numbers(example: Meaning) -> dict[str, int]:
    """The columns that need no tokens; of a pair those of its preferred conversation."""
    if isinstance(example, Preference):
        return _numbers(as_chats(example)[0])
    if isinstance(example, Chat):
        learnt = [n for n, turn in enumerate(example.messages) if turn.role == "assistant" and turn.weight]
        sizes = [0] * len(example.messages)
        answers, asked = [], []
        for at, text in lints.texts(example):
            n = int(at[9 : at.index("]")])  # messages[n]...
            sizes[n] += len(text)
            if n in learnt:
                answers.append(text)
            elif example.messages[n].role == "user":
                asked.append(text)
        answer = sum(sizes[n] for n in learnt)
        prompt, turns = sum(sizes) - answer, len(sizes)
        spoken, question = " ".join(answers), " ".join(asked)
    elif isinstance(example, Completion):
        prompt, answer, turns = len(example.prompt), len(example.completion), 2
        spoken, question = example.completion, example.prompt
    else:
        prompt, answer, turns, spoken, question = 0, len(example.text), 1, example.text, ""
    return {
        "row": example.row,
        "prompt_characters": prompt,
        "answer_characters": answer,
        "turns": turns,
        "language": language(spoken),
        "prompt_language": language(question) if question else 0,
    }


def _signs(text: str) -> float:
    """Characters of ASCII that are neither letters, digits nor space, as a share of all characters."""
    text = text[:_LOOKED_AT]
    return len(text.encode("utf-8", "surrogatepass").translate(None, _PLAIN)) / max(1, len(text))


def _shape(part: Columns, example: Meaning) -> None:
    """What only all rows together tell: endings, classes, roles, system messages."""
    if isinstance(example, Completion):
        part.prompt_endings.add(prompt_ending(example.prompt), example.row)
        part.completion_endings.add(completion_ending(example.completion), example.row)
        if not example.completion.startswith(" "):
            part.unspaced.add(example.row, f"completion: begins with {example.completion[:1]!r}")
        part.note_answer(example.completion.strip())
    elif isinstance(example, Chat):
        roles = [turn.role for turn in example.messages]
        part.roles.update(roles)
        if roles[0] not in ("system", "developer"):
            part.without_system.add(example.row, "messages: begin with " + roles[0])
        part.note_answer(example.messages[-1].content.strip())
