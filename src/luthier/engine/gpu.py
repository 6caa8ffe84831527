"""Kernels of our own for GPUs, written in Triton, which comes with torch's CUDA build (Tillet et al., 2019).

What kernels.py asks of the C++ on processors, with the same arguments: each goes over memory once, in float32, and
rounds once. A program has some whole rows, or a piece of one, to itself and no two write to one place, so results are
the same every time. What does not change from call to call (sizes of a row, distances between rows) is known to the
compiler; the number of rows is not, or each micro-batch would be compiled for anew.

Does not know: whether there is a GPU (kernels.py), autograd, forests, models.
"""

from __future__ import annotations

import subprocess

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

AT_ONCE = 2048  # numbers of a program, or one row if that is longer
SLICE = 16_384  # of a row of logits, which a program walks along
SHARES = 512  # programs that each keep a sum over rows

# What comes of it where Triton finds no C compiler, no driver that it knows, or no way to compile something.
FAULTS = (triton.TritonError, RuntimeError, OSError, subprocess.SubprocessError)


def norm(rows: Tensor, weight: Tensor, epsilon: float, inverse: Tensor, known: bool, out: Tensor) -> None:
    count, block, each, warps = _shares(rows)
    if count:
        _norm[(triton.cdiv(count, each),)](
            rows, weight, inverse, out, epsilon, count, *_rows(rows), *_rows(out)[1:], rows.shape[-1], known,
            each, block, num_warps=warps,
        )  # fmt: skip


