"""The lean decoder computes what transformers computes, for each family, with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from luthier.serve.compute import Lean, Whole
from luthier.serve.decoder import Piece
from tests import tiny as tiny_models
from tests.serve.replicas import LINEAR, Answer, Bench, ask, load, make_adapter

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-untied-biases": {"family": "llama", "tied": False, "attention_bias": True, "mlp_bias": True},
    "llama3-rope": {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "qwen3-wide-heads": {"family": "qwen3", "head_dim": 16},
    "qwen2-sliding": {"family": "qwen2", "sliding_window": 8},
    "mistral-sliding": {"family": "mistral", "sliding_window": 8, "tied": False},
    "gemma": {"family": "gemma"},
    "gemma3": {
        "family": "gemma3",
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
PROMPT = [(7 * n + 3) % 300 for n in range(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tiny_models.make_model(tmp_path_factory.mktemp("model") / name, **FAMILIES[name])
        return made[name]

    return get


def in_pieces(bench: Bench, prompt: list[int], cuts: list[int], adapter: Path | None = None) -> torch.Tensor:
    """Logits [T, V] of a prompt read in pieces, beside two other sequences."""
    way = bench.compute
    way.reserve(3, len(prompt) + 1)
    with torch.inference_mode():
        way.states([Piece(0, 0, PROMPT[:5]), Piece(1, 0, PROMPT[5:20])], [None, None])
        given, other = [], 5
        for start, end in zip([0, *cuts], [*cuts, len(prompt)], strict=True):
            owner = bench.adapter(adapter)
            pieces = [Piece(0, other, [9]), Piece(1, other + 10, [11]), Piece(2, start, prompt[start:end])]
            states = way.states(pieces, [None, None, owner])
            given.append(way.logits(states[2:], [owner] * (end - start)))
            other += 1
    return torch.cat(given)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, folders: Any) -> None:
    bench = Bench(folders(name))
    assert isinstance(bench.compute, Lean)
    wanted = load(folders(name))(torch.tensor([PROMPT])).logits[0]
    found = in_pieces(bench, PROMPT, [17, 18, 30])
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4), (found - wanted).abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "llama-untied-biases"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "r": 8, "lora_alpha": 16},
        {"use_dora": True},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=["lora", "rslora", "dora", "patterns"],
)
def test_adapters_are_those_of_peft(name: str, config: dict[str, Any], folders: Any, tmp_path: Path) -> None:
    base = folders(name)
    adapter = make_adapter(base, tmp_path / "adapter", 1, **config)
    wanted = PeftModel.from_pretrained(load(base), adapter).eval()(torch.tensor([PROMPT])).logits[0]
    plain = load(base)(torch.tensor([PROMPT])).logits[0]
    found = in_pieces(Bench(base), PROMPT, [17, 18, 30], adapter)
    assert (wanted - plain).abs().max() > 0.1
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4), (found - wanted).abs().max()


def test_an_adapter_on_the_head(folders: Any, tmp_path: Path) -> None:
    base = folders("mistral-sliding")
    adapter = make_adapter(base, tmp_path / "adapter", 1, target_modules=[*LINEAR, "lm_head"])
    wanted = PeftModel.from_pretrained(load(base), adapter).eval()(torch.tensor([PROMPT])).logits[0]
    assert torch.allclose(in_pieces(Bench(base), PROMPT, [20], adapter), wanted, atol=1e-4, rtol=1e-4)


OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "olmo2": {"family": "olmo2"},
    "granite": {"family": "granite", "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gemma2": {"family": "gemma2", "final_logit_softcapping": 3.0, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "dynamic-rope": {"family": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_served_by_transformers(name: str, tmp_path: Path) -> None:
    base = tiny_models.make_model(tmp_path / "base", **OTHERS[name])
    odd = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if name == "gpt2" else {}
    adapter = make_adapter(base, tmp_path / "a", 1, **odd)
    bench = Bench(base)
    assert isinstance(bench.compute, Whole)
    given = bench.run([ask("a", PROMPT), ask("b", PROMPT[:7]), ask("c", PROMPT[3:30], adapter=str(adapter))])
    for one, prompt in (("a", PROMPT), ("b", PROMPT[:7])):
        assert given[one].ids == greedy(load(base), prompt)
    tuned = PeftModel.from_pretrained(load(base), adapter).eval()
    assert given["c"].ids == greedy(tuned, PROMPT[3:30])
    assert given["c"].ids != greedy(load(base), PROMPT[3:30])


def greedy(model: Any, prompt: list[int], count: int = 12) -> list[int]:
    """The slow twin: no cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_are_those_of_transformers(folders: Any) -> None:
    for name in ("llama", "gemma3"):
        given: dict[str, Answer] = Bench(folders(name)).run([ask("a", PROMPT), ask("b", PROMPT[:7])])
        assert given["a"].ids == greedy(load(folders(name)), PROMPT)
        assert given["b"].ids == greedy(load(folders(name)), PROMPT[:7])


@pytest.mark.parametrize("name", ["llama", "llama-untied-biases", "gemma3"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_packed_bfloat16_weights_are_the_same_weights(
    name: str, config: dict[str, Any], folders: Any, tmp_path: Path
) -> None:
    base = folders(name)
    bench = Bench(base, precision="bfloat16")
    whole = dict(load(base, "bfloat16").named_modules())
    for module in bench.compute.modules:
        assert torch.equal(bench.compute.weight_of(module), whole[module].weight)
    adapter = make_adapter(base, tmp_path / "adapter", 1, **config)
    wanted = in_pieces(Bench(base), PROMPT, [17, 18, 30], adapter)
    found = in_pieces(bench, PROMPT, [17, 18, 30], adapter)
    assert (found - wanted).norm() / wanted.norm() < 0.05
