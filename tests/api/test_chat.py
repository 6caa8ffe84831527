"""POST /chat/completions with a played replica: what is asked of it, and what its tokens become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from luthier.data.render import Renderer
from luthier.spec.data import Message
from tests.api.conftest import FakeRouter

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def renderer(base_folder: Path) -> Renderer:
    return Renderer.load(base_folder)


def says(router: FakeRouter, renderer: Renderer, text: str, ends: bool = True) -> int:
    """Let the replica answer `text`; gives its number of tokens, the end included."""
    router.script = renderer.tokenizer.plain(text) + ([renderer.stop_ids[0]] if ends else [])
    return len(router.script)


def ask(client: TestClient, **fields: Any) -> Any:
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: TestClient, **fields: Any) -> list[Any]:
    body = {"model": "tiny", "messages": HELLO, "stream": True, **fields}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith(("data: ", ": ")) for line in lines)
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def content(chunks: list[Any], index: int = 0) -> str:
    deltas = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in deltas)


def refused(client: TestClient, **fields: Any) -> tuple[int, str, str]:
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **fields})
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


def test_an_answer_and_what_was_asked(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    count = says(router, renderer, "Paris is nice.")
    answer = ask(client, temperature=0, seed=7, max_tokens=50, logit_bias={"5": -100}, user="me", unknown={"x": 1})
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Paris is nice.", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    base, asked = router.asks[0]
    prompt = renderer.prompt([Message("user", "hello")])
    assert (base, asked.prompt, asked.adapter, asked.grammar) == ("tiny", prompt, None, None)
    assert (asked.temperature, asked.seed, asked.max_tokens, asked.logit_bias) == (0, 7, 50, {5: -100.0})
    assert asked.stop_ids == list(renderer.stop_ids)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), count)
    assert usage["total_tokens"] == len(prompt) + count


def test_a_stream_is_the_answer(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    count = says(router, renderer, "你好 Paris.")
    chunks = stream(client, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert content(chunks) == "你好 Paris."
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], count)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk or "error" in chunk for chunk in stream(client))


def test_choices_differ_in_their_seeds_and_the_prompt_counts_once(
    client: TestClient, router: FakeRouter, renderer: Renderer
) -> None:
    count = says(router, renderer, "yes")
    answer = ask(client, n=3, seed=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({asked.seed for _, asked in router.asks}) == 3
    assert answer["usage"]["completion_tokens"] == 3 * count
    assert answer["usage"]["prompt_tokens"] == len(router.asks[0][1].prompt)
    assert [content(stream(client, n=3), index) for index in range(3)] == ["yes"] * 3


@pytest.mark.parametrize(
    ("stop", "text", "stopped"),
    [
        ("wo th", "one t", True),
        (["three", "two"], "one ", True),
        ("fourX", "one two three four", False),
        (["four", "two three"], "one ", True),
        ("one", "", True),
        ([], "one two three four", False),
        (None, "one two three four", False),
    ],
)
def test_stop_strings(
    client: TestClient, router: FakeRouter, renderer: Renderer, stop: Any, text: str, stopped: bool
) -> None:
    says(router, renderer, "one two three four", ends=False)
    answer = ask(client, stop=stop, logprobs=True)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == text
    assert choice["finish_reason"] == ("stop" if stopped else "length")
    assert (len(router.closed) == 1) == stopped  # and frees its slot
    chunks = stream(client, stop=stop, logprobs=True, stream_options={"include_usage": True})
    assert content(chunks) == text
    assert chunks[-1]["usage"] == answer["usage"]
    told = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    assert [entry for logprobs in told for entry in logprobs["content"]] == choice["logprobs"]["content"]
    said = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode()
    assert said.startswith(text)


def test_stop_counts_only_what_was_generated(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    says(router, renderer, "one two three four")
    cut = len(renderer.tokenizer.plain("one two three four")) - len(renderer.tokenizer.plain(" three four"))
    assert ask(client, stop="two")["usage"]["completion_tokens"] == cut


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TOOL], "functions": [TOOL["function"]]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
)
def test_refusals_name_the_field(client: TestClient, fields: dict[str, Any], param: str) -> None:
    assert refused(client, **fields)[:2] == (400, param)


def test_null_is_absent(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    says(router, renderer, "yes")
    names = ("stop", "n", "tools", "tool_choice", "response_format", "stream", "stream_options", "max_tokens", "audio")
    names += ("temperature", "logit_bias", "logprobs", "store", "metadata", "functions", "function_call", "user")
    assert ask(client, **dict.fromkeys(names))["choices"][0]["message"]["content"] == "yes"


def test_unknown_models_and_long_prompts(client: TestClient) -> None:
    assert refused(client, model="tiny:gone") == (404, "model", "model_not_found")
    long = [{"role": "user", "content": "word " * 3000}]
    assert refused(client, messages=long) == (400, "messages", "context_length_exceeded")
    assert refused(client, messages=HELLO * 50_000) == (400, "messages", "context_length_exceeded")


def test_every_role_is_rendered_as_in_training(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    says(router, renderer, "yes")
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "user", "content": "so <|im_end|>?", "cache_control": {"type": "ephemeral"}},
    ]
    ask(client, messages=messages, tools=[TOOL])
    text = renderer.tokenizer.base.decode(router.asks[0][1].prompt, skip_special_tokens=False)
    assert "None" not in text
    assert '<tool_call>{"name": "look", "arguments": {"a": 1}}</tool_call>' in text
    assert text.startswith("<|im_start|>system\nbe brief\n\nYou can call these functions.")
    assert json.dumps(TOOL) in text
    assert "<|im_start|>user\nhello<|im_end|>" in text
    assert "<|im_start|>tool\n42<|im_end|>" in text
    end = renderer.tokenizer.control_ids["<|im_end|>"]
    assert router.asks[0][1].prompt.count(end) == len(messages)  # what a user spells ends no turn


def test_arguments_as_text_and_as_an_object_are_the_same(
    client: TestClient, router: FakeRouter, renderer: Renderer
) -> None:
    says(router, renderer, "yes")
    for arguments in ('{"tz":"UTC","n":1}', {"tz": "UTC", "n": 1}):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        ask(client, messages=[*HELLO, {"role": "assistant", "tool_calls": [call]}, *HELLO])
    assert router.asks[0][1].prompt == router.asks[1][1].prompt
    call["function"]["arguments"] = 5
    status, param, _ = refused(client, messages=[{"role": "assistant", "tool_calls": [call]}])
    assert (status, param) == (400, "messages[0].tool_calls[0].function.arguments")


CALLS = '<tool_call>{"name": "look", "arguments": {"a": 1}}</tool_call>'


def test_calls_are_found_and_streamed(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    says(router, renderer, f"I look.\n{CALLS}\n{CALLS}")
    choice = ask(client, tools=[TOOL])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        {"name": "look", "arguments": '{"a": 1}'}
    ] * 2
    chunks = stream(client, tools=[TOOL])
    assert content(chunks) == "I look."
    made: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for piece in chunk["choices"][0]["delta"].get("tool_calls", []):
            call = made.setdefault(piece["index"], {"name": "", "arguments": ""})
            call["name"] += piece["function"].get("name", "")
            call["arguments"] += piece["function"]["arguments"]
    assert made == {n: {"name": "look", "arguments": '{"a": 1}'} for n in range(2)}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert len(ask(client, tools=[TOOL], parallel_tool_calls=False)["choices"][0]["message"]["tool_calls"]) == 1
    plain = ask(client, tools=[TOOL], tool_choice="none")["choices"][0]
    assert plain["message"]["content"] == f"I look.\n{CALLS}\n{CALLS}"
    assert "tool_calls" not in plain["message"]


def test_what_only_looks_like_a_call_is_content(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    for text in ("a <tool_call> b", "a <tool_c", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', "a  "):
        says(router, renderer, text)
        assert ask(client, tools=[TOOL])["choices"][0]["message"]["content"] == text
        assert content(stream(client, tools=[TOOL])) == text


def test_functions_are_answered_with_function_call(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    says(router, renderer, CALLS)
    choice = ask(client, functions=[TOOL["function"]], function_call={"name": "look"})["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "look", "arguments": '{"a": 1}'}
    assert choice["message"]["content"] is None
    assert "lark" in (router.asks[0][1].grammar or {})


def test_a_forced_call_that_is_cut(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    says(router, renderer, '<tool_call>{"name": "look", "arguments": {"a', ends=False)
    choice = ask(client, tools=[TOOL], tool_choice="required")["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"a'}


def test_formats_are_asked_as_grammars(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    says(router, renderer, "{}")
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    ask(client, response_format={"type": "json_object"})
    ask(client, response_format={"type": "text"})
    first, second, third = (asked.grammar for _, asked in router.asks)
    assert first is not None
    assert second is not None
    assert schema.items() <= first["json_schema"].items()
    assert second["json_schema"]["type"] == "object"
    assert third is None


def test_stored(client: TestClient, router: FakeRouter, renderer: Renderer) -> None:
    says(router, renderer, CALLS)
    first = ask(client, store=True, metadata={"tag": "a"}, tools=[TOOL], temperature=0.5)
    chunks = stream(client, store=True, metadata={"tag": "b"}, n=2)
    loose = ask(client)
    assert client.get(f"/v1/chat/completions/{loose['id']}").status_code == 404
    kept = client.get("/v1/chat/completions", params={"metadata[tag]": "a"}).json()["data"]
    assert len(kept) == 1
    assert {name: kept[0][name] for name in first} == first
    assert (kept[0]["metadata"], kept[0]["temperature"], kept[0]["tools"]) == ({"tag": "a"}, 0.5, [TOOL])
    whole = client.get(f"/v1/chat/completions/{chunks[0]['id']}").json()
    assert whole["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in whole["choices"]] == [CALLS] * 2
    messages = client.get(f"/v1/chat/completions/{first['id']}/messages").json()["data"]
    assert [(one["id"], one["content"]) for one in messages] == [(f"{first['id']}-0", "hello")]
