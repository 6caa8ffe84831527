"""Tree attention: every token of a forest sees its ancestors and itself, as if its row were alone.

`forest_attention` is registered with transformers under NAME; while a forest is `active`, a model whose attention
implementation is NAME computes it. On CPU that is done by tiles (tiles.py), without a mask; other devices use the dense
masked twin, which the tests hold equal. `forward` and `backward` are the same for layers with a backward of their own.

Shapes: query [1, H, T, D], key and value [1, H_kv, T, D], output [1, T, H, D]. Does not know: models, losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.engine import schedule as scheduling
from luthier.engine import tiles
from luthier.engine.forest import Forest
from luthier.spec.errors import BadSetting

NAME = "luthier_forest"


@dataclass
class Plan:
    """A forest's tiles, or its masks, made once for each window size and used by every layer."""

    forest: Forest
    device: torch.device
    positions: Tensor = field(init=False)
    calls: int = 0
    _schedules: dict[tuple[int | None, int], scheduling.Schedule] = field(default_factory=dict)
    _dense: dict[int | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.positions = torch.from_numpy(self.forest.positions).to(self.device)

    def schedule(self, window: int | None, heads: int) -> scheduling.Schedule:
        if window is not None and self.forest.longest_path <= window:
            window = None
        if (window, heads) not in self._schedules:
            self._schedules[window, heads] = scheduling.schedule(self.forest, window, heads)
        return self._schedules[window, heads]

    def dense(self, window: int | None) -> Tensor:
        """The whole mask, bool [T, T]: what the twin and other devices use."""
        if window not in self._dense:
            length = self.forest.tokens
            mask = torch.zeros(length, length, dtype=torch.bool, device=self.device)
            ends = self.forest.descendants()
            for segment, end in zip(self.forest.segments, ends, strict=True):
                own = slice(segment.start, segment.end)
                mask[own, own] = torch.ones(segment.end - segment.start, segment.end - segment.start).tril().bool()
                mask[segment.end : end, own] = True
            if window is not None:
                mask &= self.positions[:, None] - self.positions[None, :] < window
            self._dense[window] = mask
        return self._dense[window]


_active: list[Plan] = []


@contextmanager
def active(plan: Plan) -> Iterator[None]:
    """Layers called inside attend within `plan`'s forest."""
    _active.append(plan)
    try:
        yield
    finally:
        _active.pop()


def require_used(plan: Plan, model: Any) -> None:
    """Raises BadSetting when a layer of `model` computed attention in code of its own: its rows saw each other."""
    if plan.calls < model.config.get_text_config().num_hidden_layers:
        raise BadSetting(
            f"{type(model).__name__} computes its attention in a way of its own, which Luthier cannot train yet.",
            param="model",
            hint="Choose another base model.",
        )


def forest_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in each layer. Raises BadSetting for attention it cannot compute exactly."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise BadSetting(
                f"This model's attention uses {name}, which Luthier cannot train yet.",
                param="model",
                hint="Choose another base model.",
            )
    if attention_mask is not None or dropout:
        raise BadSetting(
            f"{type(module).__name__} uses {'dropout' if dropout else 'a mask'} that a forest has no place for.",
            param="model",
            hint="Choose another base model.",
        )
    plan = _active[-1]
    plan.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        attend: Any = _ForestAttention.apply  # torch leaves it unannotated
        output: Tensor = attend(query, key, value, plan, sliding_window, scale)
    else:
        output = masked_attention(query, key, value, plan.dense(sliding_window), scale)
    return output.transpose(1, 2), None


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The slow twin: one dense mask. [1, H, T, D]."""
    groups = query.shape[1] // key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attn_mask=mask,
        scale=scale,
    )


class Saved(NamedTuple):
    """What `backward` needs of a `forward`: [1, H, T, D] tensors, the scores' log-sum-exp [T, H] (float32)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor
    plan: Plan
    window: int | None
    scale: float


def forward(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: int | None, scale: float
) -> tuple[Tensor, Saved]:
    """Attention of one layer within `plan`'s forest, outside autograd: (output [1, H, T, D], what `backward` takes).

    Inputs may be strided views (parts of one fused product); the output lies in memory tokens first. CPU only.
    """
    inputs = _inputs(query, key, value, plan, window, scale)
    output, lse = tiles.forward(inputs)
    output = output.transpose(0, 1)[None]
    return output.to(query.dtype), Saved(query, key, value, output, lse, plan, window, scale)


def backward(grad_output: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output [1, H, T, D], in the shape and dtype of the inputs."""
    query, key, value, output, lse, plan, window, scale = saved
    inputs = _inputs(query, key, value, plan, window, scale)
    grads = tiles.backward(inputs, _tokens_first(output), lse, _tokens_first(grad_output).float())
    first, second, third = (grad.to(query.dtype).transpose(0, 1)[None] for grad in grads)
    return first, second, third


def _tokens_first(tensor: Tensor) -> Tensor:
    return tensor[0].transpose(0, 1)


def _inputs(query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: int | None, scale: float) -> tiles.Inputs:
    # In float32 whatever the layer computes in. In bfloat16 the rounding of scores far from the guess stands in the
    # sums and not in the weights of the backward pass: on 1,200-token rows of SmolLM2, gradients had a cosine of 0.71
    # with the reference's (first layers' queries and keys below zero), while the loss was right to 2e-3.
    first, second, third = (_tokens_first(part).float() for part in (query, key, value))
    return tiles.Inputs(first, second, third, plan.schedule(window, query.shape[1]), scale)


class _ForestAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: int | None, scale: float
    ) -> Tensor:
        output, saved = forward(query, key, value, plan, window, scale)
        ctx.save_for_backward(*saved[:5])
        ctx.rest = saved[5:]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grad, Saved(*ctx.saved_tensors, *ctx.rest)), None, None, None


def install(model: Any) -> None:
    """Make `model` (a transformers model) compute forests. Raises BadSetting for layers that are not attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, forest_attention)
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        raise BadSetting(
            f"This model has {', '.join(sorted(others))} layers, which Luthier cannot train yet.",
            param="model",
            hint="Choose a base whose layers are plain or sliding attention.",
        )
    model.set_attn_implementation(NAME)
