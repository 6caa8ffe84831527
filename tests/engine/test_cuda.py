"""The same laws on a GPU: attention by its kernel, fused layers, trunks, whole runs. Skipped where there is none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.engine import attention, forest, kernels, layers, machine, models, planner, step, stream, varlen
from luthier.engine.__main__ import carry_out
from luthier.engine.attention import Trunk
from luthier.engine.forest import Row
from luthier.engine.preference import Judge
from tests.engine import runs
from tests.engine.test_attention import apart, planted, tensors
from tests.engine.test_forest import Gradients, rows_of
from tests.engine.test_kernels import told
from tests.engine.test_layers import FAMILIES, adapted, cosine, learnt, make, stop_after
from tests.engine.test_preference import fast, pairs_of, slow

GPU = torch.device("cuda")
if not (torch.cuda.is_available() and varlen.able(GPU, torch.bfloat16, 64)):
    pytest.skip("no GPU with FlashAttention", allow_module_level=True)
pytestmark = [
    # torch says so where a thread's first product is one of a backward pass; it goes on all the same.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    # Of float32, whose results are the same to rounding only.
    pytest.mark.filterwarnings("ignore:Memory Efficient attention defaults"),
]


def compared(plan: attention.Plan, parts: tuple[Tensor, ...], window: int | None, scale: float) -> float:
    """How far the kernel in bfloat16 is from float64 under one mask, beside how far bfloat16 under that mask is."""
    parts = tuple(part.to(GPU, torch.bfloat16) for part in parts)
    seed = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(1)).to(GPU, torch.bfloat16)
    output, saved = attention.forward(*parts, plan, window, scale)
    found = [output, *attention.backward(seed, saved)]
    mask = plan.dense(window)

    def masked(dtype: torch.dtype) -> list[Tensor]:
        leaves = [part.to(dtype).requires_grad_() for part in parts]
        made = attention.masked_attention(*leaves, mask, scale)
        return [made.detach(), *torch.autograd.grad(made, leaves, seed.to(dtype))]

    exact = masked(torch.float64)
    return apart(found, exact) / max(0.004, apart(masked(torch.bfloat16), exact))


@pytest.mark.parametrize("size", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 33, 100])
@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (3, 3)])
def test_attention_is_the_masked_twin(size: int, window: int | None, heads: tuple[int, int]) -> None:
    """A shared beginning, branches of unlike lengths, one that parts again, a row of its own."""
    if not varlen.able(GPU, torch.bfloat16, size):
        pytest.skip(f"this GPU has no kernel for heads of {size}")
    rng = np.random.default_rng(2)
    prefix, middle = (rng.integers(0, 300, length).tolist() for length in (290, 70))
    rows = [
        prefix + middle * inner + rng.integers(0, 300, length).tolist()
        for inner, length in ((0, 90), (1, 3), (1, 80), (0, 17))
    ]
    tree = planted([*rows, rng.integers(0, 300, 150).tolist()])
    assert compared(attention.Plan(tree, GPU), tensors(tree, heads, size), window, size**-0.5) < 1.5


@pytest.mark.parametrize("window", [None, 1, 7, 45, 1000])
def test_attention_behind_a_trunk(window: int | None) -> None:
    tree = forest.build(rows_of([3, 9, 30, 14], prefix=0, seed=4), begin=50)
    query, key, value = tensors(tree, (4, 2), 64)
    more = torch.randn(2, 1, 2, 50, 64, generator=torch.Generator().manual_seed(3))
    parts = query, torch.cat([more[0], key], dim=2), torch.cat([more[1], value], dim=2)
    assert compared(attention.Plan(tree, GPU, Trunk(50)), parts, window, 0.125) < 1.5


def both(model: Any, rows: list[Row]) -> list[tuple[float, Gradients]]:
    """Rows one by one through transformers and PEFT, the forest through them, and through the fused layers."""
    alone = learnt(model, [[row] for row in rows])
    plain = learnt(model, [rows])
    assert layers.fuse(step.inner(model)) is None
    return [alone, plain, learnt(model, [rows])]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_fused_is_plain_in_float32(family: str, method: str) -> None:
    """Where attention is the masked twin."""
    alone, plain, fused = both(adapted(make(family), method).cuda(), rows_of([3, 9, 1, 14, 6], prefix=20, seed=1))
    for loss, gradients in (plain, fused):
        assert loss == pytest.approx(alone[0], rel=1e-5)
        assert cosine(alone[1], gradients) > 0.99999


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_bfloat16_is_as_near_to_the_truth_as_rows_alone(family: str, method: str) -> None:
    """Both paths over the kernel, against float32 with the same rounded weights."""
    model = adapted(make(family, hidden_size=64, intermediate_size=96), method).to(torch.bfloat16).cuda()
    rows = rows_of([30, 90, 10, 60], prefix=40, seed=1)
    truth = learnt(copy.deepcopy(model).float(), [rows])
    alone, plain, fused = both(model, rows)
    misses = [1 - cosine(truth[1], gradients) for _, gradients in (alone, plain, fused)]
    assert misses[1] < max(1.5 * misses[0], 1e-4) and misses[2] < max(1.5 * misses[0], 1e-4), misses
    assert fused[0] == pytest.approx(truth[0], rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_streamed_is_together(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "MIN_SAVED", 8)
    model = adapted(make(family)).to(torch.bfloat16).cuda()
    assert layers.fuse(step.inner(model)) is None and step.branches(model)
    rows = rows_of([3, 9, 1, 14, 6, 5, 2], prefix=40, seed=1)

    def streamed(budget: int) -> tuple[float, Gradients]:
        model.zero_grad(set_to_none=True)
        planned = planner.works(rows, budget)
        total = sum(stream.forward_backward(model, work, 100.0) for _, work in planned)
        return total, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    whole = streamed(10_000)
    [(_, work)] = planner.works(rows, 60)
    assert work.trunk is not None and len(work.forests) > 1
    parts = streamed(60)
    assert parts[0] == pytest.approx(whole[0], rel=5e-3)
    assert cosine(whole[1], parts[1]) > 0.999


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_step_on_pairs_is_that_of_the_answers_alone(
    family: str, dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer through transformers in float32 is the truth; in one forest, and behind a trunk."""
    monkeypatch.setattr(planner, "MIN_SAVED", 8)
    model = adapted(make(family, hidden_size=64, intermediate_size=96), method).to(dtype).cuda()
    exact = copy.deepcopy(model).float()
    rows = pairs_of([(5, 9), (1, 14), (7, 7), (12, 2), (3, 3)], prefix=40, seed=1)
    start = stream.row_log_probs(exact, rows, 4096) + np.linspace(-2, 2, len(rows))
    for each in (exact, model):
        step.inner(each).set_attn_implementation("sdpa")
    judge = Judge(0.3, 0.1)
    truth, alone = slow(exact, rows, start, judge), slow(model, rows, start, judge)
    attention.install(step.inner(model))
    assert layers.fuse(step.inner(model)) is None
    most = 1e-5 if dtype == torch.float32 else max(1e-4, 1.5 * (1 - cosine(truth[1], alone[1])))
    for budget in (10_000, 120):
        loss, gradients = fast(model, rows, start, judge, budget)
        assert loss == pytest.approx(truth[0], rel=1e-5 if dtype == torch.float32 else 1e-2)
        assert 1 - cosine(truth[1], gradients) < most, budget
    assert any(work.trunk for _, work in planner.works(rows, 120, trunks=step.branches(model), each=2)) == (
        dtype == torch.bfloat16
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_pairs_is_proven(precision: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    data = runs.write(tmp_path / "pairs.jsonl", runs.preferences(40))
    options: dict[str, Any] = {"objective": "dpo", "precision": precision, "rank": 8, "learning_rate": 1e-2}
    run = runs.train(tmp_path / "run", tiny, data, epochs=4, validation="0.2", **options)
    steps, report = runs.events(run, "step"), json.loads(run.report.read_text())
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4 if precision == "float32" else 0.05)
    assert steps[-1]["loss"] < 0.3 and steps[-1]["preference"]["reward_accuracy"] == 1.0
    assert report["tuned"]["loss"] < report["base"]["loss"]
    assert report["proof"] is not None, runs.events(run, "warning")


@pytest.mark.parametrize("method", ["lora", "dora", "full", "freeze:1"])
def test_a_run_learns_is_proven_and_answers(method: str, tiny: Path, tmp_path: Path) -> None:
    """From the data to the proof; what is published computes on the CPU what it computes here."""
    data = runs.write(tmp_path / "data.jsonl", runs.chats(40))
    options: dict[str, Any] = {"epochs": 4, "validation": "0.2", "learning_rate": 3e-3, "method": method}
    run = runs.train(tmp_path / "run", tiny, data, **options, **({"rank": 8} if "ora" in method else {}))
    report = json.loads(run.report.read_text())
    assert report["tuned"]["loss"] < report["base"]["loss"]
    assert report["proof"] is not None, runs.events(run, "warning")
    told = runs.events(run, "forecast")[-1]
    assert 0 < told["peak_memory_bytes"] < told["memory_bytes"]
    assert 0.3 * told["peak_memory_bytes"] < report["peak_memory_bytes"] < 3 * told["peak_memory_bytes"]
    loaded = models.load_for_use(str(run.path), "float32")
    rows = rows_of([30, 9], prefix=20, seed=1)
    with step.forests(loaded.model):
        there = step.measure(loaded.model, forest.build(rows))
        here = step.measure(loaded.model.cpu(), forest.build(rows))  # type: ignore[operator]
    assert here.nll == pytest.approx(there.nll, rel=1e-4)


def test_the_same_step_gives_the_same_bits() -> None:
    """Rows long enough for several blocks of the kernel, branches from one token, windows that share keys."""
    machine.repeatable()
    try:
        for family in ("llama", "gemma3_text"):
            model = adapted(make(family, hidden_size=64, max_position_embeddings=4096)).to(torch.bfloat16).cuda()
            assert layers.fuse(step.inner(model)) is None
            rows = rows_of([900, 700, 10, 600, 60, 300], prefix=1500, seed=1)
            first, *others = (learnt(model, [rows]) for _ in range(4))
            for loss, gradients in others:
                assert loss == first[0]
                assert all(torch.equal(gradients[name], value) for name, value in first[1].items())
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("fused", [True, False])
def test_resumed_is_uninterrupted(fused: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, dropout's too (with which layers go through PEFT)."""
    data = runs.write(tmp_path / "data.jsonl", runs.chats(24, system="Answer in one word, and keep to it. " * 8))
    options: dict[str, Any] = {"epochs": 2, "dropout": 0.0 if fused else 0.1, "rank": 8, "checkpoint_every": 2}
    whole = runs.train(tmp_path / "whole", tiny, data, **options)
    run = runs.lay_out(tmp_path / "again", tiny, data, **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert carry_out(run) != 0
    assert carry_out(run) == 0, runs.events(run)[-1]
    assert runs.events(run, "started")[-1]["resumed_from"] == 6
    left, right = runs.weights(whole), runs.weights(run)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_resumed_pairs_are_uninterrupted(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is looked at again, and seen the same."""
    data = runs.write(tmp_path / "pairs.jsonl", runs.preferences(24))
    options: dict[str, Any] = {"objective": "dpo", "epochs": 2, "rank": 8, "checkpoint_every": 2}
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    whole = runs.train(tmp_path / "whole", tiny, data, **options)
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "another"))
    run = runs.lay_out(tmp_path / "again", tiny, data, **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert carry_out(run) != 0
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "third"))
    assert carry_out(run) == 0, runs.events(run)[-1]
    assert runs.events(run, "started")[-1]["resumed_from"] == 6
    assert runs.losses(whole) == runs.losses(run)
    left, right = runs.weights(whole), runs.weights(run)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_without_a_compiler_or_by_choice_torch_computes(tmp_path: Path) -> None:
    absent = "from luthier.engine import kernels; print(kernels.absent('cuda'), kernels.whose())"
    assert told(absent) == "own"
    assert told(absent, LUTHIER_KERNELS="torch") == "LUTHIER_KERNELS is torch torch"
    said = told(absent, CC="/bin/false", TRITON_CACHE_DIR=str(tmp_path))
    assert said.startswith("Triton failed: ") and said.endswith(" torch")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_by_torchs_kernels_is_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(make(family, hidden_size=64), "full").cuda()
    assert layers.fuse(step.inner(model)) is None
    rows = rows_of([3, 9, 1, 14, 6], prefix=20, seed=1)
    assert kernels.whose() == "own"
    own = learnt(model, [rows])
    monkeypatch.setattr(kernels, "able", lambda device="cpu": False)
    by_torch = learnt(model, [rows])
    assert own[0] == pytest.approx(by_torch[0], rel=1e-6)
    assert cosine(own[1], by_torch[1]) > 0.999999
    assert any(not torch.equal(own[1][name], by_torch[1][name]) for name in own[1]), "it was not ours that computed"


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_agree_with_one_process(ranks: int, tiny: Path, tmp_path: Path) -> None:
    """torchrun: with NCCL where each rank has a GPU of its own, with gloo where they share one."""
    data = runs.write(tmp_path / "data.jsonl", runs.chats(24))
    options: dict[str, Any] = {"epochs": 1, "precision": "float32", "micro_tokens": 64, "rank": 4}
    alone = runs.train(tmp_path / "alone", tiny, data, **options)
    run = runs.lay_out(tmp_path / "ranks", tiny, data, **options)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    assert runs.process(run, *launcher).wait(timeout=120) == 0, run.log.read_text()[-2000:]
    left, right = runs.weights(alone), runs.weights(run)
    for name in left:
        assert torch.allclose(left[name], right[name], atol=2e-5), name
