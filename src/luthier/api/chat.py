"""POST /chat/completions: a conversation in, an answer out, whole or as it comes.

Both ways are made of the same chunks: a whole answer is its stream, put together.
Does not know: how tokens are computed (serve), what a request may say (chat_wire.py).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from luthier.api.asking import At
from luthier.api.chat_wire import ChatRequest
from luthier.api.errors import ApiError
from luthier.api.inference import asks, room, too_long, usage
from luthier.api.sending import Events, while_connected
from luthier.api.services import Services
from luthier.api.speak import Piece, Said, Speaker, speak
from luthier.api.tools import Call, Listener, Toolbox, grammar, prompt_ids
from luthier.api.voices import Voice, find_voice
from luthier.data.render import Unrenderable
from luthier.data.tokenizer import Tokenizer
from luthier.spec.serving import Ask
from luthier.store.db import new_id

router = APIRouter(tags=["chat"])
ARGUMENTS_PIECE = 64  # characters of a call's arguments in one chunk
LEAST_TOKENS = 2  # of a turn: what opens or closes it
LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


@router.post("/chat/completions", response_model=None, summary="Answer a conversation")
async def create(asked: ChatRequest, request: Request, at: At) -> Response:
    """Streams with `stream: true`. Keeps request and answer with `store: true`."""
    return await chat(at, asked, request)


async def chat(services: Services, asked: ChatRequest, request: Request) -> Response:
    talk = await anyio.to_thread.run_sync(prepare, services, asked, getattr(request.state, "request_id", None))
    if asked.stream:
        return Events(talk.chunks())
    return JSONResponse(await while_connected(request, talk.whole()))


def prepare(services: Services, asked: ChatRequest, request_id: str | None) -> Talk:
    """Everything that can be refused before a token is computed. Blocks. Raises ApiError."""
    asked.check()
    box, schema, turns = asked.toolbox(), asked.form(), asked.turns()
    voice = find_voice(services, asked.model)
    renderer = voice.spoken.renderer
    if len(turns) * LEAST_TOKENS > voice.context:  # before a template renders every beginning of them
        raise too_long(voice, len(turns) * LEAST_TOKENS, "messages")
    try:
        with voice.spoken.lock:
            prompt = prompt_ids(renderer, turns, box.tools)
    except Unrenderable as error:
        problem = error.problem
        message = f"{problem.field}: found {problem.found}, wanted {problem.wanted}."
        raise ApiError(400, message, param=problem.field) from error
    wanted = asks(
        asked,
        voice,
        prompt,
        asked.choices,
        max_tokens=room(voice, prompt, asked.most_tokens, "messages"),
        logprobs=asked.alternatives,
        grammar=grammar(box, schema, renderer.lead),
    )
    return Talk(services, asked, request_id, voice, box, wanted)


@dataclass(slots=True)
class _Choice:
    """One answer so far."""

    speaker: Speaker
    listener: Listener
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # told already
    waiting: list[dict[str, Any]] = field(default_factory=list)  # of text that is held back
    finish: str = ""


class Talk:
    """One request on its way."""

    def __init__(
        self,
        services: Services,
        asked: ChatRequest,
        request_id: str | None,
        voice: Voice,
        box: Toolbox,
        wanted: list[Ask],
    ) -> None:
        self.services, self.asked, self.request_id = services, asked, request_id
        self.voice, self.box, self.asks = voice, box, wanted
        renderer = voice.spoken.renderer
        self.tokenizer = renderer.tokenizer
        self.choices = [
            _Choice(
                Speaker(renderer.tokenizer, stops=asked.stops, lead=renderer.lead, trail=renderer.trail), Listener(box)
            )
            for _ in wanted
        ]
        self.frame = {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": asked.model,
            "service_tier": "default",
            "system_fingerprint": f"fp_{voice.content[:10]}",
        }

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The stream. Stores the answer before it ends."""
        usage_key = {"usage": None} if self.asked.with_usage else {}
        async with aclosing(self._deltas()) as deltas:
            async for index, delta, logprobs, finish in deltas:
                choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
                yield {**self.frame, "choices": [choice], **usage_key}
        await self._keep()
        if self.asked.with_usage:
            yield {**self.frame, "choices": [], "usage": self._usage()}

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self._deltas()) as deltas:
            async for _ in deltas:
                pass
        await self._keep()
        return self._completion()

    async def _deltas(self) -> AsyncGenerator[tuple[int, dict[str, Any], dict[str, Any] | None, str | None], None]:
        begun: set[int] = set()
        pieces = speak(self.services.router, self.voice.base, self.asks, [choice.speaker for choice in self.choices])
        try:
            async for index, piece in pieces:
                if index not in begun:
                    begun.add(index)
                    yield index, {"role": "assistant", "content": "", "refusal": None}, None, None
                choice = self.choices[index]
                for delta in self._heard(choice, piece):
                    yield index, delta, self._told(choice), None
                if piece.finish:
                    yield index, {}, self._told(choice, last=True), choice.finish
        except ApiError as error:
            raise self._named(error) from error
        finally:
            await pieces.aclose()

    def _heard(self, choice: _Choice, piece: Piece) -> list[dict[str, Any]]:
        """The deltas that a piece makes."""
        if self.asked.logprobs:
            choice.waiting += [logprob(self.tokenizer, said) for said in piece.tokens]
        text = choice.listener.push(piece.text)
        deltas: list[dict[str, Any]] = []
        if piece.finish:
            rest, choice.calls = choice.listener.end()
            text += rest
            choice.finish = self._finish(choice, piece.finish)
        if text:
            choice.content += text
            deltas.append({"content": text})
        for number, call in enumerate(choice.calls):
            deltas += self._call_deltas(number, call)
        return deltas

    def _finish(self, choice: _Choice, finish: str) -> str:
        if choice.calls and finish == "stop":
            return "function_call" if self.box.legacy else "tool_calls"
        return finish

    def _call_deltas(self, number: int, call: Call) -> list[dict[str, Any]]:
        pieces = [call.arguments[at : at + ARGUMENTS_PIECE] for at in range(0, len(call.arguments), ARGUMENTS_PIECE)]
        if self.box.legacy:
            return [
                {"function_call": {"name": call.name, "arguments": ""}},
                *({"function_call": {"arguments": piece}} for piece in pieces),
            ]
        first = {
            "index": number,
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": ""},
        }
        return [
            {"tool_calls": [first]},
            *({"tool_calls": [{"index": number, "function": {"arguments": piece}}]} for piece in pieces),
        ]

    def _told(self, choice: _Choice, last: bool = False) -> dict[str, Any] | None:
        """The log-probabilities that ride on the next chunk."""
        if not self.asked.logprobs or (last and not choice.waiting):
            return None
        told, choice.waiting = choice.waiting, []
        choice.logprobs += told
        return {"content": told, "refusal": None}

    def _completion(self) -> dict[str, Any]:
        """The whole answer as one object."""
        return {
            **self.frame,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": self._message(choice),
                    "logprobs": {"content": choice.logprobs, "refusal": None} if self.asked.logprobs else None,
                    "finish_reason": choice.finish,
                }
                for index, choice in enumerate(self.choices)
            ],
            "usage": self._usage(),
        }

    def _message(self, choice: _Choice) -> dict[str, Any]:
        content = choice.content or (None if choice.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        calls = [(call.id, {"name": call.name, "arguments": call.arguments}) for call in choice.calls]
        if calls and self.box.legacy:
            message["function_call"] = calls[0][1]
        elif calls:
            message["tool_calls"] = [{"id": id, "type": "function", "function": function} for id, function in calls]
        return message

    def _usage(self) -> dict[str, Any]:
        speakers = [choice.speaker for choice in self.choices]
        generated = sum(speaker.generated for speaker in speakers)
        return usage(len(self.asks[0].prompt), generated, min(speaker.cached for speaker in speakers))

    async def _keep(self) -> None:
        if not self.asked.store:
            return
        request = self.asked.model_dump(mode="json", exclude_none=True)
        request |= {"request_id": self.request_id, "service_tier": "default"}
        await anyio.to_thread.run_sync(self.services.completions.add, self._completion(), request, self.asked.metadata)

    def _named(self, error: ApiError) -> ApiError:
        """`error` with the name that the field has here."""
        if error.param == "prompt":
            error.param = "messages"
        elif error.param == "response_format" and self.box.forced:
            error.param = "functions" if self.box.legacy else "tools"
        return error


def logprob(tokenizer: Tokenizer, said: Said) -> dict[str, Any]:
    """A token as chat completions tell of it."""
    token = said.token
    return {
        **_token(tokenizer, token.id, token.logprob),
        "top_logprobs": [_token(tokenizer, number, value) for number, value in token.top],
    }


def _token(tokenizer: Tokenizer, number: int, value: float | None) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(number),
        "logprob": LOWEST if value is None else max(value, LOWEST),
        "bytes": list(tokenizer.token_bytes(number)),
    }
