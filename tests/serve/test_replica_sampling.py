"""How tokens are chosen: seeds, temperature, nucleus, penalties, bias, log-probabilities, stop ids, grammars."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from luthier.serve.grammar import Grammars
from luthier.serve.sampling import Chooser, choose
from luthier.spec.errors import UserError
from tests.serve.replicas import Bench, ask, load

PROMPT = [(7 * n + 3) % 300 for n in range(20)]


def greedy_with(tiny: Path, change: Any, count: int = 12) -> list[int]:
    """The slow twin: greedy tokens of logits that `change(logits, generated)` shaped."""
    model, ids = load(tiny), list(PROMPT)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].clone()
            change(logits, Counter(ids[len(PROMPT) :]))
            ids.append(int(logits.argmax()))
    return ids[len(PROMPT) :]


def test_the_same_seed_gives_the_same_answer_in_any_company(tiny: Path) -> None:
    one = ask("x", PROMPT, temperature=1.2, top_p=0.95, seed=7, max_tokens=20)
    alone = Bench(tiny).run([one])["x"].ids
    others = [ask(f"{k}", PROMPT[k:], temperature=0.8 * k, seed=7 + k) for k in range(4)]
    assert Bench(tiny).run([*others, one])["x"].ids == alone
    answers = {tuple(Bench(tiny).run([one.model_copy(update={"seed": seed})])["x"].ids) for seed in range(5)}
    assert len(answers) == 5


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_draws_follow_the_distribution(top_p: float) -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    chooser = Chooser(ask("x", [1], temperature=1.0, top_p=top_p, seed=3), None)
    counts = Counter(choose(logits, [chooser])[0] for _ in range(4000))
    wanted = [0.5, 0.25, 0.15, 0.1] if top_p == 1 else [2 / 3, 1 / 3, 0, 0]
    assert [counts[token] / 4000 for token in range(4)] == pytest.approx(wanted, abs=0.03)


def test_temperature_sharpens() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    chooser = Chooser(ask("x", [1], temperature=0.5, seed=1), None)
    counts = Counter(choose(logits, [chooser])[0] for _ in range(4000))
    assert counts[0] / 4000 == pytest.approx(4 / 6, abs=0.03)


@pytest.mark.parametrize(("frequency", "presence"), [(2.0, 0.0), (0.0, 2.0), (1.0, 0.5), (-1.5, 0.0)])
def test_penalties_are_openais(frequency: float, presence: float, tiny: Path) -> None:
    def change(logits: torch.Tensor, said: Counter[int]) -> None:
        for token, times in said.items():
            logits[token] -= frequency * times + presence

    given = Bench(tiny).run([ask("x", PROMPT, frequency_penalty=frequency, presence_penalty=presence)])["x"]
    assert given.ids == greedy_with(tiny, change)


def test_bias_bans_and_forces(tiny: Path) -> None:
    plain = Bench(tiny).run([ask("x", PROMPT)])["x"]

    def banned(logits: torch.Tensor, said: Counter[int]) -> None:
        logits[plain.ids[0]] -= 100

    given = Bench(tiny).run(
        [ask("ban", PROMPT, logit_bias={plain.ids[0]: -100}), ask("force", PROMPT, logit_bias={42: 100}, temperature=1)]
    )
    assert given["ban"].ids == greedy_with(tiny, banned)
    assert given["force"].ids == [42] * 12
    assert given["force"].logprobs[0] < -0.5  # the model's own, before the bias


def test_logprobs_are_the_models(tiny: Path) -> None:
    given = Bench(tiny).run([ask("x", PROMPT, logprobs=3, prompt_logprobs=True)])["x"]
    ids = [*PROMPT, *given.ids]
    with torch.inference_mode():
        logs = load(tiny)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    said = [*given.prompt, *given.tokens]
    assert [token.id for token in said] == ids
    assert said[0].logprob is None
    for place, token in enumerate(said[1:]):
        assert token.logprob == pytest.approx(float(logs[place, token.id]), abs=1e-4)
        values, top = logs[place].topk(3)
        assert [alternative for alternative, _ in token.top] == top.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [1, 20, 300])
def test_only_the_prompts_logprobs(length: int, tiny: Path) -> None:
    prompt = [(3 * n) % 290 for n in range(length)]
    bench = Bench(tiny)
    bench.run([ask("before", prompt)])  # a remembered prefix must not swallow log-probabilities
    given = bench.run([ask("x", prompt, max_tokens=0, prompt_logprobs=True), ask("y", prompt, max_tokens=3)])["x"]
    assert [token.id for token in given.prompt] == prompt
    assert all(token.logprob is not None for token in given.prompt[1:])
    assert given.ids == []
    assert given.finish == "length"
    assert given.last is not None
    assert given.last.generated == 0


def test_a_stop_id_ends_and_is_counted(tiny: Path) -> None:
    plain = Bench(tiny).run([ask("x", PROMPT)])["x"].ids
    stop = plain[4]
    given = Bench(tiny).run([ask("x", PROMPT, stop_ids=[stop])])["x"]
    assert given.ids == plain[: plain.index(stop)]
    assert given.finish == "stop"
    assert given.last is not None
    assert given.last.generated == plain.index(stop) + 1


# --- grammars -------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
    "required": ["name", "kind", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(tiny: Path) -> Grammars:
    return Grammars(tiny / "tokenizer.json", Bench(tiny).compute.vocabulary)


def spoken(tiny: Path, grammars: Grammars, grammar: dict[str, Any], **more: Any) -> list[tuple[str, str | None]]:
    """(text, finish) of a few sampled answers under `grammar`."""
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    stop = tokenizer.token_to_id("<|im_end|>")
    bench = Bench(tiny)
    for seed in range(6):
        one = ask(f"{seed}", PROMPT, temperature=1, seed=seed, stop_ids=[stop], max_tokens=400, grammar=grammar, **more)
        bench.add(one, grammars.matcher(grammar, [stop]))
    given = bench.run()
    special = set(tokenizer.get_added_tokens_decoder())
    assert not any(token in special for answer in given.values() for token in answer.ids)
    return [(tokenizer.decode(answer.ids, skip_special_tokens=False), answer.finish) for answer in given.values()]


def test_a_schema_is_kept(tiny: Path, grammars: Grammars) -> None:
    for text, finish in spoken(tiny, grammars, {"json_schema": SCHEMA}, logit_bias={220: -5}):
        if finish == "stop":
            value = json.loads(text)
            assert list(value) == ["name", "kind", "n"]
            assert value["kind"] in ("a", "b")
    assert "stop" in [finish for _, finish in spoken(tiny, grammars, {"json_schema": {"enum": ["yes", "no"]}})]


def test_any_object(tiny: Path, grammars: Grammars) -> None:
    said = spoken(tiny, grammars, {"json_object": True})
    assert all(text.lstrip().startswith("{") for text, _ in said)
    for text, finish in said:
        if finish == "stop":
            assert isinstance(json.loads(text), dict)


def test_lark(tiny: Path, grammars: Grammars) -> None:
    said = spoken(tiny, grammars, {"lark": 'start: "the " ("fox" | "dog")'})
    assert {text for text, _ in said} <= {"the fox", "the dog"}
    assert {finish for _, finish in said} == {"stop"}


@pytest.mark.parametrize(
    "grammar",
    [
        {"json_schema": {"type": "nonsense"}},
        {"json_schema": {"type": "string", "pattern": "("}},
        {"json_schema": {"$ref": "#/$defs/nowhere"}},
        {"lark": "start: ("},
        {"strange": 1},
    ],
    ids=["type", "pattern", "ref", "lark", "kind"],
)
def test_what_cannot_be_followed_is_refused(grammar: dict[str, Any], grammars: Grammars) -> None:
    with pytest.raises(UserError) as refused:
        grammars.matcher(grammar, [2])
    assert refused.value.param == "response_format"
    assert refused.value.code == "invalid_request"


def test_a_schema_that_only_means_itself_is_refused_at_the_first_token(grammars: Grammars) -> None:
    """It compiles, and leaves no token that could come."""
    circle = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    matcher = grammars.matcher({"json_schema": circle}, [2])
    with pytest.raises(UserError, match=r"nothing that could come next\.$") as refused:
        matcher.forbid(torch.zeros(400))
    assert refused.value.param == "response_format"


def test_a_grammar_without_an_end_is_refused(grammars: Grammars) -> None:
    with pytest.raises(UserError, match="stop id"):
        grammars.matcher({"json_object": True}, [])
