"""Inference through a real server: the official client, a real replica of a tiny model, and what can go wrong."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from luthier.api import sending
from luthier.api.services import Services
from luthier.data.render import Renderer
from luthier.serve.router import Router
from luthier.settings import Settings
from luthier.spec.serving import Ask, Part, Token
from luthier.store.db import Database
from tests import tiny as tiny_models
from tests.api.conftest import BASE, FakeRouter, Live, make_services, serving
from tests.serve.replicas import make_adapter

HELLO: Any = [{"role": "user", "content": "What is the capital of France?"}]
TUNED = "ft:tiny:luthier::abcdefgh"


class Colour(BaseModel):
    name: Literal["red", "green"]
    number: Literal[1, 2, 3]


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"where": {"enum": ["here", "there"]}, "n": {"$ref": "#/$defs/small"}},
                "required": ["where", "n"],
                "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 9}},
            },
        },
    }
    for name in ("look", "take")
]


@pytest.fixture(scope="module")
def whole_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_model(tmp_path_factory.mktemp("whole") / "tiny", max_positions=2048)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, whole_base: Path) -> Iterator[tuple[openai.OpenAI, Services]]:
    """The whole way: HTTP, router, a replica in a process of its own."""
    home = tmp_path_factory.mktemp("voice") / "home"
    settings = Settings(home=home, bases=BASE, hub="off")
    database = Database(home)
    database.migrate()
    folders = {BASE: whole_base}
    services = make_services(settings, database, Router(settings, folders), folders)
    adapter = make_adapter(whole_base, home / "models" / "a", 1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).write_bytes((whole_base / name).read_bytes())
    services.models.register(TUNED, base=BASE, folder=adapter, content_hash="1" * 64)
    token = services.keys.create("test", "user")[1]
    with serving(services) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0), services
    database.close()


@pytest.fixture
def client(server: tuple[openai.OpenAI, Services]) -> openai.OpenAI:  # type: ignore[override]
    return server[0]


def test_answers_repeat_and_models_differ(client: openai.OpenAI) -> None:
    def say(model: str, **more: Any) -> Any:
        answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=12, logprobs=True, **more)
        assert answer.choices[0].logprobs is not None
        return [(token.bytes, round(token.logprob, 3)) for token in answer.choices[0].logprobs.content or []]

    assert say("tiny", temperature=0) == say("gpt-4o-mini", temperature=0)
    assert say("tiny", temperature=0) != say(TUNED, temperature=0)
    assert say(TUNED, temperature=1, seed=3) == say(TUNED, temperature=1, seed=3)
    assert say(TUNED, temperature=1, seed=3) != say(TUNED, temperature=1, seed=4)


def test_logprobs_and_bias(client: openai.OpenAI, whole_base: Path) -> None:
    def one(**more: Any) -> Any:
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, max_completion_tokens=1, temperature=0, logprobs=True, top_logprobs=5, **more
        )
        return answer.choices[0]

    first = one()
    assert first.finish_reason == "length"
    (told,) = first.logprobs.content
    assert len(told.top_logprobs) == 5
    assert told.logprob == told.top_logprobs[0].logprob
    tokenizer = Renderer.load(whole_base).tokenizer
    (number,) = tokenizer.plain(" Paris")[-1:]
    greedy = next(id for id in range(tokenizer.vocabulary_size) if list(tokenizer.token_bytes(id)) == told.bytes)
    assert one(logit_bias={str(greedy): -100}).logprobs.content[0].bytes != told.bytes
    forced = one(logit_bias={str(number): 100}).logprobs.content[0]
    assert bytes(forced.bytes) == tokenizer.token_bytes(number)


def test_stream_is_the_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": TUNED, "messages": HELLO, "max_tokens": 40, "n": 3, "seed": 5, "stop": ["e", "qu"]}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_structure(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model=TUNED, messages=HELLO, response_format=Colour, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Colour)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=TUNED, messages=HELLO, response_format=Colour, max_tokens=2)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        )
    assert refused.value.param == "response_format"


def test_required_calls(client: openai.OpenAI) -> None:
    for choice, names in (
        ("required", {"look", "take"}),
        ({"type": "function", "function": {"name": "take"}}, {"take"}),
    ):
        asked: Any = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "seed": 2}
        answer = client.chat.completions.create(**asked).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.tool_calls
        for call in answer.message.tool_calls:
            assert call.type == "function"
            assert call.function.name in names
            given = json.loads(call.function.arguments)
            assert given["where"] in ("here", "there")
            assert 0 <= given["n"] <= 9
        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion().choices[0].message
        assert [(call.function.name, call.function.arguments) for call in final.tool_calls or []] == [
            (call.function.name, call.function.arguments) for call in answer.message.tool_calls
        ]
        messages = [*HELLO, answer.message]
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "7"} for call in answer.message.tool_calls]
        client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=2)


def test_twelve_at_once_keep_to_the_schema(server: tuple[openai.OpenAI, Services]) -> None:
    async def play() -> list[Any]:
        sync = server[0]
        async with openai.AsyncOpenAI(base_url=str(sync.base_url), api_key=sync.api_key) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.parse(
                        model=("tiny", TUNED)[n % 2], messages=HELLO, response_format=Colour, store=True
                    )
                    for n in range(12)
                )
            )

    answers = asyncio.run(play())
    assert all(answer.choices[0].message.parsed for answer in answers)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=TUNED, prompt="one two", max_tokens=1, temperature=0, logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.top_logprobs is not None
    assert len(told.top_logprobs[0]) == 2
    scored = client.completions.create(model=TUNED, prompt="one two", max_tokens=0, echo=True, logprobs=1).choices[0]
    assert scored.text == "one two"
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs is not None
    assert scored.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in scored.logprobs.token_logprobs[1:])
    best = client.completions.create(model="tiny", prompt=["a", "b"], n=1, best_of=3, max_tokens=3)
    assert len(best.choices) == 2


def test_a_model_deleted_meanwhile(server: tuple[openai.OpenAI, Services], whole_base: Path) -> None:
    client, services = server
    adapter = make_adapter(whole_base, services.settings.home / "models" / "b", 2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).write_bytes((whole_base / name).read_bytes())
    services.models.register("ft:tiny:luthier::gone", base=BASE, folder=adapter, content_hash="2" * 64)
    asked: Any = {"model": "ft:tiny:luthier::gone", "messages": HELLO, "max_tokens": 60, "logit_bias": {"2": -100}}
    stream = client.chat.completions.create(**asked, stream=True)
    next(stream)
    assert client.models.delete("ft:tiny:luthier::gone").deleted
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")
    with pytest.raises(openai.NotFoundError) as gone:
        client.chat.completions.create(**asked)
    assert gone.value.code == "model_not_found"


# --- with a played replica ------------------------------------------------------------------------------------------


class Moody(FakeRouter):
    """Waits, or fails after `fails_after` tokens, as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.pause = 0.0
        self.fails_after: int | None = None
        self.error: dict[str, str | None] = {"code": "unavailable", "message": "The process ended.", "hint": None}

    async def generate(self, base: str, ask: Ask) -> AsyncIterator[Part]:
        self.asks.append((base, ask))
        whole = False
        try:
            for count, token in enumerate(self.script, 1):
                if self.fails_after == count - 1:
                    whole = True
                    yield Part(id=ask.id, finish="error", error=self.error)
                    return
                await asyncio.sleep(self.pause)
                yield Part(id=ask.id, tokens=[Token(id=token)], generated=count)
            whole = True
            yield Part(id=ask.id, generated=len(self.script), finish="length")
        finally:
            if not whole:
                self.closed.append(ask.id)


