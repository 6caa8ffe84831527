"""Tokens to text as they come, for one answer or several at once: stop strings, what a template puts around answers,
log-probabilities at their place in the text.

The same object speaks whether an answer is streamed or not, so the two cannot differ.
Does not know: messages, JSON, which template.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from luthier.api.errors import ApiError
from luthier.data.tokenizer import Tokenizer
from luthier.spec.serving import Ask, Part, Token

if TYPE_CHECKING:
    from luthier.serve.router import Router

WAITING = 64  # pieces of all choices together that may wait for their reader
End = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Said:
    """A token and where its text begins in the answer, in characters."""

    token: Token
    offset: int


@dataclass(slots=True)
class Piece:
    """What one Part added to an answer. `tokens` are those whose text has begun to be released."""

    text: str = ""
    tokens: list[Said] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    finish: End | None = None


class Speaker:
    """One answer. `generated` and `cached` count tokens; `stopped` is the stop string that ended it."""

    def __init__(self, tokenizer: Tokenizer, *, stops: Sequence[str] = (), lead: str = "", trail: str = "") -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._stops = tuple(stops)
        self._trail = trail
        self._lead = lead  # not yet seen at the beginning; "" once it is decided
        self._cut = 0  # characters of the lead, which no offset counts
        self._ids: list[int] = []
        self._raw = 0  # characters that came out of the tokenizer
        self._held = ""  # text that may still turn out to be a lead, a stop or a trail
        self._released = 0
        self._waiting: list[Said] = []
        self.generated = 0
        self.cached = 0
        self.stopped: str | None = None
        self.finish: End | None = None

    def push(self, part: Part) -> Piece:
        """The next part of the answer; nothing may follow one after which `finish` is set."""
        piece = Piece(prompt=list(part.prompt))
        self.cached = max(self.cached, part.cached)
        for token in part.tokens:
            self._ids.append(token.id)
            self._waiting.append(Said(token, self._raw))
            self._take(self._stream.push(token.id))
            if self._stop(piece):
                self.generated = len(self._ids)
                return piece
        self.generated = max(part.generated, len(self._ids))
        if part.finish in ("stop", "length"):
            self._end(piece, "length" if part.finish == "length" else "stop")
        else:
            self._release(piece, len(self._held) - self._doubtful())
        return piece

    def _take(self, text: str) -> None:
        self._raw += len(text)
        self._held += text
        if self._lead:
            if self._held.startswith(self._lead):
                self._cut, self._held, self._lead = len(self._lead), self._held[len(self._lead) :], ""
            elif not self._lead.startswith(self._held):
                self._lead = ""

    def _stop(self, piece: Piece) -> bool:
        """Whether a stop string has come up; the text before the earliest is released then."""
        if self._lead:
            return False
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if not found:
            return False
        place, self.stopped = min(found, key=lambda pair: pair[0])
        self.finish = piece.finish = "stop"
        self._held = self._held[:place]
        self._release(piece, place)
        return True

    def _end(self, piece: Piece, finish: End) -> None:
        """The replica has no more: what was held back comes out, halves of characters too."""
        whole = self._tokenizer.decode(self._ids)
        self._take(whole[self._raw :])
        self._lead = ""
        if self._stop(piece):
            return
        self._held = self._held.removesuffix(self._trail)
        self.finish = piece.finish = finish
        self._release(piece, len(self._held))
        piece.tokens += self._waiting
        self._waiting = []

    def _doubtful(self) -> int:
        """How many characters at the end may become the lead, a stop string or the trail."""
        if self._lead:
            return len(self._held)
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        if self._trail:
            for size in range(min(len(self._trail), len(self._held)), longest, -1):
                if self._held.endswith(self._trail[:size]):
                    longest = size
                    break
        return longest

    def _release(self, piece: Piece, size: int) -> None:
        piece.text += self._held[:size]
        self._held = self._held[size:]
        self._released += size
        while self._waiting and self._waiting[0].offset - self._cut < self._released:
            said = self._waiting.pop(0)
            piece.tokens.append(Said(said.token, max(0, said.offset - self._cut)))


async def speak(
    router: Router, base: str, asks: Sequence[Ask], speakers: Sequence[Speaker]
) -> AsyncGenerator[tuple[int, Piece], None]:
    """(which, piece) of all asks at once, each until its end. Raises ApiError when one cannot be answered; then, and
    when this iterator is closed early, the others are cancelled."""
    if len(asks) == 1:  # as nearly always; tasks and a line between them would cost more than the piece itself
        async with aclosing(_pieces(router, base, asks[0], speakers[0])) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    line: asyncio.Queue[tuple[int, Piece] | ApiError | None] = asyncio.Queue(WAITING)

    async def one(number: int) -> None:
        try:
            async with aclosing(_pieces(router, base, asks[number], speakers[number])) as pieces:
                async for piece in pieces:
                    await line.put((number, piece))
        except ApiError as error:
            await line.put(error)
        else:
            await line.put(None)

    tasks = [asyncio.create_task(one(number)) for number in range(len(asks))]
    left = len(tasks)
    try:
        while left:
            came = await _next(line, tasks)
            if isinstance(came, ApiError):
                raise came
            if came is None:
                left -= 1
            else:
                yield came
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _pieces(router: Router, base: str, ask: Ask, speaker: Speaker) -> AsyncGenerator[Piece, None]:
    """One answer until its end. Raises ApiError when it cannot be given."""
    async with aclosing(router.generate(base, ask)) as parts:  # type: ignore[type-var]
        async for part in parts:
            if part.finish in ("error", "cancelled"):
                raise failure(part)
            piece = speaker.push(part)
            yield piece
            if piece.finish:
                return


async def _next(
    line: asyncio.Queue[tuple[int, Piece] | ApiError | None], tasks: Sequence[asyncio.Task[None]]
) -> tuple[int, Piece] | ApiError | None:
    """The next in line. A task that broke is raised here: its reader would wait for ever."""
    if not line.empty():
        return line.get_nowait()
    getting = asyncio.ensure_future(line.get())
    try:
        while not getting.done():
            for task in tasks:
                if task.done():
                    task.result()
            await asyncio.wait(
                {getting, *(task for task in tasks if not task.done())}, return_when=asyncio.FIRST_COMPLETED
            )
        return getting.result()
    finally:
        getting.cancel()


def failure(part: Part) -> ApiError:
    """The HTTP answer for an ask that failed."""
    error = part.error or {}
    message = str(error.get("message") or "The answer was cancelled.")
    if error.get("hint"):
        message = f"{message} {error['hint']}"
    code, param = error.get("code"), error.get("param")
    if part.finish == "cancelled" or code == "unavailable":
        return ApiError(503, message, type="server_error", code="unavailable")
    if code == "not_found":  # the adapter went between the look and the ask
        return ApiError(404, message, param="model", code="model_not_found")
    if code in ("internal", "error", None):
        return ApiError(500, message, type="server_error", headers={"x-should-retry": "false"})
    shown = "context_length_exceeded" if code == "context_length_exceeded" else None
    return ApiError(400, message, param=param, code=shown)
