"""Kernels of our own for processors (the C++ beside it) and GPUs (gpu.py), as functions of tensors.

Where there are none, or where a first trial of them differs from float64, torch's kernels compute everything, and
`absent` says why. What `fits` refuses is torch's to do. Attention on GPUs is torch's too (varlen.py).

Shapes: T tokens, H heads, D a head's size. Does not know: autograd, forests, models.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.engine import native
from luthier.engine.tiles import KEYS, Tiles
from luthier.settings import load_settings

WIDTH = 16  # numbers: what the widest processors compute at once, so every row has to be a multiple of it
TRIAL_HALVES = 2e-3  # most that a product of halves may be off, as a share: of bfloat16 it is 2.3e-3
TRIAL = 2e-5  # most that may lie between our attention and float64's, of numbers about 1


def able(device: str = "cpu") -> bool:
    """Whether there are kernels of our own for the machine's processor, or for its GPU; makes them, if need be."""
    return not absent(device)


@functools.cache
def absent(device: str = "cpu") -> str:
    """Why there are none; empty where there are."""
    if device == "cuda":
        return _absent_on_gpus()
    library, reason = _loaded()
    if library is not None and not (off := _tried()) < TRIAL:
        return f"as compiled here they are off by {off:.1e}"
    return reason


def _absent_on_gpus() -> str:
    if load_settings().kernels == "torch":
        return "LUTHIER_KERNELS is torch"
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        return "they are made for NVIDIA's GPUs from Ampere on"
    try:
        faults = _gpu().FAULTS
    except ImportError as error:
        return f"Triton, which torch for CUDA brings, is not here ({error})"
    try:
        off = _tried_on_gpu()
    except faults as error:
        return f"Triton failed: {' '.join(str(error).split())[:300]}"
    return "" if off < TRIAL else f"as compiled here they are off by {off:.1e}"


@functools.cache
def _gpu() -> Any:
    from luthier.engine import gpu

    return gpu


def whose() -> str:
    """Whose kernels compute here, "own" or "torch"."""
    return "own" if able("cuda" if torch.cuda.is_available() else "cpu") else "torch"


def choose(before: str | None, emit: Callable[..., None]) -> str:
    """Whose kernels a run computes with, which it is told where they are slower, or not those of `before` it was
    broken off."""
    now = whose()
    if now == "torch":
        reason = absent("cuda" if torch.cuda.is_available() else "cpu")
        emit("phase", name="load", message=f"Torch's kernels do all of the work, which is slower: {reason}")
    if before not in (None, now):
        names = {"own": "our", "torch": "torch's"}
        message = f"The run began with {names.get(str(before), before)} kernels and goes on with {names[now]}"
        emit("warning", message=f"{message}: the last bits of its numbers may differ.", hint="")
    return now


@functools.cache
def _loaded() -> tuple[Any, str]:
    try:
        return ctypes.CDLL(str(native.built())), ""
    except (native.Unavailable, OSError) as error:
        return None, str(error)


def _library() -> Any:
    return _loaded()[0]


def fits(*tensors: Tensor) -> bool:
    """Whether our kernels take these: all on one device, float32 or bfloat16, rows in one piece, and on the CPU of
    whole vectors."""
    device = tensors[0].device.type
    fitting = device in ("cpu", "cuda") and all(
        tensor.device.type == device
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and tensor.stride(-1) == 1
        and (device == "cuda" or tensor.shape[-1] % WIDTH == 0)
        for tensor in tensors
    )
    return fitting and able(device)  # in this order: a GPU's work asks for no compiler


@functools.cache
def halves_absent() -> str:
    """Why there are no products of halves here; empty where there are."""
    if not able():
        return absent()
    if not hasattr(_library(), "product_of_halves"):
        return "the processor has no AVX512-FP16, or the compiler is older than it"
    return "" if (off := _tried_halves()) < TRIAL_HALVES else f"as compiled here they are off by {off:.1e}"


def halves_fit(a: Tensor, b: Tensor, plus: Tensor | None) -> bool:
    """Whether `product_of_halves` takes these: on the CPU, float32, each in lines."""
    tensors = [a, b] if plus is None else [a, b, plus]
    fitting = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return (
        fitting
        and 1 in a.stride()
        and 1 in b.stride()
        and (plus is None or plus.stride(-1) == 1)
        and not halves_absent()
    )


