"""An engine that only tells: writes the events of a run, so that views and the following of a process can be tested.

python -m tests.cli.fake_engine RUN [--steps N] [--pause SECONDS] [--ending finish|fail|die|silent|hang|locked]
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time

from luthier.spec.run import RunFolder

REPORT = {
    "base": {"rows": 54, "loss": 2.5, "token_accuracy": 0.41, "exact_match": None, "supervised_tokens": 1200},
    "tuned": {"rows": 54, "loss": 0.5, "token_accuracy": 0.91, "exact_match": None, "supervised_tokens": 1200},
    "samples": [],
    "steps": 40,
    "epochs": 3,
    "trained_tokens": 120_000,
    "supervised_tokens": 34_000,
    "physical_tokens": 60_000,
    "tree_ratio": 2.0,
    "train_loss_first": 3.2,
    "train_loss_last": 0.4,
    "validation_loss_best": 0.5,
    "best_step": 40,
    "seconds": 75.2,
    "peak_memory_bytes": 1_250_000_000,
    "weights_changed": True,
}
PROBLEM = {
    "line": 3, "field": "messages", "found": "null", "wanted": "a list", "hint": "", "row": 3, "severity": "error",
    "file": "a.jsonl",
}  # fmt: skip


def play(run: RunFolder, steps: int, pause: float, ending: str) -> int:
    if ending == "locked":
        print("Another process is working on it.")
        return 75
    first = 0
    for _, event in run.events():
        first = int(event["step"]) if event["type"] == "checkpoint" else first
    run.emit("started", pid=os.getpid(), run=str(run.path), version="0", resumed_from=first or None)
    run.emit("phase", name="load", message="Loading tiny")
    time.sleep(pause)
    run.emit("phase", name="data", message="Reading a.jsonl")
    for done in range(1, 5):
        run.emit("progress", name="data", done=done * 25, total=100)
        time.sleep(pause)
    settings = {"batch_size": 16, "epochs": 3, "learning_rate": 1.2e-3, "seed": 7}
    run.emit(
        "prepared", rows=540, train_rows=486, validation_rows=54, tokens=45_000, supervised_tokens=12_345,
        physical_tokens=30_000, tree_ratio=1.5, dropped=0, truncated=0, steps=steps, settings=settings,
    )  # fmt: skip
    run.emit("warning", message="Something is odd.", hint="Look at it.")
    run.emit("phase", name="train", message=f"Training for {steps} steps")
    for step in range(first + 1, steps + 1):
        _step(run, step, steps, pause)
        if run.stop_asked and ending != "hang":
            run.emit("checkpoint", step=step, path="", best=False)
            run.emit("stopped", status="stopped", step=step, resume=f"luthier train --resume {run.path}")
            return 0
        if step == steps // 2:
            if ending == "die":
                print("last words of the engine", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if ending == "silent":
                print("half way, and no more")
                return 3
            if ending == "fail":
                problems = [{**PROBLEM, "line": line} for line in range(1, 31)]
                run.emit(
                    "failed", status="failed", code="invalid_data", param="data", message="30 problems in the data.",
                    hint="Look at them.", problems=problems,
                )  # fmt: skip
                return 2
    if ending == "hang":
        time.sleep(600)
    run.emit("finished", status="succeeded", model=str(run.model), report=REPORT)
    return 0


def _step(run: RunFolder, step: int, steps: int, pause: float) -> None:
    loss = 0.4 + 2.8 * math.exp(-6 * step / steps) + 0.15 * math.sin(step * 1.7)
    run.emit(
        "step", step=step, steps=steps, epoch=round(3 * step / steps, 3), loss=loss, learning_rate=1.2e-3,
        grad_norm=1.5, tokens=3_000, supervised_tokens=800, seconds=max(pause, 0.01), memory_bytes=1_250_000_000,
        eta_seconds=(steps - step) * pause,
    )  # fmt: skip
    if step % max(1, steps // 8) == 0:
        run.emit("phase", name="validate", message="Validating on 54 rows")
        run.emit("progress", name="validate", done=27, total=54)
        time.sleep(pause)
        run.emit("validation", step=step, epoch=0.5, loss=loss + 0.2, token_accuracy=0.9, supervised_tokens=1200)
        run.emit("checkpoint", step=step, path="", best=True)
    time.sleep(pause)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--ending", default="finish")
    asked = parser.parse_args()
    return play(RunFolder(asked.run), asked.steps, asked.pause, asked.ending)


if __name__ == "__main__":
    sys.exit(main())
