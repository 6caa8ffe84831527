"""Products of large float32 matrices on float16 numbers (halves.cpp), where a model was chosen for it.

Weights and activations stay float32, and so do a product's totals; its factors are rounded to 11 bits, with scales of
their own for every row and panel, so nothing overflows. What is small, or not float32, is torch's to do, and so is
everything of a model that was not chosen.

Does not know: the structure of models, what a product is for, when halves pay (models.py).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from luthier.engine import kernels, machine

# Layers whose forward pass keeps to float32. In the first few of a model the states of the first token grow to
# thousands of times those of others (Sun et al., 2024, massive activations), and all others attend to it; what is
# rounded there is wrong in every gradient. On S1 their cosine lost 1e-3 to 3e-3 with them in halves, 2e-4 without.
EXACT = 4
LEAST = 64, 192, 192  # rows, inner size and columns from which on halves are quicker than torch (docs/experiments.md)
Product = Callable[..., Tensor]  # a [M, K] b [K, N] (+ plus [M, N] or [N]), [M, N], into `out` if it is given

_halved: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def absent() -> str:
    """Why no product can be made of halves here; empty where it can."""
    return "a GPU computes, in bfloat16 or float32" if torch.cuda.is_available() else kernels.halves_absent()


def gain() -> float:
    """How many times as fast as torch's products of float32 those of halves are here, by one thread; 0 where there are
    none."""
    return 0.0 if absent() else _gain()


@functools.cache
def _gain() -> float:
    a, b = torch.ones(512, 576), torch.ones(1536, 576).t()
    out = torch.empty(512, 1536)
    best = dict.fromkeys((whole, halved), math.inf)
    with machine.threads(1), torch.inference_mode():
        for _ in range(20):
            for product in best:
                begun = time.perf_counter()
                product(a, b, out=out)
                best[product] = min(best[product], time.perf_counter() - begun)
    return best[whole] / best[halved]


def choose(base: nn.Module, halved: bool) -> None:
    """Whether the large products of `base` (transformers' model), and attention's, are made of halves from now on."""
    _halved[base] = halved


def chosen(base: nn.Module) -> bool:
    """What `choose` said of `base`."""
    return _halved.get(base, False)


def of(base: nn.Module, layer: int | None = None) -> Product:
    """What `base` multiplies with; forward, if a `layer` is named."""
    return halved if chosen(base) and (layer is None or layer >= EXACT) else whole


def whole(a: Tensor, b: Tensor, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    return torch.mm(a, b, out=out) if plus is None else torch.addmm(plus, a, b, out=out)


def halved(a: Tensor, b: Tensor, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    sizes = a.shape[0], a.shape[1], b.shape[1]
    if any(size < least for size, least in zip(sizes, LEAST, strict=True)) or not kernels.halves_fit(a, b, plus):
        return whole(a, b, plus, out)
    made = a.new_empty(sizes[0], sizes[2]) if out is None else out
    kernels.product_of_halves(a, b, plus, made)
    return made
