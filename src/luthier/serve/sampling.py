"""Which token comes next, for each sequence by its own rules and its own random generator.

The order is OpenAI's: penalties and bias change the logits, the grammar forbids, temperature and top_p choose.
Log-probabilities are the model's own, before any of that.
Does not know: text, models, who asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.serve.grammar import Matcher
from luthier.spec.serving import Ask, Token

NUCLEUS = 1024  # so many likeliest tokens are looked at first: sorting a whole vocabulary costs milliseconds


class Chooser:
    """The rules of one Ask. `counts` are the tokens it has generated."""

    def __init__(self, ask: Ask, matcher: Matcher | None) -> None:
        self.ask, self.matcher = ask, matcher
        self.generator = torch.Generator().manual_seed(ask.seed % 2**63)
        self.counts: Counter[int] = Counter()
        self.plain = not (ask.frequency_penalty or ask.presence_penalty or ask.logit_bias or matcher is not None)

    @property
    def greedy(self) -> bool:
        return self.ask.temperature == 0

    def shaped(self, logits: Tensor) -> Tensor:
        """[V] -> [V], changed by penalties, bias and grammar."""
        if self.plain:
            return logits
        logits = logits.clone()
        ask = self.ask
        if self.counts and (ask.frequency_penalty or ask.presence_penalty):
            ids = torch.tensor(list(self.counts))
            times = torch.tensor(list(self.counts.values()), dtype=logits.dtype)
            logits[ids] -= ask.frequency_penalty * times + ask.presence_penalty
        if ask.logit_bias:
            ids = torch.tensor(list(ask.logit_bias))
            logits[ids] += torch.tensor(list(ask.logit_bias.values()), dtype=logits.dtype)
        if self.matcher is not None:
            self.matcher.forbid(logits)
        return logits

    def draw(self, logits: Tensor) -> int:
        """A token of `logits` [V], shaped already."""
        if self.greedy:
            return int(logits.argmax())
        chances = (logits.double() / self.ask.temperature).softmax(-1)
        point = torch.rand(1, generator=self.generator, dtype=torch.float64)
        if self.ask.top_p >= 1:
            below = chances.cumsum(-1)
            place = min(int(torch.searchsorted(below, point * below[-1], right=True)), len(below) - 1)
            while chances[place] == 0:  # rounding at the very end
                place -= 1
            return place
        ranked, ids = chances.topk(min(NUCLEUS, len(chances)))
        if float(ranked.sum()) < self.ask.top_p:
            ranked, ids = chances.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        ranked = ranked[before < self.ask.top_p]
        below = ranked.cumsum(-1)
        return int(ids[min(int(torch.searchsorted(below, point * below[-1], right=True)), len(below) - 1)])

    def chose(self, token: int) -> None:
        """The sequence goes on with `token`."""
        self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.take(token)


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Next tokens from finite logits [B, V], row by row."""
    if all(chooser.plain and chooser.greedy for chooser in choosers):
        return logits.argmax(-1).tolist()
    return [chooser.draw(chooser.shaped(row)) for row, chooser in zip(logits, choosers, strict=True)]


def described(logits: Tensor, token: int, alternatives: int | None) -> Token:
    """`token` with its log-probability under raw `logits` [V] and the likeliest `alternatives`."""
    if alternatives is None:
        return Token(id=token)
    logs = logits.log_softmax(-1)
    top: list[tuple[int, float]] = []
    if alternatives:
        values, ids = logs.topk(min(alternatives, len(logs)))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(id=token, logprob=float(logs[token]), top=top)
