"""Small real runs for tests: data on disk, a run folder, the engine in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.engine.__main__ import carry_out
from luthier.spec.job import make_request
from luthier.spec.run import RunFolder

WORDS = ("red", "green", "blue", "one two", "three four five", "six", "seven eight nine", "ten")


def chats(count: int, start: int = 0, system: str | None = None) -> list[dict[str, Any]]:
    """Distinct conversations with answers of different lengths."""
    first = [{"role": "system", "content": system}] if system else []
    return [
        {
            "messages": [
                *first,
                {"role": "user", "content": f"say number {n} again"},
                {"role": "assistant", "content": f"{WORDS[n % len(WORDS)]} {n}"},
            ]
        }
        for n in range(start, start + count)
    ]


def preferences(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Pairs: what `chats` answers is preferred to another answer."""
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"say number {n} again"}]},
            "preferred_output": [{"role": "assistant", "content": f"{WORDS[n % len(WORDS)]} {n}"}],
            "non_preferred_output": [{"role": "assistant", "content": f"{WORDS[(n + 1) % len(WORDS)]}, no"}],
        }
        for n in range(start, start + count)
    ]


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lay_out(out: Path, model: Path, data: Path, **options: Any) -> RunFolder:
    options = {"learning_rate": 1e-3, "batch_size": 4, "seed": 7, **options}
    request = make_request({"model": str(model), "data": [str(data)], **options})
    return RunFolder(out).create(request.model_dump(exclude_unset=True))


def events(run: RunFolder, type: str | None = None) -> list[dict[str, Any]]:
    return [event for _, event in run.events() if type is None or event["type"] == type]


def train(out: Path, model: Path, data: Path, **options: Any) -> RunFolder:
    """A whole run in this process; fails the test when the run fails."""
    run = lay_out(out, model, data, **options)
    code = carry_out(run)
    assert code == 0, events(run)[-1]
    return run


def refused(out: Path, model: Path, data: Path, **options: Any) -> dict[str, Any]:
    """The `failed` event of a run that must not take a step."""
    run = lay_out(out, model, data, **options)
    assert carry_out(run) != 0
    assert events(run, "step") == []
    failed = events(run)[-1]
    assert failed["type"] == "failed", failed
    assert not run.model.exists()
    return failed


def process(run: RunFolder, *launcher: str) -> subprocess.Popen[bytes]:
    """The engine in a process group of its own, as the command line starts it."""
    command = [sys.executable, *launcher, "-m", "luthier.engine", str(run.path)]
    here = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(run.log, "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=here, start_new_session=True)


def weights(run: RunFolder) -> dict[str, Any]:
    from safetensors.torch import load_file

    found = sorted(run.model.glob("*.safetensors"))
    assert found
    return {name: tensor for path in found for name, tensor in load_file(path).items()}


def losses(run: RunFolder) -> list[float]:
    return [event["loss"] for event in events(run, "step")]
