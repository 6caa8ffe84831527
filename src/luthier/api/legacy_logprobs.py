"""Log-probabilities in the shape of /completions: four lists side by side, a token at each place.

Does not know: requests, answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.api.speak import Said
from luthier.data.tokenizer import Tokenizer
from luthier.spec.serving import Token

NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


class Lines:
    """The lists of one answer. `alternatives` is how many likeliest tokens are told at each place."""

    def __init__(self, tokenizer: Tokenizer, alternatives: int) -> None:
        self._tokenizer = tokenizer
        self._alternatives = alternatives
        self._lists: dict[str, list[Any]] = {name: [] for name in NAMES}
        self._told = 0

    def prompt(self, tokens: Sequence[Token]) -> None:
        """The echoed prompt. Its first token has no log-probability, whatever nobody wrote before it."""
        stream, offset = self._tokenizer.stream(), 0
        for number, token in enumerate(tokens):
            self._add(token if number else Token(id=token.id), offset)
            offset += len(stream.push(token.id))

    def answer(self, said: Said, before: int) -> None:
        """A token of the answer, `before` characters of echo before it."""
        self._add(said.token, before + said.offset)

    def all(self) -> dict[str, list[Any]]:
        return self._lists

    def fresh(self) -> dict[str, list[Any]] | None:
        """What came since the last call; None for nothing."""
        since, self._told = self._told, len(self._lists["tokens"])
        return {name: line[since:] for name, line in self._lists.items()} if self._told > since else None

    def _add(self, token: Token, offset: int) -> None:
        values = (self._name(token.id), _number(token.logprob), self._top(token), offset)
        for name, value in zip(NAMES, values, strict=True):
            self._lists[name].append(value)

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens by name, and the chosen one; of two with one name the likelier counts."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for number, value in [*token.top[: self._alternatives], (token.id, token.logprob)]:
            name = self._name(number)
            top[name] = max(top.get(name, LOWEST), value)
        return top

    def _name(self, number: int) -> str:
        """A token's text; bytes that are no whole character are spelt `bytes:\\xe4\\xbd`."""
        content = self._tokenizer.token_bytes(number)
        try:
            content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
        return self._tokenizer.token_text(number)


def _number(value: float | None) -> float | None:
    return None if value is None else max(value, LOWEST)