def norm_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor, out: Tensor, plus: Tensor | None, own: Tensor | None
) -> None:
    count, block, each, warps = _shares(rows)
    if not count:
        return
    programs = triton.cdiv(count, each)
    if own is not None:
        programs = min(programs, SHARES)
    sums = weight if own is None else torch.empty(programs, rows.shape[-1], device=rows.device)
    more = grad if plus is None else plus
    _norm_backward[(programs,)](
        grad, rows, weight, inverse, out, more, sums, count, programs, *_rows(grad), *_rows(rows)[1:], *_rows(out)[1:],
        *_rows(more)[1:], rows.shape[-1], plus is not None, own is not None, each, block, num_warps=warps,
    )  # fmt: skip
    if own is not None:
        own += sums.sum(0)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    half = heads.shape[-1] // 2
    count, block = len(heads) * heads.shape[1], triton.next_power_of_2(half)
    each = max(1, AT_ONCE // 2 // block)
    if count:
        _rotate[(triton.cdiv(count, each),)](
            heads, cos, sin, out, count, *_rows(heads), *_rows(out)[1:], half, each, block
        )


def gated(gelu: bool, gate: Tensor, up: Tensor, out: Tensor) -> None:
    pieces, block = _pieces(gate)
    if gate.numel():
        _gated[(len(gate) * pieces,)](
            gate, up, out, gate.stride(0), up.stride(0), out.stride(0), gate.shape[1], gelu, pieces, block
        )


def gated_backward(gelu: bool, grad: Tensor, gate: Tensor, up: Tensor, again: Tensor | None) -> None:
    pieces, block = _pieces(gate)
    made = grad if again is None else again
    if gate.numel():
        _gated_backward[(len(gate) * pieces,)](
            grad, gate, up, made, grad.stride(0), gate.stride(0), up.stride(0), made.stride(0), gate.shape[1], gelu,
            again is not None, pieces, block,
        )  # fmt: skip


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Of 16-bit logits too, whose gradient is rounded once."""
    losses = torch.empty(len(logits), device=logits.device)
    right = torch.empty(len(logits), dtype=torch.uint8, device=logits.device)
    block = min(SLICE, triton.next_power_of_2(logits.shape[1]))
    if len(logits):
        _cross_entropy[(len(logits),)](
            logits, targets, weights, losses, right, smoothing, logits.stride(0), logits.shape[1], block, num_warps=16
        )
    return losses, right.view(torch.bool)


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    """Of [T, D] or [T, N, D]: how many neighbours, from one group of them to the next, from one to the next."""
    return (1, tensor.stride(0), 0) if tensor.dim() == 2 else (tensor.shape[1], tensor.stride(0), tensor.stride(1))


def _shares(rows: Tensor) -> tuple[int, int, int, int]:
    """(rows, numbers of a row as a power of two, rows of a program, its warps)."""
    width = rows.shape[-1]
    block = triton.next_power_of_2(width)
    return rows.numel() // width, block, max(1, AT_ONCE // block), min(16, max(4, block // 512))


def _pieces(rows: Tensor) -> tuple[int, int]:
    """In how many pieces rows are cut, and of how many numbers."""
    block = min(AT_ONCE, triton.next_power_of_2(max(1, rows.shape[1])))
    return triton.cdiv(rows.shape[1], block), block


# What Triton compiles: arguments are pointers, numbers, and what the compiler knows.


@triton.jit
def _places(at, neighbours: constexpr, outer: constexpr, inner: constexpr):
    """Where rows begin."""
    return (at // neighbours) * outer + (at % neighbours) * inner


@triton.jit(do_not_specialize=["count", "programs"])
def _norm(
    rows, weight, inverse, out, epsilon, count, neighbours: constexpr, outer: constexpr, inner: constexpr,
    out_outer: constexpr, out_inner: constexpr, width: constexpr, known: constexpr, each: constexpr, block: constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * each + tl.arange(0, each)
    column = tl.arange(0, block)
    there, real = at < count, column < width
    mask = there[:, None] & real[None, :]
    x = tl.load(rows + _places(at, neighbours, outer, inner)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    if known:
        scale = tl.load(inverse + at, mask=there, other=0.0)
    else:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + epsilon)
        tl.store(inverse + at, scale, mask=there)
    made = x * scale[:, None] * tl.load(weight + column, mask=real, other=0.0)[None, :]
    place = out + _places(at, neighbours, out_outer, out_inner)[:, None] + column
    tl.store(place, made.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "programs"])
def _norm_backward(
    grad, rows, weight, inverse, out, plus, sums, count, programs, neighbours: constexpr, grad_outer: constexpr,
    grad_inner: constexpr, outer: constexpr, inner: constexpr, out_outer: constexpr, out_inner: constexpr,
    plus_outer: constexpr, plus_inner: constexpr, width: constexpr, added: constexpr, learns: constexpr,
    each: constexpr, block: constexpr,
):  # fmt: skip
    column = tl.arange(0, block)
    real = column < width
    times = tl.load(weight + column, mask=real, other=0.0)
    total = tl.zeros([block], tl.float32)
    for start in range(tl.program_id(0) * each, count, programs * each):
        at = (start + tl.arange(0, each)).to(tl.int64)
        there = at < count
        mask = there[:, None] & real[None, :]
        place = _places(at, neighbours, grad_outer, grad_inner)[:, None] + column
        into = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        place = _places(at, neighbours, outer, inner)[:, None] + column
        x = tl.load(rows + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(inverse + at, mask=there, other=0.0)[:, None]
        if learns:
            total += tl.sum(into * x * scale, axis=0)
        into = into * times[None, :]
        share = tl.sum(into * x, axis=1)[:, None] * (scale * scale * scale) / -width
        made = x * share + into * scale
        if added:
            place = _places(at, neighbours, plus_outer, plus_inner)[:, None] + column
            made += tl.load(plus + place, mask=mask, other=0.0).to(tl.float32)
        place = _places(at, neighbours, out_outer, out_inner)[:, None] + column
        tl.store(out + place, made.to(out.dtype.element_ty), mask=mask)
    if learns:
        tl.store(sums + tl.program_id(0) * width + column, total, mask=real)


@triton.jit(do_not_specialize=["count", "programs"])
def _rotate(
    heads, cos, sin, out, count, neighbours: constexpr, outer: constexpr, inner: constexpr, out_outer: constexpr,
    out_inner: constexpr, half: constexpr, each: constexpr, block: constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * each + tl.arange(0, each)
    column = tl.arange(0, block)
    mask = (at < count)[:, None] & (column < half)[None, :]
    left = _places(at, neighbours, outer, inner)[:, None] + column
    angle = (at // neighbours)[:, None] * half + column
    c, s = tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)
    x = tl.load(heads + left, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(heads + left + half, mask=mask, other=0.0).to(tl.float32)
    place = out + _places(at, neighbours, out_outer, out_inner)[:, None] + column
    tl.store(place, (x * c - y * s).to(out.dtype.element_ty), mask=mask)
    tl.store(place + half, (y * c + x * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _slope(x, gelu: constexpr):
    """(sigmoid of z, dz/dx): both gates are x times a sigmoid, as 1 + tanh(z / 2) is 2 sigmoid(z)."""
    if gelu:
        z, slope = 1.5957691216057308 * (x + 0.044715 * x * x * x), 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        z, slope = x, 1.0
    return tl.sigmoid(z), slope


@triton.jit
def _gated(
    gate, up, out, gate_outer: constexpr, up_outer: constexpr, out_outer: constexpr, width: constexpr, gelu: constexpr,
    pieces: constexpr, block: constexpr,
):  # fmt: skip
    at = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * block + tl.arange(0, block)
    mask = column < width
    x = tl.load(gate + at * gate_outer + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(up + at * up_outer + column, mask=mask, other=0.0).to(tl.float32)
    share, _ = _slope(x, gelu)
    tl.store(out + at * out_outer + column, (x * share * y).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward(
    grad, gate, up, again, grad_outer: constexpr, gate_outer: constexpr, up_outer: constexpr, again_outer: constexpr,
    width: constexpr, gelu: constexpr, wanted: constexpr, pieces: constexpr, block: constexpr,
):  # fmt: skip
    at = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * block + tl.arange(0, block)
    mask = column < width
    into = tl.load(grad + at * grad_outer + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(gate + at * gate_outer + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(up + at * up_outer + column, mask=mask, other=0.0).to(tl.float32)
    share, slope = _slope(x, gelu)
    acted = x * share
    if wanted:
        tl.store(again + at * again_outer + column, (acted * y).to(again.dtype.element_ty), mask=mask)
    turned = share + acted * (1 - share) * slope
    tl.store(up + at * up_outer + column, (into * acted).to(up.dtype.element_ty), mask=mask)
    tl.store(gate + at * gate_outer + column, (into * y * turned).to(gate.dtype.element_ty), mask=mask)


@triton.jit
def _cross_entropy(
    logits, targets, weights, losses, right, smoothing, outer: constexpr, width: constexpr, block: constexpr
):
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * outer
    wanted, weight = tl.load(targets + at), tl.load(weights + at)
    aim = tl.load(row + wanted).to(tl.float32)
    column = tl.arange(0, block)
    top, total, added = -float("inf"), 0.0, 0.0
    for start in range(0, width, block):
        mask = start + column < width
        x = tl.load(row + start + column, mask=mask, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        added += tl.sum(tl.where(mask, x, 0.0), axis=0)
        top = higher
    earlier = tl.zeros([block], tl.int32)  # as likely as the target, and in front of it
    for start in range(0, width, block):
        mask = start + column < width
        x = tl.load(row + start + column, mask=mask, other=-float("inf")).to(tl.float32)
        earlier += ((x == top) & (start + column < wanted)).to(tl.int32)
        made = tl.exp(x - top) * (weight / total) - weight * smoothing / width
        made += tl.where(start + column == wanted, weight * (smoothing - 1), 0.0)
        tl.store(row + start + column, made.to(logits.dtype.element_ty), mask=mask)
    aimed = (1 - smoothing) * aim + smoothing * (added / width)
    tl.store(losses + at, (tl.log(total) + top - aimed) * weight)
    tl.store(right + at, ((aim == top) & (tl.sum(earlier, axis=0) == 0)).to(tl.uint8))
