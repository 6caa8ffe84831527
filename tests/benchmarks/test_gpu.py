"""The GPU's benchmark, on the CPU and in small: everybody takes the same step."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu


@pytest.mark.parametrize("case", list(gpu.ROWS))
def test_everybody_takes_the_same_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setitem(gpu.ROWS, case, 3)
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    monkeypatch.setitem(gpu.SHAPES, "tiny", {**gpu.SHAPES["135m"], **small, "num_key_value_heads": 1})
    rows = gpu.rows_of(case)
    loss, gradients = gpu.reference("tiny", rows)
    for name, micro in (("luthier", 4096), ("flat", 2)):
        own, found = gpu.gradients(gpu.SYSTEMS[name](gpu.prepared(name, "tiny"), rows, micro))
        assert own == pytest.approx(loss, rel=gpu.LOSS)
        assert float(torch.nn.functional.cosine_similarity(found, gradients, dim=0)) > gpu.COSINE
