"""What a scheduler needs of a model: slots for sequences, states of their next tokens, logits. Two ways to give it.

`Lean` runs one forward pass for all sequences of a step, whatever their adapters, and remembers prefixes. `Whole` asks
transformers' module for one sequence after the other: slower, for architectures that the lean decoder does not know.
Does not know: sampling, what is asked, which sequences come next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.serve import decoder, lora
from luthier.serve.decoder import Decoder, Piece
from luthier.serve.lora import Adapter, Mix
from luthier.serve.memory import Prefixes, Shape, Slots


class Compute(Protocol):
    name: str
    vocabulary: int
    modules: set[str]  # linear modules that an adapter may change
    budget: int  # tokens whose keys and values are held at most

    def fits(self, rows: int, length: int) -> bool: ...
    def reserve(self, rows: int, length: int) -> None: ...
    def recall(self, slot: int, owner: str, tokens: Sequence[int]) -> int: ...
    def remember(self, slot: int, owner: str, tokens: Sequence[int]) -> None: ...
    def move(self, source: int, target: int, length: int) -> None: ...
    def clear(self, slot: int, length: int) -> None: ...
    def give_back(self) -> None: ...
    def states(self, pieces: Sequence[Piece], adapters: Sequence[Adapter | None]) -> Tensor: ...
    def logits(self, states: Tensor, adapters: Sequence[Adapter | None]) -> Tensor: ...
    def weight_of(self, module: str) -> Tensor: ...


class Lean:
    """The lean decoder with its slots, its remembered prefixes and the adapters of the moment."""

    name = "lean"

    def __init__(self, made: Decoder, kv_tokens: int, prefix_bytes: int) -> None:
        self.decoder = made
        self.budget = kv_tokens
        self.slots = Slots(made.shape, kv_tokens)
        self.prefixes = Prefixes(prefix_bytes)
        self.vocabulary = made.vocabulary
        self.modules = {part.name for parts in made.layout for part in parts}
        if made.tied:
            self.modules.discard("lm_head")  # tied: an adapter on it would have changed the embeddings, too
        self._mix: Mix | None = None

    def fits(self, rows: int, length: int) -> bool:
        return self.slots.fits(rows, length)

    def reserve(self, rows: int, length: int) -> None:
        self.slots.reserve(rows, length)

    def recall(self, slot: int, owner: str, tokens: Sequence[int]) -> int:
        """Put what is known of `tokens` into `slot`; how many tokens that is."""
        at = 0
        for block in self.prefixes.find(owner, tokens):
            end = at + block.shape[2]
            self.slots.data[:, :, slot, at:end] = block
            at = end
        return at

    def remember(self, slot: int, owner: str, tokens: Sequence[int]) -> None:
        self.prefixes.keep(owner, tokens, self.slots.data[:, :, slot])

    def move(self, source: int, target: int, length: int) -> None:
        self.slots.move(source, target, length)

    def clear(self, slot: int, length: int) -> None:
        self.slots.clear(slot, length)

    def give_back(self) -> None:
        self.slots.give_back()

    def states(self, pieces: Sequence[Piece], adapters: Sequence[Adapter | None]) -> Tensor:
        """[T, hidden] for the tokens of `pieces`; `adapters` has one for each piece."""
        mix = self._mixed(adapters)
        if mix is not None:
            places = _places(mix, adapters)
            mix.set_rows([place for piece, place in zip(pieces, places, strict=True) for _ in piece.tokens])
        return self.decoder.forward(pieces, self.slots, mix)

    def logits(self, states: Tensor, adapters: Sequence[Adapter | None]) -> Tensor:
        """[N, hidden] -> [N, V]; `adapters` has one for each row."""
        mix = self._mix if any(adapters) else None
        if mix is not None:
            mix.set_rows(_places(mix, adapters))
        return self.decoder.logits(states, mix)

    def weight_of(self, module: str) -> Tensor:
        return self.decoder.weight_of(module)

    def _mixed(self, adapters: Sequence[Adapter | None]) -> Mix | None:
        """A stack that holds all of `adapters`: the last one while it does and has not too many others."""
        wanted = {adapter.key: adapter for adapter in adapters if adapter is not None}
        if not wanted:
            return None
        mix = self._mix
        there = set() if mix is None else {adapter.key for adapter in mix.adapters}
        if mix is None or wanted.keys() - there or len(there) > 2 * len(wanted):
            active = [wanted[key] for key in sorted(wanted)]
            mix = self._mix = lora.stack(active, self.decoder.layout, self.decoder.dtype)
        return mix


def _places(mix: Mix, adapters: Sequence[Adapter | None]) -> list[int]:
    place = {adapter.key: number for number, adapter in enumerate(mix.adapters, start=1)}
    return [0 if adapter is None else place[adapter.key] for adapter in adapters]


class Whole:
    """transformers' own module, a cache for each sequence, adapters through hooks on its linear layers."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel, kv_tokens: int) -> None:
        self.model = model
        self.budget = kv_tokens
        self.caches: dict[int, Any] = {}
        self.adapter: Adapter | None = None
        config: Any = model.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.modules = set()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                self.modules.add(name)
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def changed(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            change = self.adapter.changes.get(name) if self.adapter else None
            if change is None:
                return output
            if change.gain is not None:
                bias = getattr(module, "bias", None)
                gain = change.gain.to(output.dtype)
                output = output * gain if bias is None else (output - bias) * gain + bias
            return output + given[0] @ change.a.T.to(output.dtype) @ change.b.T.to(output.dtype)

        return changed

    def fits(self, rows: int, length: int) -> bool:
        return rows * length <= self.budget

    def reserve(self, rows: int, length: int) -> None:
        pass

    def recall(self, slot: int, owner: str, tokens: Sequence[int]) -> int:
        return 0

    def remember(self, slot: int, owner: str, tokens: Sequence[int]) -> None:
        pass

    def move(self, source: int, target: int, length: int) -> None:
        self.caches[target] = self.caches.pop(source)

    def clear(self, slot: int, length: int) -> None:
        self.caches.pop(slot, None)

    def give_back(self) -> None:
        self.caches.clear()

    def states(self, pieces: Sequence[Piece], adapters: Sequence[Adapter | None]) -> Tensor:
        given = []
        for piece, adapter in zip(pieces, adapters, strict=True):
            self.adapter = adapter
            if piece.start == 0:
                self.caches[piece.slot] = DynamicCache(config=self.model.config)
            output = self.model(
                input_ids=torch.tensor([list(piece.tokens)]), cache=self.caches[piece.slot], use_cache=True
            )
            given.append(output.logits[0].float())
        return torch.cat(given)

    def logits(self, states: Tensor, adapters: Sequence[Adapter | None]) -> Tensor:
        return states  # heads differ: some scale or cap what they give, so the model's own has been asked

    def weight_of(self, module: str) -> Tensor:
        weight: Tensor = self.model.get_submodule(module).weight  # type: ignore[assignment]
        return weight.T if isinstance(self.model.get_submodule(module), Conv1D) else weight


def choose(model: PreTrainedModel, kv_tokens: int | None, prefix_bytes: int, memory: int) -> Compute:
    """The lean way when it computes the same. `kv_tokens` None: as many as a quarter of `memory` bytes holds."""
    made = decoder.make(model)
    config: Any = model.config.get_text_config()
    if kv_tokens is None:
        heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        shape = made.shape if made else Shape(int(config.num_hidden_layers), heads, size, model.dtype)
        kv_tokens = max(int(config.max_position_embeddings), memory // 4 // shape.bytes_per_token)
    return Whole(model, kv_tokens) if made is None else Lean(made, kv_tokens, prefix_bytes)
