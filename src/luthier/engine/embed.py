"""How near texts are in meaning, by the base model's own states: the cosine of their mean last hidden states.

The states of all texts have a large part in common, which would make everything alike; their mean is taken off first
(Mu and Viswanath, 2018). Does not know: whose texts these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.engine.generate import own_attention
from luthier.engine.step import inner

BATCH = 16
LONGEST = 512  # tokens of a text that are looked at


@torch.no_grad()
def mean_states(model: Any, texts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Mean last hidden state of each text's ids, float64 [N, H]; zeros for a text without any."""
    base = inner(model)
    device = next(base.parameters()).device
    found = torch.zeros((len(texts), int(base.config.get_text_config().hidden_size)), dtype=torch.float64)
    order = sorted((n for n in range(len(texts)) if len(texts[n])), key=lambda n: len(texts[n]))
    with own_attention(model):
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            rows = [list(texts[n][:LONGEST]) for n in batch]
            width = max(map(len, rows))
            ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
            states = base.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            total = (states.double() * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            found[batch] = total.cpu()
    return found


def likeness(answers: Tensor, wanted: Tensor) -> list[float]:
    """Cosine of each answer's state with its reference's, [N, H] each, less the mean of the references; 0 for a text
    that has none."""
    middle = wanted.mean(dim=0)
    empty = (answers.abs().sum(dim=1) == 0) | (wanted.abs().sum(dim=1) == 0)
    found = torch.nn.functional.cosine_similarity(answers - middle, wanted - middle, dim=1)
    return [float(value) for value in found.masked_fill(empty, 0.0)]
