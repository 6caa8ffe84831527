"""POST /completions: prompts in, their continuations out, whole or as they come.

A prompt stays exactly as it is: no template, the same ids that prompt/completion files are trained with.
Does not know: how tokens are computed (serve).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from luthier.api import inference
from luthier.api.asking import At
from luthier.api.errors import ApiError
from luthier.api.inference import MOST_CHOICES, Sampling, asks, room, usage
from luthier.api.legacy_logprobs import Lines
from luthier.api.sending import Events, while_connected
from luthier.api.services import Services
from luthier.api.speak import Piece, Speaker, speak
from luthier.api.voices import Voice, find_voice
from luthier.data.render import Renderer
from luthier.spec.serving import Ask
from luthier.store.db import new_id

router = APIRouter(tags=["completions"])
DEFAULT_TOKENS = 16
MOST_ALTERNATIVES = 5
MOST_BEST = 20
MOST_PROMPTS = 2048
MOST_ANSWERS = 4096  # prompts times choices of one request

FIELDS: dict[str, tuple[str, str]] = {
    **inference.SAMPLING_FIELDS,
    "prompt": ("supported", "A string, strings, token ids, or lists of them; default: the end-of-text token."),
    "max_tokens": ("supported", "Default 16; 0 with echo scores the prompt. Bounded by the rest of the context."),
    "echo": ("supported", "The first token has no log-probability."),
    "logprobs": ("supported", "0 to 5, in the shape of this route; 0 tells of the chosen tokens only."),
    "best_of": ("supported", "0 to 20, at least n: the likeliest by the mean log-probability of their tokens."),
    "suffix": ("refused", "the models continue a text and cannot fill one in."),
    "any other": ("ignored", "Clients may know more than this server."),
}


class CompletionRequest(Sampling):
    prompt: Any = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    best_of: Annotated[int, Field(ge=0, le=MOST_BEST)] | None = None
    suffix: str | None = None

    @property
    def tries(self) -> int:
        """Answers to compute for each prompt."""
        return self.choices if self.best_of is None else self.best_of

    def check(self) -> None:
        """What the fields cannot say each for itself. Raises ApiError 400."""
        inference.refuse({"suffix": self.suffix or None}, FIELDS)
        self.check_stream()
        if self.tries < self.choices:
            raise ApiError(400, f"best_of: found {self.tries}, wanted at least n, {self.choices}.", param="best_of")
        if self.stream and self.tries > self.choices:
            raise ApiError(400, "best_of: the best cannot be known while answers stream.", param="best_of")

    def prompts(self) -> list[str | list[int]]:
        """Raises ApiError 400."""
        asked = self.prompt
        if asked is None:
            return [""]
        if isinstance(asked, str):
            return [asked]
        if isinstance(asked, list) and asked:
            if all(_is_id(one) for one in asked):
                return [asked]
            if len(asked) <= MOST_PROMPTS and (
                all(isinstance(one, str) for one in asked)
                or all(isinstance(one, list) and one and all(_is_id(id) for id in one) for one in asked)
            ):
                return asked
        wanted = f"a string, up to {MOST_PROMPTS} strings, token ids, or lists of token ids"
        raise ApiError(400, f"prompt: wanted {wanted}.", param="prompt")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


@router.post("/completions", response_model=None, summary="Continue a text")
async def create(asked: CompletionRequest, request: Request, at: At) -> Response:
    """Streams with `stream: true`."""
    return await complete(at, asked, request)


async def complete(services: Services, asked: CompletionRequest, request: Request) -> Response:
    text = await anyio.to_thread.run_sync(prepare, services, asked)
    if asked.stream:
        return Events(text.chunks())
    return JSONResponse(await while_connected(request, text.whole()))


def prepare(services: Services, asked: CompletionRequest) -> Continuation:
    """Everything that can be refused before a token is computed. Blocks. Raises ApiError."""
    asked.check()
    prompts = asked.prompts()
    if len(prompts) * asked.tries > MOST_ANSWERS or asked.tries > MOST_CHOICES:
        raise ApiError(
            400, f"prompt: {len(prompts)} prompts of {asked.tries} answers are too many at once.", param="prompt"
        )
    voice = find_voice(services, asked.model)
    choices: list[_Choice] = []
    for number, prompt in enumerate(prompts):
        choices += _choices(asked, voice, prompt, number)
    return Continuation(services, asked, voice, choices)


def _choices(asked: CompletionRequest, voice: Voice, prompt: str | list[int], number: int) -> list[_Choice]:
    renderer = voice.spoken.renderer
    ids, shown, added = _tokens(renderer, prompt)
    most = DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
    ranked = asked.tries > asked.choices
    wanted = asks(
        asked,
        voice,
        ids,
        asked.tries,
        first=number * asked.tries,
        max_tokens=room(voice, ids, most, "prompt"),
        logprobs=asked.logprobs if asked.logprobs is not None else 0 if ranked else None,
        prompt_logprobs=bool(asked.echo) and asked.logprobs is not None,
    )
    return [
        _Choice(
            ask,
            Speaker(renderer.tokenizer, stops=asked.stops),
            shown if asked.echo else "",
            None if asked.logprobs is None else Lines(renderer.tokenizer, asked.logprobs),
            added,
        )
        for ask in wanted
    ]


def _tokens(renderer: Renderer, prompt: str | Sequence[int]) -> tuple[list[int], str, int]:
    """(ids, the text that echo shows, how many ids at the beginning nobody wrote)."""
    tokenizer = renderer.tokenizer
    if not isinstance(prompt, str):
        size = tokenizer.vocabulary_size
        if any(id >= size for id in prompt):
            raise ApiError(400, f"prompt: found a token id beyond {size - 1}.", param="prompt")
        return list(prompt), tokenizer.decode(prompt), 0
    ids = renderer.completion_prompt(prompt)
    if not ids:
        return [renderer.stop_ids[-1]], "", 1
    return ids, prompt, len(ids) - len(tokenizer.plain(prompt))


@dataclass(slots=True)
class _Choice:
    """One answer so far; `lines` collects log-probabilities; `total` is the sum of its tokens' own."""

    ask: Ask
    speaker: Speaker
    echo: str
    lines: Lines | None
    added: int
    text: str = ""
    finish: str = ""
    total: float = 0.0
    begun: bool = False

    @property
    def mean(self) -> float:
        return self.total / max(1, self.speaker.generated)


