"""Laws of the fused layers: they compute what transformers and PEFT compute, and learn what autograd learns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.engine import adapters, attention, forest, layers, models, step
from luthier.engine.forest import Row
from luthier.spec.job import make_request
from tests.engine import runs
from tests.engine.test_forest import Gradients, rows_of, same

pytestmark = pytest.mark.usefixtures("either_kernels")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "mistral": {"sliding_window": 9, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"attention_bias": True, "head_dim": 16},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PRECISIONS = st.sampled_from([torch.float32, torch.bfloat16])


def make(family: str, seed: int = 0, **config: Any) -> Any:
    """A random model of the family: weights large enough that every one of them matters, norms and biases too."""
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family], **config})
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
    attention.install(model)
    return model


def adapted(model: Any, method: str = "lora", targets: list[str] | None = None, rank: int = 3, alpha: float = 5) -> Any:
    """The model with an adapter whose B is not zero, or with what `full` and `freeze:N` leave learning."""
    options = {"rank": rank, "target_modules": targets or []} if method in ("lora", "rslora", "pissa", "dora") else {}
    request = make_request({"model": "m", "data": ["d"], "method": method, **options})
    torch.manual_seed(1)
    if not request.uses_adapter:
        layers_learn = models._last_layers(model, method)
        model.requires_grad_(layers_learn is None)
        for layer in layers_learn or []:
            layer.requires_grad_(True)
        return model
    made = adapters.add(model, request, alpha)
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            weight.data += torch.randn_like(weight) * 0.1
    return made


def learnt(model: Any, groups: list[list[Row]]) -> tuple[float, Gradients]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for tree in map(forest.build, groups):
        total += step.learn(model, tree, step.hidden_states(model, tree), 100.0)[0]
    return total, {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def both(model: Any, rows: list[Row]) -> tuple[tuple[float, Gradients], tuple[float, Gradients]]:
    """(loss, gradients) through transformers and PEFT, and through the fused layers."""
    plain = learnt(model, [rows])
    assert layers.fuse(step.inner(model)) is None
    return plain, learnt(model, [rows])


def cosine(left: Gradients, right: Gradients) -> float:
    one, other = (torch.cat([grads[name].float().flatten() for name in sorted(grads)]) for grads in (left, right))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("method", ["lora", "rslora", "pissa", "full", "freeze:1"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_fused_is_plain(family: str, method: str) -> None:
    """Loss and every gradient, in float32: biases, one key head, windows, head norms, sandwiches, tied or not."""
    plain, fused = both(adapted(make(family), method), rows_of([3, 9, 1, 14, 6], prefix=20, seed=1))
    same(plain, fused)
    assert cosine(plain[1], fused[1]) > 0.99999
    for name, gradient in plain[1].items():  # small ones too
        assert float((gradient - fused[1][name]).norm()) < 1e-4 * float(gradient.norm()) + 1e-7, name


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(list(FAMILIES)),
    st.lists(st.sampled_from(LINEAR), min_size=1, unique=True),
    st.integers(1, 5),
    st.integers(1, 3),
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(0, 30),
)
def test_any_targets_ranks_and_rows(
    family: str, targets: list[str], rank: int, depth: int, lengths: list[int], prefix: int
) -> None:
    types = {"layer_types": (["sliding_attention", "full_attention"] * 2)[:depth]} if family == "gemma3_text" else {}
    model = adapted(make(family, num_hidden_layers=depth, **types), "lora", targets, rank)
    same(*both(model, rows_of(lengths, prefix, seed=3)))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_bfloat16_is_as_near_to_the_truth_as_plain_bfloat16(family: str) -> None:
    rows = rows_of([30, 90, 10, 60], prefix=40, seed=1)
    exact = adapted(make(family, hidden_size=64, intermediate_size=96))
    exact_loss, truth = learnt(exact, [rows])
    plain, fused = both(copy.deepcopy(exact).to(torch.bfloat16), rows)
    misses = [1 - cosine(truth, grads) for _, grads in (plain, fused)]
    assert misses[1] < max(1.5 * misses[0], 1e-4)
    assert fused[0] == pytest.approx(exact_loss, rel=1e-2)
    assert {grad.dtype for grad in fused[1].values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_large_states_in_a_long_shared_beginning_do_not_cost_precision(family: str) -> None:
    """In bfloat16, where the stream is much larger than what each layer adds: at least a third nearer to float32 than
    the rows one by one through transformers, whose stream is rounded after every layer."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 4} if family == "gemma3_text" else {}
    model = make(family, hidden_size=64, intermediate_size=96, num_hidden_layers=8, **kinds)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    rounded = adapted(model).to(torch.bfloat16)
    rows = rows_of([20] * 8, prefix=300, seed=1)
    truth = learnt(copy.deepcopy(rounded).float(), [rows])[1]
    flat = learnt(rounded, [[row] for row in rows])[1]
    assert layers.fuse(step.inner(rounded)) is None
    ours = learnt(rounded, [rows])[1]
    assert 1 - cosine(truth, ours) < 0.67 * (1 - cosine(truth, flat))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_order_and_cuts_do_not_matter(family: str) -> None:
    rows = rows_of([3, 9, 1, 14, 6, 2], prefix=20, seed=2)
    model = adapted(make(family))
    assert layers.fuse(step.inner(model)) is None
    whole = learnt(model, [rows])
    same(whole, learnt(model, [rows[::-1]]))
    same(whole, learnt(model, [rows[:2], rows[2:5], rows[5:]]))
    same(whole, learnt(model, [[row] for row in rows]))


