"""POST /completions with a played replica."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from luthier.api.legacy_logprobs import Lines
from luthier.data.render import Renderer
from luthier.spec.serving import Ask, Part, Token
from tests.api.conftest import FakeRouter


class Scorer(FakeRouter):
    """Tells prompts' log-probabilities too: -1, -2, ... and of each answer what its ask's place says."""

    async def generate(self, base: str, ask: Ask) -> AsyncIterator[Part]:
        place = float(len(self.asks))
        self.asks.append((base, ask))
        if ask.prompt_logprobs:
            told = [Token(id=id, logprob=-float(n) if n else None) for n, id in enumerate(ask.prompt)]
            yield Part(id=ask.id, prompt=told)
        for count, token in enumerate(self.script[: ask.max_tokens], 1):
            alternatives = [(token, -place), (65, -9.0)][: ask.logprobs or 0]
            said = Token(id=token, logprob=None if ask.logprobs is None else -place, top=alternatives)
            yield Part(id=ask.id, tokens=[said], generated=count)
        yield Part(id=ask.id, generated=min(len(self.script), ask.max_tokens), finish="length")


@pytest.fixture
def router() -> Scorer:
    return Scorer()


@pytest.fixture(scope="module")
def renderer(base_folder: Path) -> Renderer:
    return Renderer.load(base_folder)


def ask(client: TestClient, **fields: Any) -> Any:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "one two", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: TestClient, **fields: Any) -> tuple[int, str]:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "one two", **fields})
    return answer.status_code, answer.json()["error"]["param"]


def stream(client: TestClient, **fields: Any) -> list[Any]:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "one two", "stream": True, **fields})
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_a_text_goes_on(client: TestClient, router: Scorer, renderer: Renderer) -> None:
    router.script = renderer.tokenizer.plain(" three four" * 20)
    answer = ask(client)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert (choice["logprobs"], choice["finish_reason"]) == (None, "length")
    base, asked = router.asks[0]
    assert (base, asked.prompt, asked.max_tokens) == ("tiny", renderer.completion_prompt("one two"), 16)
    assert choice["text"] == renderer.tokenizer.decode(router.script[:16])
    assert answer["usage"]["completion_tokens"] == 16
    assert "".join(chunk["choices"][0]["text"] for chunk in stream(client)) == choice["text"]
    assert ask(client, stop=" four")["choices"][0] == {**choice, "text": " three", "finish_reason": "stop"}


def test_prompts_of_every_form(client: TestClient, router: Scorer, renderer: Renderer) -> None:
    router.script = renderer.tokenizer.plain("!")
    ids = renderer.completion_prompt("one")
    for prompt, count in (("one", 1), (["one", "one"], 2), (ids, 1), ([ids, ids, ids], 3)):
        router.asks.clear()
        answer = ask(client, prompt=prompt, n=2, echo=True)
        assert [choice["text"] for choice in answer["choices"]] == ["one!"] * 2 * count
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * count))
        assert {tuple(asked.prompt) for _, asked in router.asks} == {tuple(ids)}
        assert answer["usage"]["prompt_tokens"] == count * len(ids)
        assert answer["usage"]["completion_tokens"] == 2 * count
    for prompt in ("", None):
        assert ask(client, prompt=prompt)["choices"][0]["text"] == "!"


def test_logprobs(client: TestClient, router: Scorer, renderer: Renderer) -> None:
    router.script = renderer.tokenizer.plain(" baseball")
    (choice,) = ask(client, logprobs=2, max_tokens=1, temperature=0)["choices"]
    assert choice["logprobs"]["token_logprobs"] == [0.0]
    assert len(choice["logprobs"]["top_logprobs"][0]) == 2
    (choice,) = ask(client, logprobs=0, max_tokens=1)["choices"]
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [choice["logprobs"]["tokens"]]
    chunks = stream(client, logprobs=2)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    tokens = [token for logprobs in told if logprobs for token in logprobs["tokens"]]
    assert "".join(tokens) == " baseball"


def test_a_prompt_is_scored(client: TestClient, router: Scorer, renderer: Renderer) -> None:
    ids = renderer.completion_prompt("one two")
    (choice,) = ask(client, echo=True, logprobs=1, max_tokens=0)["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "one two"
    assert "".join(told["tokens"]) == "one two"
    assert told["token_logprobs"] == [None, *(-float(n) for n in range(1, len(ids)))]
    assert told["top_logprobs"][0] is None
    starts = [sum(map(len, told["tokens"][:n])) for n in range(len(ids))]
    assert told["text_offset"] == starts
    router.script = renderer.tokenizer.plain(" six")
    (choice,) = ask(client, echo=True, logprobs=1)["choices"]
    assert choice["text"] == "one two six"
    assert choice["logprobs"]["text_offset"][len(ids)] == len("one two")


def test_the_best_are_told(client: TestClient, router: Scorer, renderer: Renderer) -> None:
    router.script = renderer.tokenizer.plain("!")
    answer = ask(client, n=2, best_of=4, logprobs=0, prompt=["a", "b"])
    best = [choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"]]
    assert best == [-0.0, -1.0, -4.0, -5.0]
    assert answer["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": "word " * 3000}, "prompt"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_refusals_name_the_field(client: TestClient, fields: dict[str, Any], param: str) -> None:
    assert refused(client, **fields) == (400, param)


def test_models(client: TestClient) -> None:
    assert refused(client, model="ada:ft-me:x-2023-01-01-00-00-00") == (404, "model")
    assert client.post("/v1/engines/tiny/completions", json={"prompt": "a"}).json()["object"] == "text_completion"


def test_bytes_that_are_no_character_have_names_of_their_own(renderer: Renderer) -> None:
    lines = Lines(renderer.tokenizer, 1)
    ids = renderer.tokenizer.plain("ж")
    assert len(ids) > 1
    for id in ids:
        lines._add(Token(id=id, logprob=-1.0), 0)
    assert all(name.startswith("bytes:\\x") for name in lines.all()["tokens"])
    assert len(set(lines.all()["tokens"])) == len(ids)
