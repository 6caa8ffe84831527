"""Laws of our own kernels: each is what torch computes, whatever the sizes; who cannot have them is told and trains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.engine import attention, forest, kernels, loss, native, pointwise
from luthier.engine.tiles import AT_ONCE, KEYS, QUERIES, Tiles
from tests import tiny as tiny_models
from tests.engine.runs import carry_out, chats, events, lay_out, losses, process, train, write
from tests.engine.test_layers import stop_after

here = pytest.mark.skipif(not kernels.able(), reason=f"no kernels of our own: {kernels.absent()}")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
WIDTHS = st.sampled_from([16, 48, 64, 576])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose sizes our kernels take."""
    return tiny_models.make_model(tmp_path_factory.mktemp("base") / "model", hidden=64, heads=2, kv_heads=1, layers=1)


@contextmanager
def by_torch() -> Iterator[None]:
    with mock.patch.object(kernels, "able", return_value=False):
        yield


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A view with gaps between rows, as parts of a product have them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape[:-1], shape[-1] + 32, generator=generator).to(dtype)[..., : shape[-1]]


def near(one: Tensor, other: Tensor) -> bool:
    """Within what one rounding in the last place, or another order of a sum, can do."""
    least = 2e-6 if one.dtype == torch.float32 else 2e-2
    largest = float(other.abs().max()) if other.numel() else 0.0
    return bool(torch.allclose(one, other, rtol=least, atol=least * (largest + 1e-9)))


@here
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70), st.integers(0, 3), WIDTHS, DTYPES, st.booleans(), st.booleans(), st.integers(1, 4))
def test_norms_are_torchs(
    rows: int, inner: int, width: int, dtype: torch.dtype, learns: bool, residual: bool, threads: int
) -> None:
    shape = (rows, inner, width) if inner else (rows, width)
    x, grad, plus = numbers(*shape), numbers(*shape, seed=1, dtype=dtype), numbers(*shape, seed=2)
    weight = torch.rand(width) + 0.5

    def both() -> list[Tensor]:
        out, again, into = (torch.empty(shape, dtype=kind) for kind in (dtype, dtype, torch.float32))
        own = torch.ones(width) if learns else None
        inverse = pointwise.norm(x, weight, 1e-6, out)
        pointwise.norm_again(x, weight, inverse, again)
        assert torch.equal(out, again)
        pointwise.norm_backward(grad, x, weight, inverse, into, plus if residual else None, own)
        return [out, inverse, into, *([] if own is None else [own])]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = both()
        with by_torch():
            theirs = both()
    finally:
        torch.set_num_threads(before)
    assert all(near(*pair) for pair in zip(ours, theirs, strict=True))


@here
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9), st.sampled_from([32, 64, 256]), DTYPES)
def test_rotation_is_torchs_and_turns_back(rows: int, heads: int, width: int, dtype: torch.dtype) -> None:
    x = numbers(rows, heads, width, dtype=dtype)
    angle = torch.rand(rows, 1, width // 2) * 6
    cos, sin = angle.cos(), angle.sin()
    ours, theirs, back = (torch.empty(x.shape, dtype=dtype) for _ in range(3))
    pointwise.rotate(x, cos, sin, ours)
    pointwise.rotate(ours, cos, -sin, back)
    with by_torch():
        pointwise.rotate(x, cos, sin, theirs)
        pointwise.rotate(back, cos, sin, back)
    assert near(ours, theirs) and near(back, ours)
    pointwise.rotate(back, cos, -sin, back)
    assert near(back, x)


@here
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["silu", "gelu_pytorch_tanh"]), st.integers(0, 40), WIDTHS, DTYPES, st.booleans(),
    st.sampled_from([1.0, 30.0, 1e4]),
)  # fmt: skip
def test_gates_are_autograds(name: str, rows: int, width: int, dtype: torch.dtype, again: bool, larger: float) -> None:
    """Also where the activation has run flat: gates of thousands must not overflow an exponential."""
    gate = pointwise.GATES[name]
    x, up, grad = (numbers(rows, width, seed=seed, dtype=dtype) for seed in range(3))
    x = x * larger
    one, two = x.double().requires_grad_(), up.double().requires_grad_()
    act = torch.nn.functional.silu(one) if name == "silu" else torch.nn.functional.gelu(one, approximate="tanh")
    wanted = act * two
    slopes = torch.autograd.grad(wanted, [one, two], grad.double())
    both, out, kept = (
        torch.cat([x, up], dim=1),
        torch.empty(x.shape, dtype=dtype),
        torch.empty(rows, 2 * width).bfloat16(),
    )
    gate.apply(both, out, kept if again else None)
    assert near(out, wanted.detach().to(dtype))
    assert torch.equal(kept, both.bfloat16()) or not again
    into, made = torch.empty_like(both), torch.empty(x.shape, dtype=dtype) if again else None
    gate.back(grad.clone(), both, into, made)
    for part, slope in zip(into.chunk(2, dim=1), slopes, strict=True):
        assert near(part, slope.to(dtype))
    assert made is None or torch.equal(made, out)
    gate.back(grad.clone(), both, both, None)
    assert torch.equal(both, into)