@pytest.fixture
def router() -> Moody:
    return Moody()


@pytest.fixture
def played(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.base_url, api_key=live.key, max_retries=0)


def test_an_error_in_the_middle_of_a_stream(played: openai.OpenAI, router: Moody) -> None:
    router.fails_after = 2
    stream = played.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="The process ended"):
        list(stream)


def test_an_error_before_anything(played: openai.OpenAI, router: Moody) -> None:
    router.fails_after = 0
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as failed:
            played.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
        assert failed.value.status_code == 503
    router.error = {"code": "context_length_exceeded", "message": "Too long.", "param": "prompt"}
    with pytest.raises(openai.BadRequestError) as refused:
        played.chat.completions.create(model="tiny", messages=HELLO)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


def test_silence_is_filled_with_comments(live: Live, router: Moody, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "KEEP_ALIVE_SECONDS", 0.05)
    router.pause = 0.2
    raw = _raw(live, {"model": "tiny", "messages": HELLO, "stream": True})
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"text/event-stream" in head
    assert body.count(b": keep-alive\n\n") >= 4
    assert b"data: [DONE]\n\n" in body
    for line in body.splitlines():
        assert not line.startswith((b"id:", b"event:", b"retry:"))
    client = openai.OpenAI(base_url=live.base_url, api_key=live.key)
    text = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    )
    assert text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slots(live: Live, router: Moody, stream: bool) -> None:
    router.script = [72] * 500
    router.pause = 0.05
    connection = _send(live, {"model": "tiny", "messages": HELLO, "stream": stream, "n": 2})
    _until(lambda: len(router.asks) == 2)
    connection.close()
    _until(lambda: len(router.closed) == 2)


def _send(live: Live, body: dict[str, Any]) -> socket.socket:
    host, port = live.base_url.removeprefix("http://").removesuffix("/v1").split(":")
    content = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {live.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
        + content
    )
    return connection


def _raw(live: Live, body: dict[str, Any]) -> bytes:
    with _send(live, body) as connection:
        pieces = []
        while data := connection.recv(65536):
            pieces.append(data)
    return b"".join(pieces)


def _until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not true():
        assert time.monotonic() < ends
        threading.Event().wait(0.02)
