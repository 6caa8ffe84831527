"""One forward pass for tokens of many sequences: a lean decoder over the weights of a transformers model.

Tokens of a step lie flat, [T, hidden], those of one sequence side by side; only attention looks at sequences: all that
decode one token attend in a single call over the first slots, a piece of a prompt in a call of its own. Queries,
keys and values come from one matrix product, gate and up from another. Knows Llama, Mistral, Qwen 2 and 3, Gemma and
Gemma 3 (text); `make` gives None for others, and for options that it does not compute. The tests hold it equal to
transformers' own forward.
Does not know: sampling, what is asked, which sequences come next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.serve.lora import Mix, Part, pack
from luthier.serve.memory import Shape, Slots

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"})
PLAIN_ROPE = frozenset({"default", "linear", "llama3", "yarn"})  # frequencies that no sequence's length changes
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
FULL, SLIDING = "full_attention", "sliding_attention"

_packed_linear = torch.ops.mkldnn._linear_pointwise


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of the sequence in `slot`, whose first `start` tokens are in its slot already."""

    slot: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Linear:
    """y = W x + b; `index` is its place in the layout that adapters are stacked over.

    A bfloat16 weight lies as oneDNN's kernels read it. Otherwise they would rearrange it in every call, which takes
    as long as the product of a few rows: on two cores of a Zen 4, 16.9 ms became 9.3 for all layers of the 135M model.
    """

    index: int
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, mix: Mix | None) -> Tensor:
        if self.weight.is_mkldnn:
            y = _packed_linear(x, self.weight, self.bias, "none", [], "")
        else:
            y = F.linear(x, self.weight, self.bias)
        return y if mix is None else mix.add(self.index, x, y, self.bias)


@dataclass(frozen=True, slots=True)
class Layer:
    kind: str  # FULL | SLIDING
    before_attention: Tensor
    qkv: Linear
    head_norm: Tensor | None  # [heads + kv heads, head size]
    out: Linear
    after_attention: Tensor | None  # Gemma 3 norms what a block gives, too
    before_mlp: Tensor
    gate_up: Linear
    down: Linear
    after_mlp: Tensor | None


@dataclass(slots=True)
class _Step:
    """What all layers of one pass share."""

    slots: Slots
    pieces: Sequence[Piece]
    decoding: int  # the first so many pieces are one token each, of slots 0, 1, 2, ...
    places: Tensor  # [T] where keys and values go, in slots x capacity
    rope: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, list[Tensor | None]]  # for the decoding ones together, then for each other piece
    mix: Mix | None