def product_of_halves(a: Tensor, b: Tensor, plus: Tensor | None, out: Tensor) -> None:
    """a [M, K] b [K, N], and `plus` ([M, N], or [N] for all rows), into `out` [M, N], whose rows are contiguous."""
    plus_row = plus.stride(0) if plus is not None and plus.dim() == 2 else 0
    sizes = (ctypes.c_int64(size) for size in (a.shape[0], b.shape[1], a.shape[1]))
    _library().product_of_halves(
        *sizes, *map(_matrix, (a, b)), None if plus is None else _at(plus), ctypes.c_int64(plus_row),
        _at(out), ctypes.c_int64(out.stride(0)), torch.get_num_threads(),
    )  # fmt: skip


def attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, scale: float, halved: bool = False
) -> tuple[Tensor, Tensor]:
    """(output [1, H, T, D], which lies in memory tokens first, log-sum-exp of the scores [1, H, T]); float32 inputs
    that `fits` has passed, keys and values with those of the trunk in front. `halved`: of float16 numbers, where they
    can be."""
    plan = _plan(query, key, tiles, scale, halved)
    output = tokens_first(query)
    lse = torch.empty(query.shape[:-1])
    room = _room(plan)
    _library().attention(ctypes.byref(plan), *map(_heads, (query, key, value, output)), _at(lse), _at(room))
    return output, lse


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    tiles: Tiles,
    scale: float,
    halved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output, shaped as they are, in memory tokens first."""
    plan = _plan(query, key, tiles, scale, halved)
    into = tokens_first(query), tokens_first(key), tokens_first(value)
    room = _room(plan)
    sums = torch.empty(plan.threads * 2 * key.numel())
    _library().attention_backward(
        ctypes.byref(plan),
        *map(_heads, (query, key, value, output, grad)),
        _at(lse),
        *map(_heads, into),
        _at(room),
        _at(sums),
    )
    return into


def norm(rows: Tensor, weight: Tensor, epsilon: float, inverse: Tensor, known: bool, out: Tensor) -> None:
    """RMSNorm of rows [T, ..., D] (of two or three dimensions); `inverse` is made, unless it is `known`."""
    if rows.is_cuda:
        _gpu().norm(rows, weight, epsilon, inverse, known, out)
        return
    _library().norm(_shape(rows), _rows(rows), _at(weight), ctypes.c_float(epsilon), _at(inverse), known, _rows(out))


def norm_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor, out: Tensor, plus: Tensor | None, own: Tensor | None
) -> None:
    """The gradient of rows, and `plus`, into `out`; that of the weight is added to `own`."""
    if rows.is_cuda:
        _gpu().norm_backward(grad, rows, weight, inverse, out, plus, own)
        return
    shape = _shape(rows)
    shares = None if own is None else torch.empty(shape.threads, len(own))
    _library().norm_backward(
        shape,
        _rows(grad),
        _rows(rows),
        _at(weight),
        _at(inverse),
        _rows(plus),
        _rows(out),
        None if shares is None else _at(shares),
    )
    if own is not None and shares is not None:
        own += shares.sum(0)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotary embedding of heads [T, N, D]; cos and sin [T, 1, D/2]."""
    if heads.is_cuda:
        _gpu().rotate(heads, cos, sin, out)
        return
    _library().rotate(_shape(heads), _rows(heads), _at(cos), _at(sin), _rows(out))


def gated(gelu: bool, both: Tensor, out: Tensor, kept: Tensor | None = None) -> None:
    """act(gate) * up [T, N] of gate and up beside each other, [T, 2N]: SiLU, or GELU by its tanh. `kept`: for a copy
    of them, bfloat16 or float32 (on the CPU)."""
    if both.is_cuda:
        _gpu().gated(gelu, *_sides(both), out)
        return
    places = *_sides(both), out, *_sides(kept)
    _library().gated(gelu, _shape(out), *map(_rows, places))


def gated_backward(gelu: bool, grad: Tensor, both: Tensor, into: Tensor, again: Tensor | None) -> None:
    """Gradients of gate and up into `into` [T, 2N], which may be `both` itself; act(gate) * up into `again`."""
    if both.is_cuda:
        if into is not both:
            into.copy_(both)
        _gpu().gated_backward(gelu, grad, *_sides(into), again)
        return
    places = grad, *_sides(both), *_sides(into), again
    _library().gated_backward(gelu, _shape(grad), *map(_rows, places))