@here
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.sampled_from([16, 64, 1024]), st.sampled_from([0.0, 0.1]), st.sampled_from([1, 20, 1000]))
def test_the_loss_is_torchs(rows: int, vocabulary: int, smoothing: float, larger: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocabulary, generator=generator).mul_(larger).round_()  # with ties
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    leaf = logits.double().requires_grad_()
    exact = loss.supervised(leaf, targets, weights.double(), smoothing)
    (slope,) = torch.autograd.grad(exact, leaf)
    ours = logits.clone()
    found, right = kernels.cross_entropy(ours, targets, weights, smoothing)
    assert float(found.sum()) == pytest.approx(float(exact.detach()), rel=1e-5, abs=1e-5)
    assert torch.allclose(ours, slope.float(), atol=1e-6, rtol=1e-4)
    assert torch.equal(right, logits.argmax(-1) == targets)


@here
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_none(wrong: float) -> None:
    x = numbers(3, 64)
    x[1, 5] = wrong
    out = torch.empty(3, 64)
    pointwise.norm(x, torch.ones(64), 1e-6, out)
    assert not bool(out[1].isfinite().all()) and bool(out[[0, 2]].isfinite().all())
    pointwise.GATES["silu"].apply(torch.cat([x, torch.ones(3, 64)], dim=1), out)
    assert not bool(out[1].isfinite().all())
    found, _ = kernels.cross_entropy(x.contiguous(), torch.zeros(3, dtype=torch.int64), torch.ones(3), 0.0)
    assert found.isfinite().tolist() == [True, False, True]


@here
@pytest.mark.parametrize("value", [0x7F800001, 0x7FFFFFFF, 0x7F800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0x00000001])
def test_numbers_are_rounded_to_bfloat16_as_torch_does(value: int) -> None:
    """Ties to even, the largest up to infinity, what is not a number stays none."""
    x = torch.full((1, 16), value, dtype=torch.int32).view(torch.float32)
    out = torch.empty(1, 16, dtype=torch.bfloat16)
    kernels.norm(x, torch.ones(16), 0.0, torch.ones(1, 1), True, out)
    assert torch.equal(out.isnan(), x.isnan()) and (bool(x.isnan().any()) or torch.equal(out, x.bfloat16()))


@here
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=150), min_size=1, max_size=6),
    st.sampled_from([None, 1, 7, 64, 100]),
    st.integers(0, 130),
)
def test_tiles_see_what_the_mask_says(rows: list[list[int]], window: int | None, trunk: int) -> None:
    """Every query is in one tile; the visits of its tile show it each key that it sees, once, and no other counts."""
    tree = forest.build([(np.array(r, np.int32), np.ones(len(r), np.float32)) for r in rows], min_shared=1, begin=trunk)
    shared = attention.Trunk(trunk) if trunk else None
    plan = attention.Plan(tree, torch.device("cpu"), shared)
    tiles = Tiles.of(tree.segments, tree.positions, window, trunk)
    mask = plan.dense(window).numpy()
    seen = np.zeros(mask.shape, int)
    for start, count, position, first, last in tiles.queries:
        assert 0 < count <= QUERIES and (count % AT_ONCE == 0 or start + count in {end for _, end, _ in tree.segments})
        for number, own in tiles.visits[first:last]:
            begin, size, place = tiles.keys[number]
            assert 0 < size <= KEYS
            ahead = position + np.arange(count)[:, None] - (place + np.arange(size))
            seen[start : start + count, begin : begin + size] += (not own or ahead >= 0) & (
                window is None or ahead < window
            )
    assert np.array_equal(seen, mask.astype(int))


@here
def test_the_same_bits_again() -> None:
    """Threads share no sums."""
    tree = forest.build([(np.arange(n, dtype=np.int32) % 7, np.ones(n, np.float32)) for n in (300, 170, 90)])
    plan = attention.Plan(tree, torch.device("cpu"))
    parts = [numbers(1, heads, tree.tokens, 64, seed=heads) for heads in (6, 2, 2)]
    outputs = []
    for _ in range(5):
        output, saved = attention.forward(*parts, plan, None, 0.125)
        outputs.append([output, *attention.backward(torch.ones_like(output), saved)])
    assert all(torch.equal(one, other) for later in outputs[1:] for one, other in zip(outputs[0], later, strict=True))


# ---- who makes them, and where -----------------------------------------------------------------------------------


def told(code: str, **environment: str) -> str:
    """What a process of its own says, for what is found is found once a process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


ABSENT = "from luthier.engine import kernels; print(kernels.absent())"


def compiler(folder: Path, script: str) -> str:
    """PATH with a g++ of ours in front."""
    folder.mkdir()
    (folder / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "g++").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@here
def test_without_a_compiler_or_by_choice_torch_computes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert told(ABSENT, PATH=str(tmp_path / "empty")) == "no C++ compiler was found: g++ makes them in seconds, once"
    assert told(ABSENT, LUTHIER_KERNELS="torch") == "LUTHIER_KERNELS is torch"
    assert told(ABSENT) == ""


@here
def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    path = compiler(tmp_path / "bin", 'case "$1" in --version) echo ours;; *) echo "no such flag" >&2; exit 1;; esac')
    assert told(ABSENT, PATH=path) == f"{tmp_path}/bin/g++ failed: no such flag"


def copied(folder: Path, name: str, old: str, new: str) -> str:
    """Lines of Python after which the sources are these copies, one of them changed."""
    return f"""
