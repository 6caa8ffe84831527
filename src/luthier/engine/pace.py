"""How fast this machine does the engine's work: sizes of forests, their operations, and what timed ones took.

A micro-batch of W floating-point operations takes a + W / rate seconds; a and the rate are fitted to micro-batches that
were timed on this machine with this base, method and code. Such points are kept, by the content of all that decides
them, so a later run that lies within them measures nothing.
Operations of a matrix product are 2 m n k; a frozen one costs 2 of them (forward, gradient of the input), a learning
one 3; attention's backward costs 2.5 times its forward (Dao, 2023, FlashAttention-2, section 4).

Does not know: runs, what is timed (forecast.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.engine import kernels, machine, native, step
from luthier.engine.forest import Forest
from luthier.engine.setup import Ready
from luthier.settings import load_settings
from luthier.spec.run import write_json

KEPT_POINTS, KEPT_FILES = 40, 200
LOW = 0.3
UNSTEADY = 1.5
WIDE = 1.3  # a point says something of micro-batches up to so many times larger


@dataclass(frozen=True, slots=True)
class Size:
    """What forests have: tokens, tokens to learn, and pairs of a token and one that it sees."""

    tokens: int
    targets: int
    pairs: int

    @classmethod
    def of(cls, *trees: Forest) -> Size:
        return cls(
            sum(tree.tokens for tree in trees),
            sum(len(tree.sources) for tree in trees),
            sum(int((tree.positions + 1).sum()) for tree in trees),
        )


@dataclass(frozen=True, slots=True)
class Price:
    """Floating-point operations of a token, a token to learn and a pair."""

    token: float
    target: float
    pair: float

    def of(self, size: Size) -> float:
        return self.token * size.tokens + self.target * size.targets + self.pair * size.pairs


@dataclass(frozen=True, slots=True)
class Point:
    """One timed micro-batch. `kind`: train (forward and backward), forward, or first: the largest one, which warms up
    what is made once, and whose memory (bytes beside the model) is what counts. Of kind `decode`, `work` is how many
    rows got one more token."""

    kind: str
    work: float
    seconds: float
    tokens: int
    memory: int = 0


def prices(model: Any) -> tuple[Price, Price]:
    """(training, only forward) of `model`."""
    base = step.inner(model)
    config = base.config.get_text_config()
    head = base.get_output_embeddings().weight
    tables = {id(base.get_input_embeddings().weight), id(head)}
    weights = [weight for weight in model.parameters() if weight.ndim > 1 and id(weight) not in tables]
    linear = sum(weight.numel() for weight in weights)
    learning = sum(weight.numel() for weight in weights if weight.requires_grad)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    pair = 4.0 * width * config.num_hidden_layers
    target = 2.0 * head.numel()
    training = Price(4.0 * linear + 2.0 * learning, target * (3 if head.requires_grad else 2), 3.5 * pair)
    return training, Price(2.0 * linear, target, pair)


class Known:
    """Points of earlier measurements of the same work on the same machine."""

    def __init__(self, ready: Ready) -> None:
        self.path = load_settings().cache_dir / "forecasts" / f"{_key(ready)}.json"
        self.resting = machine.memory_now()
        self.points: list[Point] = []
        self._lines: dict[str, tuple[float, float]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):  # no points yet, or damaged: they are made anew
            self.points = [Point(**point) for point in json.loads(self.path.read_text(encoding="utf-8"))]

    def covers(self, works: Sequence[float], tokens: int) -> bool:
        """Whether they say enough of micro-batches of these sizes."""
        timed = [point.work for point in self.points if point.kind == "train"]
        if not {"first", "train", "forward"} <= {point.kind for point in self.points}:
            return False
        middle, high = (float(np.quantile(works, place)) for place in (0.5, 0.95))
        near = any(middle / WIDE <= work <= middle * WIDE for work in timed)
        alike = any(tokens / WIDE <= point.tokens <= tokens * WIDE for point in self.points if point.kind == "first")
        return near and high <= max(timed) * WIDE and alike

    def add(self, points: Sequence[Point]) -> None:
        self.points = [*self.points, *points][-KEPT_POINTS:]
        self._lines.clear()
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run its measuring
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, [asdict(point) for point in self.points])
            others = sorted(self.path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in others[:-KEPT_FILES]:
                old.unlink(missing_ok=True)

    def seconds(self, work: float, kind: str) -> float:
        """Of a micro-batch of so many operations."""
        start, rate = self.line(kind)
        return start + work / rate

    def line(self, kind: str) -> tuple[float, float]:
        """(a, rate): `work` of this kind takes a + work / rate seconds."""
        if kind not in self._lines:
            self._lines[kind] = fit([(point.work, point.seconds) for point in self.points if point.kind == kind])
        return self._lines[kind]

    def has(self, kind: str) -> bool:
        return any(point.kind == kind for point in self.points)

    def peak(self, tokens: int, learning: int, several: bool) -> float:
        """Bytes that the process will hold at most, with `learning` weights that AdamW keeps two moments of: while it
        computes the largest micro-batch (with the gradients of earlier ones, when a step has `several`), or while it
        updates the weights (gradients, and one more value of each on the way)."""
        # The point nearest in size: one of much longer rows tells of memory that these do not need.
        firsts = [point for point in self.points if point.kind == "first"]
        seen = min(firsts, key=lambda point: (abs(np.log(tokens / point.tokens)), -point.memory))
        computing = seen.memory * max(1.0, tokens / seen.tokens) + (12 if several else 8) * learning
        return self.resting + max(computing, 16 * learning)


def steady(points: Sequence[Point]) -> bool:
    """Whether the last two timed micro-batches went at about one pace, so that no burst of other work lies on them."""
    last = [point.seconds / point.work for point in points if point.kind == "train"][-2:]
    return len(last) == 2 and max(last) < UNSTEADY * min(last)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, rate) of seconds = a + work / rate, a >= 0: the quantile LOW of log errors (Koenker & Bassett, 1978).

    Whatever else runs here only ever slows a micro-batch down, so the fast ones say more than the slow ones; when all
    are slowed alike, so will the run be. The best line goes through two of the points, or through one and the origin.
    """
    work, seconds = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    lines = [(0.0, taken / done) for done, taken in points]
    for first, second in itertools.combinations(points, 2):
        if first[0] != second[0]:
            slope = (second[1] - first[1]) / (second[0] - first[0])
            lines.append((first[1] - slope * first[0], slope))

    def loss(line: tuple[float, float]) -> float:
        error = np.log(seconds / (line[0] + line[1] * work))
        return float(np.maximum(LOW * error, (LOW - 1) * error).sum())

    start, slope = min((line for line in lines if line[0] >= 0 and line[1] > 0), key=loss)
    return start, 1 / slope


def _key(ready: Ready) -> str:
    """What decides how long the same work takes: machine, base, method, and our code."""
    code = hashlib.sha256()
    code.update(kernels.whose().encode())
    for path in sorted([*Path(__file__).parent.glob("*.py"), *native.SOURCES]):
        code.update(path.read_bytes())
    shapes = [(name, list(value.shape)) for name, value in ready.masters.values.items()]
    parts = [
        machine.description(), ready.base_hash, ready.request.method, ready.request.dropout > 0, shapes,
        ready.settings.precision, code.hexdigest(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
