"""Attention within a forest as matrix products over tiles, forward and backward, without autograd.

A tile is a stretch of queries against a stretch of keys that they (almost all) see. Its scores are one product; the
exponential, the weighted values and all gradients follow from it, so nothing larger than a tile ever exists. Three
things are meant to make this exact in bfloat16, whose products torch rounds on their way out. They do not suffice yet
for rows of a thousand tokens of a real model, so attention.py hands float32 in, in which it is exact:

- Scores leave their product with the row's log-sum-exp already taken off. It rides along as two more columns of the
  queries (its bfloat16 value and what that rounding lost) against ones in the keys. What gets rounded is then near
  zero just where the probability is large.
- Whatever adds up over tiles (outputs, sums, gradients) does so in float32.
- All tiles of a query shift its scores by the same amount, so outputs of several tiles are merged by addition. The
  shift is guessed first: the larger of a token's scores with itself and with its root's first token, where many heads
  rest. Rows for which the guess was far off are taken again with the sum that the first pass found.

Queries that share a key head are folded into the rows of one product; short segments of like length are computed
together. Both keep all cores busy with a single key head and with many short rows.

Shapes: T tokens, H query heads, K key heads, G = H / K, D head size. Does not know: models, autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from luthier.engine.schedule import Group, Schedule, Tile

LOG2_E = math.log2(math.e)
FAR = 12.0  # nats between guess and truth; beyond, rounding would cost more than two parts in a hundred

HEATS = (4096.0, 512.0, 64.0, 8.0, 1.0)


class Inputs(NamedTuple):
    """One layer's tensors, tokens first: queries [T, H, D], keys and values [T, K, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    plan: Schedule
    scale: float

    @property
    def groups(self) -> int:
        return self.query.shape[1] // self.key.shape[1]


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(output [T, H, D], log-sum-exp of the scores [T, H] in float32)."""
    output, total, shift = _weighted(inputs, _guess(inputs))
    worst = float(total.max()) if total.numel() else 1.0
    if worst == math.inf:
        # Scores far above the guess. Divided by a large number they overflow no more and give an upper bound of the
        # largest; with a smaller one the bound is better, and never so far above that all weights would vanish.
        for heat in HEATS:
            _, total, shift = _weighted(inputs, shift, heat)
            shift = shift + total.log() * heat
    elif worst > math.exp(FAR):
        shift = shift + total.log()
    if worst > math.exp(FAR):
        output, total, shift = _weighted(inputs, shift)
    return (output / total[..., None]).to(inputs.query.dtype), shift + total.log()


def _guess(inputs: Inputs) -> Tensor:
    """The larger of each token's scores with itself and with the first token on its path, [T, H]."""
    query = inputs.query.unflatten(1, (-1, inputs.groups))
    best = (query * inputs.key[:, :, None]).sum(-1)
    if inputs.plan.roots is not None:
        best = torch.maximum(best, (query * inputs.key.index_select(0, inputs.plan.roots)[:, :, None]).sum(-1))
    guess: Tensor = best.flatten(1).float() * inputs.scale
    return guess


