"""Laws of the head: the gradient that is made in the logits' place is autograd's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from luthier.engine import loss

pytestmark = pytest.mark.usefixtures("either_kernels")


class Model(nn.Module):
    """As much of a transformers model as the head looks at."""

    def __init__(self, vocabulary: int, size: int, dtype: torch.dtype, learns: bool, **config: float) -> None:
        super().__init__()
        self.config: Any = type("Config", (), {"get_text_config": lambda self: self, **config})()
        self.head = nn.Linear(size, vocabulary, bias=False, dtype=dtype)
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(1))
        self.head.requires_grad_(learns)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def learnt(model: Model, by_hand: bool, count: int, smoothing: float) -> tuple[float, Tensor, Tensor, Tensor | None]:
    """(loss, hits, gradient of the states, gradient of the head)."""
    generator = torch.Generator().manual_seed(2)
    vocabulary, size = model.head.weight.shape
    hidden = torch.randn(count, size, generator=generator).to(model.head.weight.dtype).requires_grad_()
    targets = torch.randint(vocabulary, (count,), generator=generator)
    weights = torch.rand(count, generator=generator).round(decimals=1)
    head = loss.Head(model)
    assert head.matrix is not None
    if not by_hand:
        head.matrix = None
    model.zero_grad()
    value, right = loss.backward(hidden, head, targets, weights, 7.0, vocabulary, smoothing)
    assert hidden.grad is not None
    return value, right, hidden.grad, model.head.weight.grad


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(2, 60), st.sampled_from([0.0, 0.1, 0.5]), st.booleans(), st.integers(1, 500))
def test_in_place_is_autograd(count: int, vocabulary: int, smoothing: float, learns: bool, elements: int) -> None:
    """Float32: any number of targets, slices, smoothing; with and without a head that learns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "SLICE_ELEMENTS", elements)
        model = Model(vocabulary, 8, torch.float32, learns)
        ours, theirs = (learnt(model, by_hand, count, smoothing) for by_hand in (True, False))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-6)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-6)
    if learns and count:
        torch.testing.assert_close(ours[3], theirs[3], rtol=1e-4, atol=1e-6)
    assert learns or ours[3] is None


def test_bfloat16_is_rounded_where_autograd_rounds() -> None:
    model = Model(50, 16, torch.bfloat16, True)
    ours, theirs = (learnt(model, by_hand, 30, 0.1) for by_hand in (True, False))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert torch.equal(ours[1], theirs[1])
    for one, other in zip(ours[2:], theirs[2:], strict=True):
        assert one is not None and other is not None
        assert one.dtype == torch.bfloat16
        assert float((one.float() - other.float()).norm()) < 0.01 * float(other.float().norm())


def test_logits_of_any_size() -> None:
    """Differences of hundreds neither overflow nor lose the loss."""
    model = Model(3, 1, torch.float32, False)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[500.0], [-500.0], [0.0]]))
    hidden = torch.ones(3, 1, requires_grad=True)
    value, right = loss.backward(hidden, loss.Head(model), torch.tensor([0, 1, 2]), torch.ones(3), 1.0, 3)
    assert value == pytest.approx(0 + 1000 + 500) and right.tolist() == [True, False, False]
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [0.0, 1000.0, 500.0]


@pytest.mark.parametrize("config", [{"final_logit_softcapping": 30.0}, {"logits_scaling": 4.0}, {"logit_scale": 0.25}])
def test_other_heads_go_through_autograd(config: dict[str, float]) -> None:
    assert loss.Head(Model(5, 4, torch.float32, False, **config)).matrix is None


def test_what_is_not_a_number_comes_out_as_such() -> None:
    model = Model(5, 4, torch.float32, False)
    hidden = torch.full((2, 4), math.nan, requires_grad=True)
    value, _ = loss.backward(hidden, loss.Head(model), torch.tensor([0, 1]), torch.ones(2), 1.0, 5)
    assert math.isnan(value)
