"""Many rows to few forests: token tries in which a prefix that rows share is computed once. Pure data, no torch.

A forest is what one forward pass computes:
    token_ids [T], positions [T] (depth on the own path, so rotary positions are those of the row alone),
    segments (start, end, parent) in depth-first order,
    targets (source_index, target_id, weight, sequence): the hidden state at source_index predicts target_id.
Where rows part, one source predicts several next tokens. Packing without cross-contamination is the same thing with
one segment a row.

Laws (held by tests): loss and gradients of a forest equal those of its rows one by one; any order of rows and any cut
into micro-batches give the same optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]
Row = tuple[Ids, Weights]

# A shared prefix shorter than this is not worth two attention calls a layer: rows keep their own copy.
MIN_SHARED = 16


class Segment(NamedTuple):
    """Tokens [start, end) that follow, on their path, the last token of segment `parent` (-1: a root)."""

    start: int
    end: int
    parent: int


@dataclass(slots=True)
class Forest:
    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    segments: list[Segment]
    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    sequences: npt.NDArray[np.int64]
    logical_tokens: int

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    @property
    def longest_path(self) -> int:
        return int(self.positions.max(initial=-1)) + 1

    def descendants(self) -> list[int]:
        """For each segment, the end index of its last descendant: descendants are contiguous in depth-first order."""
        ends = [segment.end for segment in self.segments]
        for index in range(len(self.segments) - 1, -1, -1):
            parent = self.segments[index].parent
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[index])
        return ends


def shared_prefix(first: Ids, second: Ids) -> int:
    """Number of leading ids that two rows have in common."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def build(
    rows: Sequence[Row], sequences: Sequence[int] | None = None, min_shared: int = MIN_SHARED, begin: int = 0
) -> Forest:
    """The forest of `rows`; `sequences[i]` names row i in the targets (default: i).

    With a `begin`, rows are what follows a trunk of so many tokens: positions count from there. What the trunk's last
    token predicts, the first token of each row, is among the trunk's targets.
    """
    names = list(range(len(rows))) if sequences is None else list(sequences)
    order = sorted(range(len(rows)), key=lambda index: rows[index][0].astype(">i4").tobytes())
    maker = _Maker(rows, names, min_shared)
    # Stack of (members in sorted order, depth at which they begin, parent segment, index of the parent's last token).
    stack: list[tuple[list[int], int, int, int]] = [(group, 0, -1, -1) for group in reversed(maker.groups(order, 0))]
    while stack:
        members, depth, parent, last = stack.pop()
        end = maker.common_end(members)
        segment, last = maker.segment(members, depth, end, parent, last)
        longer = [index for index in members if len(rows[index][0]) > end]
        stack += [(group, end, segment, last) for group in reversed(maker.groups(longer, end))]
    tree = maker.forest()
    tree.positions += begin
    return tree


def trunk(rows: Sequence[Row], sequences: Sequence[int], length: int) -> Forest:
    """The first `length` tokens, which all `rows` share, as a forest of one segment with all targets of its tokens.
    Its logical tokens are those of all rows."""
    maker = _Maker(rows, list(sequences), 0)
    maker.segment(range(len(rows)), 0, length, -1, -1)
    for (ids, weights), name in zip(rows, sequences, strict=True):
        if len(ids) > length and weights[length]:
            at = np.array([length])
            maker.targets.append((at - 1, ids[at], weights[at], name))
    tree = maker.forest()
    tree.logical_tokens = length * len(rows)
    return tree


