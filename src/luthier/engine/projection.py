"""Linear layers on the same input as one matrix, with their LoRA branches inside the product.

The matrix is [W | B]: the weights of the layers below each other, and to their right the LoRA B of each, block by
block. Its input is [x | s A x], so one product computes W x + s B A x, and nothing is added in a pass of its own. The
layers' parameters become views into the matrix: memory does not double, an optimizer that writes the parameters has
written the matrix, and the layers still compute by themselves.

Shapes: T tokens, K inputs, N outputs, R ranks (all layers'). Does not know: what lies between the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.engine.products import Product, halved, whole


@dataclass(frozen=True)
class Part:
    """One linear layer and its adapter, by their places in the matrix."""

    weight: Tensor
    bias: Tensor | None
    rows: slice
    a: Tensor | None
    b: Tensor | None
    columns: slice


class Projection:
    """Several linear layers on one input. Raises ValueError for layers that `taken_apart` refuses."""

    def __init__(self, modules: Sequence[nn.Module], ahead: Product = whole, back: Product = whole) -> None:
        self.ahead, self.back = ahead, back  # what multiplies on the way forward, and on the way back
        self.parts: list[Part] = []
        scales: list[Tensor] = []
        outputs = ranks = 0
        for module in modules:
            linear, a, b, scale = taken_apart(module)
            size, rank = linear.out_features, 0 if a is None else a.shape[0]
            self.parts.append(
                Part(
                    linear.weight,
                    linear.bias,
                    slice(outputs, outputs + size),
                    a,
                    b,
                    slice(ranks, ranks + rank),
                )
            )
            scales.append(torch.full((rank,), scale))
            outputs, ranks = outputs + size, ranks + rank
        first = self.parts[0].weight
        self.inputs, self.outputs, self.ranks = first.shape[1], outputs, ranks
        self.matrix = first.new_zeros(outputs, self.inputs + ranks).detach()
        self.down = first.new_empty(ranks, self.inputs).detach()
        self.scale = torch.cat(scales).to(first.device)  # float32: 2^-9 of a scale would be lost in bfloat16
        self.biased = any(part.bias is not None for part in self.parts)
        self.learning = [
            weight
            for part in self.parts
            for weight in (part.weight, part.bias, part.a, part.b)
            if weight is not None and weight.requires_grad
        ]
        for part in self.parts:
            _move(part.weight, self.matrix[part.rows, : self.inputs])
            if part.a is not None and part.b is not None:
                _move(part.a, self.down[part.columns])
                _move(part.b, self.matrix[part.rows, self.inputs :][:, part.columns])

    @property
    def width(self) -> int:
        """Columns of the input that `forward` wants: K + R."""
        return self.inputs + self.ranks

    def room(self, like: Tensor) -> Tensor:
        """An input [T, K + R], in the weights' precision, with its first K columns to be filled."""
        return self.matrix.new_empty(len(like), self.width)

    def forward(self, wide: Tensor, plus: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(W x + s B A x (+ plus) [T, N], s A x [T, R]) of x in the first columns of `wide`, whose last R it fills.

        With a `plus` of more precision the sum has that precision.
        """
        low = wide.new_empty(len(wide), self.ranks)  # not a part of `wide`: kept, it would keep all of that
        if self.ranks:
            low = torch.mm(wide[:, : self.inputs], self.down.t()).mul_(self.scale)
            wide[:, self.inputs :] = low
        if plus is not None and not self.biased and plus.dtype == wide.dtype:
            return self.ahead(wide, self.matrix.t(), plus), low
        output = self.ahead(wide, self.matrix.t(), self._bias())
        return (output if plus is None else output + plus), low

    def _bias(self) -> Tensor | None:
        """The layers' biases [N], those that have none with zeros."""
        if not self.biased:
            return None
        return torch.cat(
            [
                self.matrix.new_zeros(part.rows.stop - part.rows.start) if part.bias is None else part.bias
                for part in self.parts
            ]
        )

    def backward(self, grad: Tensor, low: Tensor) -> Backward:
        """The gradient `grad` [T, N] of the output on its way back; `low` is what `forward` returned."""
        return Backward(self, grad, low)


class Backward:
    """Gradients of one use of a projection, each made when it is asked for, `input` best of all first: the gradient of
    the input is often needed in between."""

    def __init__(self, projection: Projection, grad: Tensor, low: Tensor) -> None:
        self.projection, self.grad, self.low = projection, grad, low
        self._into_low: Tensor | None = None

    @property
    def into_low(self) -> Tensor:
        """Gradient of A x, [T, R]."""
        if self._into_low is None:
            projection = self.projection
            self._into_low = torch.mm(self.grad, projection.matrix[:, projection.inputs :]).mul_(projection.scale)
        return self._into_low

    def input(self) -> Tensor:
        """Gradient of x, [T, K]."""
        projection = self.projection
        inputs, matrix = projection.inputs, projection.matrix
        if not projection.ranks:
            return projection.back(self.grad, matrix)
        if projection.back is not halved or self._into_low is not None:
            into = torch.mm(self.into_low, projection.down)
            return projection.back(self.grad, matrix[:, :inputs], into, into)
        both = projection.back(self.grad, matrix)  # [W | B] at once: the gradient is read, and packed, once
        self._into_low = both[:, inputs:] * projection.scale
        return both[:, :inputs].addmm_(self._into_low, projection.down)

    def weights(self, x: Tensor) -> list[Tensor]:
        """Gradients of `learning`, in its order, from the input x [T, K]."""
        found: list[Tensor] = []
        down = torch.mm(self.into_low.t(), x) if self._learns_down() else x
        for part in self.projection.parts:
            grad = self.grad[:, part.rows]
            if part.weight.requires_grad:
                found.append(self.projection.back(grad.t(), x))
            if part.bias is not None and part.bias.requires_grad:
                found.append(grad.sum(0, dtype=torch.float32).to(grad.dtype))
            if part.a is not None and part.a.requires_grad:
                found.append(down[part.columns])
            if part.b is not None and part.b.requires_grad:
                found.append(torch.mm(self.low[:, part.columns].t(), grad).t())
        return found

    def _learns_down(self) -> bool:
        return any(part.a is not None and part.a.requires_grad for part in self.projection.parts)


@torch.no_grad()
def _move(parameter: Tensor, place: Tensor) -> None:
    place.copy_(parameter)
    parameter.data = place


def taken_apart(module: Any) -> tuple[nn.Linear, Tensor | None, Tensor | None, float]:
    """(linear layer, A, B, scaling) of a plain or PEFT linear layer. Raises ValueError for any other."""
    from peft.tuners.lora import Linear as Adapted

    if type(module) is nn.Linear:
        return module, None, None, 0.0
    if type(module) is not Adapted or type(module.base_layer) is not nn.Linear:
        raise ValueError(f"{type(module).__name__} is no plain linear layer")
    names = list(module.active_adapters)
    if len(names) != 1 or module.disable_adapters or module.merged or module.fan_in_fan_out:
        raise ValueError("its adapters are not one that is active and unmerged")
    name = names[0]
    if module.use_dora.get(name) or module.lora_variant:
        raise ValueError("the adapter is DoRA" if module.use_dora.get(name) else "the adapter is a variant of LoRA")
    if not isinstance(module.lora_dropout[name], nn.Identity):
        raise ValueError("the adapter has dropout")
    a: Any = module.lora_A[name]
    b: Any = module.lora_B[name]
    if a.bias is not None or b.bias is not None:
        raise ValueError("the adapter has biases")
    if a.weight.dtype != module.base_layer.weight.dtype or b.weight.dtype != module.base_layer.weight.dtype:
        raise ValueError("the adapter has another precision than its base")
    return module.base_layer, a.weight, b.weight, float(module.scaling[name])
