"""Several files to one: each with its share of the rows, shuffled or from easy to hard.

Rows go to a spool beside the result and are picked from it, so that memory holds a few numbers a row and no texts.
Does not know: tokens (whoever gives `difficulty` does).
"""

from __future__ import annotations

import random
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, Literal

from luthier.data.formats import detect
from luthier.data.messages import shown
from luthier.data.new_file import check_free, new_file
from luthier.data.read import OnBytes, read_records
from luthier.data.rows import good_rows, on_one_line
from luthier.spec.data import Example, Preference, Problem
from luthier.spec.errors import BadData, BadSetting

Order = Literal["shuffle", "easy-to-hard"]
Difficulty = Callable[[Path, int, Example | Preference], float]  # (file, row, what it means) -> the less the easier
OnFile = Callable[[Path], OnBytes]


@dataclass(frozen=True)
class Source:
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Taken:
    """What was taken of one source: `taken` rows in all, `distinct` different ones of `rows`."""

    file: str
    weight: float
    rows: int
    taken: int
    distinct: int

    @property
    def repeated(self) -> int:
        return self.taken - self.distinct


@dataclass(frozen=True)
class Mixed:
    out: str
    rows: int
    order: Order
    seed: int
    sources: list[Taken]


@dataclass
class _Spool:
    """Rows of all sources one after another: where each begins, how long it is, how hard."""

    handle: IO[bytes]
    starts: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("I"))
    hardness: array[float] = field(default_factory=lambda: array("d"))

    def add(self, raw: bytes, hardness: float) -> None:
        self.starts.append(self.handle.tell())
        self.sizes.append(len(raw))
        self.hardness.append(hardness)
        self.handle.write(raw)

    def row(self, index: int) -> bytes:
        self.handle.seek(self.starts[index])
        return self.handle.read(self.sizes[index])


def parse_source(text: str) -> Source:
    """`A.jsonl:0.7` -> its path and weight; without a number the weight is 1. Raises BadSetting."""
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Source(Path(text))
    try:
        weight = float(number)
    except ValueError:
        return Source(Path(text))
    if not 0 < weight < float("inf"):
        raise BadSetting(
            f"{text}: the weight is {number}, wanted a number above 0.", hint="For instance 0.7.", param="sources"
        )
    return Source(Path(name), weight)


def mix(
    sources: Sequence[Source],
    out: Path,
    *,
    rows: int | None = None,
    order: Order = "shuffle",
    seed: int = 0,
    difficulty: Difficulty | None = None,
    force: bool = False,
    on_file: OnFile | None = None,
) -> Mixed:
    """Write `rows` rows to `out` as JSON Lines, of each source its weight's share (largest remainder).

    Without `rows`: as many as can be taken without repeating one. A source that must give more than it has gives every
    row equally often, or once more. `difficulty` is needed for easy-to-hard. Raises BadData for rows that cannot be
    read, sources of different formats, or a mix in which a source gives nothing.
    """
    if len({source.path.absolute() for source in sources}) < len(sources):
        raise BadSetting("A file is named twice.", hint="Name it once, with the sum of its weights.", param="sources")
    check_free(out, force)
    with tempfile.TemporaryFile(dir=out.parent) as handle:
        spool = _Spool(handle)
        counts = _read(sources, spool, difficulty, on_file)
        quotas = shares(counts, [source.weight for source in sources], rows)
        for source, quota in zip(sources, quotas, strict=True):
            if not quota:
                raise BadData(
                    f"{source.path} would give none of the {sum(quotas)} rows: its weight is {source.weight:g}.",
                    hint="Give it a greater weight, or ask for more --rows.",
                    param="sources",
                )
        picked, taken = _pick(sources, counts, quotas, seed)
        if order == "easy-to-hard":
            picked.sort(key=spool.hardness.__getitem__)  # stable: equals stay shuffled
        with new_file(out, force=force) as lines:
            for index in picked:
                lines.write(spool.row(index) + b"\n")
    return Mixed(str(out), len(picked), order, seed, taken)


