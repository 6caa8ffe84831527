"""Memory does not grow with the steps, although torch keeps a kernel for every shape and each step brings new ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
