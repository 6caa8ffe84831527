"""Grammars that the next token must keep to: JSON schemas, any JSON object, Lark. llguidance does the parsing.

Each grammar is compiled once and then copied. Special tokens are never allowed, save a stop id where the grammar may
end. Does not know: models, sampling.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer
from torch import Tensor

from luthier.spec.errors import UserError

KEPT = 64  # compiled grammars
FIELD = "response_format"


class Matcher:
    """Where one sequence is in its grammar."""

    def __init__(self, inner: LLMatcher, stops: Tensor, specials: Tensor) -> None:
        self._inner, self._stops, self._specials = inner, stops, specials

    def forbid(self, logits: Tensor) -> None:
        """Put -inf into `logits` [V] where the grammar allows no token. Raises UserError if nothing is left."""
        if self._inner.is_stopped():
            allowed = torch.zeros(len(logits), dtype=torch.bool)
            allowed[self._stops] = True
        else:
            bits = torch.frombuffer(bytearray(self._inner.compute_bitmask()), dtype=torch.uint8)
            spread = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            allowed = torch.zeros(len(logits), dtype=torch.bool)
            flat = spread.flatten()[: len(logits)].bool()
            allowed[: len(flat)] = flat
            allowed[self._specials] = False
            allowed[self._stops] = self._inner.is_accepting()
        if self._inner.is_error() or not bool(allowed.any()):
            raise UserError("The schema cannot be followed: it leaves nothing that could come next.", param=FIELD)
        logits.masked_fill_(~allowed, float("-inf"))

    def take(self, token: int) -> None:
        if not self._inner.is_stopped():
            self._inner.consume_token(token)


class Grammars:
    """Compiled grammars over one tokenizer file."""

    def __init__(self, tokenizer_file: Path, vocabulary: int) -> None:
        self._file, self._vocabulary = tokenizer_file, vocabulary
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}
        self._compiled: OrderedDict[tuple[object, ...], LLMatcher] = OrderedDict()
        self._specials: Tensor | None = None

    def matcher(self, grammar: dict[str, Any], stop_ids: Sequence[int]) -> Matcher:
        """A fresh matcher. Raises UserError for a schema that cannot be followed."""
        stops = tuple(sorted({stop for stop in stop_ids if stop < self._vocabulary}))
        if not stops:
            raise UserError("A grammar needs a stop id to end with.", param=FIELD)
        key = (json.dumps(grammar, sort_keys=False), stops)
        if key not in self._compiled:
            self._compiled[key] = self._compile(grammar, stops)
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        assert self._specials is not None
        return Matcher(self._compiled[key].deep_copy(), torch.tensor(stops), self._specials)

    def _compile(self, grammar: dict[str, Any], stops: tuple[int, ...]) -> LLMatcher:
        try:
            if "json_schema" in grammar:
                text = LLMatcher.grammar_from_json_schema(grammar["json_schema"])
            elif grammar.get("json_object"):
                text = LLMatcher.grammar_from_json_schema({"type": "object"})
            elif "lark" in grammar:
                text = LLMatcher.grammar_from_lark(grammar["lark"])
            else:
                raise UserError("A grammar is one of json_schema, json_object, lark.", param=FIELD)
        except (ValueError, TypeError) as error:
            raise UserError(f"The schema cannot be used: {error}", param=FIELD) from error
        compiled = LLMatcher(self._tokenizer(stops), text, log_level=0)
        if compiled.is_error():
            reason = compiled.get_error().splitlines()[0]
            raise UserError(f"The schema cannot be followed: {reason}", param=FIELD)
        return compiled

    def _tokenizer(self, stops: tuple[int, ...]) -> LLTokenizer:
        if self._specials is None:
            added = Tokenizer.from_file(str(self._file)).get_added_tokens_decoder()
            special = [number for number, token in added.items() if token.special and number < self._vocabulary]
            self._specials = torch.tensor(special, dtype=torch.long)
        if stops not in self._tokenizers:
            text = Tokenizer.from_file(str(self._file))
            text.no_padding()
            text.no_truncation()
            self._tokenizers[stops] = LLTokenizer(text.to_str(), n_vocab=self._vocabulary, eos_token=list(stops))
        return self._tokenizers[stops]
