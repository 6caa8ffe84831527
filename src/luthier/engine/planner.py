"""One optimizer step's rows to passes through the model: what is computed together, and what is computed once.

Rows are cut into micro-batches of neighbours in sorted order (forest.plan), so rows with a common beginning pay for it
once a micro-batch. Where several micro-batches would compute the same beginning it becomes a *trunk*: a forest that is
computed once, at whose keys and values the others only look (stream.py). Pure data, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.engine import forest
from luthier.engine.forest import Forest, Row

# Tokens that a trunk must save in all: it is one more pass through the model, and a small one makes poor use of it.
MIN_SAVED = 128


@dataclass(frozen=True, slots=True)
class Work:
    """Forests that are computed one after another; with a trunk, all their rows continue it."""

    forests: list[Forest]
    trunk: Forest | None = None

    @property
    def all(self) -> list[Forest]:
        return [*self.forests, *([self.trunk] if self.trunk else [])]

    @property
    def tokens(self) -> int:
        """Physical tokens."""
        return sum(tree.tokens for tree in self.all)

    @property
    def held(self) -> int:
        """Most tokens whose activations are in memory at a time."""
        return max((tree.tokens for tree in self.forests), default=0) + (self.trunk.tokens if self.trunk else 0)


def works(
    rows: Sequence[Row], micro_tokens: int, *, part: slice = slice(None), trunks: bool = True, each: int = 1
) -> list[tuple[int, Work]]:
    """(number, work) of a step's rows, or of a share of its micro-batches (ranks); numbers are those of the whole step.
    `each` following rows belong together (the answers of a pair): but for what a trunk holds, one forest has them all.

    A forest and its trunk have at most about `micro_tokens` tokens together. A single row or a trunk may have more;
    beside a long trunk there is room for half as many tokens of what follows. Without `trunks` each forest stands
    alone.
    """
    batches = list(enumerate(forest.plan(rows, micro_tokens, each=each)))[part]
    runs = _runs(rows, [batch for _, batch in batches]) if trunks else [(1, 0)] * len(batches)
    made: list[tuple[int, Work]] = []
    at = 0
    for count, shared in runs:
        number, first = batches[at]
        members = [index for _, batch in batches[at : at + count] for index in batch]
        at += count
        if shared:
            room = max(micro_tokens - shared, micro_tokens // 2)
            made.append((number, _branched(rows, members, shared, room, each)))
        else:
            made.append((number, Work([forest.build([rows[index] for index in first], first)])))
    return made


def _branched(rows: Sequence[Row], members: list[int], shared: int, room: int, each: int) -> Work:
    """The first `shared` tokens of `members` as a trunk, the rest of each in forests of at most `room` tokens."""
    ends = [(ids[shared:], weights[shared:]) for ids, weights in (rows[index] for index in members)]
    longer = [[at for at in cut if len(ends[at][0])] for cut in forest.plan(ends, room, each=each)]
    branches = [
        forest.build([ends[at] for at in cut], [members[at] for at in cut], begin=shared) for cut in longer if cut
    ]
    return Work(branches, forest.trunk([rows[index] for index in members], members, shared))


def _runs(rows: Sequence[Row], batches: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(micro-batches, tokens that all their rows begin with): neighbours, joined as long as that saves more."""
    runs: list[tuple[int, int]] = []
    common = first = 0  # tokens that all rows of the last run begin with; its first row
    for batch in batches:
        own = min(forest.shared_prefix(rows[batch[0]][0], rows[index][0]) for index in batch)
        if runs:
            count, shared = runs[-1]
            together = min(common, own, forest.shared_prefix(rows[first][0], rows[batch[0]][0]))
            if together * count > shared * (count - 1):
                runs[-1] = count + 1, together
                common = together
                continue
        runs.append((1, 0))
        common, first = own, batch[0]
    return [
        part
        for count, shared in runs
        for part in ([(count, shared)] if shared * (count - 1) >= MIN_SAVED else [(1, 0)] * count)
    ]
