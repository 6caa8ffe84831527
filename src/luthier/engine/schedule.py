"""Which queries of a forest meet which keys, cut into tiles that fit a cache: what tiles.py computes, in which order.

Every segment attends within itself (causally), and an inner segment's keys are seen by all its descendants, which lie
together in depth-first order. Pure planning, once a forest, window size and number of heads; no layer's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.engine.forest import Forest

# Scores in a tile: 2 MiB in bfloat16, which stays in the second-level caches of two cores while five products and
# three passes go over it. On Zen 4 half of it cost 10 %, a fourth 30 %; twice as much gained nothing.
TILE = 1024 * 1024


class Tile(NamedTuple):
    """Queries [start, end) against keys [key_start, key_end). Entry (query row r, key column j) is seen where
    j - r <= causal and j - r >= window, as far as these are given."""

    start: int
    end: int
    key_start: int
    key_end: int
    causal: int | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Segments of like length that attend within themselves, computed together; `tiles` count from their starts.

    `index` [count * length] names their tokens; shorter ones repeat their last token (None: tokens from `start` on,
    with nothing repeated). `real` [count * length, 1, 1] is 0 for repeated tokens (None: there are none).
    """

    start: int
    count: int
    length: int
    index: Tensor | None
    real: Tensor | None
    tiles: list[Tile]


@dataclass(frozen=True, slots=True)
class Schedule:
    """All tiles of a forest for one window size. `order` [T] finds each token among the groups' rows, one after
    another (None: they lie in order); `roots` [T] names the first token on each token's path."""

    groups: list[Group]
    ancestors: list[Tile]
    order: Tensor | None
    roots: Tensor | None
    rows: int


def schedule(forest: Forest, window: int | None, heads: int) -> Schedule:
    """Tiles for a forest whose queries have `heads` heads; with a window, distances are counted on the path."""
    segments = [segment for segment in forest.segments if segment.end > segment.start]
    groups: list[Group] = []
    gathered: list[Tensor] = []
    for members in _alike([(segment.start, segment.end) for segment in segments], heads):
        groups.append(_group(members, window, heads))
        gathered.append(_tokens(members, groups[-1].length))
    rows = torch.cat(gathered) if gathered else torch.zeros(0, dtype=torch.long)
    order = None
    if not torch.equal(rows, torch.arange(forest.tokens)):
        order = torch.empty(forest.tokens, dtype=torch.long)
        order[rows.flip(0)] = torch.arange(len(rows) - 1, -1, -1)  # of a token's copies, the first
    first: list[int] = []
    for number, segment in enumerate(forest.segments):
        first.append(first[segment.parent] if segment.parent >= 0 and number else segment.start)
    roots = torch.empty(forest.tokens, dtype=torch.long)
    for start, segment in zip(first, forest.segments, strict=True):
        roots[segment.start : segment.end] = start
    return Schedule(groups, _ancestors(forest, window, heads), order, roots if window is None else None, len(rows))


def _alike(ranges: list[tuple[int, int]], heads: int) -> list[list[tuple[int, int]]]:
    """Ranges of tokens, together where a quarter of padding or less makes them equally long and one tile holds them."""
    found: list[list[tuple[int, int]]] = []
    for start, end in sorted(ranges, key=lambda at: at[0] - at[1]):
        if found:
            longest = found[-1][0][1] - found[-1][0][0]
            if longest <= 1.25 * (end - start) + 4 and heads * longest**2 * (len(found[-1]) + 1) <= TILE:
                found[-1].append((start, end))
                continue
        found.append([(start, end)])
    return [sorted(members) for members in found]


def _tokens(members: list[tuple[int, int]], length: int) -> Tensor:
    return torch.cat([torch.arange(start, start + length).clamp_(max=end - 1) for start, end in members])


def _group(members: list[tuple[int, int]], window: int | None, heads: int) -> Group:
    length = max(end - start for start, end in members)
    tokens = _tokens(members, length)
    plain = bool((tokens.diff() == 1).all())
    real = torch.cat([torch.arange(length) < end - start for start, end in members])
    step = min(length, max(64, min(256, TILE // (heads * len(members) * length) // 32 * 32)))
    tiles = []
    for start in range(0, length, step):
        end = min(start + step, length)
        first = 0 if window is None else max(0, start - window + 1)
        lowest = None if window is None or end - window <= first else start - window + 1 - first
        tiles.append(Tile(start, end, first, end, start - first, lowest))
    return Group(
        members[0][0],
        len(members),
        length,
        None if plain else tokens,
        None if bool(real.all()) else real[:, None, None],
        tiles,
    )


def _ancestors(forest: Forest, window: int | None, heads: int) -> list[Tile]:
    """Each inner segment's keys against its descendants, which lie together; where a window ends inside the segment,
    each descendant segment on its own."""
    tiles: list[Tile] = []
    for number, (segment, last) in enumerate(zip(forest.segments, forest.descendants(), strict=True)):
        keys = segment.end - segment.start
        if not keys or last == segment.end:
            continue
        whole: list[list[int]] = []  # ranges of queries that see every key
        below = number + 1
        while below < len(forest.segments) and forest.segments[below].start < last:
            start, end, _ = forest.segments[below]
            below += 1
            # Row r of a descendant sees key j of this segment where j >= r + nearest.
            nearest = -keys
            if window is not None and end > start:
                nearest = int(forest.positions[start]) - window + 1 - int(forest.positions[segment.start])
            if window is None or end - 1 - start + nearest <= 0:
                if whole and whole[-1][1] == start:
                    whole[-1][1] = end
                else:
                    whole.append([start, end])
            elif nearest < keys:
                end = min(end, start + keys - nearest)
                skip = max(0, nearest)
                tiles += _cut(Tile(start, end, segment.start + skip, segment.end, None, nearest - skip), heads)
        for start, end in whole:
            tiles += _cut(Tile(start, end, segment.start, segment.end), heads)
    return tiles


def _cut(tile: Tile, heads: int) -> list[Tile]:
    """Stretches of equal length, each of about TILE scores."""
    count = tile.end - tile.start
    if not count:
        return []
    parts = -(-count * heads * (tile.key_end - tile.key_start) // TILE)
    step = -(-count // parts)
    return [
        tile._replace(
            start=start,
            end=min(start + step, tile.end),
            window=None if tile.window is None else tile.window + start - tile.start,
        )
        for start in range(tile.start, tile.end, step)
    ]
