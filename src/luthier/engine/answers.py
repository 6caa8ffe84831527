"""Greedy answers of a model to many prompts: timed, remembered by content, interruptible between batches.

An answer that was written before, by the same weights in the same precision to the same ids under the same rules, is
read back: the base is asked once for all runs that are proven on the same rows, and a proof that was killed goes on.
Does not know: what is asked, why.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.answer import answer_text
from luthier.data.render import Renderer
from luthier.engine import generate
from luthier.spec.data import Chat, Completion, Example
from luthier.spec.proof import Cost
from luthier.spec.run import append_line

KEPT_FILES = 64  # models whose answers are remembered; those not asked for longest go first

Progress = Callable[[int, int], None]  # (answered, in all)


@dataclass(frozen=True, slots=True)
class Question:
    """One answer to ask for. `example` tells how to read the ids that come back; `row` is its number in its file."""

    example: Chat | Completion
    prompt: list[int]
    wanted: str


@dataclass(frozen=True, slots=True)
class Answer:
    """New ids; `seconds` is its share of its batch, when it was written; `cached`: that was before."""

    ids: list[int]
    seconds: float
    cached: bool = False


class Memory:
    """Answers of one model on disk: a line each, in a file named after the model."""

    def __init__(self, folder: Path, model: str) -> None:
        """`model` says which weights answer, and how: anything that tells them apart."""
        self.path = folder / f"{hashlib.sha256(model.encode()).hexdigest()[:32]}.jsonl"
        self._known: dict[str, Answer] | None = None

    def get(self, key: str) -> Answer | None:
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def put(self, answers: dict[str, Answer]) -> None:
        """Remember; a disk that does not take it costs only the memory."""
        with suppress(OSError):
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._make_room()
            lines = [
                json.dumps({"key": key, "ids": answer.ids, "seconds": round(answer.seconds, 6)})
                for key, answer in answers.items()
            ]
            append_line(self.path, "\n".join(lines))

    def _read(self) -> dict[str, Answer]:
        known: dict[str, Answer] = {}
        with suppress(OSError):
            os.utime(self.path)  # asked for now
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a half line of a killed process
                    found = json.loads(line)
                    known[found["key"]] = Answer(list(map(int, found["ids"])), float(found["seconds"]), True)
        return known

    def _make_room(self) -> None:
        files = sorted(self.path.parent.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        for old in files[: max(0, len(files) + 1 - KEPT_FILES)]:
            old.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Asker:
    """How answers are asked for; the same for every model, so that they can be compared."""

    renderer: Renderer
    context: int
    sampling: generate.Sampling
    batch_size: int = generate.BATCH_SIZE
    heed: Callable[[], None] = lambda: None

    def ask(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        memory: Memory | None = None,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """Answers in the order of `prompts`. `heed` is called between batches and may raise; what is written by then is
        remembered. Raises what generate raises."""
        keys = [self._key(prompt) for prompt in prompts]
        found = [memory.get(key) if memory else None for key in keys]
        missing = [n for n, answer in enumerate(found) if answer is None]
        missing.sort(key=lambda n: (len(prompts[n]), n))
        done = len(prompts) - len(missing)
        for start in range(0, len(missing), self.batch_size):
            self.heed()
            batch = missing[start : start + self.batch_size]
            fresh = self._write(model, [prompts[n] for n in batch])
            if memory:
                memory.put({keys[n]: answer for n, answer in zip(batch, fresh, strict=True)})
            for n, answer in zip(batch, fresh, strict=True):
                found[n] = answer
            done += len(batch)
            if progress:
                progress(done, len(prompts))
        return [answer for answer in found if answer is not None]

    def latency(self, model: Any, prompts: Sequence[Sequence[int]]) -> float | None:
        """Median seconds of an answer to one of `prompts`, each asked alone."""
        return statistics.median(self._write(model, [prompt])[0].seconds for prompt in prompts) if prompts else None

    def _write(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        begun = time.monotonic()
        done = generate.generate(
            model,
            prompts,
            self.renderer.stop_ids,
            self.renderer.tokenizer.pad_id,
            self.sampling,
            context=self.context,
            batch_size=self.batch_size,
        )
        share = (time.monotonic() - begun) / len(prompts)
        return [Answer(generation.ids, share) for generation in done]

    def _key(self, prompt: Sequence[int]) -> str:
        rules = f"{self.sampling.max_tokens} {self.context} {self.renderer.stop_ids}"
        return hashlib.sha256(rules.encode() + np.asarray(prompt, np.int32).tobytes()).hexdigest()


def cost(prompts: Sequence[Sequence[int]], answers: Sequence[Answer], latency: float | None = None) -> Cost:
    """What these answers took."""
    seconds, tokens = sum(answer.seconds for answer in answers), sum(len(answer.ids) for answer in answers)
    return Cost(
        prompt_tokens=sum(map(len, prompts)),
        answer_tokens=tokens,
        seconds=round(seconds, 4),
        tokens_per_second=round(tokens / seconds, 3) if seconds else None,
        latency=None if latency is None else round(latency, 4),
        cached=sum(answer.cached for answer in answers),
    )


def answer_of(renderer: Renderer, example: Example, ids: Sequence[int]) -> str:
    """Generated ids as the text that is compared with `renderer.question`'s reference."""
    if isinstance(example, Chat):
        return answer_text(renderer.parse(ids))
    stops = set(renderer.stop_ids)
    end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
    return renderer.tokenizer.decode(ids[:end])


def asked_of(example: Example) -> str:
    """What the question was, for people: the prompt, or the last user turn before the answer."""
    if isinstance(example, Completion):
        return example.prompt
    if not isinstance(example, Chat):
        return example.text
    last = max(n for n, turn in enumerate(example.messages) if turn.role == "assistant" and turn.weight)
    before = example.messages[:last]
    asked = [turn.content for turn in before if turn.role == "user"] or [turn.content for turn in before]
    return asked[-1] if asked else ""
