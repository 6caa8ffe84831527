"""Laws of the kernels for GPUs: each is what torch computes in float64, whatever the sizes. Where there is no GPU they
can be interpreted, with Triton installed and TRITON_INTERPRET=1; else this is skipped."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from luthier.engine import kernels, loss

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("no GPU, and Triton is not to interpret", allow_module_level=True)

from luthier.engine import gpu

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, where it interprets
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [24, 64, 576, 2048, 5000]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, gap: int = 8) -> Tensor:
    """A view with gaps between rows, as parts of a product have them."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape[:-1], shape[-1] + gap, generator=generator).to(dtype)
    return made.to(DEVICE)[..., : shape[-1]]


def room(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nothing that is left unwritten passes."""
    return torch.full((*shape[:-1], shape[-1] + 16), torch.nan, dtype=dtype, device=DEVICE)[..., : shape[-1]]


def near(one: Tensor, exact: Tensor) -> bool:
    least = 3e-6 if one.dtype == torch.float32 else 8e-3
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    return bool(torch.allclose(one.double(), exact.double(), rtol=least, atol=least * (largest + 1e-9)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("rows", "inner"), [(0, 0), (1, 0), (131, 0), (37, 3)])
def test_norms(rows: int, inner: int, width: int, dtype: torch.dtype) -> None:
    shape = (rows, inner, width) if inner else (rows, width)
    x, grad, plus = numbers(*shape), numbers(*shape, seed=1, dtype=dtype), numbers(*shape, seed=2)
    weight = torch.rand(width, device=DEVICE) + 0.5
    out, again, into = room(shape, dtype), room(shape, dtype), room(shape)
    inverse = room((*shape[:-1], 1)).contiguous()
    kernels_norm(x, weight, inverse, out, again)
    leaf, learns = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = leaf * (leaf.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * learns
    slopes = torch.autograd.grad(exact, [leaf, learns], grad.double())
    assert near(out, exact.detach()) and torch.equal(out, again)
    gpu.norm_backward(grad, x, weight, inverse, into, None, None)
    assert near(into, slopes[0])
    own = torch.ones(width, device=DEVICE)
    gpu.norm_backward(grad, x, weight, inverse, plus, plus.clone(), own)  # in the place of one of them
    assert near(plus, slopes[0] + numbers(*shape, seed=2)) and near(own - 1, slopes[1])


def kernels_norm(x: Tensor, weight: Tensor, inverse: Tensor, out: Tensor, again: Tensor) -> None:
    gpu.norm(x, weight, 1e-6, inverse, False, out)
    gpu.norm(x, weight, 0.0, inverse, True, again)


def test_many_rows_share_the_sums_of_a_weight() -> None:
    """More than there are programs, some of which have one row less."""
    count = 2 * gpu.SHARES * gpu.AT_ONCE // 64 + 5 if DEVICE == "cuda" else 40
    x, grad, weight = numbers(count, 64), numbers(count, 64, seed=1), torch.ones(64, device=DEVICE)
    inverse, out, own = room((count, 1)).contiguous(), room((count, 64)), torch.zeros(64, device=DEVICE)
    gpu.norm(x, weight, 1e-6, inverse, False, out)
    gpu.norm_backward(grad, x, weight, inverse, room((count, 64)), None, own)
    assert near(own, (grad.double() * x * inverse).sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 48, 64, 256])
@pytest.mark.parametrize(("rows", "heads"), [(0, 2), (1, 1), (67, 5)])
def test_rotation(rows: int, heads: int, size: int, dtype: torch.dtype) -> None:
    x, angle = numbers(rows, heads, size, dtype=dtype), torch.rand(rows, 1, size // 2, device=DEVICE) * 6
    out = room(x.shape, dtype)
    gpu.rotate(x, angle.cos(), angle.sin(), out)
    left, right = x.double().chunk(2, dim=-1)
    cos, sin = angle.cos().double(), angle.sin().double()
    assert near(out, torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1))
    gpu.rotate(out, angle.cos(), -angle.sin(), out)
    assert near(out, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("rows", "larger"), [(0, 1.0), (9, 1.0), (9, 1e4)])
def test_gates(rows: int, larger: float, width: int, gelu: bool, dtype: torch.dtype) -> None:
    """Also where the activation has run flat."""
    x, up, grad = (numbers(rows, width, seed=seed, dtype=dtype) for seed in range(3))
    x = x * larger
    one, two = x.double().requires_grad_(), up.double().requires_grad_()
    act = torch.nn.functional.gelu(one, approximate="tanh") if gelu else torch.nn.functional.silu(one)
    slopes = torch.autograd.grad(act * two, [one, two], grad.double())
    out, made = room(x.shape, dtype), room(x.shape, dtype)
    gpu.gated(gelu, x, up, out)
    assert near(out, (act * two).detach())
    alone = x.clone(), up.clone()
    gpu.gated_backward(gelu, grad, *alone, None)
    gpu.gated_backward(gelu, grad, x, up, made)
    assert near(x, slopes[0]) and near(up, slopes[1])
    assert torch.equal(made, out) and torch.equal(x, alone[0]) and torch.equal(up, alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("vocabulary", [16, 1000, 20_000])
@pytest.mark.parametrize("larger", [1, 20, 1000])
def test_loss(larger: int, vocabulary: int, smoothing: float, dtype: torch.dtype) -> None:
    """With ties, of which the first is the most likely."""
    logits = (numbers(30, vocabulary) * larger).round().to(dtype).contiguous()
    targets, weights = torch.randint(vocabulary, (30,), device=DEVICE), torch.rand(30, device=DEVICE)
    likeliest = (logits == logits.max(dim=-1, keepdim=True).values).int().argmax(dim=-1)  # the first
    targets[:9] = likeliest[:9]
    leaf = logits.double().requires_grad_()
    exact = loss._each(leaf, targets, smoothing) * weights
    (slope,) = torch.autograd.grad(exact.sum(), leaf)
    losses, right = gpu.cross_entropy(logits, targets, weights, smoothing)
    assert near(losses, exact.detach()) and torch.equal(right, likeliest == targets) and int(right.sum()) >= 9
    assert torch.allclose(logits.double(), slope, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=1e-4)


def test_what_is_not_a_number_stays_none() -> None:
    for wrong in (float("nan"), float("inf")):
        x = numbers(3, 64).contiguous()
        x[1, 5] = wrong
        out, inverse = room(x.shape), room((3, 1)).contiguous()
        gpu.norm(x, torch.ones(64, device=DEVICE), 1e-6, inverse, False, out)
        assert not bool(out[1].isfinite().all()) and bool(out[[0, 2]].isfinite().all())
        gpu.gated(False, x, torch.ones_like(x), out)
        assert not bool(out[1].isfinite().all())
        aims = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        found, _ = gpu.cross_entropy(x, aims, torch.ones(3, device=DEVICE), 0.0)
        assert found.isfinite().tolist() == [True, False, True]


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_what_fits() -> None:
    """Whatever rows lie apart, but not with columns apart, other precisions, or on two devices."""
    assert kernels.able("cuda"), kernels.absent("cuda")
    x = numbers(4, 24)
    assert kernels.fits(x, x.bfloat16())
    assert not kernels.fits(x, x.t()) and not kernels.fits(x.half()) and not kernels.fits(x, x.cpu())
