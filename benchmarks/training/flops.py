"""Floating-point operations that a step cannot do without, from shapes alone. Pure arithmetic; 2 for a multiply-add.

Counted: frozen linear layers (forward and the gradient of their input), LoRA (forward and both gradients), the head at
positions that are learnt from, and attention at pairs of positions that see each other. Not counted: whatever a trainer
does beyond that, such as checkpoints computed twice, logits nobody asks for, padding, half of a masked square. Norms,
lookups and the optimizer count as nothing.

Two counts of the same rows: `logical`, each row alone, and `physical`, as a forest computes them, with shared prefixes
once. Time divided by the first tells what a user gets, by the second how well the machine is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Of a decoder: sizes as in its config.json."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    windows: tuple[int | None, ...]  # of each layer; None sees everything
    rank: int = 16

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one decoder layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden)]
        return [*attention, (self.hidden, self.inner), (self.hidden, self.inner), (self.inner, self.hidden)]

    @property
    def frozen(self) -> int:
        """Weights in all linear layers but the head."""
        return self.layers * sum(one * other for one, other in self.linears)

    @property
    def lora(self) -> int:
        return self.layers * self.rank * sum(one + other for one, other in self.linears)


def shape(config: dict[str, Any]) -> Shape:
    """From a config.json."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kinds = config.get("layer_types") or ["full_attention"] * layers
    window = config.get("sliding_window")
    return Shape(
        layers=layers,
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )


@dataclass(frozen=True)
class Work:
    """What rows come to: tokens computed, positions whose logits are needed, and (depth, length) of every piece."""

    tokens: int
    predicting: int
    pieces: tuple[tuple[int, int], ...]


def flat(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Work:
    """Each row alone. Rows are (ids, mask)."""
    return Work(
        tokens=sum(len(ids) for ids, _ in rows),
        predicting=sum(sum(mask[1:]) for _, mask in rows),
        pieces=tuple((0, len(ids)) for ids, _ in rows),
    )


def shared(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Work:
    """As a token trie: what rows begin with alike is there once. Positions from which two rows learn count once."""
    ordered = sorted(rows, key=lambda row: list(row[0]))
    tokens = predicting = 0
    pieces = []
    before: Sequence[int] = []
    seen: set[int] = set()
    for ids, mask in ordered:
        common = 0
        for one, other in zip(before, ids, strict=False):
            if one != other:
                break
            common += 1
        tokens += len(ids) - common
        pieces.append((common, len(ids) - common))
        path = 0  # of the tokens so far, as one number
        for at in range(1, len(ids)):
            path = hash((path, ids[at - 1]))
            if mask[at] and path not in seen:
                predicting += 1
                seen.add(path)
        before = ids
    return Work(tokens, predicting, tuple(pieces))


def pairs(pieces: Sequence[tuple[int, int]], window: int | None) -> int:
    """Query-key pairs: position p of a path sees itself and those before it, at most `window` in all."""
    total = 0
    for depth, length in pieces:
        end = depth + length
        if window is None or end <= window:
            total += (end * (end + 1) - depth * (depth + 1)) // 2
            continue
        ramp = max(0, min(end, window) - depth)  # positions that see less than the window
        first = depth + 1
        total += ramp * (2 * first + ramp - 1) // 2 + (length - ramp) * window
    return total


def step(model: Shape, work: Work, full: bool) -> float:
    """Operations of forward and backward over `work`; `full`: every weight learns."""
    linear = (6 if full else 4) * model.frozen * work.tokens
    lora = 0 if full else 6 * model.lora * work.tokens
    head = (6 if full else 4) * model.vocabulary * model.hidden * work.predicting
    attention = sum(12 * model.heads * model.head_dim * pairs(work.pieces, window) for window in model.windows)
    return float(linear + lora + head + attention)