def shares(counts: Sequence[int], weights: Sequence[float], rows: int | None) -> list[int]:
    """Rows that each source gives; their sum is `rows`, or without it the most that repeats no row."""
    parts = [Fraction(repr(float(weight))) for weight in weights]  # as they were written: 0.7 is seven tenths
    total = sum(parts)
    if rows is None:
        whole = min(count * total / part for count, part in zip(counts, parts, strict=True))
        return [int(whole * part / total) for part in parts]
    exact = [rows * part / total for part in parts]
    given = [int(each) for each in exact]
    for n in sorted(range(len(exact)), key=lambda n: (given[n] - exact[n], n))[: rows - sum(given)]:
        given[n] += 1
    return given


def _read(sources: Sequence[Source], spool: _Spool, difficulty: Difficulty | None, on_file: OnFile | None) -> list[int]:
    """The number of rows of each source; all rows are in the spool afterwards."""
    counts, first = [], ""
    for source in sources:
        before = len(spool.starts)
        for record, meaning in good_rows(source.path, on_file(source.path) if on_file else None, "mixed"):
            if len(spool.starts) == before:
                kind = detect(record.value) or ""
                first = first or kind
                if kind != first:
                    raise BadData(
                        f"{source.path} holds {kind} records and {sources[0].path} {first} records.",
                        hint=f"Bring them to one format: luthier data convert {source.path} OUT --to {first}",
                        param="sources",
                    )
            hard = difficulty(source.path, record.row, meaning) if difficulty else 0.0
            spool.add(on_one_line(record), hard)
        counts.append(len(spool.starts) - before)
    return counts


def _pick(
    sources: Sequence[Source], counts: Sequence[int], quotas: Sequence[int], seed: int
) -> tuple[list[int], list[Taken]]:
    """Indices into the spool, shuffled, and the account."""
    drawn = random.Random(seed)
    picked: list[int] = []
    taken = []
    start = 0
    for source, count, quota in zip(sources, counts, quotas, strict=True):
        mine = range(start, start + count)
        whole, rest = divmod(quota, count)
        for _ in range(whole):
            picked += mine
        picked += drawn.sample(mine, rest)
        taken.append(Taken(str(source.path), source.weight, count, quota, min(quota, count)))
        start += count
    drawn.shuffle(picked)
    return picked, taken


def read_losses(path: Path, sources: Sequence[Source]) -> Difficulty:
    """The difficulty that a file gives: one JSON object a line with `row`, `loss` and, with several sources, `file`.

    `file` is a source's path or its last part. Raises BadData for a line that says less, for two losses of one row, and
    later, when a row is asked for that has none.
    """
    losses: dict[tuple[str, int], float] = {}
    names = {name: str(source.path) for source in sources for name in (source.path.name, str(source.path))}
    if len({source.path.name for source in sources}) < len(sources):
        names = {str(source.path): str(source.path) for source in sources}
    for record in read_records(path):
        if isinstance(record, Problem):
            raise BadData(str(record), problems=[record], param="loss")
        value = record.value if isinstance(record.value, dict) else {}
        named = value.get("file", str(sources[0].path) if len(sources) == 1 else None)
        file, row, loss = names.get(named) if isinstance(named, str) else None, value.get("row"), value.get("loss")
        wrong = (
            ("file", named, "the name of a source")
            if file is None
            else ("row", row, "the number of a row, from 1")
            if type(row) is not int or row < 1
            else ("loss", loss, "a number")
            if isinstance(loss, bool) or not isinstance(loss, int | float)
            else ("row", row, "one loss a row")
            if (file, row) in losses
            else None
        )
        if wrong:
            at, found, wanted = wrong
            problem = Problem(record.line, at, shown(found), wanted, row=record.row, file=path.name)
            raise BadData(str(problem), problems=[problem], param="loss")
        losses[file, row] = float(loss)  # type: ignore[index,arg-type]

    def difficulty(file: Path, row: int, meaning: Example | Preference) -> float:
        del meaning
        if (str(file), row) not in losses:
            raise BadData(f"{path} has no loss for row {row} of {file}.", hint="Every row needs one.", param="loss")
        return losses[str(file), row]

    return difficulty