def test_parameters_are_the_matrix() -> None:
    """What writes a parameter has written the matrix; the plain path and a merged model read the same weights."""
    rows = rows_of([8, 5], prefix=20, seed=4)
    model = adapted(make("qwen2"))
    assert layers.fuse(step.inner(model)) is None
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.mul_(-2)
    fused = step.measure(model, forest.build(rows))
    twin = copy.deepcopy(model)
    assert layers.of(step.inner(twin)) is None
    merged = twin.merge_and_unload()
    assert step.measure(merged, forest.build(rows)).nll == pytest.approx(fused.nll, rel=1e-5)
    assert step.self_check(model, rows) < 1e-5


def kept(outputs: torch.Tensor, without: Any) -> int:
    """Bytes of all that the graph behind `outputs` keeps for the way back, but for the weights of `without`."""
    seen: dict[int, int] = {}
    nodes, found = [outputs.grad_fn], set()

    def count(thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, (list, tuple)):
            for part in thing:
                count(part)

    while nodes:
        node = nodes.pop()
        if node is None or node in found:
            continue
        found.add(node)
        count([getattr(node, name) for name in dir(node) if name.startswith("_saved") or name == "saved_tensors"])
        count(list(getattr(node, "__dict__", {}).values()))
        nodes += [before for before, _ in node.next_functions]
    for weight in without.parameters():
        seen.pop(weight.untyped_storage().data_ptr(), None)
    return sum(seen.values())


@pytest.mark.parametrize("shared", [0, 24])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_a_layer_keeps_of_a_token(family: str, method: str, shared: int) -> None:
    """Its inputs, one product each, attention's output and log-sum-exp, the LoRA branches' few columns, and nothing
    twice: not queries and keys as they were before they were turned, nor those of a trunk behind each forest."""
    rows = rows_of([8, 5, 9], prefix=24, seed=4)
    held = []
    for count in (2, 3):
        more = {"layer_types": ["full_attention"] * count} if family == "gemma3_text" else {}
        model = adapted(make(family, num_hidden_layers=count, num_key_value_heads=2, **more), method)
        assert layers.fuse(step.inner(model)) is None
        trunk = attention.Trunk(shared) if shared else None
        tree = forest.build([(ids[shared:], weights[shared:]) for ids, weights in rows], begin=shared)
        if trunk is not None:
            above = forest.trunk(rows, [0, 1, 2], shared)
            beginning = step.hidden_states(model, above, becomes=trunk)  # noqa: F841, as long as it lives
        held.append(kept(step.hidden_states(model, tree, trunk=trunk), model))
    hidden, inner, heads, keys, size, ranks = 32, 48, 4, 2, 8, 7 * 3 * (method == "lora")
    numbers = 2 * hidden + (heads + 2 * keys) * size + heads * size + heads + 2 * inner + ranks + 2
    if family == "gemma3_text":  # with norms of heads, and norms that close
        numbers += (heads + keys) * size + (heads + keys) + 2 * hidden + 2
    assert held[1] - held[0] == 4 * numbers * tree.tokens


