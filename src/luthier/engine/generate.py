"""Tokens in, tokens out: batched decoding with a key-value cache, on transformers' own forward.

Prompts are sorted by length and padded on the left, with positions counted from each row's first real token, so that a
row's answer does not depend on its neighbours. What all prompts have in common (a system prompt, few-shot examples) is
computed once and handed to every batch. A finished row leaves its batch.

Laws (held by tests, float32): a batch equals its prompts one by one, in any order; cached equals uncached; a shared
prefix equals none; the same seed gives the same answer whatever else is in the batch.
Does not know: text, templates, where a model came from.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from luthier.engine import attention
from luthier.engine.loss import Head
from luthier.engine.step import inner, resting
from luthier.spec.errors import BadSetting, UserError

BATCH_SIZE = 32  # on a CPU, 64 gains another tenth and doubles the cache
BATCH_TOKENS = 32_768  # most cached tokens of one batch: bounds memory when prompts are long
MIN_SHARED = 16  # a shorter common prefix is not worth a forward pass of its own

FinishReason = Literal["stop", "length"]
OnToken = Callable[[int, int], None]  # (index of the prompt, token id)
Progress = Callable[[int, int], None]  # (prompts answered, prompts in all)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a next token is chosen. Temperature 0 takes the most likely one; top_p keeps the smallest set of tokens
    whose probabilities sum to at least that (nucleus sampling: Holtzman et al., 2020). Raises BadSetting."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise _bad("max_tokens", self.max_tokens, "1 or more")
        if not 0 <= self.temperature <= 100:  # also refuses NaN
            raise _bad("temperature", self.temperature, "0 (always the likeliest token) or more, 2 is already wild")
        if not 0 < self.top_p <= 1:
            raise _bad("top_p", self.top_p, "more than 0 and at most 1")


@dataclass(slots=True)
class Generation:
    """New ids of one prompt; with reason `stop` the last of them is the stop token."""

    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling,
    *,
    context: int,
    batch_size: int = BATCH_SIZE,
    on_token: OnToken | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Continue every prompt until a token of `stop_ids`, `max_tokens`, or until it fills `context` tokens.

    `model` is a transformers causal model, with or without PEFT around it. `on_token` sees every token as it comes;
    what it raises ends the generation. Raises UserError for a prompt that is empty or leaves no room in the context.
    """
    limits = [_room(index, prompt, context, sampling.max_tokens) for index, prompt in enumerate(prompts)]
    done = [Generation() for _ in prompts]
    choose = _Chooser(sampling)
    finished = 0
    with own_attention(model), resting(model), torch.no_grad():
        shared = _shared(model, prompts, max(map(len, prompts), default=0) + sampling.max_tokens)
        for rows in _batches(prompts, limits, batch_size):
            for row, token, reason in _decode(model, rows, prompts, shared, pad_id, limits, set(stop_ids), choose):
                done[row].ids.append(token)
                if on_token:
                    on_token(row, token)
                if reason:
                    done[row].finish_reason = reason
                    finished += 1
                    if progress:
                        progress(finished, len(prompts))
    return done


def _decode(
    model: Any,
    rows: list[int],
    prompts: Sequence[Sequence[int]],
    shared: _Shared,
    pad_id: int,
    limits: Sequence[int],
    stops: set[int],
    choose: _Chooser,
) -> Iterator[tuple[int, int, FinishReason | None]]:
    """(row, token, why it ended or None) in the order of decoding; one forward pass gives every row one token."""
    device = shared.device
    # The head gets [B, H]: for [B, 1, H] cut from a prompt's states, torch copies the whole matrix once for each row.
    decoder, head = inner(model).get_decoder(), Head(inner(model))
    cache = shared.cache_for(len(rows))
    tokens, mask, positions = (
        tensor.to(device) for tensor in _left_padded([prompts[row] for row in rows], len(shared), pad_id)
    )
    padded = not bool(mask.all())
    count = 0
    while rows:
        count += 1
        output = decoder(
            input_ids=tokens,
            attention_mask=mask if padded else None,
            position_ids=positions,
            cache=cache,
            use_cache=True,
        )
        chosen = choose(head(output.last_hidden_state[:, -1]), rows)
        staying = []
        for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            reason: FinishReason | None = "stop" if token in stops else "length" if count == limits[row] else None
            yield row, token, reason
            if reason is None:
                staying.append(place)
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        if len(staying) < len(rows):
            rows = [rows[place] for place in staying]
            keep = torch.tensor(staying, dtype=torch.long, device=device)
            tokens, positions, mask = tokens[keep], positions[keep], mask[keep]
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)