from pathlib import Path
from luthier.engine import kernels, native
folder = Path({str(folder)!r})
folder.mkdir()
for path in native.SOURCES:
    text = path.read_text()
    assert path.name != {name!r} or {old!r} in text
    (folder / path.name).write_text(text.replace({old!r}, {new!r}) if path.name == {name!r} else text)
native.SOURCES = tuple(folder / path.name for path in native.SOURCES)
"""


@here
def test_a_compiler_that_computes_wrongly_is_found_out(tmp_path: Path) -> None:
    """The exponential's first coefficient is off by a thousandth."""
    path = compiler(tmp_path / "bin", 'exec /usr/bin/env -i PATH=/usr/bin:/bin g++ "$@"')
    code = f"""
{copied(tmp_path / "package", "vectors.h", "5.0000001201e-1f", "5.005e-1f")}
print(kernels.absent(), kernels.able())
"""
    said = told(code, PATH=path)
    assert said.startswith("as compiled here they are off by ") and said.endswith("False")


@here
def test_kept_in_the_cache_where_the_package_is_read_only(tmp_path: Path) -> None:
    """What cannot be a folder stands for what cannot be written, also where everything can (root)."""
    code = f"""
{copied(tmp_path / "package", "native.cpp", "// Does not know", "// Another. Does not know")}
(native.SOURCES[0].parent / "__pycache__").write_text("no folder")
print(kernels.absent(), sorted(path.suffix for path in Path({str(tmp_path / "home" / "cache" / "native")!r}).iterdir()))
"""
    assert told(code, LUTHIER_HOME=str(tmp_path / "home")) == "['.so']"


def test_a_gpu_that_triton_cannot_serve_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert kernels._absent_on_gpus() == "they are made for NVIDIA's GPUs from Ampere on"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "luthier.engine.gpu", raising=False)
    kernels._gpu.cache_clear()
    said = kernels._absent_on_gpus()
    assert said.startswith("Triton, which torch for CUDA brings, is not here") and "triton" in said
    kernels._gpu.cache_clear()


@here
def test_other_machines_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = native.built()
    monkeypatch.setattr(native, "_processor", lambda: "another")
    other = native.built()
    assert other != kept
    other.unlink()
    monkeypatch.setattr(native.platform, "machine", lambda: "riscv64")
    with pytest.raises(native.Unavailable, match="made for Linux on x86-64, not linux on riscv64"):
        native.built()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.raises(native.Unavailable, match="AVX2"):
        native.built()


@here
def test_a_run_says_what_it_goes_without_and_trains_the_same(base: Path, tmp_path: Path) -> None:
    """LUTHIER_KERNELS, through whole runs in processes of their own."""
    data = write(tmp_path / "rows.jsonl", chats(12))
    found: dict[str, list[float]] = {}
    said: dict[str, list[str]] = {}
    for name in ("auto", "torch"):
        run = lay_out(tmp_path / name, base, data, epochs=2)
        with mock.patch.dict(os.environ, LUTHIER_KERNELS=name):
            assert process(run).wait(timeout=120) == 0
        found[name] = losses(run)
        said[name] = [event["message"] for event in events(run, "phase") if "kernels" in event.get("message", "")]
    assert said["torch"] == ["Torch's kernels do all of the work, which is slower: LUTHIER_KERNELS is torch"]
    assert said["auto"] == []
    assert found["auto"] == pytest.approx(found["torch"], rel=1e-4)
    assert len(found["auto"]) == 6


@here
def test_a_run_that_goes_on_with_other_kernels_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel is used in a step, and the run comes to the same but for the last bits."""
    data = write(tmp_path / "rows.jsonl", chats(16))
    options: dict[str, Any] = {"epochs": 1, "checkpoint_every": 1, "precision": "float32"}
    run = lay_out(tmp_path / "run", base, data, **options)
    names = ("attention", "attention_backward", "norm", "norm_backward", "rotate", "gated", "gated_backward")
    stop_after(monkeypatch, 2)
    with ExitStack() as stack:
        used = [stack.enter_context(mock.patch.object(kernels, name, wraps=getattr(kernels, name))) for name in names]
        assert carry_out(run) != 0
    monkeypatch.undo()
    assert all(kernel.called for kernel in used)
    with by_torch(), mock.patch.object(kernels, "absent", return_value="played"):
        assert carry_out(run) == 0, events(run)[-1]
    warned = [event["message"] for event in events(run, "warning")]
    assert "The run began with our kernels and goes on with torch's: the last bits of its numbers may differ." in warned
    whole = train(tmp_path / "whole", base, data, **options)
    assert losses(run)[-4:] == pytest.approx(losses(whole), rel=1e-4)
