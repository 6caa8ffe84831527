"""Which queries of a forest meet which keys, as few blocks that need no mask: what attention.py computes, in its order.

Every segment attends within itself, causally, and an inner segment's keys are seen by all its descendants, which lie
together in depth-first order. Sliding windows count distances on the path: segments are cut into stretches of at most a
window, so most blocks are seen whole or not at all and only those that a window's edge crosses need a mask.
Pure planning, once a forest and window size; no layer's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.engine.forest import Forest

# The kernel's backward pass has one task for each key head of each stretch. Blocks of more pairs than this are halved,
# so that a second core has as much to do as the first, also with one or three key heads.
HALVED = 256 * 256
# A windowed segment is not cut finer than this: a call costs more than the hidden part of a small block.
LEAST = 128


class Block(NamedTuple):
    """`parts` stretches of `length` queries, one after another from `start`, each against `keys` keys. Stretch i's keys
    begin at key_start + i * key_step, where key_step is 0 or `keys`.

    Query row r sees key column j where j <= r, if `causal`, and where j >= r + low + i * low_step, if `low` is given.
    """

    start: int
    length: int
    key_start: int
    keys: int
    causal: bool = False
    low: int | None = None
    parts: int = 1
    key_step: int = 0
    low_step: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.parts * self.length

    @property
    def key_stop(self) -> int:
        return self.key_start + (self.parts - 1) * self.key_step + self.keys

    def mask(self) -> Tensor | None:
        """Float32 [parts or 1, 1, length, keys], 0 where a query sees a key and else -inf; None where `causal` alone
        says it."""
        if self.low is None:
            return None
        lows = torch.arange(self.parts if self.low_step else 1) * self.low_step + self.low
        distance = torch.arange(self.keys) - torch.arange(self.length)[:, None]
        hidden = distance < lows[:, None, None]
        if self.causal:
            hidden |= distance > 0
        return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]


class Stretch(NamedTuple):
    """Tokens [start, end) of one segment, the first at `position` on its path; those up to `last` descend from them."""

    start: int
    end: int
    position: int
    last: int


def blocks(forest: Forest, window: int | None, before: int = 0) -> list[Block]:
    """All blocks of a forest: first those of stretches with themselves, each token in exactly one of them.

    With a trunk of `before` tokens, which all rows continue, keys are counted from its first one.
    """
    if window is not None and forest.longest_path <= window:
        window = None
    stretches = list(_stretches(forest, window))
    own = [
        Block(start, end - start, start + before, end - start, True, _low(1 - window if window else None, end - start))
        for start, end, _, _ in stretches
    ]
    halved = [half for block in _together(own) for half in _halved(block)]
    # What a halved one leaves over (its second half before its first) comes after all tokens had their own block.
    first = [block for block in halved if block.causal]
    rest = [block for block in halved if not block.causal]
    if before:
        size = _cut(before, window)
        trunk = [
            Stretch(at - before, min(at + size, before) - before, at, forest.tokens) for at in range(0, before, size)
        ]
        stretches = trunk + stretches
    above = [half for block in _together(_ancestors(stretches, window, before)) for half in _halved(block)]
    return first + rest + above


def _low(low: int | None, length: int) -> int | None:
    """None where even the last of `length` rows sees the first key."""
    return low if low is not None and low + length - 1 > 0 else None


def _stretches(forest: Forest, window: int | None) -> Iterator[Stretch]:
    for (start, end, _), last in zip(forest.segments, forest.descendants(), strict=True):
        if start == end:
            continue
        size = _cut(end - start, window)
        for at in range(start, end, size):
            yield Stretch(at, min(at + size, end), int(forest.positions[at]), last)


def _cut(length: int, window: int | None) -> int:
    """Tokens of a stretch, where so many are cut evenly."""
    return length if window is None else -(-length // -(-length // max(window, LEAST)))


def _ancestors(stretches: list[Stretch], window: int | None, before: int) -> Iterator[Block]:
    """Each stretch's keys against what descends from it: neighbours that see all of it as one."""
    for number, (start, end, position, last) in enumerate(stretches):
        keys, first = end - start, start + before
        seeing = at = max(0, end)  # [seeing, at) see every key
        for below in stretches[number + 1 :]:
            if below.start >= last:
                break
            if below.start < 0:  # the trunk's own queries are computed with it
                continue
            length = below.end - below.start
            # Its row r sees key j where j >= r + nearest.
            nearest = 0 if window is None else below.position - window + 1 - position
            at = below.end
            if window is None or length - 1 + nearest <= 0:
                continue
            if below.start > seeing:
                yield Block(seeing, below.start - seeing, first, keys)
            seeing = at
            if nearest < keys:
                skip = max(0, nearest)
                yield Block(below.start, length, first + skip, keys - skip, False, nearest - skip)
        if at > seeing:
            yield Block(seeing, at - seeing, first, keys)


def _together(single: Iterable[Block]) -> Iterator[Block]:
    """Neighbours of one shape as one block of several stretches."""
    current: Block | None = None
    for block in single:
        if current is not None and (joined := _joined(current, block)) is not None:
            current = joined
            continue
        if current is not None:
            yield current
        current = block
    if current is not None:
        yield current


def _joined(block: Block, other: Block) -> Block | None:
    shape = (block.length, block.keys, block.causal, block.low)
    if shape != (other.length, other.keys, other.causal, other.low) or other.start != block.stop:
        return None
    step = other.key_start - (block.key_start + (block.parts - 1) * block.key_step)
    if step not in (0, block.keys) or (block.parts > 1 and step != block.key_step):
        return None
    return block._replace(parts=block.parts + 1, key_step=step)


def _halved(block: Block) -> Iterator[Block]:
    """A large block that stands alone as two of one size, and what that leaves over."""
    start, length, key_start, keys, causal, low, parts = block[:7]
    if parts > 1 or length < 4 or length * keys < HALVED or (causal and low is not None):
        yield block
        return
    half = length // 4 * 2 if causal else length // 2
    rest = length - 2 * half
    if causal:
        yield Block(start, half, key_start, half, True, None, 2, half)
        yield from _halved(Block(start + half, half, key_start, half))
        if rest:
            yield Block(start + 2 * half, rest, key_start + 2 * half, rest, True)
            yield Block(start + 2 * half, rest, key_start, 2 * half)
        return
    yield Block(start, half, key_start, keys, False, low, 2, 0, half if low is not None else 0)
    if rest:
        yield Block(start + 2 * half, rest, key_start, keys, False, None if low is None else low + 2 * half)
