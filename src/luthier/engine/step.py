"""One forest through one model: hidden states, loss with gradient, or sums of a measurement.

Training, validation, evaluation and the self-check all go through here. Does not know: optimizers, files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from luthier.engine import attention, forest, layers, loss
from luthier.engine.forest import Forest, Row

Watch = Callable[[Forest, Tensor], None]


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over supervised tokens; any two can be added, so no batch size can change a mean."""

    nll: float = 0.0
    hits: float = 0.0
    weight: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.nll + other.nll, self.hits + other.hits, self.weight + other.weight)

    @property
    def loss(self) -> float | None:
        return self.nll / self.weight if self.weight else None

    @property
    def token_accuracy(self) -> float | None:
        return self.hits / self.weight if self.weight else None


@dataclass(slots=True)
class Tally:
    """Counts answers: their tokens and the right ones, their rows and those with every token right.

    A token of an answer has the weight 1; prompt tokens that are learnt a little (prompt_loss_weight) do not count.
    """

    tokens: float = 0.0
    right: float = 0.0
    rows: float = 0.0
    whole: float = 0.0

    def see(self, tree: Forest, right: Tensor) -> None:
        """Add one forest; `right` (bool [N]) says of each of its targets whether the most likely token was it."""
        answer, hit = tree.weights >= 1, right.cpu().numpy()
        rows = np.unique(tree.sequences[answer])
        self.tokens += int(answer.sum())
        self.right += int((answer & hit).sum())
        self.rows += len(rows)
        self.whole += len(rows) - len(np.unique(tree.sequences[answer & ~hit]))

    @property
    def token_accuracy(self) -> float | None:
        return self.right / self.tokens if self.tokens else None

    @property
    def sequence_accuracy(self) -> float | None:
        return self.whole / self.rows if self.rows else None


def inner(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, tree: Forest) -> Tensor:
    """Last hidden states at the forest's target sources, [N, H]."""
    device = next(model.parameters()).device
    base = inner(model)
    plan = attention.Plan(tree, device)
    ids, sources = (torch.from_numpy(array).to(device) for array in (tree.token_ids, tree.sources))
    fused = layers.of(base)
    with attention.active(plan):
        if fused is not None:
            return fused(ids, plan.positions, sources, attention.forest_attention)
        output = base.get_decoder()(input_ids=ids[None], position_ids=plan.positions[None], use_cache=False)
    attention.require_used(plan, base)
    states: Tensor = output.last_hidden_state[0]
    return states.index_select(0, sources)


def forward_backward(
    model: Any, tree: Forest, normaliser: float, smoothing: float = 0.0, tally: Tally | None = None
) -> float:
    """Add this forest's gradients to the parameters; returns its share of the step's mean loss (nats per token)."""
    if not len(tree.sources):
        return 0.0
    hidden = hidden_states(model, tree)
    targets, weights = _targets(tree, hidden.device)
    base = inner(model)
    value, right = loss.backward(hidden, loss.head_of(base), targets, weights, normaliser, _vocabulary(base), smoothing)
    if tally is not None:
        tally.see(tree, right)
    return value


@torch.no_grad()
def measure(model: Any, tree: Forest, tally: Tally | None = None, watch: Watch | None = None) -> Sums:
    """Sums of one forest. `tally` counts its answers; `watch` may look at its hidden states [N, H]."""
    if not len(tree.sources):
        return Sums()
    hidden = hidden_states(model, tree)
    targets, weights = _targets(tree, hidden.device)
    base = inner(model)
    *sums, right = loss.measure(hidden, loss.head_of(base), targets, weights, _vocabulary(base))
    if tally is not None:
        tally.see(tree, right)
    if watch is not None:
        watch(tree, hidden)
    return Sums(*sums)


def measure_rows(
    model: Any,
    rows: Sequence[Row],
    micro_tokens: int,
    *,
    part: slice = slice(None),
    progress: Callable[[int, int], None] | None = None,
    tally: Tally | None = None,
    watch: Watch | None = None,
) -> Sums:
    """Sums over many rows, in forests of at most `micro_tokens`; `part` takes a share of them (ranks).

    The sequences of the forests that `watch` sees are indices of `rows`.
    """
    was_training = model.training
    model.eval()
    total = Sums()
    batches = forest.plan(rows, micro_tokens)[part]
    try:
        for done, batch in enumerate(batches, 1):
            total += measure(model, forest.build([rows[index] for index in batch], batch), tally, watch)
            if progress:
                progress(done, len(batches))
    finally:
        model.train(was_training)
    return total


def row_log_probs(
    model: Any, rows: Sequence[Row], micro_tokens: int, *, part: slice = slice(None)
) -> npt.NDArray[np.float64]:
    """Log-probability, nats, of everything that each row learns, [rows]: sums over its targets, whatever they weigh.

    Rows outside `part` of the micro-batches keep 0.
    """
    base = inner(model)
    head, vocabulary = loss.head_of(base), _vocabulary(base)
    found = np.zeros(len(rows))

    def add(tree: Forest, hidden: Tensor) -> None:
        targets = torch.from_numpy(tree.targets).to(hidden.device)
        for cut in loss.slices(len(targets), vocabulary):
            picked = head(hidden[cut]).log_softmax(-1).gather(1, targets[cut, None]).squeeze(1)
            np.add.at(found, tree.sequences[cut], picked.double().cpu().numpy())

    measure_rows(model, rows, micro_tokens, part=part, watch=add)
    return found


@contextlib.contextmanager
def forests(model: Any) -> Iterator[None]:
    """While inside, `model` attends within forests; then as before."""
    base = inner(model)
    before = base.config._attn_implementation
    if before != attention.NAME:
        attention.install(base)
    try:
        yield
    finally:
        if before != attention.NAME:
            base.set_attn_implementation(before)


def plain_log_probs(model: Any, ids: Sequence[int]) -> Tensor:
    """Log-probabilities [T-1] of ids[1:] by the model's own forward, nothing of ours in the way: the self-check's twin.

    The attention implementation must be one of transformers' own while this runs.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor([list(ids)], device=device)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    picked: Tensor = logits.log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)
    return picked


def self_check(model: Any, rows: Sequence[Row]) -> float:
    """Largest difference, as a share of the loss (at least 1 nat), between rows in one forest and the same rows through
    the model's own forward. A model whose head or attention does something that ours does not shows up here.

    Every token counts, not only the learnt ones: in bfloat16 both paths are noisy, and a mean over many is not.
    """
    sample = [(ids, np.r_[0.0, np.ones(len(ids) - 1)].astype(np.float32)) for ids, _ in rows]
    base = inner(model)
    was_training = model.training
    model.eval()
    try:
        ours = [measure(model, forest.build([row])) for row in sample]
        together = measure(model, forest.build(sample))
        base.set_attn_implementation("sdpa")
        own = [-float(plain_log_probs(model, ids.tolist()).sum()) for ids, _ in sample]
    finally:
        base.set_attn_implementation(attention.NAME)
        model.train(was_training)
    pairs = [*zip(ours, own, strict=True), (together, sum(own))]
    return max(abs(sums.nll - plain) / max(sums.weight, plain, 1.0) for sums, plain in pairs)


def _targets(tree: Forest, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(tree.targets).to(device), torch.from_numpy(tree.weights).to(device)


def _vocabulary(base: Any) -> int:
    return int(base.config.get_text_config().vocab_size)
