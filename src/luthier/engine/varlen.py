"""Attention within a forest on GPUs: a few calls of the variable-length FlashAttention kernel that torch brings.

A call is a list of sequences: stretches of queries, each against a stretch of keys. Where every token sees all of its
path, one causal call lets each segment meet itself, and one call for each depth of the tree lets what descends from a
segment meet that segment's keys; results are merged by log-sum-exp, and the backward pass hands each call the merged
ones, as in attention.py. With a sliding window one causal call does it all: a segment's keys are the end of its path,
as far back as its first token sees, and itself; the kernel counts windows from the ends of both (Dao, 2023,
FlashAttention-2; causal masks aligned to the bottom right since its version 2.1), which is the distance on the path.

Shapes: query [T, H, D], key and value [before + T, H_kv, D], log-sum-exp [H, T] float32. Does not know: layers, models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from luthier.engine.forest import Forest

Range = tuple[int, int]
Places = Tensor | slice  # of tokens: int64 [N], or a slice where they are neighbours

_attend = torch.ops.aten._flash_attention_forward
_attend_backward = torch.ops.aten._flash_attention_backward


class Call(NamedTuple):
    """One call of the kernel. `queries` and `keys` name what is given to it; sequence i of the N is rows
    [query_starts[i], query_starts[i + 1]) of those queries against [key_starts[i], key_starts[i + 1]) of those keys
    (int32 [N + 1]). `window`: tokens that a query sees, itself included."""

    queries: Places
    keys: Places
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int
    causal: bool
    window: int | None = None


def able(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernel runs there, backward too: NVIDIA's GPUs from Ampere on, 16-bit numbers. Of head sizes above
    192 consumer cards have too little shared memory (torch's own check: sdp_utils.cpp)."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.bfloat16, torch.float16):
        return False
    capability = torch.cuda.get_device_capability(device)
    largest = 256 if capability in ((8, 0), (9, 0), (10, 0)) else 192
    return capability >= (8, 0) and head_size % 8 == 0 and head_size <= largest


def calls(forest: Forest, window: int | None, before: int, device: torch.device) -> list[Call]:
    """All calls of a forest; the first is of all its tokens. With a trunk of `before` tokens, which all rows continue,
    keys are counted from its first one."""
    if window is not None and forest.longest_path <= window:
        window = None
    segments = [(segment.start, segment.end) for segment in forest.segments]
    if window is not None:
        pairs = [((start, end), _path(forest, number, window, before)) for number, (start, end) in enumerate(segments)]
        return [_call(pairs, device, causal=True, window=window)]
    made = [_call([(own, [(own[0] + before, own[1] + before)]) for own in segments], device, causal=True)]
    if before:
        made.append(_call([((0, forest.tokens), [(0, before)])], device))
    levels: dict[int, list[tuple[Range, list[Range]]]] = {}
    depths: list[int] = []
    for segment, last in zip(forest.segments, forest.descendants(), strict=True):
        depths.append(depths[segment.parent] + 1 if segment.parent >= 0 else 0)
        if last > segment.end > segment.start:
            keys = [(segment.start + before, segment.end + before)]
            levels.setdefault(depths[-1], []).append(((segment.end, last), keys))
    return made + [_call(levels[depth], device) for depth in sorted(levels)]


def _path(forest: Forest, number: int, window: int, before: int) -> list[Range]:
    """The keys that segment `number` sees: up to window - 1 tokens before its first one, and its own."""
    segment = forest.segments[number]
    found = [(segment.start + before, segment.end + before)]
    left, parent = window - 1, segment.parent
    while left > 0 and parent >= 0:
        above = forest.segments[parent]
        first = max(above.start, above.end - left)
        found.append((first + before, above.end + before))
        left, parent = left - (above.end - first), above.parent
    if left > 0 and before:
        found.append((max(0, before - left), before))
    return found[::-1]


def _call(
    pairs: Iterable[tuple[Range, list[Range]]], device: torch.device, causal: bool = False, window: int | None = None
) -> Call:
    """Of queries and what they see; empty ones are left out."""
    pairs = [pair for pair in pairs if pair[0][1] > pair[0][0]]
    queries = [end - start for (start, end), _ in pairs]
    keys = [sum(end - start for start, end in ranges) for _, ranges in pairs]
    return Call(
        _places([own for own, _ in pairs], device),
        _places([one for _, ranges in pairs for one in ranges], device),
        _starts(queries, device),
        _starts(keys, device),
        max(queries),
        max(keys),
        causal,
        window,
    )


def _places(ranges: Sequence[Range], device: torch.device) -> Places:
    ranges = [(start, end) for start, end in ranges if end > start]
    if all(one[1] == two[0] for one, two in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.from_numpy(np.concatenate([np.arange(start, end) for start, end in ranges])).to(device)


def _starts(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device)


def forward(query: Tensor, key: Tensor, value: Tensor, made: Sequence[Call], scale: float) -> tuple[Tensor, Tensor]:
    """(output [T, H, D], log-sum-exp [H, T]). Inputs may be strided views whose last dimension is contiguous."""
    output, lse = kernel_forward(query, key[made[0].keys], value[made[0].keys], made[0], scale)
    if len(made) == 1:
        return output, lse
    total = output.float()
    for call in made[1:]:
        at = call.queries
        part, part_lse = kernel_forward(query[at], key[call.keys], value[call.keys], call, scale)
        own = lse[:, at]
        merged = torch.logaddexp(own, part_lse)
        kept, new = ((one - merged).exp_().t()[..., None] for one in (own, part_lse))
        total[at] = (total[at] * kept).addcmul_(part, new)
        lse[:, at] = merged
    return total.to(query.dtype), lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    made: Sequence[Call],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output [T, H, D], in the dtype of the inputs."""
    if len(made) == 1 and made[0].queries == slice(0, len(query)) and made[0].keys == slice(0, len(key)):
        return kernel_backward(grad, query, key, value, output, lse, made[0], scale)
    totals = [torch.zeros_like(one, dtype=torch.float32) for one in (query, key, value)]
    for call in made:
        at, seen = call.queries, call.keys
        asked = grad[at], query[at], key[seen], value[seen], output[at], lse[:, at].contiguous()
        for total, place, part in zip(totals, (at, seen, seen), kernel_backward(*asked, call, scale), strict=True):
            if isinstance(place, slice):
                total[place] += part
            else:
                total.index_add_(0, place, part.float())
    first, second, third = (total.to(query.dtype) for total in totals)
    return first, second, third


def kernel_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    """One call: (output, log-sum-exp) of the queries given to it."""
    output, lse, *_ = _attend(query, key, value, *_sequences(call), 0.0, call.causal, False, scale=scale, **_seen(call))
    return output, lse


def kernel_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    call: Call,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what one call was given."""
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which there is none of
    unused = torch.empty(0, device=query.device)
    with _in_one_order():
        first, second, third = _attend_backward(
            grad, query, key, value, output, lse, *_sequences(call), 0.0, call.causal, state, unused, scale=scale,
            **_seen(call),
        )  # fmt: skip
    return first, second, third


@contextmanager
def _in_one_order() -> Iterator[None]:
    """Where results are to be repeatable, if only with warnings for what cannot be, this kernel's are not unless
    everything must."""
    warned = torch.get_deterministic_debug_mode() == 1
    if warned:
        torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        if warned:
            torch.set_deterministic_debug_mode("warn")


def _sequences(call: Call) -> tuple[Tensor, Tensor, int, int]:
    return call.query_starts, call.key_starts, call.most_queries, call.most_keys


def _seen(call: Call) -> dict[str, int]:
    return {} if call.window is None else {"window_size_left": call.window - 1, "window_size_right": 0}