def test_nothing_is_computed_below_the_lowest_learning_weight() -> None:
    """Frozen layers under it leave no trace in the graph, and the first learning layer gives its input no gradient."""
    model = adapted(make("llama", num_hidden_layers=3), "freeze:1")
    assert layers.fuse(model) is None
    seen: list[bool] = []

    def attend(module: Any, query: Any, *rest: Any, **options: Any) -> Any:
        seen.append(query.requires_grad)
        return attention.forest_attention(module, query, *rest, **options)

    tree = forest.build(rows_of([9], prefix=0, seed=5))
    plan = attention.Plan(tree, torch.device("cpu"))
    decoder = layers.of(model)
    assert decoder is not None
    with attention.active(plan):
        decoder(torch.from_numpy(tree.token_ids), plan.positions, torch.from_numpy(tree.sources), attend)
    assert seen == [False, False, True]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"dropout": 0.1}, "self_attn.q_proj: the adapter has dropout"),
    "dora": ({"method": "dora"}, "self_attn.q_proj: the adapter is DoRA"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_fused_says_so_and_trains(case: str, tiny: Path, tmp_path: Path) -> None:
    options, why = REFUSED[case]
    data = runs.write(tmp_path / "data.jsonl", runs.chats(8))
    run = runs.train(tmp_path / "run", tiny, data, max_steps=2, **options)
    told = [event["message"] for event in runs.events(run, "phase") if "PEFT" in event["message"]]
    assert len(told) == 1 and why in told[0]


def test_other_families_and_activations_are_left_to_transformers() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    other = AutoModelForCausalLM.from_config(config)
    assert "GPT2Model" in str(layers.fuse(other))
    assert layers.of(other) is None
    assert layers.fuse(make("llama", hidden_act="relu")) == "its activation is relu"
    assert "bfloat16" not in str(layers.fuse(make("llama").to(torch.bfloat16)))


def test_checkpoints_are_the_same_for_both_paths(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started plain and resumed fused, or the other way round: the run that one path takes alone."""
    data = runs.write(tmp_path / "data.jsonl", runs.chats(16))
    options: dict[str, Any] = {"precision": "float32", "epochs": 1, "checkpoint_every": 1}
    whole = runs.losses(runs.train(tmp_path / "fused", tiny, data, **options))
    fuse = layers.fuse
    for name, first in (("plain-fused", lambda base: "not now"), ("fused-plain", fuse)):
        then = fuse if first is not fuse else lambda base: "not now"
        run = runs.lay_out(tmp_path / name, tiny, data, **options)
        monkeypatch.setattr(layers, "fuse", first)
        stop_after(monkeypatch, 2)
        assert runs.carry_out(run) != 0
        monkeypatch.undo()
        monkeypatch.setattr(layers, "fuse", then)
        assert runs.carry_out(run) == 0, runs.events(run)[-1]
        assert runs.losses(run)[-len(whole) :] == pytest.approx(whole, rel=1e-4)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The engine breaks down when it begins the step after `steps`."""
    from luthier.engine import train
    from luthier.spec.errors import Broken

    go_on = train.Loop._one_step

    def one(self: Any, at: int) -> Any:
        if at == steps:
            raise Broken("played")
        return go_on(self, at)

    monkeypatch.setattr(train.Loop, "_one_step", one)