class Continuation:
    """One request on its way."""

    def __init__(self, services: Services, asked: CompletionRequest, voice: Voice, choices: list[_Choice]) -> None:
        self.services, self.asked, self.voice, self.choices = services, asked, voice, choices
        self.frame = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": f"fp_{voice.content[:10]}",
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The stream."""
        usage_key = {"usage": None} if self.asked.with_usage else {}
        async with aclosing(self._pieces()) as pieces:
            async for index, text, logprobs, finish in pieces:
                if text or logprobs or finish:
                    choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}
                    yield {**self.frame, "choices": [choice], **usage_key}
        if self.asked.with_usage:
            yield {**self.frame, "choices": [], "usage": self._usage()}

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self._pieces()) as pieces:
            async for _ in pieces:
                pass
        choices = [
            {
                "text": choice.text,
                "index": index,
                "logprobs": None if choice.lines is None else choice.lines.all(),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self._best())
        ]
        return {**self.frame, "choices": choices, "usage": self._usage()}

    async def _pieces(self) -> AsyncGenerator[tuple[int, str, dict[str, Any] | None, str | None], None]:
        """(which choice, more of its text, their log-probabilities, how it ended)."""
        speakers = [choice.speaker for choice in self.choices]
        pieces = speak(self.services.router, self.voice.base, [choice.ask for choice in self.choices], speakers)
        async with aclosing(pieces):
            async for index, piece in pieces:
                choice = self.choices[index]
                text, logprobs = self._heard(choice, piece)
                choice.text += text
                choice.finish = piece.finish or ""
                yield index, text, logprobs, piece.finish

    def _heard(self, choice: _Choice, piece: Piece) -> tuple[str, dict[str, Any] | None]:
        text = piece.text
        choice.total += sum(said.token.logprob or 0.0 for said in piece.tokens)
        if not choice.begun and (piece.prompt or piece.text or piece.tokens or piece.finish):
            choice.begun = True
            text = choice.echo + text
            if choice.lines is not None and choice.echo:
                choice.lines.prompt(piece.prompt[choice.added :])
        if choice.lines is None:
            return text, None
        for said in piece.tokens:
            choice.lines.answer(said, len(choice.echo))
        return text, choice.lines.fresh()

    def _best(self) -> list[_Choice]:
        """The choices to tell, of each prompt the likeliest."""
        tries, count = self.asked.tries, self.asked.choices
        if tries == count:
            return self.choices
        best: list[_Choice] = []
        for start in range(0, len(self.choices), tries):
            best += sorted(self.choices[start : start + tries], key=lambda choice: -choice.mean)[:count]
        return best

    def _usage(self) -> dict[str, Any]:
        first = self.choices[:: self.asked.tries]
        prompt = sum(len(choice.ask.prompt) for choice in first)
        generated = sum(choice.speaker.generated for choice in self.choices)
        return usage(prompt, generated, sum(choice.speaker.cached for choice in first))
