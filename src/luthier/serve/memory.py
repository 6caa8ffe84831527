"""Keys and values of the sequences being served: one tensor, a slot each; and blocks remembered by content.

The tensor is [layers, 2 (key, value), slots, capacity, kv heads, head size]. Sequences fill the first slots without a
hole, so that a step attends to all of them through views. Slots are zero where nothing was written: attention gives
such places weight 0, and 0 times what was there must not be NaN.
Does not know: what a sequence is, models, sampling.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROWTH = 256  # capacity grows by so many tokens at once
BLOCK = 16  # tokens of one remembered block


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_size * self.dtype.itemsize


class Slots:
    """Room for `rows` sequences of `capacity` tokens each; `budget` bounds their product."""

    def __init__(self, shape: Shape, budget: int) -> None:
        self.shape, self.budget = shape, budget
        self.data = self._empty(0, 0)

    def _empty(self, rows: int, capacity: int) -> Tensor:
        s = self.shape
        return torch.zeros(s.layers, 2, rows, capacity, s.kv_heads, s.head_size, dtype=s.dtype)

    @property
    def rows(self) -> int:
        return int(self.data.shape[2])

    @property
    def capacity(self) -> int:
        return int(self.data.shape[3])

    def fits(self, rows: int, length: int) -> bool:
        """Whether `rows` sequences, the longest of `length` tokens, stay within the budget."""
        return rows * length <= self.budget

    def reserve(self, rows: int, length: int) -> None:
        """Make room; what is there is kept."""
        if rows <= self.rows and length <= self.capacity:
            return
        capacity = self.capacity if length <= self.capacity else -(-length // GROWTH) * GROWTH
        wanted = self.rows
        while wanted < rows:
            wanted = max(1, 2 * wanted)
        old = self.data
        self.data = self._empty(wanted, capacity)
        self.data[:, :, : old.shape[2], : old.shape[3]] = old

    def move(self, source: int, target: int, length: int) -> None:
        """Bring the first `length` tokens of `source` to `target`; both must be given up or overwritten then."""
        self.data[:, :, target, :length] = self.data[:, :, source, :length]

    def clear(self, row: int, length: int) -> None:
        self.data[:, :, row, :length] = 0

    def give_back(self) -> None:
        """Nobody is here: return the memory."""
        self.data = self._empty(0, 0)


def block_keys(owner: str, tokens: Sequence[int]) -> Iterator[bytes]:
    """A key for each whole block of `tokens`. It depends on all tokens up to the block's end and on `owner`."""
    key = hashlib.sha256(owner.encode()).digest()
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hashlib.sha256(key + struct.pack(f"<{BLOCK}q", *tokens[start : start + BLOCK])).digest()
        yield key


class Prefixes:
    """Blocks of keys and values by content, the least recently used forgotten first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit = limit_bytes
        self.bytes = 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, owner: str, tokens: Sequence[int]) -> list[Tensor]:
        """The longest known run of blocks from the start of `tokens`."""
        found = []
        for key in block_keys(owner, tokens):
            block = self._blocks.get(key)
            if block is None:
                break
            self._blocks.move_to_end(key)
            found.append(block)
        return found

    def keep(self, owner: str, tokens: Sequence[int], values: Tensor) -> None:
        """Remember `values` [layers, 2, >= len(tokens), kv heads, head size], computed for `tokens`."""
        for place, key in enumerate(block_keys(owner, tokens)):
            if key in self._blocks:
                self._blocks.move_to_end(key)
                continue
            block = values[:, :, place * BLOCK : (place + 1) * BLOCK].clone()
            size = block.numel() * block.itemsize
            if size > self.limit:
                return
            self._blocks[key] = block
            self.bytes += size
        while self.bytes > self.limit:
            _, block = self._blocks.popitem(last=False)
            self.bytes -= block.numel() * block.itemsize
