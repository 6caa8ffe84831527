"""Memory does not grow with the steps, although torch keeps a kernel for every shape and each step brings new ones, and
though the C library keeps what was freed in pieces that later ones do not fit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from luthier.engine import machine, train
from tests.engine import runs

ROOT = Path(__file__).parents[2]

# Rows of ever new lengths through one wide layer: each length is a new matrix shape.
SCRIPT = """
import json, luthier.engine, torch
layers = torch.nn.ModuleList(torch.nn.Linear(768, 768, dtype=torch.bfloat16) for _ in range(2))
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
seen = []
for length in range(100, 600):
    for layer in layers:
        layer(torch.ones(length, 768, dtype=torch.bfloat16)).sum().backward()
        layer.zero_grad()
    if length in (250, 599):
        seen.append(memory())
print(json.dumps(seen))
"""


def test_new_shapes_do_not_pile_up() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=250, check=True, cwd=ROOT / "src"
    )
    early, late = json.loads(done.stdout)
    assert late - early < 150_000_000, f"grew by {(late - early) / 1e6:.0f} MB"


# Pieces of 64 kB, every second of them freed: the heap keeps the holes, as its end is in use.
HOLES = """
import json
from luthier.engine import machine
pieces = [bytes([number % 250 + 1]) * 65_536 for number in range(3_000)]
pieces[::2] = [None] * len(pieces[::2])
kept = machine.memory_now()
machine.trim()
print(json.dumps([kept, machine.memory_now()]))
"""


# Pieces of 1 MB as a model's weights are, every second of them freed while they are still loaded.
LOADED = """
import json, torch
from luthier.engine import machine
for _ in range(3):  # pieces that were mapped and freed have glibc take the next from its heap
    torch.ones(7_000_000)
with machine.loading():
    pieces = [torch.ones(250_000) for _ in range(200)]
    kept = machine.memory_now()
    pieces[::2] = [None] * 100
    print(json.dumps([kept, machine.memory_now()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.parametrize("code", [HOLES, LOADED], ids=["trimmed", "loaded"])
def test_freed_pieces_go_back_to_the_system(code: str) -> None:
    here = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # or it would be the GPU's memory that is told
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
        cwd=ROOT / "src",
        env=here,
    )
    kept, left = json.loads(done.stdout)
    assert kept - left > 50_000_000, f"{(kept - left) / 1e6:.0f} MB of about 100 went back"


@pytest.mark.parametrize(("full", "wanted"), [(-1e9, True), (1e9, False)])
def test_a_process_that_holds_too_much_is_trimmed(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, full: float, wanted: bool
) -> None:
    """Once all is loaded, before the first step, after each piece of one, when the weights have left; what is learnt is
    the same."""
    data = runs.write(tmp_path / "data.jsonl", runs.chats(12))
    usual = runs.train(tmp_path / "usual", tiny, data, epochs=1)
    seen: list[int] = []
    monkeypatch.setattr(machine, "trim", lambda: seen.append(1))
    monkeypatch.setattr(train, "FULL", full)
    run = runs.train(tmp_path / "run", tiny, data, epochs=1)
    assert len(seen) == 3 + (runs.events(run, "forecast")[0]["micro_batches"] if wanted else 0)
    assert all(torch.equal(value, runs.weights(usual)[name]) for name, value in runs.weights(run).items())
