"""Held-out loss of what some trainer has learnt, measured by one and the same float32 model for all of them.

Reads weights-*.safetensors in the job's folder and writes judged.json: the loss by step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.drivers import flat
from benchmarks.training.drivers import job as jobs


def losses(job: jobs.Job) -> dict[str, float]:
    """Held-out loss by step. Raises SystemExit when the weights that were learnt are not those that were to learn."""
    from safetensors.torch import load_file

    model = flat.load(job, torch.float32).eval()
    own = {jobs.plain_name(name): weight for name, weight in model.named_parameters()}
    wanted = {name for name in own if job.full or "lora_" in name}
    rows = jobs.rows(job, "held_out")
    # Everybody starts alike, so the start is measured for the reference, and where a curve is wanted.
    found = {"0": measure(model, rows)} if job.setting == "reference" or job.keep_every < job.steps else {}
    for path in sorted(Path(job.out).glob("weights-*.safetensors"), key=lambda path: int(path.stem.split("-")[1])):
        learnt = load_file(path)
        if set(learnt) != wanted:
            raise SystemExit(f"{path.name} holds other weights than those to learn: {sorted(set(learnt) ^ wanted)[:4]}")
        with torch.no_grad():
            for name, value in learnt.items():
                own[name].copy_(value)
        found[path.stem.split("-")[1]] = measure(model, rows)
    return found


@torch.no_grad()
def measure(model: Any, rows: list[tuple[list[int], list[int]]]) -> float:
    """Mean loss of the learnt tokens, nats."""
    total = count = 0.0
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        wanted = torch.tensor(labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += float((wanted != -100).sum())
    return total / count


if __name__ == "__main__":
    asked = jobs.read()
    (Path(asked.out) / "judged.json").write_text(json.dumps(losses(asked), indent=1), encoding="utf-8")
