"""Acceptance checks 43-46 with the official Python client, on a real small model (argv: its public name)."""

from __future__ import annotations

import json
import math
from typing import Literal

import openai
from harness import raises, run
from pydantic import BaseModel

client = openai.OpenAI()
ASKED = [{"role": "user", "content": "What is the capital of France? One word."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}


class Ticket(BaseModel):
    kind: Literal["billing", "shipping", "other"]
    urgent: bool


def ask(given, **asked):
    return client.chat.completions.create(**{"model": given["model"], "messages": ASKED, "max_tokens": 12, **asked})


def check_43_streams(given):
    whole = ask(given, temperature=0)
    chunks = list(ask(given, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert said == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count(None) == len(chunks) - 2
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    bare = list(ask(given, temperature=0, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in bare)
    three = list(ask(given, n=3, stream=True, temperature=1, seed=1))
    assert {chunk.choices[0].index for chunk in three} == {0, 1, 2}


def check_44_what_is_sampled(given):
    greedy = ask(given, temperature=0).choices[0].message.content
    assert ask(given, temperature=0).choices[0].message.content == greedy
    word = greedy[3:8]
    stopped = ask(given, temperature=0, stop=[word, "\n\n\n"])
    assert stopped.choices[0].message.content == greedy[: greedy.index(word)]
    assert stopped.choices[0].finish_reason == "stop"
    three = client.chat.completions.create(model=given["model"], messages=ASKED, n=3, max_completion_tokens=1)
    assert [choice.finish_reason for choice in three.choices] == ["length"] * 3
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    scored = ask(given, temperature=0, logprobs=True, top_logprobs=5).choices[0]
    for token in scored.logprobs.content:
        assert len(token.top_logprobs) == 5
        assert token.logprob == max(one.logprob for one in token.top_logprobs)
        assert sum(math.exp(one.logprob) for one in token.top_logprobs) <= 1 + 1e-6
    assert "".join(token.token for token in scored.logprobs.content) == greedy
    assert ask(given, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert ask(given).choices[0].logprobs is None
    seeded = [ask(given, temperature=1, seed=5).choices[0].message.content for _ in range(2)]
    assert seeded[0] == seeded[1]
    with raises(openai.BadRequestError) as error:
        ask(given, top_logprobs=3)
    assert error.value.param == "top_logprobs"
    with raises(openai.BadRequestError) as error:
        ask(given, temperature=2.5)
    assert error.value.param == "temperature"
    with raises(openai.BadRequestError) as error:
        ask(given, messages=[{"role": "user", "content": "word " * 60_000}])
    assert error.value.code == "context_length_exceeded"


def check_44_logit_bias(given):
    """The greedy token banned; another forced. The completions route takes token ids, which tells us some."""
    first = ask(given, temperature=0, logprobs=True, top_logprobs=2, max_tokens=1).choices[0].logprobs.content[0]
    banned = {str(token): -100 for token in given["ids"]["greedy"]}
    other = ask(given, temperature=0, max_tokens=1, logit_bias=banned).choices[0].message.content
    assert other != first.token, other
    (forced,) = given["ids"]["forced"]
    answer = ask(given, temperature=0, max_tokens=3, logit_bias={str(forced): 100})
    assert answer.choices[0].message.content == given["ids"]["text"] * 3, answer.choices[0].message.content


def check_45_a_parsed_answer(given):
    asked = [{"role": "user", "content": "I was charged twice! Classify my ticket."}]
    done = client.chat.completions.parse(
        model=given["model"], messages=asked, response_format=Ticket, temperature=0, max_tokens=60
    )
    assert isinstance(done.choices[0].message.parsed, Ticket)
    free = ask(given, response_format={"type": "json_object"}, temperature=0, max_tokens=40).choices[0]
    assert free.message.content.lstrip().startswith("{")
    if free.finish_reason == "stop":
        assert isinstance(json.loads(free.message.content), dict)
    with raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=given["model"], messages=asked, response_format=Ticket, max_tokens=2)


def check_45_tools(given):
    asked = [{"role": "user", "content": "How is the weather in Rome for 3 days?"}]
    tools = {"messages": asked, "tools": [WEATHER, TIME], "temperature": 0, "max_tokens": 90}
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        said = ask(given, **tools, tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert said.finish_reason in (("tool_calls",) if choice == "required" else ("tool_calls", "stop")), said
        (call,) = said.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert (call.type, bool(call.id)) == ("function", True)
        if choice != "required" or call.function.name == "get_weather":
            assert call.function.name == "get_weather"
            assert set(arguments) == {"city", "days"} and arguments["city"] in ("Paris", "Rome"), arguments
    wanted = {"type": "function", "function": {"name": "get_weather"}}
    whole = ask(given, **tools, tool_choice=wanted, parallel_tool_calls=False).choices[0].message.tool_calls[0]
    name, arguments, ids = "", "", set()
    for chunk in ask(given, **tools, tool_choice=wanted, parallel_tool_calls=False, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            assert piece.index == 0
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
            ids |= {piece.id} - {None}
    assert (name, json.loads(arguments)) == ("get_weather", json.loads(whole.function.arguments))
    assert len(ids) == 1
    with client.chat.completions.stream(
        model=given["model"], messages=asked, tools=[WEATHER], tool_choice=wanted, temperature=0, max_tokens=90
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "get_weather"
    plain = ask(given, **tools, tool_choice="none").choices[0]
    assert plain.message.tool_calls is None and plain.finish_reason in ("stop", "length")


def check_46_stored_completions(given):
    mark = {"batch": given["mark"], "odd key": "a&b=c"}
    kept = ask(given, store=True, metadata=mark, temperature=0, max_tokens=3)
    streamed = list(ask(given, store=True, metadata=mark, temperature=0, max_tokens=3, stream=True))
    loose = ask(given, max_tokens=1)
    stored = client.chat.completions
    found = list(stored.list(metadata={"batch": given["mark"]}, limit=1))
    assert [one.id for one in found] == [kept.id, streamed[0].id], found
    assert found[0].choices[0].message.content == kept.choices[0].message.content
    assert found[1].choices[0].message.content == kept.choices[0].message.content
    assert stored.retrieve(kept.id).metadata == mark
    (turn,) = stored.messages.list(kept.id).data
    assert (turn.id, turn.content, turn.role) == (f"{kept.id}-0", ASKED[0]["content"], "user")
    assert stored.update(kept.id, metadata={"new": "one"}).metadata == {"new": "one"}
    assert stored.retrieve(kept.id).metadata == {"new": "one"}
    for one in (kept.id, streamed[0].id):
        gone = stored.delete(one)
        assert (gone.deleted, gone.object) == (True, "chat.completion.deleted")
    for one in (kept.id, loose.id):
        with raises(openai.NotFoundError):
            stored.retrieve(one)


run(globals())
