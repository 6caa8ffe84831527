"""Tree attention: every token of a forest sees its ancestors and itself, as if its row were alone.

`forest_attention` is registered with transformers under NAME; while a forest is `active`, a model whose attention
implementation is NAME computes it. On CPUs a kernel of our own walks along it tile by tile (tiles.py, kernels.py).
Where that cannot be, torch's is called: the queries of each segment meet its own keys in one causal call, and those of
all its descendants meet them in another (blocks.py); results are merged by log-sum-exp. The backward pass hands each
block the merged output and log-sum-exp, which makes its gradient exact (the identity behind ring and cascade attention:
Liu et al., 2023; Ye et al., 2024). GPUs do the same in fewer and larger calls (varlen.py), or, where their kernel
cannot, use the dense masked twin, to which the tests hold all of it equal.

Shapes: query [1, H, T, D], key and value [1, H_kv, T, D], output [1, T, H, D]. Does not know: models, losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.engine import blocks as planning
from luthier.engine import kernels, products, varlen
from luthier.engine.blocks import Block
from luthier.engine.forest import Forest
from luthier.engine.tiles import Tiles
from luthier.spec.errors import BadSetting

NAME = "luthier_forest"

# Below this many query-key pairs the CPU kernel's bfloat16 backward spends most of its time converting: measured on
# Zen 4, 45 x 45 took 0.81 ms in bfloat16 and 0.17 in float32; at 974 x 974 bfloat16 was ahead, 27 to 34.
SMALL_BLOCK = 256 * 256

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass
class Trunk:
    """What several forests need of a beginning that they share: its keys and values [1, H_kv, P, D], layer by layer,
    and the sums (float32) of the gradients that these forests send back to them."""

    length: int
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    sent: dict[int, list[Tensor]] = field(default_factory=dict)

    def send(self, layer: int, *grads: Tensor) -> None:
        if layer not in self.sent:  # copies: a part of a gradient would keep all of it
            self.sent[layer] = [grad.to(torch.float32, copy=True) for grad in grads]
            return
        for total, grad in zip(self.sent[layer], grads, strict=True):
            total += grad


@dataclass
class Plan:
    """A forest's tiles, blocks or masks, made once for each window size and used by every layer."""

    forest: Forest
    device: torch.device
    trunk: Trunk | None = None  # which the forest's rows continue
    becomes: Trunk | None = None  # which the forest is: what its layers compute is kept, what comes back is added
    halved: bool = False  # products of float16 numbers, where our kernel has them
    positions: Tensor = field(init=False)
    calls: int = 0
    _tiles: dict[int | None, Tiles] = field(default_factory=dict)
    _blocks: dict[int | None, list[tuple[Block, Tensor | None]]] = field(default_factory=dict)
    _calls: dict[int | None, list[varlen.Call]] = field(default_factory=dict)
    _dense: dict[int | None, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.positions = torch.from_numpy(self.forest.positions).to(self.device)

    @property
    def before(self) -> int:
        """Keys of the trunk, which come before the forest's own."""
        return self.trunk.length if self.trunk else 0

    def tiles(self, window: int | None) -> Tiles:
        """The forest's tiles (tiles.py)."""
        if window not in self._tiles:
            self._tiles[window] = Tiles.of(self.forest.segments, self.forest.positions, window, self.before)
        return self._tiles[window]

    def blocks(self, window: int | None) -> list[tuple[Block, Tensor | None]]:
        """The forest's blocks and their masks (blocks.py)."""
        if window not in self._blocks:
            self._blocks[window] = [
                (block, block.mask()) for block in planning.blocks(self.forest, window, self.before)
            ]
        return self._blocks[window]

    def sequences(self, window: int | None) -> list[varlen.Call]:
        """The forest's calls of a GPU's kernel (varlen.py)."""
        if window not in self._calls:
            self._calls[window] = varlen.calls(self.forest, window, self.before, self.device)
        return self._calls[window]

    def dense(self, window: int | None) -> Tensor:
        """The whole mask, bool [T, before + T]: what the twin uses."""
        if window not in self._dense:
            length, before = self.forest.tokens, self.before
            mask = torch.zeros(length, before + length, dtype=torch.bool, device=self.device)
            mask[:, :before] = True
            within = mask[:, before:]
            ends = self.forest.descendants()
            for segment, end in zip(self.forest.segments, ends, strict=True):
                own = slice(segment.start, segment.end)
                within[own, own] = torch.ones_like(within[own, own]).tril_()
                within[segment.end : end, own] = True
            if window is not None:
                keys = torch.cat([torch.arange(before, device=self.device), self.positions])
                mask &= self.positions[:, None] - keys < window
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


def merges(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether attention is computed in parts there that are merged, so that a forest can continue a trunk."""
    return device.type == "cpu" or varlen.able(device, dtype, head_size)


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
    layer, plan.calls = plan.calls, plan.calls + 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if merges(query.device, query.dtype, query.shape[-1]):
        attend: Any = _ForestAttention.apply  # torch leaves it unannotated
        output: Tensor = attend(query, key, value, plan, sliding_window, scale, layer)
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
    """What `backward` needs of a `forward`: [1, H, T, D] tensors (keys and values with the trunk's), the scores'
    log-sum-exp [1, H, T] (float32)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    lse: Tensor
    plan: Plan
    window: int | None
    scale: float


def forward(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: int | None, scale: float, layer: int = 0
) -> tuple[Tensor, Saved]:
    """Attention of one layer within `plan`'s forest, outside autograd: (output [1, H, T, D], what `backward` takes).

    With a trunk, its keys and values are the first `plan.before` of `key` and `value`. Inputs may be strided views
    whose last dimension is contiguous (parts of one fused product); the output lies in memory tokens first.
    """
    if query.device.type != "cpu":
        output, lse = varlen.forward(_flat(query), _flat(key), _flat(value), plan.sequences(window), scale)
        output = output.transpose(0, 1)[None]
        return output, Saved(query, key, value, output, lse[None], plan, window, scale)
    if _by_tiles(query, key, value):
        halved = plan.halved and layer >= products.EXACT
        output, lse = kernels.attention(query.float(), key.float(), value.float(), plan.tiles(window), scale, halved)
        output = output.to(query.dtype)
        return output, Saved(query, key, value, output, lse, plan, window, scale)
    planned = plan.blocks(window)
    merging = any(not block.causal for block, _ in planned)
    output = kernels.tokens_first(query, torch.float32 if merging else query.dtype)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32)
    for block, mask in planned:
        part, part_lse = _forward(
            _rows(query, block),
            _seen(key, block),
            _seen(value, block),
            0.0,
            block.causal and mask is None,
            attn_mask=mask,
            scale=scale,
        )
        into, into_lse = _rows(output, block), _rows(lse, block)
        if block.causal:
            into.copy_(part)
            into_lse.copy_(part_lse)
            continue
        if mask is not None:  # rows that see no key of this block
            hidden = mask.isinf().all(dim=-1)
            part = part.masked_fill(hidden[..., None], 0.0)
            part_lse = part_lse.masked_fill(hidden, -torch.inf)
        merged = torch.logaddexp(into_lse, part_lse)
        into.mul_((into_lse - merged).exp_()[..., None]).addcmul_(part, part_lse.sub_(merged).exp_()[..., None])
        into_lse.copy_(merged)
    output = output.to(query.dtype)
    return output, Saved(query, key, value, output, lse, plan, window, scale)


def backward(grad_output: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output [1, H, T, D], in the shape and dtype of the inputs."""
    query, key, value, output, lse, plan, window, scale = saved
    if query.device.type != "cpu":
        flat = _flat(grad_output), _flat(query), _flat(key), _flat(value), _flat(output)
        found = varlen.backward(*flat, lse[0], plan.sequences(window), scale)
        first, second, third = (one.transpose(0, 1)[None] for one in found)
        return first, second, third
    if _by_tiles(query, key, value):
        found = kernels.attention_backward(
            _in_rows(grad_output).float(),
            query.float(),
            key.float(),
            value.float(),
            output.float(),
            lse,
            plan.tiles(window),
            scale,
            plan.halved,
        )
        first, second, third = (grad.to(query.dtype) for grad in found)
        return first, second, third
    planned = plan.blocks(window)
    adding = any(not block.causal for block, _ in planned)
    grads = [kernels.tokens_first(tensor, torch.float32 if adding else query.dtype) for tensor in (query, key, value)]
    for grad in grads[1:]:  # all others have a block of their own, which comes first
        grad[:, :, : plan.before] = 0
    for block, mask in planned:
        asked = [_rows(tensor, block) for tensor in (grad_output, query, output)]
        seen = [_seen(tensor, block) for tensor in (key, value)]
        if block.length * block.keys < SMALL_BLOCK:
            asked, seen = ([tensor.float() for tensor in tensors] for tensors in (asked, seen))
        parts = _backward(
            *asked[:2],
            *seen,
            asked[2],
            _rows(lse, block),
            0.0,
            block.causal and mask is None,
            attn_mask=mask,
            scale=scale,
        )
        places = [_rows(grads[0], block), *(_keys(grad, block) for grad in grads[1:])]
        for place, part in zip(places, parts, strict=True):
            if block.causal:
                place.copy_(part)
            elif len(part) > len(place):  # keys that all stretches see
                place += part.sum(0, keepdim=True, dtype=torch.float32)
            else:
                place += part
    first, second, third = (grad.to(query.dtype) for grad in grads)
    return first, second, third


def _by_tiles(*tensors: Tensor) -> bool:
    """Whether our kernel computes these. Of bfloat16 it makes float32 first, which pays (docs/experiments.md) but
    where torch's kernel multiplies bfloat16 in tiles of the processor's own."""
    if not kernels.fits(*tensors):
        return False
    return tensors[0].dtype == torch.float32 or not torch.cpu.get_capabilities().get("amx_bf16")


def _in_rows(tensor: Tensor) -> Tensor:
    """A gradient may come expanded, or with its last dimension in pieces."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _flat(tensor: Tensor) -> Tensor:
    """A view of [1, H, T, D] as [T, H, D]."""
    return tensor[0].transpose(0, 1)


def _rows(tensor: Tensor, block: Block) -> Tensor:
    """A view of the block's queries in [1, H, T, ...]: [parts, H, length, ...]."""
    part: Tensor = tensor[0, :, block.start : block.stop].unflatten(1, (block.parts, block.length))
    return part.transpose(0, 1)


def _keys(tensor: Tensor, block: Block) -> Tensor:
    """A view of the block's keys in [1, H, T, D]: [parts, H, keys, D], or [1, H, keys, D] of keys that all see."""
    part: Tensor = tensor[0, :, block.key_start : block.key_stop].unflatten(1, (-1, block.keys))
    return part.transpose(0, 1)


def _seen(tensor: Tensor, block: Block) -> Tensor:
    """`_keys`, repeated for all stretches."""
    return _keys(tensor, block).expand(block.parts, -1, -1, -1)


def _continued(plan: Plan, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values behind those of the trunk, if there is one: put together anew for each pass, as both of each
    layer would be a good part of what is kept."""
    if plan.trunk is None:
        return key, value
    before_key, before_value = plan.trunk.kept[layer]
    return torch.cat([before_key, key], dim=2), torch.cat([before_value, value], dim=2)


class _ForestAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: int | None, scale: float, layer: int
    ) -> Tensor:
        if plan.becomes is not None:
            plan.becomes.kept.append((key.detach(), value.detach()))
        output, saved = forward(query, *_continued(plan, layer, key, value), plan, window, scale, layer)
        ctx.save_for_backward(query, key, value, output, saved.lse)
        ctx.rest, ctx.layer = saved[5:], layer
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        plan, layer = ctx.rest[0], ctx.layer
        key, value = _continued(plan, layer, key, value)
        into_query, *others = backward(grad, Saved(query, key, value, output, lse, *ctx.rest))
        if plan.trunk is not None:
            plan.trunk.send(layer, *(part[:, :, : plan.before] for part in others))
            others = [part[:, :, plan.before :] for part in others]
        if plan.becomes is not None and layer in plan.becomes.sent:
            sent = plan.becomes.sent.pop(layer)
            others = [(part + more).to(part.dtype) for part, more in zip(others, sent, strict=True)]
        return into_query, *others, None, None, None, None


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
