"""One piece of a step's work through the model: forests that stand alone, or a trunk and what follows it.

The trunk goes forward once, and its keys and values are kept. Each forest of branches goes forward and backward against
them; what it sends back to them is added up. Then the trunk goes backward once, with its own losses and that sum. So
memory holds the trunk and one forest of branches, and gradients are those of everything at once (the idea of DTA: Jiang
et al., 2026).
Does not know: how work is cut (planner.py), optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from luthier.engine import loss as losses
from luthier.engine import planner, step
from luthier.engine.attention import Trunk
from luthier.engine.forest import Forest, Row
from luthier.engine.planner import Work
from luthier.engine.step import Sums, Tally, Watch


def forward_backward(
    model: Any,
    work: Work,
    normaliser: float,
    smoothing: float = 0.0,
    tally: Tally | None = None,
    collect: Callable[[], None] = lambda: None,
) -> float:
    """Add the gradients of `work` to the parameters; returns its share of the step's mean loss (nats per token).

    `collect` is called after each backward pass and may take the gradients away.
    """
    seen: list[tuple[Forest, Tensor]] = []
    total = 0.0

    def learn(tree: Forest, hidden: Tensor) -> None:
        nonlocal total
        value, right = step.learn(model, tree, hidden, normaliser, smoothing)
        total += value
        seen.append((tree, right))
        collect()

    if work.trunk is None:
        for tree in work.forests:
            if len(tree.sources):
                learn(tree, step.hidden_states(model, tree))
    else:
        trunk = Trunk(work.trunk.tokens)
        hidden = step.hidden_states(model, work.trunk, becomes=trunk)
        for tree in work.forests:
            if len(tree.sources):
                learn(tree, step.hidden_states(model, tree, trunk=trunk))
        learn(work.trunk, hidden)
    if tally is not None:
        tally.see(*seen)
    return total


@torch.no_grad()
def states(model: Any, work: Work) -> Iterator[tuple[Forest, Tensor]]:
    """Each forest of `work`, the trunk first, with its hidden states [N, H]."""
    trunk = Trunk(work.trunk.tokens) if work.trunk else None
    for tree in (work.trunk, *work.forests):
        if tree is None or not (len(tree.sources) or tree is work.trunk):
            continue
        role = {"becomes": trunk} if tree is work.trunk else {"trunk": trunk}
        yield tree, step.hidden_states(model, tree, **role)


@torch.no_grad()
def measure(model: Any, work: Work, tally: Tally | None = None, watch: Watch | None = None) -> Sums:
    """Sums of `work`. `tally` counts its answers; `watch` may look at the hidden states [N, H] of each forest."""
    seen: list[tuple[Forest, Tensor]] = []
    total = Sums()
    for tree, hidden in states(model, work):
        sums, right = step.weigh(model, tree, hidden)
        total += sums
        seen.append((tree, right))
        if watch is not None:
            watch(tree, hidden)
    if tally is not None:
        tally.see(*seen)
    return total


def measure_rows(
    model: Any,
    rows: Sequence[Row],
    micro_tokens: int,
    *,
    part: slice = slice(None),
    progress: Callable[[int, int], None] | None = None,
    tally: Tally | None = None,
    watch: Watch | None = None,
    trunks: bool = True,
) -> Sums:
    """Sums over many rows, in forests of at most `micro_tokens`; `part` takes a share of them (ranks).

    The sequences of the forests that `watch` sees are indices of `rows`; without `trunks` all of a row is in one.
    """
    planned = planner.works(rows, micro_tokens, part=part, trunks=trunks and step.branches(model))
    total = Sums()
    with step.resting(model):
        for work in _told(planned, progress):
            total += measure(model, work, tally, watch)
    return total


def row_log_probs(
    model: Any,
    rows: Sequence[Row],
    micro_tokens: int,
    *,
    part: slice = slice(None),
    each: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """Log-probability, nats, of everything that each row learns, [rows]: sums over its targets, whatever they weigh.

    Rows outside `part` of the micro-batches keep 0; `each` following ones are in the same.
    """
    base = step.inner(model)
    head, vocabulary = losses.Head(base), step.vocabulary_of(base)
    planned = planner.works(rows, micro_tokens, part=part, trunks=step.branches(model), each=each)
    found = np.zeros(len(rows))
    with step.resting(model):
        for work in _told(planned, progress):
            for tree, hidden in states(model, work):
                targets = torch.from_numpy(tree.targets).to(hidden.device)
                nll, _ = losses.score(hidden, head, targets, vocabulary)
                np.subtract.at(found, tree.sequences, nll.double().cpu().numpy())
    return found


def _told(planned: Sequence[tuple[int, Work]], progress: Callable[[int, int], None] | None) -> Iterator[Work]:
    """The works one after another; `progress` hears (done, total) after each."""
    for done, (_, work) in enumerate(planned, 1):
        yield work
        if progress:
            progress(done, len(planned))
