"""What a decoder layer does between its matrix products, forward and backward: norms, rotation, gated activations.

Pure functions of tensors, computed in float32 and rounded once. These passes are bound by memory, not by arithmetic:
kernels of our own go over it once (kernels.py); where there are none, torch's go over slices of rows small enough to
stay in a core's cache, or on a GPU over all rows at once, for which torch has norms of one kernel. Rows are tokens; the
last dimension is normalised or rotated.
Does not know: weights that learn, attention, forests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.engine import kernels

# Elements of a slice: 128 rows of 2,048 in float32 are 1 MiB, one core's second-level cache on most machines.
SLICE = 128 * 2048

_silu_backward = torch.ops.aten.silu_backward.grad_input
_gelu_backward = torch.ops.aten.gelu_backward.grad_input
_silu, _gelu = torch.ops.aten.silu.out, torch.ops.aten.gelu.out
_norm, _norm_backward = torch.ops.aten._fused_rms_norm, torch.ops.aten._fused_rms_norm_backward  # of GPUs


def slices(rows: Tensor) -> Iterator[slice]:
    """Rows a cache's worth at a time; an accelerator takes all at once."""
    size = max(1, SLICE * len(rows) // max(1, rows.numel())) if rows.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), size):
        yield slice(start, min(start + size, len(rows)))


def norm(rows: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> Tensor:
    """RMSNorm (Zhang & Sennrich, 2019) of `rows` [T, ..., H] into `out`, times `weight` [H] float32.

    Returns the inverse root mean squares [T, ..., 1] float32, which `norm_backward` needs. `out` may be `rows`.
    """
    inverse = torch.empty((*rows.shape[:-1], 1), dtype=torch.float32, device=rows.device)
    if kernels.fits(rows, out):
        kernels.norm(rows, weight, epsilon, inverse, False, out)
        return inverse
    if rows.is_cuda:
        made, inverse = _norm(rows.float(), rows.shape[-1:], weight, epsilon)
        out.copy_(made)
        return inverse  # type: ignore[no-any-return]
    for part in slices(rows):
        values = rows[part].float()
        torch.linalg.vector_norm(values, dim=-1, keepdim=True, out=inverse[part])
        inverse[part].square_().div_(rows.shape[-1]).add_(epsilon).rsqrt_()
        made = _wide(out[part])
        _into(out[part], torch.mul(values, inverse[part], out=made).mul_(weight))
    return inverse


def norm_again(rows: Tensor, weight: Tensor, inverse: Tensor, out: Tensor) -> None:
    """`norm` once more, its inverse root mean squares being known."""
    if kernels.fits(rows, out):
        kernels.norm(rows, weight, 0.0, inverse, True, out)
        return
    for part in slices(rows):
        made = _wide(out[part])
        _into(out[part], torch.mul(rows[part], inverse[part], out=made).mul_(weight))


def norm_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    inverse: Tensor,
    out: Tensor,
    plus: Tensor | None = None,
    weight_grad: Tensor | None = None,
) -> None:
    """The gradient of `norm`'s rows, `plus` another (the residual's), into `out`, which may be any of the inputs.

    `weight_grad` [H] float32, if given, is added to.
    """
    if kernels.fits(grad, rows, out, *(() if plus is None else (plus,))):
        kernels.norm_backward(grad, rows, weight, inverse, out, plus, weight_grad)
        return
    if rows.is_cuda:
        wanted = [True, weight_grad is not None]
        into, own = _norm_backward(grad.float(), rows.float(), rows.shape[-1:], inverse, weight, wanted)
        if weight_grad is not None:
            weight_grad += own
        out.copy_(into if plus is None else into.add_(plus))
        return
    for part in slices(rows):
        values = rows[part].float()
        inner = grad[part] * weight
        share = (inner * values).sum(dim=-1, keepdim=True).mul_(inverse[part] ** 3).div_(-rows.shape[-1])
        if weight_grad is not None:
            weight_grad += (grad[part] * values).mul_(inverse[part]).flatten(0, -2).sum(0)
        made = _wide(out[part])
        if plus is None:
            torch.mul(values, share, out=made)
        else:
            torch.addcmul(plus[part].float(), values, share, out=made)
        _into(out[part], made.addcmul_(inner, inverse[part]))


def _wide(place: Tensor) -> Tensor:
    """Where float32 values that belong in `place` are made: there, if it is float32."""
    return place if place.dtype == torch.float32 else torch.empty_like(place, dtype=torch.float32)


def _into(place: Tensor, made: Tensor) -> None:
    """Rounded once, if they were made elsewhere."""
    if made.dtype != place.dtype:
        place.copy_(made)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotary embedding (Su et al., 2021) of `heads` [T, N, D] into `out`, which may be `heads`; cos, sin [T, 1, D/2].
    `-sin` turns back."""
    if kernels.fits(heads, cos, out):
        kernels.rotate(heads, cos, sin, out)
        return
    half = heads.shape[-1] // 2
    for part in slices(heads):
        first, second = (side.float() for side in heads[part].split(half, dim=-1))
        left, right = out[part].split(half, dim=-1)
        turned = (first * cos[part]).addcmul_(second, sin[part], value=-1)
        right.copy_(second.mul(cos[part]).addcmul_(first, sin[part]))
        left.copy_(turned)


@dataclass(frozen=True)
class Gate:
    """act(gate) * up, and its gradient."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    options: dict[str, Any]
    gelu: bool | None  # by its tanh; None: a gate that our kernels do not have

    def apply(self, both: Tensor, out: Tensor, kept: Tensor | None = None) -> None:
        """Of gate and up beside each other, [T, 2N], into `out` [T, N]; `kept`: for a copy of `both`."""
        gate, up = both.chunk(2, dim=1)
        if self.gelu is not None and kernels.fits(gate, up, out, *(() if kept is None else (kept,))):
            kernels.gated(self.gelu, both, out, kept)
            return
        if kept is not None:
            kept.copy_(both)
        for part in slices(gate):
            self.forward(gate[part], **self.options, out=out[part])
            out[part].mul_(up[part])

    def back(self, grad: Tensor, both: Tensor, into: Tensor, gated: Tensor | None) -> None:
        """The gradients of gate and up into `into` [T, 2N], which may be `both`; `grad` is used up. `gated`, if wanted,
        is act(gate) * up again."""
        if self.gelu is not None and kernels.fits(grad, both, into, *(() if gated is None else (gated,))):
            kernels.gated_backward(self.gelu, grad, both, into, gated)
            return
        if into is not both:
            into.copy_(both)
        gate, up = into.chunk(2, dim=1)
        for part in slices(gate):
            acted = self.forward(gate[part], **self.options, out=torch.empty_like(gate[part]))
            if gated is not None:
                torch.mul(acted, up[part], out=gated[part])
            acted.mul_(grad[part])
            into_gate = grad[part].mul_(up[part])
            up[part] = acted
            self.backward(into_gate, gate[part], **self.options, grad_input=gate[part])


GATES: dict[str, Gate] = {
    "silu": Gate(_silu, _silu_backward, {}, False),
    "gelu": Gate(_gelu, _gelu_backward, {"approximate": "none"}, None),
    "gelu_pytorch_tanh": Gate(_gelu, _gelu_backward, {"approximate": "tanh"}, True),
}