def _left_padded(prompts: Sequence[Sequence[int]], skip: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """What follows the first `skip` ids of each prompt: (ids [B, S], mask [B, skip + S], positions [B, S]).

    The mask says what is real, never the ids: a pad token may also be a real one.
    """
    width = max(map(len, prompts)) - skip
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), skip + width), dtype=torch.long)
    mask[:, :skip] = 1
    for place, prompt in enumerate(prompts):
        new = torch.tensor(list(prompt[skip:]), dtype=torch.long)
        ids[place, width - len(new) :] = new
        mask[place, skip + width - len(new) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)[:, skip:]
    return ids, mask, positions


class _Shared:
    """Keys and values of the ids with which all prompts begin; empty when sharing is not worth it or not exact."""

    def __init__(self, config: Any, device: torch.device) -> None:
        self.device = device
        self.cache = DynamicCache(config=config)

    def __len__(self) -> int:
        return int(self.cache.get_seq_length())

    def cache_for(self, rows: int) -> Any:
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


def _shared(model: Any, prompts: Sequence[Sequence[int]], reach: int) -> _Shared:
    """Compute the common prefix once. `reach` is the most tokens that a row can come to.

    Behind a shared prefix the padding lies between prefix and prompt. Attention that looks at all tokens does not
    mind; a sliding window counts padding as distance, so there prefixes are shared only while no window slides.
    """
    base = inner(model)
    shared = _Shared(base.config, next(base.parameters()).device)
    layers: list[Any] = shared.cache.layers
    windows = [layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)]
    common = _common_prefix(prompts)
    if len(common) < MIN_SHARED or reach > min(windows, default=reach):
        return shared
    ids = torch.tensor([common], dtype=torch.long, device=shared.device)
    base.get_decoder()(input_ids=ids, cache=shared.cache, use_cache=True)
    return shared


def _common_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Ids that every prompt begins with, leaving each at least one of its own; empty for a single prompt."""
    if len(prompts) < 2:
        return []
    first, last = min(map(list, prompts)), max(map(list, prompts))  # in sorted order all others lie between
    length = min(len(first), len(last), min(map(len, prompts)) - 1)
    return first[: next((n for n in range(length) if first[n] != last[n]), length)]


def _batches(prompts: Sequence[Sequence[int]], limits: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts of like length, at most `batch_size` and about BATCH_TOKENS cached tokens together."""
    if batch_size < 1:
        raise _bad("batch_size", batch_size, "1 or more")
    batch: list[int] = []
    reach = 0
    for row in sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row)):
        own = len(prompts[row]) + limits[row]
        if batch and (len(batch) == batch_size or (len(batch) + 1) * max(reach, own) > BATCH_TOKENS):
            yield batch
            batch, reach = [], 0
        batch.append(row)
        reach = max(reach, own)
    if batch:
        yield batch


class _Chooser:
    """Next tokens from logits [B, V]. Each prompt has a random generator of its own, so batching changes nothing."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generators: dict[int, torch.Generator] = {}

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = (logits.double() / self.sampling.temperature).softmax(dim=-1)
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked
        ranked = ranked.masked_fill(before >= self.sampling.top_p, 0.0)
        below = ranked.cumsum(dim=-1)
        draws = torch.stack([torch.rand(1, generator=self._generator(row), dtype=torch.float64) for row in rows])
        place = torch.searchsorted(below, draws.to(below.device) * below[:, -1:], right=True)
        last = (ranked > 0).sum(dim=-1, keepdim=True) - 1
        return ids.gather(1, torch.minimum(place, last)).squeeze(1)

    def _generator(self, row: int) -> torch.Generator:
        if row not in self._generators:
            digest = hashlib.sha256(f"{self.sampling.seed}:{row}".encode()).digest()
            self._generators[row] = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return self._generators[row]


def context_of(model: Any) -> int:
    """How many tokens the model reads at most, answer included."""
    return int(inner(model).config.get_text_config().max_position_embeddings)


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """While inside, a model that trains on forests uses transformers' `sdpa`, which knows caches."""
    base = inner(model)
    if base.config._attn_implementation != attention.NAME:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(attention.NAME)


def _room(index: int, prompt: Sequence[int], context: int, max_tokens: int) -> int:
    """How many tokens this prompt may get."""
    if not prompt:
        raise UserError(f"Prompt {index + 1} is empty: there is nothing to continue.", param="prompt")
    if len(prompt) >= context:
        raise UserError(
            f"The prompt has {len(prompt):,} tokens, and the model reads at most {context:,}, its answer included.",
            param="prompt",
            hint="Shorten it, or leave out earlier turns.",
        )
    return min(max_tokens, context - len(prompt))


def _bad(name: str, found: float, wanted: str) -> BadSetting:
    return BadSetting(f"--{name.replace('_', '-')}: found {found}; wanted {wanted}.", param=name)