class _Maker:
    """Grows the arrays of one forest."""

    def __init__(self, rows: Sequence[Row], names: list[int], min_shared: int) -> None:
        self.rows, self.names, self.min_shared = rows, names, min_shared
        self.ids: list[Ids] = []
        self.positions: list[npt.NDArray[np.int64]] = []
        self.segments: list[Segment] = []
        self.targets: list[tuple[npt.NDArray[np.int64], Ids, Weights, int]] = []
        self.size = 0

    def groups(self, members: Sequence[int], depth: int) -> list[list[int]]:
        """Members (sorted) that share at least `min_shared` ids from `depth` on, together; the others alone."""
        found: list[list[int]] = []
        for index in members:
            if found:
                previous = self.rows[found[-1][0]][0]
                if shared_prefix(previous[depth:], self.rows[index][0][depth:]) >= self.min_shared:
                    found[-1].append(index)
                    continue
            found.append([index])
        return found

    def common_end(self, members: Sequence[int]) -> int:
        """Depth up to which all members are the same: first against last, as they are sorted."""
        first, last = self.rows[members[0]][0], self.rows[members[-1]][0]
        return shared_prefix(first, last) if len(members) > 1 else len(first)

    def segment(self, members: Sequence[int], depth: int, end: int, parent: int, last: int) -> tuple[int, int]:
        """Append ids [depth, end) once, and every member's targets for them; returns (segment, its last index)."""
        start = self.size
        self.ids.append(self.rows[members[0]][0][depth:end])
        self.positions.append(np.arange(depth, end, dtype=np.int64))
        self.segments.append(Segment(start, start + end - depth, parent))
        self.size += end - depth
        sources = np.arange(start - 1, self.size - 1, dtype=np.int64)
        if len(sources):
            sources[0] = last  # the token before this segment ends the parent
        for index in members:
            ids, weights = self.rows[index]
            learnt = np.flatnonzero(weights[depth:end])
            learnt = learnt[sources[learnt] >= 0]
            if len(learnt):
                at = learnt + depth
                self.targets.append((sources[learnt], ids[at], weights[at], self.names[index]))
        return len(self.segments) - 1, self.size - 1

    def forest(self) -> Forest:
        def joined(column: int, dtype: type) -> npt.NDArray[np.generic]:
            parts = [target[column] for target in self.targets]
            return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

        counts = [len(target[0]) for target in self.targets]
        return Forest(
            token_ids=np.concatenate(self.ids).astype(np.int64) if self.ids else np.zeros(0, np.int64),
            positions=np.concatenate(self.positions) if self.positions else np.zeros(0, np.int64),
            segments=self.segments,
            sources=joined(0, np.int64),  # type: ignore[arg-type]
            targets=joined(1, np.int64),  # type: ignore[arg-type]
            weights=joined(2, np.float32),  # type: ignore[arg-type]
            sequences=np.repeat([target[3] for target in self.targets], counts).astype(np.int64),
            logical_tokens=sum(len(ids) for ids, _ in self.rows),
        )


def plan(rows: Sequence[Row], micro_tokens: int, min_shared: int = MIN_SHARED, each: int = 1) -> list[list[int]]:
    """Cut one optimizer step's rows into micro-batches of at most `micro_tokens` physical tokens: as few as can be, and
    of those the ones whose largest is smallest, as the largest decides how much memory is needed.

    Rows are taken in sorted order, so rows with a common prefix stay together and pay for it once. A row longer than
    the budget gets a micro-batch of its own. Of rows that belong together, `each` following ones (the answers of a
    pair), the first gives the order and all get into one micro-batch.
    """

    def alone(ids: Ids, before: Ids) -> int:
        shared = shared_prefix(before, ids)
        return len(ids) - (shared if shared >= min_shared else 0)

    order = sorted(range(0, len(rows), each), key=lambda index: rows[index][0].astype(">i4").tobytes())
    costs: list[tuple[int, int]] = []  # tokens as the first of a micro-batch, and behind the one before
    for index, before in zip(order, [*order[:1], *order], strict=False):
        ids = rows[index][0]
        others = sum(alone(rows[member][0], ids) for member in range(index + 1, index + each))
        costs.append((len(ids) + others, alone(ids, rows[before][0]) + others))
    least = _least(costs, micro_tokens)
    return [[member for at in cut for member in range(order[at], order[at] + each)] for cut in _cuts(costs, least)]


def _cuts(costs: Sequence[tuple[int, int]], budget: int) -> list[range]:
    """Neighbours that a micro-batch of `budget` tokens holds, taken one after another: no other cuts are fewer, for
    neighbours never cost more than they do with more of their neighbours."""
    cuts: list[range] = []
    used = 0
    for at, (first, following) in enumerate(costs):
        if cuts and used + following <= budget:
            cuts[-1] = range(cuts[-1].start, at + 1)
            used += following
        else:
            cuts.append(range(at, at + 1))
            used = first
    return cuts


def _least(costs: Sequence[tuple[int, int]], budget: int) -> int:
    """The smallest budget that needs no more micro-batches than `budget` does."""
    count, low = len(_cuts(costs, budget)), 0
    while low < budget:
        middle = (low + budget) // 2
        if len(_cuts(costs, middle)) <= count:
            budget = middle
        else:
            low = middle + 1
    return budget


def physical_tokens(rows: Sequence[Row], min_shared: int = MIN_SHARED) -> int:
    """Tokens that a forest of `rows` computes, at most; cheap: sorted neighbours only."""
    total, previous = 0, None
    for index in sorted(range(len(rows)), key=lambda index: rows[index][0].astype(">i4").tobytes()):
        ids = rows[index][0]
        shared = shared_prefix(previous, ids) if previous is not None else 0
        total += len(ids) - (shared if shared >= min_shared else 0)
        previous = ids
    return total
