"""A forest's queries and keys as small tiles, and which meet: what a kernel of our own walks along (attention.cpp).

Tiles are of one segment each, so a query sees all of another segment's tile, or of its own what lies before it; sliding
windows hide more, by positions on the path. Pure planning, once a forest and window size; no layer's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# Of a tile, at most. Scores of one fill half of a core's first-level cache; queries are multiplied six at a time.
QUERIES, KEYS, AT_ONCE = 60, 64, 6

Table = npt.NDArray[np.int32]


class Tiles(NamedTuple):
    """queries [N, 5]: first token, count, position of the first, and of which visits (from, to); keys [M, 3]: first
    token, count, position of the first; visits [V, 2]: tile of keys, and whether it is of the queries' own segment."""

    queries: Table
    keys: Table
    visits: Table
    window: int | None

    @classmethod
    def of(
        cls, segments: Sequence[tuple[int, int, int]], positions: npt.NDArray[Any], window: int | None, before: int
    ) -> Tiles:
        """Of segments (start, end, parent) in depth-first order; keys are counted from the first of a trunk of `before`
        tokens, which all see."""
        keys: list[tuple[int, int, int]] = []

        def cut(start: int, count: int, position: int) -> range:
            keys.extend((start + at, min(KEYS, count - at), position + at) for at in range(0, count, KEYS))
            return range(len(keys) - -(-count // KEYS), len(keys))

        trunk = list(cut(0, before, 0))
        own: list[range] = []
        above: list[list[int]] = []  # the tiles of a segment's ancestors
        queries: list[tuple[int, ...]] = []
        visits: list[tuple[int, int]] = []
        for number, (start, end, parent) in enumerate(segments):
            first = int(positions[start]) if end > start else 0
            own.append(cut(before + start, end - start, first))
            above.append([*above[parent], *own[parent]] if parent >= 0 else trunk)
            for at, count in _even(end - start):
                begin, last = first + at, first + at + count - 1
                visited = len(visits)
                seen = [(tile, 0) for tile in above[number]]
                seen += [(tile, 1) for tile in own[number] if keys[tile][2] <= last]
                if window is not None:
                    seen = [(tile, same) for tile, same in seen if begin - sum(keys[tile][1:]) + 1 < window]
                visits += seen
                queries.append((start + at, count, begin, visited, len(visits)))
        return cls(_table(queries, 5), _table(keys, 3), _table(visits, 2), window)


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Table:
    return np.array(rows, dtype=np.int32).reshape(-1, columns)


def _even(count: int) -> list[tuple[int, int]]:
    """(start, length) of tiles of about one size, whole multiples of AT_ONCE but for the last."""
    if not count:
        return []
    size = -(-count // -(-count // QUERIES))
    size = -(-size // AT_ONCE) * AT_ONCE
    return [(at, min(size, count - at)) for at in range(0, count, size)]
