"""The GPU's benchmark, on the CPU and in small: everybody takes the same step."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from luthier.engine.forest import Row


@pytest.fixture(autouse=True)
def in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setitem(gpu.SHAPES, "tiny", {**gpu.SHAPES["135m"], **small, "num_key_value_heads": 1})


def alike(rows: list[Row], systems: dict[str, gpu.Way]) -> None:
    loss, gradients = gpu.reference("tiny", rows, systems["flat"])
    for name, micro in (("luthier", 4096), ("flat", 2)):
        own, found = gpu.gradients(systems[name](gpu.prepared(name, "tiny"), rows, micro))
        assert own == pytest.approx(loss, rel=gpu.LOSS)
        assert float(torch.nn.functional.cosine_similarity(found, gradients, dim=0)) > gpu.COSINE


@pytest.mark.parametrize("case", list(gpu.ROWS))
def test_everybody_takes_the_same_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.ROWS, case, 3)
    alike(gpu.rows_of(case), gpu.SYSTEMS)


def test_and_the_same_step_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PAIRS", 2)
    alike(gpu.pairs(), gpu.SYSTEMS_OF_PAIRS)