def _sides(both: Tensor | None) -> tuple[Tensor, ...] | tuple[None, None]:
    """Gate and up [T, N] of [T, 2N]."""
    return (None, None) if both is None else both.chunk(2, dim=1)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Logits [N, V] (float32; on a GPU bfloat16 too) into the gradient of their weighted loss, [N]; (losses [N],
    whether right [N])."""
    if logits.is_cuda:
        return _gpu().cross_entropy(logits, targets, weights, smoothing)  # type: ignore[no-any-return]
    losses, right = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.bool)
    _library().cross_entropy(
        _shape(logits),
        _at(logits),
        _at(targets),
        _at(weights),
        ctypes.c_float(smoothing),
        _at(losses),
        _at(right),
    )
    return losses, right


def tokens_first(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for [1, H, T, D] that lies in memory as [T, H, D]."""
    _, heads, tokens, size = like.shape
    return torch.empty(tokens, heads, size, dtype=dtype).transpose(0, 1)[None]


def _room(plan: _Plan) -> Tensor:
    """Memory for keys and values as products take them."""
    tiles = plan.key_heads * plan.key_tiles
    return torch.empty(2 * (tiles * (KEYS * plan.width + 1) + WIDTH))


def _plan(query: Tensor, key: Tensor, tiles: Tiles, scale: float, halved: bool) -> _Plan:
    return _Plan(
        *(array.ctypes.data for array in (tiles.queries, tiles.keys, tiles.visits)),
        *(len(tiles.queries), len(tiles.keys), query.shape[2], key.shape[2], query.shape[1], key.shape[1]),
        *(query.shape[3], tiles.window or 0),
        scale,
        torch.get_num_threads(),
        halved and query.shape[3] % (2 * WIDTH) == 0 and not halves_absent(),
    )


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _heads(tensor: Tensor) -> _Heads:
    return _Heads(tensor.data_ptr(), tensor.stride(2), tensor.stride(1))


def _matrix(tensor: Tensor) -> _Matrix:
    return _Matrix(tensor.data_ptr(), *tensor.stride())


def _rows(tensor: Tensor | None) -> _Rows:
    if tensor is None:
        return _Rows()
    inner = tensor.stride(1) if tensor.dim() > 2 else 0
    return _Rows(tensor.data_ptr(), tensor.stride(0), inner, tensor.dtype == torch.bfloat16)


def _shape(tensor: Tensor) -> _Shape:
    inner = tensor.shape[1] if tensor.dim() > 2 else 1
    return _Shape(tensor.shape[0], inner, tensor.shape[-1], torch.get_num_threads())


def _tried() -> float:
    """How far a small attention, forward and backward, is off float64's."""
    generator = torch.Generator().manual_seed(0)
    tokens, size = 100, 32
    query, key, value, grad = (torch.randn(1, heads, tokens, size, generator=generator) for heads in (2, 1, 1, 2))
    tiles = Tiles.of([(0, tokens, -1)], np.arange(tokens), None, 0)
    output, lse = attention(query, key, value, tiles, size**-0.5)
    found = (output, *attention_backward(grad, query, key, value, output, lse, tiles, size**-0.5))
    with torch.inference_mode(False), torch.enable_grad():
        first, second, third = wide = [tensor.double().clone().requires_grad_() for tensor in (query, key, value)]
        exact = torch.nn.functional.scaled_dot_product_attention(first, second, third, is_causal=True, enable_gqa=True)
        wanted = (exact.detach(), *torch.autograd.grad(exact, wide, grad.double()))
    return max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))


def _tried_on_gpu() -> float:
    """How far a small norm is off float64's."""
    rows = torch.randn(70, 100, generator=torch.Generator().manual_seed(0)).cuda()
    out, inverse, ones = torch.empty_like(rows), torch.empty(70, 1, device="cuda"), torch.ones(100, device="cuda")
    _gpu().norm(rows, ones, 0.0, inverse, False, out)
    exact = rows.double() / rows.double().square().mean(-1, keepdim=True).sqrt()
    return float((out - exact).abs().max())


def _tried_halves() -> float:
    """How far a small product is off float64's, as a share of its norm."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((70, 200), (200, 130)))
    out = torch.empty(70, 130)
    product_of_halves(a, b, None, out)
    exact = a.double() @ b.double()
    return float((out - exact).norm() / exact.norm())


class _Heads(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Matrix(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("row", ctypes.c_int64), ("column", ctypes.c_int64)]


class _Rows(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("outer", ctypes.c_int64), ("inner", ctypes.c_int64), ("half", ctypes.c_int64)]


class _Shape(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in ("outer", "inner", "width")), ("threads", ctypes.c_int64)]


_SIZES = ("query_tiles", "key_tiles", "query_tokens", "key_tokens", "heads", "key_heads", "width", "window")


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "visits")),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("halves", ctypes.c_int32),
    ]
