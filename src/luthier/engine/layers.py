"""Decoder layers as two functions each, with gradients by hand, over transformers' own modules and weights.

A layer is `_Inward` (norm, queries, keys and values, rotation), attention, and `_Outward` (output projection, norm,
gated MLP, both residuals). What a backward pass needs and a cheap pass can make again (norms, gated activations) is
not kept; frozen weights get no gradient, and nothing below the lowest learning weight gets any. `fuse` says of a model
why it cannot be computed so; it then goes through transformers and PEFT, which are also the slow twin in the tests.

The stream of states from layer to layer, its gradient and the angles of the rotation are float32, whatever the weights
are: the first tokens of a text have states thousands of times larger than what a layer adds to them (Sun et al., 2024,
massive activations), every later token attends to them, and in bfloat16 each layer's share would be rounded away there.

Shapes: T tokens, H hidden. Does not know: how tokens attend (attention.py), where rows part (forest.py), losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from luthier.engine import pointwise, products
from luthier.engine.projection import Projection, taken_apart

# Models whose layers are the ones computed here, whatever their sizes: transformers' class of the decoder.
KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "GemmaModel", "Gemma3TextModel")

Attend = Callable[..., tuple[Tensor, Any]]

_fused: WeakKeyDictionary[nn.Module, Decoder] = WeakKeyDictionary()


def fuse(base: Any) -> str | None:
    """Have `base` (transformers' model, adapters on it or not) computed here from now on; else the reason why not.

    The parameters stay where they are in the model, as views into the matrices that are multiplied.
    """
    decoder = base.get_decoder()
    if type(decoder).__name__ not in KNOWN or not type(decoder).__module__.startswith("transformers.models."):
        return f"{type(decoder).__name__} is not one of {', '.join(KNOWN)}"
    try:
        _fused[base] = Decoder(decoder, base)
    except ValueError as error:
        return str(error)
    return None


def of(base: nn.Module) -> Decoder | None:
    """The fused layers of `base`, if `fuse` made them."""
    return _fused.get(base)


class Norm:
    """An RMSNorm module; Gemma's are written as 1 + weight."""

    def __init__(self, module: Any) -> None:
        self.weight: Parameter = module.weight
        self.shift = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
        self.epsilon: float = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        self.learning = [self.weight] if self.weight.requires_grad else []
        self._frozen = None if self.learning else self._float()

    @property
    def scale(self) -> Tensor:
        """What is multiplied with, [H] float32."""
        return self._float() if self._frozen is None else self._frozen

    def _float(self) -> Tensor:
        return self.weight.detach().float() + self.shift

    def forward(self, rows: Tensor, out: Tensor) -> Tensor:
        return pointwise.norm(rows, self.scale, self.epsilon, out)

    def again(self, rows: Tensor, inverse: Tensor) -> Tensor:
        out = torch.empty_like(rows, dtype=self.weight.dtype)
        pointwise.norm_again(rows, self.scale, inverse, out)
        return out

    def backward(
        self, grad: Tensor, rows: Tensor, inverse: Tensor, out: Tensor, plus: Tensor | None = None
    ) -> list[Tensor]:
        """Gradient of the rows (plus `plus`) into `out`; the gradients of `learning`."""
        own = [torch.zeros(self.weight.shape, device=rows.device) for _ in self.learning]
        pointwise.norm_backward(grad, rows, self.scale, inverse, out, plus, own[0] if own else None)
        return [value.to(self.weight.dtype) for value in own]


class Layer:
    """One decoder layer's weights, as the two functions use them."""

    def __init__(self, module: Any, activation: str, *multiply: products.Product) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.attention = attention
        self.gate = pointwise.GATES[activation]
        self.head_size: int = attention.head_dim
        self.halved = multiply[-1] is products.halved  # then gate and up are kept in half of their size
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], *multiply)
        self.o = Projection([attention.o_proj], *multiply)
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj], *multiply)
        self.down = Projection([mlp.down_proj], *multiply)
        self.queries = self.qkv.parts[0].rows.stop // self.head_size
        self.keys = self.qkv.parts[1].rows.stop // self.head_size - self.queries
        self.before = Norm(module.input_layernorm)
        after = Norm(module.post_attention_layernorm)
        sandwich = hasattr(module, "pre_feedforward_layernorm")
        self.middle = Norm(module.pre_feedforward_layernorm) if sandwich else after
        self.after_attention = after if sandwich else None
        self.after_mlp = Norm(module.post_feedforward_layernorm) if sandwich else None
        self.head_norms = [Norm(attention.q_norm), Norm(attention.k_norm)] if hasattr(attention, "q_norm") else []
        self.inward = [*self.before.learning, *self.qkv.learning, *(w for n in self.head_norms for w in n.learning)]
        self.outward = [
            *self.o.learning,
            *(self.after_attention.learning if self.after_attention else ()),
            *self.middle.learning,
            *self.gate_up.learning,
            *self.down.learning,
            *(self.after_mlp.learning if self.after_mlp else ()),
        ]

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [T, heads, D] as views of their product [T, N]."""
        heads = joined.view(len(joined), -1, self.head_size)
        return heads[:, : self.queries], heads[:, self.queries : -self.keys], heads[:, -self.keys :]

    def turned(self, joined: Tensor) -> Tensor:
        """Queries and keys at once."""
        return joined.view(len(joined), -1, self.head_size)[:, : -self.keys]


class Decoder:
    """All layers of a model. Raises ValueError, before any weight is moved, for one that cannot be computed here."""

    def __init__(self, decoder: Any, base: nn.Module) -> None:
        config = decoder.config
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation not in pointwise.GATES:
            raise ValueError(f"its activation is {activation}")
        if getattr(config, "use_bidirectional_attention", False):
            raise ValueError("its attention looks ahead")
        for name, module in decoder.layers.named_modules():
            if name.endswith("_proj"):
                try:
                    taken_apart(module)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        self.decoder = decoder
        self.layers = [
            Layer(module, activation, products.of(base, number), products.of(base))
            for number, module in enumerate(decoder.layers)
        ]

    def __call__(self, ids: Tensor, positions: Tensor, sources: Tensor, attend: Attend) -> Tensor:
        """Last hidden states, normalised, at `sources` [N, H]; ids and positions [T].

        `attend` is called as transformers calls its attention functions.
        """
        states: Tensor = self.decoder.embed_tokens(ids[None])[0].float()
        turns = list(self._rotations(states, positions))
        for layer, turn in zip(self.layers, turns, strict=True):
            query, key, value, states = _Inward.apply(states, layer, *turn, *layer.inward)  # type: ignore[no-untyped-call]
            attended, _ = attend(
                layer.attention,
                *(heads.transpose(0, 1)[None] for heads in (query, key, value)),
                None,
                scaling=layer.attention.scaling,
                sliding_window=self._window(layer),
            )
            attended = attended.reshape(len(ids), -1)
            if layer is self.layers[-1] and len(sources) < len(ids):  # the rest of it is of no use to anyone
                states, attended = states.index_select(0, sources), attended.index_select(0, sources)
            states = _Outward.apply(states, attended, layer, *layer.outward)  # type: ignore[no-untyped-call]
        normal: Tensor = self.decoder.norm(states).to(attended.dtype)
        return normal if len(sources) < len(ids) else normal.index_select(0, sources)

    def _window(self, layer: Layer) -> int | None:
        """Mistral's is in its config alone; Llama ignores one there."""
        if hasattr(layer.attention, "sliding_window"):
            return layer.attention.sliding_window  # type: ignore[no-any-return]
        return getattr(self.decoder.config, "sliding_window", None) if self._is("MistralModel") else None

    def _is(self, name: str) -> bool:
        return type(self.decoder).__name__ == name

    def _rotations(self, states: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """cos and sin [T, 1, D/2] of each layer: Gemma 3 turns local and global layers differently."""
        known: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            kind = layer.attention.layer_type if self._is("Gemma3TextModel") else ""
            if kind not in known:
                both = self.decoder.rotary_emb(states[None], positions[None], *([kind] if kind else []))
                cos, sin = (whole[0, :, None, : whole.shape[-1] // 2].contiguous() for whole in both)
                known[kind] = cos, sin
            yield known[kind]


class _Inward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, layer: Layer, cos: Tensor, sin: Tensor, *learning: Tensor
    ) -> tuple[Tensor, ...]:
        wide = layer.qkv.room(states)
        inverse = layer.before.forward(states, wide[:, : layer.qkv.inputs])
        joined, low = layer.qkv.forward(wide)
        plain = layer.split(joined)
        query, key, value = plain
        kept: list[Tensor] = []
        if layer.head_norms:
            normal = [torch.empty_like(heads) for heads in plain[:2]]
            kept = [norm.forward(*pair) for norm, *pair in zip(layer.head_norms, plain[:2], normal, strict=True)]
            query, key = normal
        for heads in (query, key) if layer.head_norms else (layer.turned(joined),):
            pointwise.rotate(heads, cos, sin, heads)
        ctx.save_for_backward(states)
        ctx.layer, ctx.turn = layer, (cos, sin)
        ctx.kept = (inverse, low, joined if layer.head_norms else None, kept)
        return query, key, value, states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, (cos, sin), (inverse, low, joined, head_inverses) = ctx.layer, ctx.turn, ctx.kept
        (states,) = ctx.saved_tensors
        ctx.kept = None
        grad = layer.qkv.matrix.new_empty(len(states), layer.qkv.outputs)
        into = layer.split(grad)
        for out, part in zip(into[:2], grads[:2], strict=True):
            pointwise.rotate(part, cos, -sin, out)
        into[2].copy_(grads[2])
        own: list[Tensor] = []
        for number, norm in enumerate(layer.head_norms):
            own += norm.backward(into[number], layer.split(joined)[number], head_inverses[number], into[number])
        back = layer.qkv.backward(grad, low)
        into_normal = back.input() if ctx.needs_input_grad[0] or layer.before.learning else None
        weights = back.weights(layer.before.again(states, inverse)) if layer.qkv.learning else []
        if into_normal is None:
            return (None, None, None, None, *weights, *own)
        out = torch.empty_like(states)
        first = layer.before.backward(into_normal, states, inverse, out, grads[3])
        return (out, None, None, None, *first, *weights, *own)


class _Outward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, attended: Tensor, layer: Layer, *learning: Tensor) -> Tensor:
        wide = layer.o.room(attended)
        wide[:, : layer.o.inputs] = attended
        middle, low_o, after = _closed(layer.o, wide, layer.after_attention, states)
        wide = layer.gate_up.room(middle)
        inverse = layer.middle.forward(middle, wide[:, : layer.gate_up.inputs])
        both, low_g = layer.gate_up.forward(wide)
        wide = layer.down.room(both)
        kept = torch.empty_like(both, dtype=torch.bfloat16) if layer.halved else None
        layer.gate.apply(both, wide[:, : layer.down.inputs], kept)
        both = both if kept is None else kept
        output, low_d, end = _closed(layer.down, wide, layer.after_mlp, middle)
        ctx.save_for_backward(attended)
        ctx.layer = layer
        ctx.kept = (middle, inverse, both, (low_o, low_g, low_d), after, end)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer: Layer = ctx.layer
        middle, inverse, both, (low_o, low_g, low_d), after, end = ctx.kept
        (attended,) = ctx.saved_tensors
        ctx.kept = None
        before_end, end_weights = _opened(grad, layer.after_mlp, end, attended.dtype)
        back = layer.down.backward(before_end, low_d)
        into_gated = back.input()
        gated = torch.empty_like(into_gated) if layer.down.learning else None
        into = torch.empty_like(both, dtype=attended.dtype) if both.dtype != attended.dtype else both
        layer.gate.back(into_gated, both, into, gated)
        weights = [*back.weights(gated), *end_weights] if gated is not None else end_weights
        del into_gated, gated, both
        back = layer.gate_up.backward(into, low_g)
        lower = ctx.needs_input_grad[0] or ctx.needs_input_grad[1] or layer.o.learning or layer.middle.learning
        lower = lower or (layer.after_attention is not None and layer.after_attention.learning)
        into_normal = back.input() if lower else None
        if layer.gate_up.learning:
            weights = [*back.weights(layer.middle.again(middle, inverse)), *weights]
        if into_normal is None:
            return (None, None, None, *weights)
        out = torch.empty_like(middle)
        middle_weights = layer.middle.backward(into_normal, middle, inverse, out, grad)
        before_after, after_weights = _opened(out, layer.after_attention, after, attended.dtype)
        back = layer.o.backward(before_after, low_o)
        into_attended = back.input() if ctx.needs_input_grad[1] else None
        first = back.weights(attended) if layer.o.learning else []
        return (out, into_attended, None, *first, *after_weights, *middle_weights, *weights)


def _closed(
    projection: Projection, wide: Tensor, norm: Norm | None, residual: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """(residual + projection, low product, what `_opened` needs): with a norm in between where the family has one."""
    if norm is None:
        return *projection.forward(wide, residual), None
    plain, low = projection.forward(wide)
    output = torch.empty_like(residual)
    inverse = norm.forward(plain, output)
    return output.add_(residual), low, (plain, inverse)


def _opened(
    grad: Tensor, norm: Norm | None, kept: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The gradient before the closing norm in the products' dtype, and its weight's if that learns."""
    if norm is None or kept is None:
        return grad.to(dtype), []
    out = torch.empty_like(grad, dtype=dtype)
    own = norm.backward(grad, *kept, out)
    return out, own