def _pieces(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers as a sum of two in `dtype`."""
    large = numbers.to(dtype)
    return large, (numbers - large.float()).to(dtype)


def _weighted(inputs: Inputs, shift: Tensor, heat: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of w * value [T, H, D], sum of w [T, H], shift), float32, where w = exp((score - shift) / heat); the shift
    [T, H] comes back as it could be subtracted."""
    query, key, value, plan, scale = inputs
    heads, size = query.shape[1:]
    pieces = _pieces(shift / scale, query.dtype)
    shift, scale = (pieces[0].float() + pieces[1].float()) * scale, scale / heat
    queries = _widened(query, *(-piece for piece in pieces))
    keys = _widened(key, 1, 1)
    several = bool(plan.ancestors)
    outputs = torch.empty(plan.rows, heads, size, dtype=torch.float32 if several else query.dtype)
    totals = torch.empty(plan.rows, heads)
    scratch = torch.empty(_largest(inputs), dtype=query.dtype)
    done = 0
    for group in plan.groups:
        rows = slice(done, done + group.count * group.length)
        done = rows.stop
        own_queries, own_keys, own_values = (_of(tensor, group) for tensor in (queries, keys, value))
        own_keys, own_values = (_by_head(part, 1).flatten(0, 1) for part in (own_keys, own_values))
        into, sums = (part[rows].unflatten(0, (group.count, -1)) for part in (outputs, totals))
        for tile in group.tiles:
            part = _by_head(own_queries[:, tile.start : tile.end], inputs.groups).flatten(0, 1)
            seen = slice(tile.key_start, tile.key_end)
            weights = _exponentials(part, own_keys[:, seen], tile, scale, scratch)
            shape = (group.count, -1, inputs.groups, tile.end - tile.start)
            into[:, tile.start : tile.end] = _by_token((weights @ own_values[:, seen]).view(*shape, size))
            sums[:, tile.start : tile.end] = _by_token(weights.sum(-1, dtype=torch.float32).view(*shape, 1))[..., 0]
    if plan.order is not None:
        outputs, totals = outputs.index_select(0, plan.order), totals.index_select(0, plan.order)
    if several:
        all_keys, all_values = (_by_head(tensor[None], 1)[0] for tensor in (keys, value))
        for tile in plan.ancestors:
            rows, seen = slice(tile.start, tile.end), slice(tile.key_start, tile.key_end)
            part = _by_head(queries[None, rows], inputs.groups)[0]
            weights = _exponentials(part, all_keys[:, seen], tile, scale, scratch)
            shape = (1, -1, inputs.groups, tile.end - tile.start)
            outputs[rows] += _by_token((weights @ all_values[:, seen]).view(*shape, size))[0]
            totals[rows] += _by_token(weights.sum(-1, dtype=torch.float32).view(*shape, 1))[0, ..., 0]
    return outputs, totals, shift


def backward(inputs: Inputs, output: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [T, H, D], key and value [T, K, D] from that of the output [T, H, D]."""
    query, key, value, plan, scale = inputs
    heads, size = query.shape[1:]
    delta = (grad.float() * output.float()).sum(-1)
    queries = _widened(query, *(-piece for piece in _pieces(lse / scale, query.dtype)))
    grads = _widened(grad, *(-piece for piece in _pieces(delta, query.dtype)))
    keys, values = _widened(key, 1, 1), _widened(value, 1, 1)
    sums = [torch.empty(plan.rows, count, size, dtype=torch.float32) for count in (heads, key.shape[1], key.shape[1])]
    scratch = torch.empty(2, _largest(inputs), dtype=query.dtype)
    done = 0
    for group in plan.groups:
        rows = slice(done, done + group.count * group.length)
        done = rows.stop
        own_queries, own_grads, own_keys, own_values = (_of(part, group) for part in (queries, grads, keys, values))
        if group.real is not None:
            own_grads = own_grads * group.real.unflatten(0, (group.count, -1))
        own_keys, own_values = (_by_head(part, 1).flatten(0, 1) for part in (own_keys, own_values))
        of_keys = torch.zeros(2, *own_keys.shape[:2], size)
        for tile in group.tiles:
            at, seen = slice(tile.start, tile.end), slice(tile.key_start, tile.key_end)
            asking, sent = (_by_head(part[:, at], inputs.groups).flatten(0, 1) for part in (own_queries, own_grads))
            products = _gradients(asking, sent, own_keys[:, seen], own_values[:, seen], tile, scale, scratch)
            shape = (group.count, -1, inputs.groups, tile.end - tile.start, size)
            sums[0][rows].unflatten(0, (group.count, -1))[:, at] = _by_token(products[0].view(shape))
            of_keys[0, :, seen] += products[1]
            of_keys[1, :, seen] += products[2]
        for total, part in zip(sums[1:], of_keys, strict=True):
            total[rows].unflatten(0, (group.count, -1)).copy_(part.unflatten(0, (group.count, -1)).transpose(1, 2))
    if plan.order is not None:
        sums = [part.index_select(0, plan.order) for part in sums]
    if plan.ancestors:
        all_keys, all_values = (_by_head(tensor[None], 1)[0] for tensor in (keys, values))
        for tile in plan.ancestors:
            at, seen = slice(tile.start, tile.end), slice(tile.key_start, tile.key_end)
            asking, sent = (_by_head(part[None, at], inputs.groups)[0] for part in (queries, grads))
            products = _gradients(asking, sent, all_keys[:, seen], all_values[:, seen], tile, scale, scratch)
            sums[0][at] += _by_token(products[0].view(1, -1, inputs.groups, tile.end - tile.start, size))[0]
            sums[1][seen] += products[1].transpose(0, 1)
            sums[2][seen] += products[2].transpose(0, 1)
    return sums[0].to(query.dtype), sums[1].to(query.dtype), sums[2].to(query.dtype)


def _exponentials(queries: Tensor, keys: Tensor, tile: Tile, scale: float, scratch: Tensor) -> Tensor:
    """exp(scale * score) of widened queries [N, rows, D + 2] and keys [N, keys, D + 2], 0 where a key is not seen."""
    shape = (len(queries), queries.shape[1], keys.shape[1])
    scores = scratch[: math.prod(shape)].view(shape)
    torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=0, alpha=scale * LOG2_E, out=scores).exp2_()
    squares = scores.view(-1, tile.end - tile.start, shape[2])
    if tile.causal is not None:
        squares.tril_(tile.causal)
    if tile.window is not None:
        squares.triu_(tile.window)
    return scores


def _gradients(
    queries: Tensor, grads: Tensor, keys: Tensor, values: Tensor, tile: Tile, scale: float, scratch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's share of the gradients of its queries, keys and values, from widened [N, rows or keys, D + 2]."""
    size = queries.shape[2] - 2
    weights = _exponentials(queries, keys, tile, scale, scratch[0])
    slopes = scratch[1, : weights.numel()].view(weights.shape)
    torch.bmm(grads, values.transpose(1, 2), out=slopes)  # less delta, which the extra columns bring
    of_values = weights.transpose(1, 2) @ grads[..., :size]
    slopes.mul_(weights)
    of_queries = _scaled(slopes, keys[..., :size], scale)
    of_keys = _scaled(slopes.transpose(1, 2), queries[..., :size], scale)
    return of_queries, of_keys, of_values


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    into = left.new_empty(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(into, left, right, beta=0, alpha=scale)


def _largest(inputs: Inputs) -> int:
    """Scores of the largest tile."""
    plan, heads = inputs.plan, inputs.query.shape[1]
    own = [(group.count, tile) for group in plan.groups for tile in group.tiles]
    counted = own + [(1, tile) for tile in plan.ancestors]
    return heads * max(
        (n * (tile.end - tile.start) * (tile.key_end - tile.key_start) for n, tile in counted), default=0
    )


def _widened(tensor: Tensor, *columns: Tensor | int) -> Tensor:
    """[T, heads, D] with two more columns at the end."""
    size = tensor.shape[-1]
    wide = tensor.new_empty(*tensor.shape[:-1], size + 2)
    wide[..., :size] = tensor
    for column, numbers in enumerate(columns, size):
        wide[..., column] = numbers
    return wide


def _of(tensor: Tensor, group: Group) -> Tensor:
    """A group's tokens of [T, heads, width]: [count, length, heads, width]."""
    if group.index is None:
        part = tensor[group.start : group.start + group.count * group.length]
    else:
        part = tensor.index_select(0, group.index)
    rows: Tensor = part.unflatten(0, (group.count, group.length))
    return rows


def _by_head(tensor: Tensor, groups: int) -> Tensor:
    """[B, t, H, width] to [B, H / groups, groups * t, width]."""
    folded: Tensor = tensor.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return folded.contiguous()


def _by_token(tensor: Tensor) -> Tensor:
    """[B, K, G, t, width] to [B, t, K * G, width]."""
    return tensor.permute(0, 3, 1, 2, 4).flatten(2, 3)
