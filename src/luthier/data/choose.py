"""Which rows of a file go: those with a kind of finding that is not wanted, and those that repeat another row.

Does not know: files, what happens to the rows that stay (fix.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from luthier.data import lints
from luthier.data.characters import COMMON_CONTROL, control_pattern
from luthier.data.duplicates import BINS, Sketches, earlier_alike, identity, sketch
from luthier.data.findings import KINDS
from luthier.data.pairs import Meaning, render_all
from luthier.data.render import Renderer
from luthier.data.rows import Row, read_rows
from luthier.spec.data import Problem, Rendered, Text
from luthier.spec.errors import BadSetting

Dedupe = Literal["exact", "near"]
NEEDS_MODEL = frozenset({"unrenderable", "nothing_supervised", "too_long"})
DROPPABLE = tuple(name for name, kind in KINDS.items() if kind.by_row and name not in ("unknown_key", "other"))


@dataclass(frozen=True, slots=True)
class Gone:
    """Why a row goes: a kind of finding, and what was found (nothing private)."""

    kind: str
    detail: str


@dataclass
class Training:
    """What is remembered of training rows. `prompts`: key of a prompt -> the place of its first row among all of them;
    `rows`: the file and the number of the row at each place."""

    prompts: dict[int, int]
    sketches: Sketches
    rows: list[tuple[str, int]]

    def named(self, place: int) -> str:
        file, row = self.rows[place]
        return f"row {row} of {file}"


def training_rows(paths: Sequence[Path]) -> Training | None:
    """The rows of training files to be apart from; None for no files. Raises NotFound, BadData for a plain text."""
    if not paths:
        return None
    prompts: dict[int, int] = {}
    sketches: list[np.ndarray[tuple[int], np.dtype[np.uint16]]] = []
    rows: list[tuple[str, int]] = []
    for path in paths:
        for item in read_rows(path):
            if isinstance(item, Row) and item.meaning is not None:
                same = identity(item.meaning)
                prompts.setdefault(same.prompt, len(rows))
                sketches.append(sketch(same.text)[0])
                rows.append((path.name, item.record.row))
    return Training(prompts, np.stack(sketches) if sketches else np.zeros((0, BINS), np.uint16), rows)


class Chooser:
    """Sees all rows once, in order, then says which go."""

    def __init__(
        self,
        drop: frozenset[str],
        dedupe: Dedupe | None,
        renderer: Renderer | None,
        max_length: int | None,
        training: Training | None = None,
    ) -> None:
        """`training`: rows that these are to be apart from, as validation rows must be from training rows.

        Raises BadSetting for a kind that no row has by itself, or that needs a model and has none.
        """
        for kind in sorted(drop):
            if kind not in DROPPABLE:
                hint = f"Kinds: {', '.join(DROPPABLE)}."
                raise BadSetting(f"--drop {kind}: rows do not have this kind by themselves.", hint=hint, param="drop")
            if kind in NEEDS_MODEL and renderer is None:
                raise BadSetting(f"--drop {kind} needs --model, whose tokens and template decide.", param="model")
        self.drop, self.dedupe = drop, dedupe
        self.renderer, self.max_length, self.training = renderer, max_length, training
        self.control = COMMON_CONTROL if renderer is None else control_pattern(renderer.tokenizer.control_ids)
        self.gone: dict[int, Gone] = {}
        self._numbers: list[int] = []  # of each row that may almost repeat another: its number in the file
        self._places: list[int] = []  # and its place, from 0
        self._first: dict[int, int] = {}  # identity -> number
        self._sketches: list[np.ndarray[tuple[int], np.dtype[np.uint16]]] = []
        self._at = 0

    def look(self, items: Sequence[Row | Problem]) -> None:
        """The next items of the file."""
        examples = [item.meaning for item in items if isinstance(item, Row)]
        rendered = self._rendered([example for example in examples if example is not None])
        for item in items:
            rows = next(rendered) if isinstance(item, Row) and item.meaning is not None else []
            kind = self._kind(item, rows)
            if kind is not None:
                self.gone[self._at] = kind
            elif (self.dedupe or self.training) and isinstance(item, Row) and item.meaning is not None:
                self._remember(item)
            self._at += 1

    def finish(self) -> dict[int, Gone]:
        """Place in the file, from 0 -> why the row there goes."""
        if self._sketches and self.training is not None and len(self.training.sketches):
            sketches: Sketches = np.concatenate([self.training.sketches, np.stack(self._sketches)])
            before = len(self.training.sketches)
            for n, earlier in enumerate(earlier_alike(sketches, before)[before:]):
                if earlier >= 0:
                    self.gone[self._places[n]] = Gone("near_overlap", f"is almost {self.training.named(int(earlier))}")
        if self._sketches and self.dedupe == "near":
            sketches = np.stack(self._sketches)
            for n, earlier in enumerate(earlier_alike(sketches)):
                if earlier >= 0 and self._places[n] not in self.gone:
                    row = self._numbers[int(earlier)]
                    self.gone[self._places[n]] = Gone("near_duplicate", f"is almost row {row}")
        return self.gone

    def _rendered(self, examples: Sequence[Meaning]) -> Iterator[list[Rendered] | Problem]:
        if self.renderer is None or not self.drop & NEEDS_MODEL:
            return iter([[] for _ in examples])
        return (rows for _, rows in render_all(self.renderer, examples))

    def _kind(self, item: Row | Problem, rendered: list[Rendered] | Problem) -> Gone | None:
        if isinstance(item, Problem):
            return Gone("unreadable", f"{item.found}, wanted {item.wanted}") if "unreadable" in self.drop else None
        if item.meaning is None:
            wrong = next(problem for problem in item.problems if problem.severity == "error")
            detail = f"{wrong.field or 'record'}: {wrong.found}, wanted {wrong.wanted}"
            return Gone("invalid", detail) if "invalid" in self.drop else None
        found = [Gone(mark.kind, f"{mark.field}: {_told(mark)}") for mark in lints.look(item.meaning, self.control)]
        found += _by_tokens(item.meaning, rendered, self.max_length)
        return next((gone for gone in found if gone.kind in self.drop), None)

    def _remember(self, item: Row) -> None:
        assert item.meaning is not None
        same = identity(item.meaning)
        if self.training is not None and same.prompt in self.training.prompts:
            place = self.training.named(self.training.prompts[same.prompt])
            self.gone[self._at] = Gone("overlap", f"has the prompt of {place}")
            return
        key = (same.prompt << 64) | same.answer
        first = self._first.setdefault(key, item.record.row)
        if self.dedupe and first != item.record.row:
            self.gone[self._at] = Gone("duplicate", f"repeats row {first}")
        elif self.dedupe == "near" or self.training is not None:
            self._numbers.append(item.record.row)
            self._places.append(self._at)
            self._sketches.append(sketch(same.text)[0])


def _told(mark: lints.Mark) -> str:
    """What was found; of private data only what it looks like, without its beginning."""
    return mark.detail.rpartition(" ")[0] if mark.kind in ("secret", "personal_data") else mark.detail


def _by_tokens(example: Meaning, rendered: list[Rendered] | Problem, longest: int | None) -> Iterator[Gone]:
    """What the report says of a row's tokens."""
    if isinstance(rendered, Problem):
        yield Gone("unrenderable", f"{rendered.field}: {rendered.found}, wanted {rendered.wanted}")
        return
    if longest is None or not rendered or isinstance(example, Text):
        return
    size = max(len(row.ids) for row in rendered)
    if not all(any(weight >= 1 for weight in row.weights[:longest]) for row in rendered):
        yield Gone("nothing_supervised", f"no token to learn within {longest:,}")
    if size > longest:
        yield Gone("too_long", f"{size:,} tokens, over {longest:,}")
