"""The honest rival of tuning: training rows shown in the prompt, those that are most like the question.

Nearest by TF-IDF of character n-grams, which needs no words and no model (retrieved examples: Liu et al., 2022). The
nearest stands last, next to the question. A training row that asks just what the question asks is never shown: it would
give the answer away. Does not know: tokens; what fits into a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from luthier.data.rows import normal, parts
from luthier.spec.data import Chat, Completion, Example, Message

MOST_ROWS = 5_000  # training rows that are searched
SEPARATOR = "\n\n"  # between examples of plain prompts
LONGEST = 4_000  # characters of a prompt that are compared
BATCH = 256


class Neighbours:
    """The training rows, ready to be searched."""

    def __init__(self, rows: Sequence[Example], seed: int = 0) -> None:
        """Of more than MOST_ROWS rows that many are taken, the same ones for the same `seed`."""
        from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]

        kept = [row for row in rows if isinstance(row, Chat | Completion) and parts(row)[0]]
        if len(kept) > MOST_ROWS:
            picked = np.random.default_rng(seed).choice(len(kept), MOST_ROWS, replace=False)
            kept = [kept[n] for n in sorted(picked)]
        self.rows: list[Chat | Completion] = kept
        self._asked = [normal(parts(row)[0]) for row in kept]
        self._weigh = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True, dtype=np.float32)
        texts = [text[-LONGEST:] for text in self._asked]
        self._matrix = self._weigh.fit_transform(texts) if texts and any(texts) else None

    def nearest(self, questions: Sequence[Example], count: int) -> list[list[Chat | Completion]]:
        """For each question up to `count` training rows of its own kind, the nearest first."""
        if self._matrix is None or count < 1:
            return [[] for _ in questions]
        found = []
        for start in range(0, len(questions), BATCH):
            part = questions[start : start + BATCH]
            asked = [normal(parts(question)[0]) for question in part]
            likeness = (self._weigh.transform([text[-LONGEST:] for text in asked]) @ self._matrix.T).toarray()
            found += [
                self._picked(question, text, np.argsort(-row, kind="stable").tolist(), count)
                for question, text, row in zip(part, asked, likeness, strict=True)
            ]
        return found

    def _picked(self, question: Example, asked: str, order: Sequence[int], count: int) -> list[Chat | Completion]:
        chosen: list[Chat | Completion] = []
        for n in order:
            if len(chosen) == count:
                break
            if type(self.rows[n]) is type(question) and self._asked[n] != asked:
                chosen.append(self.rows[n])
        return chosen


def with_examples(question: Chat | Completion, shown: Sequence[Chat | Completion]) -> Chat | Completion:
    """The question with `shown` (nearest first) before it: in a chat as earlier turns after its system message, in a
    plain prompt as text. Answers of shown turns are context, not learnt."""
    if isinstance(question, Completion):
        texts = [row.prompt + row.completion for row in reversed(shown) if isinstance(row, Completion)]
        return replace(question, prompt=SEPARATOR.join([*texts, question.prompt]))
    lead = 0
    while lead < len(question.messages) and question.messages[lead].role in ("system", "developer"):
        lead += 1
    turns = [turn for row in reversed(shown) if isinstance(row, Chat) for turn in _turns(row)]
    return replace(question, messages=(*question.messages[:lead], *turns, *question.messages[lead:]))


def _turns(row: Chat) -> list[Message]:
    """What was said, from the first turn after the system message to the last learnt answer."""
    last = max((n for n, turn in enumerate(row.messages) if turn.role == "assistant" and turn.weight), default=-1)
    turns = [turn for turn in row.messages[: last + 1] if turn.role not in ("system", "developer")]
    return [replace(turn, weight=0) if turn.role == "assistant" else turn for turn in turns]


def cut(answer: str, wanted: str) -> str:
    """The answer to a plain prompt with examples, up to where the model goes on to an example of its own."""
    return answer if SEPARATOR in wanted.strip() else answer.lstrip("\n").partition(SEPARATOR)[0]
