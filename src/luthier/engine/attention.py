"""Tree attention: every token of a forest sees its ancestors and itself, as if its row were alone.

`forest_attention` is registered with transformers under NAME; while a forest is `active`, a model whose attention
implementation is NAME computes it. On CPU it makes one causal call per segment and one rectangular call per inner
segment (queries: all its descendants, which lie together in depth-first order), and merges them by log-sum-exp: no
mask, no copy of keys or values. The backward pass hands each block the merged output and log-sum-exp, which makes its
gradient exact (the identity behind ring and cascade attention: Liu et al., 2023; Ye et al., 2024). Only blocks that a
sliding window cuts through need a mask. Other devices use the dense masked twin, which the tests hold equal.

Shapes: query [1, H, T, D], key and value [1, H_kv, T, D], output [1, T, H, D]. Does not know: models, losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.engine.forest import Forest
from luthier.spec.errors import BadSetting

NAME = "luthier_forest"

# Below this many query-key pairs the CPU kernel's bfloat16 backward spends most of its time converting: measured on
# Zen 4, 45 x 45 took 0.81 ms in bfloat16 and 0.17 in float32; at 974 x 974 bfloat16 was ahead, 27 to 34.
SMALL_BLOCK = 256 * 256

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Block:
    """Queries [start, end) against keys [key_start, key_end); own blocks are causal, ancestor blocks see all keys."""

    start: int
    end: int
    key_start: int
    key_end: int
    own: bool
    mask: Tensor | None = None  # additive [queries, keys], only where a sliding window cuts through


@dataclass
class Plan:
    """A forest's blocks, made once for each window size and used by every layer."""

    forest: Forest
    device: torch.device
    positions: Tensor = field(init=False)
    calls: int = 0
    _blocks: dict[tuple[int | None, torch.dtype], list[Block]] = field(default_factory=dict)
    _dense: dict[int | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.positions = torch.from_numpy(self.forest.positions).to(self.device)

    def blocks(self, window: int | None, dtype: torch.dtype) -> list[Block]:
        if window is not None and self.forest.longest_path <= window:
            window = None
        key = (window, dtype)
        if key not in self._blocks:
            self._blocks[key] = list(self._make_blocks(window, dtype))
        return self._blocks[key]

    def _make_blocks(self, window: int | None, dtype: torch.dtype) -> Iterator[Block]:
        ends = self.forest.descendants()
        for segment in self.forest.segments:
            yield self._block(segment.start, segment.end, segment.start, segment.end, True, window, dtype)
        for segment, end in zip(self.forest.segments, ends, strict=True):
            if end > segment.end > segment.start:
                yield self._block(segment.end, end, segment.start, segment.end, False, window, dtype)

    def _block(
        self, start: int, end: int, key_start: int, key_end: int, own: bool, window: int | None, dtype: torch.dtype
    ) -> Block:
        if window is None:
            return Block(start, end, key_start, key_end, own)
        distance = self.positions[start:end, None] - self.positions[None, key_start:key_end]
        visible = distance < window
        if own:
            visible &= distance >= 0
            if key_end - key_start <= window:
                return Block(start, end, key_start, key_end, own)
        elif bool(visible.all()):
            return Block(start, end, key_start, key_end, own)
        mask = torch.zeros(visible.shape, dtype=dtype, device=self.device).masked_fill_(~visible, float("-inf"))
        return Block(start, end, key_start, key_end, own, mask)

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
    """What `backward` needs of a `forward`: [1, H, T, D] tensors, the scores' log-sum-exp [1, H, T] (float32)."""

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

    Inputs may be strided views whose last dimension is contiguous (parts of one fused product).
    """
    output = torch.empty(query.shape, dtype=torch.float32)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32)
    for block in plan.blocks(window, query.dtype):
        rows, keys = slice(block.start, block.end), slice(block.key_start, block.key_end)
        part, part_lse = _forward(
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            0.0,
            block.own and block.mask is None,
            attn_mask=block.mask,
            scale=scale,
        )
        if block.own:
            output[:, :, rows], lse[:, :, rows] = part, part_lse
            continue
        if block.mask is not None:  # rows that see no key of this block
            hidden = block.mask.isinf().all(dim=1)
            part = part.masked_fill(hidden[:, None], 0.0)
            part_lse = part_lse.masked_fill(hidden, float("-inf"))
        merged = torch.logaddexp(lse[:, :, rows], part_lse)
        output[:, :, rows].mul_((lse[:, :, rows] - merged).exp_()[..., None])
        output[:, :, rows].addcmul_(part.float(), (part_lse - merged).exp_()[..., None])
        lse[:, :, rows] = merged
    output = output.to(query.dtype)
    return output, Saved(query, key, value, output, lse, plan, window, scale)


def backward(grad_output: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output [1, H, T, D], in the dtype of the inputs."""
    query, key, value, output, lse = saved[:5]
    grads = [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in (query, key, value)]
    for block in saved.plan.blocks(saved.window, query.dtype):
        rows, keys = slice(block.start, block.end), slice(block.key_start, block.key_end)
        small = (block.end - block.start) * (block.key_end - block.key_start) < SMALL_BLOCK
        parts = _backward(
            *(
                part.float() if small else part
                for part in (
                    grad_output[:, :, rows],
                    query[:, :, rows],
                    key[:, :, keys],
                    value[:, :, keys],
                    output[:, :, rows],
                )
            ),
            lse[:, :, rows],
            0.0,
            block.own and block.mask is None,
            attn_mask=block.mask.float() if small and block.mask is not None else block.mask,
            scale=saved.scale,
        )
        for total, part, place in zip(grads, parts, (rows, keys, keys), strict=True):
            total[:, :, place] += part
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


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
