"""Losses as pure functions of logits or log-probabilities and weights, and the head that feeds them.

The normaliser is an argument everywhere: the sum of weights over the whole optimizer step, all micro-batches and all
ranks, so that accumulation equals one big batch. The head runs at target positions only, a slice at a time, and each
slice's gradient is taken at once, so logits never exist for more than one slice.

Shapes: N targets, V vocabulary, H hidden size. Does not know: forests, optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Logits in one slice: 64 MiB in float32; on a GPU 512, or its products would have a hundred rows of a large vocabulary.
SLICE_ELEMENTS, SLICE_ELEMENTS_GPU = 16 * 1024 * 1024, 128 * 1024 * 1024

Head = Callable[[Tensor], Tensor]


def supervised(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Weighted sum of negative log-likelihoods, nats; not divided by anything. logits [N, V] float32 -> scalar.

    With label smoothing e the target distribution is (1 - e) one-hot + e uniform (Szegedy et al., 2016).
    """
    log_probs = logits.log_softmax(dim=-1)
    nll = -log_probs.gather(1, targets[:, None]).squeeze(1)
    if smoothing:
        nll = (1 - smoothing) * nll - smoothing * log_probs.mean(dim=-1)
    return (nll * weights).sum()


def head_of(model: torch.nn.Module) -> Head:
    """Hidden states [N, H] to float32 logits [N, V], with the scaling or soft cap of the model's own forward."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    embeddings = model.get_output_embeddings()  # type: ignore[operator]
    cap = getattr(config, "final_logit_softcapping", None)
    divide = getattr(config, "logits_scaling", None) or 1.0
    times = getattr(config, "logit_scale", None) or 1.0

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = embeddings(hidden).float()
        if divide != 1.0 or times != 1.0:
            logits = logits * (times / divide)
        return torch.tanh(logits / cap) * cap if cap else logits

    return head


def slices(targets: Tensor, vocabulary: int) -> Iterator[slice]:
    """Of what is predicted, [N, ...], as many at a time as logits may exist."""
    count, elements = len(targets), SLICE_ELEMENTS_GPU if targets.is_cuda else SLICE_ELEMENTS
    size = max(1, elements // vocabulary)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def backward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    weights: Tensor,
    normaliser: float,
    vocabulary: int,
    smoothing: float = 0.0,
) -> tuple[float, Tensor]:
    """Loss of hidden states [N, H] at their targets, and its gradient through everything below.

    Returns its value and, for each target, whether the most likely token was right (bool [N]).
    """
    leaf = hidden.detach().requires_grad_()
    losses: list[Tensor] = []  # read at the end: a GPU would be waited for
    right = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    for part in slices(targets, vocabulary):
        logits = head(leaf[part])
        loss = supervised(logits, targets[part], weights[part], smoothing) / normaliser
        loss.backward()
        losses.append(loss.detach())
        right[part] = logits.detach().argmax(dim=-1) == targets[part]
    if hidden.requires_grad:  # also of no targets: others may have sent gradients to what lies below
        hidden.backward(torch.zeros_like(hidden) if leaf.grad is None else leaf.grad)
    return sum(map(float, losses)), right


@torch.no_grad()
def measure(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, vocabulary: int
) -> tuple[float, float, float, Tensor]:
    """(weighted nll, weighted hits, weight, hit or not [N]) of hidden states [N, H]: sums, so that any batching gives
    the same mean."""
    nll = hits = 0.0
    right = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    for part in slices(targets, vocabulary):
        logits = head(hidden[part])
        nll += float(supervised(logits, targets[part], weights[part]).double())
        right[part] = logits.argmax(dim=-1) == targets[part]
        hits += float((right[part] * weights[part]).sum())
    return nll, hits, float(weights.sum()), right
