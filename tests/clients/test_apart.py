"""Two tuned models and their base, asked at the same time by many: nobody gets another's answer.

Does not know: how adapters share a batch (serve/lora.py; its laws are in tests/serve).
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.clients.rows import jsonl
from tests.clients.served import Server

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("clients")]

ASKS = 40


def learns(server: Server, word: str) -> str:
    """The name of a model that was taught to answer `word` to everything."""
    rows: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": f"fruit {n}?"}, {"role": "assistant", "content": f"{word} {word}"}]}
        for n in range(12)
    ]
    settings = {"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 30}  # few tokens a step
    body = {"model": "tiny", "training_file": server.upload(jsonl(rows), f"{word}.jsonl"), "suffix": word}
    status, job = server.ask("POST", "/v1/fine_tuning/jobs", {**body, "seed": 1, "hyperparameters": settings})
    assert status == 200, job
    ended = server.wait(job["id"])
    assert ended["status"] == "succeeded", ended["error"]
    return str(ended["fine_tuned_model"])


def body(model: str, number: int, tokens: int = 12) -> dict[str, Any]:
    asked = {"role": "user", "content": f"fruit {number % 12}?"}
    return {"model": model, "messages": [asked], "max_tokens": tokens, "temperature": 0}


def whole(server: Server, model: str, number: int) -> tuple[str, dict[str, int]]:
    """(text, usage) of an answer that comes at once."""
    status, said = server.ask("POST", "/v1/chat/completions", body(model, number))
    assert status == 200, said
    return said["choices"][0]["message"]["content"], said["usage"]


def streamed(
    server: Server, model: str, number: int, tokens: int = 12, begun: Callable[[], object] = lambda: None
) -> tuple[str, dict[str, int]]:
    """(text, usage) of an answer that comes in parts; `begun` is called after the first of them."""
    asked = {**body(model, number, tokens), "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(server.url + "/v1/chat/completions", json.dumps(asked).encode(), method="POST")
    request.add_header("Authorization", f"Bearer {server.key}")
    request.add_header("Content-Type", "application/json")
    text, usage, last = "", {}, b""
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            last = line.removeprefix(b"data: ").strip()
            if last == b"[DONE]":
                continue
            part = json.loads(last)
            assert "error" not in part, part
            usage = part.get("usage") or usage
            more = "".join(choice["delta"].get("content") or "" for choice in part["choices"])
            if more and not text:
                begun()
            text += more
    assert last == b"[DONE]"
    return text, usage


def test_answers_are_never_anothers(server: Server) -> None:
    apple, banana = learns(server, "apple"), learns(server, "banana")
    alone = {(model, n): whole(server, model, n) for model in (apple, banana, "tiny") for n in range(12)}
    for n in range(12):
        assert len({alone[model, n][0] for model in (apple, banana, "tiny")}) == 3
    asks = [((apple, banana, "tiny")[n % 3], n % 12, (whole, streamed)[n // 3 % 2]) for n in range(ASKS)]
    with ThreadPoolExecutor(ASKS) as pool:
        given = list(pool.map(lambda ask: ask[2](server, ask[0], ask[1]), asks))
    for (model, number, _), (text, usage) in zip(asks, given, strict=True):
        wanted, counted = alone[model, number]
        assert text == wanted
        assert [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")] == [
            counted[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        ]

    def delete() -> None:
        assert server.ask("DELETE", f"/v1/models/{apple}")[0] == 200

    assert streamed(server, apple, 0, begun=delete)[0] == alone[apple, 0][0]  # what has begun ends well
    status, refused = server.ask("POST", "/v1/chat/completions", body(apple, 0))
    assert (status, refused["error"]["code"]) == (404, "model_not_found")
    assert whole(server, banana, 0)[0] == alone[banana, 0][0]
