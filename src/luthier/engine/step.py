"""One forest through one model: hidden states, loss with gradient, or sums of a measurement.

Training, validation, evaluation and the self-check all go through here. Does not know: optimizers, files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.engine import attention, forest, layers, loss, products
from luthier.engine.attention import Trunk
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

    def see(self, *seen: tuple[Forest, Tensor]) -> None:
        """Add forests that hold all answers of their rows; with each, whether the most likely token was its target
        (bool [N])."""
        if not seen:
            return
        answer = np.concatenate([tree.weights >= 1 for tree, _ in seen])
        hit = np.concatenate([right.cpu().numpy() for _, right in seen])
        sequences = np.concatenate([tree.sequences for tree, _ in seen])
        rows = np.unique(sequences[answer])
        self.tokens += int(answer.sum())
        self.right += int((answer & hit).sum())
        self.rows += len(rows)
        self.whole += len(rows) - len(np.unique(sequences[answer & ~hit]))

    @property
    def token_accuracy(self) -> float | None:
        return self.right / self.tokens if self.tokens else None

    @property
    def sequence_accuracy(self) -> float | None:
        return self.whole / self.rows if self.rows else None


def inner(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def branches(model: Any) -> bool:
    """Whether forests of `model` can continue a trunk."""
    weight, config = next(model.parameters()), inner(model).config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return attention.merges(weight.device, weight.dtype, size)


def hidden_states(model: Any, tree: Forest, trunk: Trunk | None = None, becomes: Trunk | None = None) -> Tensor:
    """Last hidden states at the forest's target sources, [N, H]. Its rows continue `trunk`, if given; `becomes` is what
    the forest, as a trunk, leaves for those that follow."""
    device = next(model.parameters()).device
    base = inner(model)
    plan = attention.Plan(tree, device, trunk, becomes, products.chosen(base))
    ids, sources = (torch.from_numpy(array).to(device) for array in (tree.token_ids, tree.sources))
    fused = layers.of(base)
    with attention.active(plan):
        if fused is not None:
            return fused(ids, plan.positions, sources, attention.forest_attention)
        output = base.get_decoder()(input_ids=ids[None], position_ids=plan.positions[None], use_cache=False)
    attention.require_used(plan, base)
    states: Tensor = output.last_hidden_state[0]
    return states.index_select(0, sources)


def learn(model: Any, tree: Forest, hidden: Tensor, normaliser: float, smoothing: float = 0.0) -> tuple[float, Tensor]:
    """Add this forest's gradients to the parameters, from its hidden states [N, H] on. Returns its share of the step's
    mean loss (nats per token), and whether each target was the most likely token."""
    targets, weights = _targets(tree, hidden.device)
    base = inner(model)
    return loss.backward(hidden, loss.Head(base), targets, weights, normaliser, vocabulary_of(base), smoothing)


@torch.no_grad()
def measure(model: Any, tree: Forest) -> Sums:
    """Sums of one forest."""
    return weigh(model, tree, hidden_states(model, tree))[0] if len(tree.sources) else Sums()


@torch.no_grad()
def weigh(model: Any, tree: Forest, hidden: Tensor) -> tuple[Sums, Tensor]:
    """Sums of one forest from its hidden states [N, H], and whether each target was the most likely token."""
    targets, weights = _targets(tree, hidden.device)
    base = inner(model)
    *sums, right = loss.measure(hidden, loss.Head(base), targets, weights, vocabulary_of(base))
    return Sums(*sums), right


@contextlib.contextmanager
def resting(model: Any) -> Iterator[None]:
    """Without dropout while inside."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


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


def vocabulary_of(base: Any) -> int:
    return int(base.config.get_text_config().vocab_size)