class Decoder:
    """The weights, and how they compute."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        base: Any = model.get_decoder()
        self.config = config
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.head_size = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.eps = float(config.rms_norm_eps)
        self.gemma = str(config.model_type).startswith("gemma")
        self.scale = self.head_size**-0.5
        if config.model_type == "gemma3_text":
            self.scale = float(config.query_pre_attn_scalar) ** -0.5
        self.activate = ACTIVATIONS[activation_of(config)]
        self.window = getattr(config, "sliding_window", None) or 0
        self.rotary = base.rotary_emb
        self.by_kind = config.model_type == "gemma3_text"
        self.layout: list[list[Part]] = []
        self.linears: list[Linear] = []
        self.embedding = base.embed_tokens.weight
        self.dtype = self.embedding.dtype
        self.packs = self.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self.tied = model.get_output_embeddings().weight is base.embed_tokens.weight
        self.embed_scale: Tensor | None = None
        if self.gemma:
            self.embed_scale = torch.tensor(float(config.hidden_size) ** 0.5, dtype=self.dtype)
        kinds = kinds_of(config)
        self.kinds = sorted(set(kinds))
        self.layers = [self._layer(layer, f"model.layers.{n}", kinds[n]) for n, layer in enumerate(base.layers)]
        self.norm = self._norm(base.norm)
        self.head = self._fused([("lm_head", model.get_output_embeddings())])
        self.shape = Shape(len(self.layers), self.kv_heads, self.head_size, self.dtype)
        self.vocabulary = int(self.head.weight.shape[0])

    # --- the weights ------------------------------------------------------------------------------------------------

    def _norm(self, module: Any) -> Tensor:
        return (1.0 + module.weight.float()).to(self.dtype) if self.gemma else module.weight.detach()  # type: ignore[no-any-return]

    def _fused(self, modules: list[tuple[str, Any]]) -> Linear:
        parts, start = [], 0
        for name, module in modules:
            parts.append(Part(name, start, start + module.weight.shape[0]))
            start = parts[-1].end
        self.layout.append(parts)
        weights = [module.weight.detach() for _, module in modules]
        biases = [module.bias for _, module in modules]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [torch.zeros(len(w), dtype=w.dtype) if b is None else b for w, b in zip(weights, biases, strict=True)]
            )
        whole = torch.cat(weights) if len(weights) > 1 else weights[0]
        if self.packs:
            whole = pack(whole)
        if self.packs or len(weights) > 1:  # the model's own copy would double the memory
            for _, module in modules:
                module.weight = nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)
        self.linears.append(Linear(len(self.linears), whole, bias))
        return self.linears[-1]

    def weight_of(self, name: str) -> Tensor:
        """The weight [out, in] of the linear module `name`."""
        for parts, linear in zip(self.layout, self.linears, strict=True):
            for part in parts:
                if part.name == name:
                    whole = linear.weight.to_dense() if linear.weight.is_mkldnn else linear.weight
                    return whole[part.start : part.end]
        raise KeyError(name)

    def _layer(self, layer: Any, name: str, kind: str) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        head_norm = None
        if hasattr(attention, "q_norm"):
            head_norm = torch.cat(
                [
                    self._norm(attention.q_norm).expand(self.heads, -1),
                    self._norm(attention.k_norm).expand(self.kv_heads, -1),
                ]
            )
        both = hasattr(layer, "pre_feedforward_layernorm")
        return Layer(
            kind,
            self._norm(layer.input_layernorm),
            self._fused(
                [(f"{name}.self_attn.{part}", getattr(attention, part)) for part in ("q_proj", "k_proj", "v_proj")]
            ),
            head_norm,
            self._fused([(f"{name}.self_attn.o_proj", attention.o_proj)]),
            self._norm(layer.post_attention_layernorm) if both else None,
            self._norm(layer.pre_feedforward_layernorm if both else layer.post_attention_layernorm),
            self._fused([(f"{name}.mlp.{part}", getattr(mlp, part)) for part in ("gate_proj", "up_proj")]),
            self._fused([(f"{name}.mlp.down_proj", mlp.down_proj)]),
            self._norm(layer.post_feedforward_layernorm) if both else None,
        )

    # --- the pass ---------------------------------------------------------------------------------------------------

    def forward(self, pieces: Sequence[Piece], slots: Slots, mix: Mix | None) -> Tensor:
        """States [T, hidden] of the pieces' tokens, after the last norm; keys and values go into `slots`.

        Pieces of one token for slots 0, 1, 2, ... come first and attend together. `slots` has room for all.
        """
        step = self._prepare(pieces, slots, mix)
        x = F.embedding(torch.tensor([token for piece in pieces for token in piece.tokens]), self.embedding)
        if self.embed_scale is not None:
            x = x * self.embed_scale
        for number, layer in enumerate(self.layers):
            given = self._attend(number, layer, self._rms(x, layer.before_attention), step)
            x = x + (given if layer.after_attention is None else self._rms(given, layer.after_attention))
            gate, up = layer.gate_up(self._rms(x, layer.before_mlp), mix).chunk(2, dim=-1)
            given = layer.down(self.activate(gate) * up, mix)
            x = x + (given if layer.after_mlp is None else self._rms(given, layer.after_mlp))
        return self._rms(x, self.norm)

    def logits(self, states: Tensor, mix: Mix | None) -> Tensor:
        """[N, hidden] -> float32 [N, vocabulary]. `mix` has its rows set for these states."""
        return self.head(states, mix).float()

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _attend(self, number: int, layer: Layer, x: Tensor, step: _Step) -> Tensor:
        heads, kv_heads, size = self.heads, self.kv_heads, self.head_size
        qkv = layer.qkv(x, step.mix).view(len(x), heads + 2 * kv_heads, size)
        turned = qkv[:, : heads + kv_heads]
        if layer.head_norm is not None:
            turned = F.rms_norm(turned, (size,), None, self.eps) * layer.head_norm
        cos, sin = step.rope[layer.kind]
        turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
        kept = step.slots.data[number]
        keys, values = kept[0].view(-1, kv_heads, size), kept[1].view(-1, kv_heads, size)
        keys.index_copy_(0, step.places, turned[:, heads:])
        values.index_copy_(0, step.places, qkv[:, heads + kv_heads :])
        query = turned[:, :heads]
        given = torch.empty(len(x), heads, size, dtype=x.dtype)
        masks = step.masks[layer.kind]
        groups, count = heads // kv_heads, step.decoding
        if count:
            reach = max(piece.end for piece in step.pieces[:count])
            mixed = F.scaled_dot_product_attention(
                query[:count].view(count, kv_heads, groups, size),
                kept[0, :count, :reach].transpose(1, 2),
                kept[1, :count, :reach].transpose(1, 2),
                attn_mask=masks[0],
                scale=self.scale,
            )
            given[:count] = mixed.reshape(count, heads, size)
        at = count
        for piece, mask in zip(step.pieces[count:], masks[1:], strict=True):
            length = len(piece.tokens)
            # The heads of a group share their keys: as so many more queries of one head, without copying keys.
            own = query[at : at + length].view(length, kv_heads, groups, size).permute(1, 2, 0, 3)
            mixed = F.scaled_dot_product_attention(
                own.reshape(1, kv_heads, groups * length, size),
                kept[0, piece.slot, : piece.end].transpose(0, 1)[None],
                kept[1, piece.slot, : piece.end].transpose(0, 1)[None],
                attn_mask=mask,
                scale=self.scale,
            )
            given[at : at + length] = (
                mixed.view(kv_heads, groups, length, size).permute(2, 0, 1, 3).reshape(length, heads, size)
            )
            at += length
        return layer.out(given.view(len(x), heads * size), step.mix)

    def _prepare(self, pieces: Sequence[Piece], slots: Slots, mix: Mix | None) -> _Step:
        decoding = 0
        while decoding < len(pieces) and len(pieces[decoding].tokens) == 1 and pieces[decoding].slot == decoding:
            decoding += 1
        positions = torch.tensor([place for piece in pieces for place in range(piece.start, piece.end)])
        places = torch.tensor(
            [piece.slot * slots.capacity + place for piece in pieces for place in range(piece.start, piece.end)]
        )
        return _Step(
            slots,
            pieces,
            decoding,
            places,
            {kind: self._rope(positions, kind) for kind in self.kinds},
            {kind: self._masks(pieces, decoding, kind) for kind in self.kinds},
            mix,
        )

    def _rope(self, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, head size]; sin carries the sign that rotating the halves brings."""
        like = self.embedding[:1]
        more = (kind,) if self.by_kind else ()
        cos, sin = self.rotary(like, positions[None], *more)
        sin = sin.clone()
        sin[..., : self.head_size // 2].neg_()
        return cos[0][:, None], sin[0][:, None]

    def _masks(self, pieces: Sequence[Piece], decoding: int, kind: str) -> list[Tensor | None]:
        window = self.window if kind == SLIDING else 0
        groups = self.heads // self.kv_heads
        masks: list[Tensor | None] = [None]
        if decoding:
            ends = torch.tensor([piece.end for piece in pieces[:decoding]])[:, None]
            keys = torch.arange(int(ends.max()))[None]
            seen = keys < ends
            if window:
                seen &= keys >= ends - window
            if not bool(seen.all()):
                masks[0] = self._additive(seen)[:, None, None, :]
        for piece in pieces[decoding:]:
            queries = torch.arange(piece.start, piece.end)[:, None]
            keys = torch.arange(piece.end)[None]
            seen = keys <= queries
            if window:
                seen &= keys > queries - window
            masks.append(self._additive(seen).repeat(groups, 1)[None, None])
        return masks

    def _additive(self, seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, float("-inf"))


def activation_of(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))


def kinds_of(config: Any) -> list[str]:
    """Which attention each layer has."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [SLIDING if getattr(config, "sliding_window", None) else FULL] * config.num_hidden_layers
    return list(kinds)


def make(model: PreTrainedModel) -> Decoder | None:
    """A lean decoder that takes over the weights of `model`; None when it would not compute the same."""
    config: Any = model.config
    if config.model_type not in FAMILIES or activation_of(config) not in ACTIVATIONS:
        return None
    if set(kinds_of(config)) - {FULL, SLIDING}:
        return None
    ropes = config.rope_parameters
    ropes = list(ropes.values()) if all(isinstance(rope, dict) for rope in ropes.values()) else [ropes]
    if any(rope["rope_type"] not in PLAIN_ROPE or rope.get("partial_rotary_factor", 1) != 1 for rope in ropes):
        return None
    odd = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
    if any(getattr(config, name, None) for name in odd) or next(model.parameters()).device.type != "cpu":
        return None
    return Decoder(model)
