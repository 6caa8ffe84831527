"""Losses as pure functions of logits or log-probabilities and weights, and the head that feeds them.

The normaliser is an argument everywhere: the sum of weights over the whole optimizer step, all micro-batches and all
ranks, so that accumulation equals one big batch. The head runs at target positions only, a slice at a time, and each
slice's gradient is taken at once, so logits never exist for more than one slice. Where logits are a plain product the
gradient is made in their place, softmax less target: one exponential for each, and no memory that the next slice does
not use again; by a kernel of our own where there is one (kernels.py).

Shapes: N targets, V vocabulary, H hidden size. Does not know: forests, optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from luthier.engine import kernels, products

# Logits in one slice: 128 MiB in float32; on a GPU 512. With fewer rows a product reads the vocabulary's matrix too
# often: with 262,144 tokens, 64 rows at a time took a quarter longer than 128 do (docs/experiments.md).
SLICE_ELEMENTS, SLICE_ELEMENTS_GPU = 32 * 1024 * 1024, 128 * 1024 * 1024


def supervised(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Weighted sum of negative log-likelihoods, nats; not divided by anything. logits [N, V] float32 -> scalar.

    With label smoothing e the target distribution is (1 - e) one-hot + e uniform (Szegedy et al., 2016).
    """
    return (_each(logits, targets, smoothing) * weights).sum()


def _each(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    log_probs = logits.log_softmax(dim=-1)
    nll = -log_probs.gather(1, targets[:, None]).squeeze(1)
    return (1 - smoothing) * nll - smoothing * log_probs.mean(dim=-1) if smoothing else nll


class Head:
    """Hidden states [N, H] to float32 logits [N, V], with the scaling or soft cap of the model's own forward.

    `matrix` [V, H]: where logits are no more than a product with it.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.embeddings = model.get_output_embeddings()
        self.cap = getattr(config, "final_logit_softcapping", None)
        divide, times = (getattr(config, name, None) or 1.0 for name in ("logits_scaling", "logit_scale"))
        self.scale = times / divide
        self.multiply = products.of(model)
        plain = type(self.embeddings) is nn.Linear and self.embeddings.bias is None
        self.matrix: Tensor | None = self.embeddings.weight if plain and not self.cap and self.scale == 1.0 else None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.embeddings(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


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
    way = _in_place if _product(head, hidden) else _by_autograd
    losses, right, gradient = way(hidden.detach(), head, targets, weights / normaliser, vocabulary, smoothing)
    if hidden.requires_grad:  # also of no targets: others may have sent gradients to what lies below
        hidden.backward(gradient)
    return float(losses.double().sum()), right


@torch.no_grad()
def score(
    hidden: Tensor, head: Head, targets: Tensor, vocabulary: int, gradient: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Negative log-likelihood of each target, nats, [N]; and on request what that of each sends to its own hidden
    state, [N, H]: weighted losses send it times their weights. None where the head learns too or scales its logits:
    then weights must be known first, for `backward`."""
    if gradient and _product(head, hidden) and not head.matrix.requires_grad:  # type: ignore[union-attr]
        alike = torch.ones(len(targets), device=hidden.device)
        losses, _, sent = _in_place(hidden, head, targets, alike, vocabulary, 0.0)
        return losses, sent
    losses = torch.empty(len(targets), device=hidden.device)
    for part in slices(targets, vocabulary):
        logits, wanted = head(hidden[part]), targets[part]
        if kernels.fits(logits):
            losses[part], _ = kernels.cross_entropy(logits, wanted, torch.ones_like(wanted, dtype=logits.dtype), 0.0)
        else:
            losses[part] = _each(logits, wanted)
    return losses, None


def _product(head: Head, hidden: Tensor) -> bool:
    """Whether logits are a product of these states with the head's matrix, and no more."""
    return head.matrix is not None and head.matrix.dtype == hidden.dtype


Result = tuple[Tensor, Tensor, Tensor]  # each target's loss [N], hit or not [N], the gradient of hidden [N, H]


def _by_autograd(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, vocabulary: int, smoothing: float
) -> Result:
    leaf = hidden.requires_grad_()
    losses = torch.empty(len(targets), device=targets.device)
    right = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    for part in slices(targets, vocabulary):
        logits = head(leaf[part])
        each = _each(logits, targets[part], smoothing) * weights[part]
        each.sum().backward()
        losses[part] = each.detach()
        right[part] = logits.detach().argmax(dim=-1) == targets[part]
    return losses, right, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@torch.no_grad()
def _in_place(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, vocabulary: int, smoothing: float
) -> Result:
    matrix = head.matrix
    assert matrix is not None
    losses = torch.empty(len(targets), device=targets.device)
    right = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
    gradient = torch.zeros_like(hidden)
    parts = list(slices(targets, vocabulary))
    room = hidden.new_empty(max((part.stop - part.start for part in parts), default=0), len(matrix))
    for part in parts:
        product = head.multiply(hidden[part], matrix.t(), out=room[: part.stop - part.start])
        logits = product if product.is_cuda and kernels.fits(product) else product.float()
        if kernels.fits(logits):
            losses[part], right[part] = kernels.cross_entropy(logits, targets[part], weights[part], smoothing)
        else:
            losses[part] = _into_gradient(logits, targets[part, None], weights[part, None], smoothing, right[part])
        if logits is not product:
            product.copy_(logits)
        head.multiply(product, matrix, out=gradient[part])
        if matrix.requires_grad:
            if matrix.grad is None:
                matrix.grad = torch.zeros_like(matrix)
            head.multiply(product.t(), hidden[part], matrix.grad, matrix.grad)
    return losses, right, gradient


def _into_gradient(logits: Tensor, wanted: Tensor, weight: Tensor, smoothing: float, right: Tensor) -> Tensor:
    """Logits [N, V] into the gradient of their weighted losses [N], which are returned; wanted and weight [N, 1].
    `right` [N]: whether the target was the most likely."""
    aim = logits.gather(1, wanted)
    if smoothing:
        aim = (1 - smoothing) * aim + smoothing * logits.mean(dim=-1, keepdim=True)
    top, likeliest = logits.max(dim=-1, keepdim=True)
    torch.eq(likeliest, wanted, out=right[:, None])
    total = logits.sub_(top).exp_().sum(dim=-1, keepdim=True)
    losses = ((total.log() + top - aim) * weight).squeeze(1)
    logits.mul_(weight / total)
    if smoothing:
        logits.sub_(weight * (smoothing / logits.shape[1]))
    logits.scatter_add_(1, wanted, weight * (smoothing - 1))
    return losses


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
