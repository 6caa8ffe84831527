"""Luthier's own loop, `engine.train.train`, on the rows of the job: what runs is what `luthier train` runs.

Only what comes from elsewhere in a benchmark is put in its place: rows are ids and weights instead of files, their
order is the workload's, the adapter is the one that everybody starts from, and gradients are looked at on their way.
`without` turns parts of the engine off, one line each in ladder.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.training import ladder
from benchmarks.training.drivers import job as jobs


class Spent(Exception):
    """The seconds of the job are spent."""


def train(job: jobs.Job) -> jobs.Record:
    """Carry out the job in this process. Raises whatever the engine raises."""
    from luthier.engine import models
    from luthier.engine import train as engine
    from luthier.spec.job import make_request
    from luthier.spec.run import RunFolder

    record = jobs.Record(job)
    method = {"method": "full"} if job.full else {"method": "lora", "rank": 16, "alpha": 32.0}
    options = {
        **method,
        "model": job.model,
        "data": ["the workload"],
        "epochs": 1,
        "batch_size": job.rows_per_step,
        "max_steps": job.steps,
        "learning_rate": job.rate,
        "schedule": "constant",
        "warmup": 0.0,
        "seed": 0,
        "checkpoint_every": 1_000_000,
        "precision": "auto" if job.precision == models.quicker() else job.precision,
    }
    request = make_request(options)
    run = RunFolder(Path(job.out) / "run").create(request.model_dump(exclude_unset=True))
    with _in_place(job, record), ladder.without(job.without), suppress(Spent):
        engine.train(run)
    return record


@contextmanager
def _in_place(job: jobs.Job, record: jobs.Record) -> Iterator[None]:
    from luthier.engine import models, optimizer, reading, setup
    from luthier.engine import train as engine

    attach, step, one_step, go = models.attach, optimizer.Masters.step, engine.Loop._one_step, engine.Loop.go
    masters: list[Any] = []

    def read_data(*_: Any) -> tuple[Any, Any, None]:
        prepared = _prepared(jobs.rows(job))
        return prepared, prepared.rows, None

    def attach_ours(*given: Any, **named: Any) -> Any:
        model = attach(*given, **named)
        if not job.full:
            _load_adapter(model, Path(job.adapter))
        return model

    def step_seen(self: Any, *given: Any, **named: Any) -> float:
        masters[:] = [self]
        record.gradients((name, value.grad) for name, value in self.values.items())
        return step(self, *given, **named)

    def one_step_timed(self: Any, number: int) -> Any:
        measured = one_step(self, number)
        record.losses.append(measured["loss"])
        record.norms.append(measured["grad_norm"])
        record.notes["physical_tokens"] = measured["physical_tokens"]
        record.step_done()
        record.learnt(masters[0].values.items())
        if record.over and len(record.steps) < job.steps:
            raise Spent
        return measured

    def go_timed(self: Any, *given: Any) -> None:
        record.begin()
        go(self, *given)

    with (
        mock.patch.object(reading, "read", read_data),
        mock.patch.object(setup, "position_order", lambda rows, seed, epoch: np.arange(rows)),
        mock.patch.object(setup.models, "attach", attach_ours),
        mock.patch.object(optimizer.Masters, "step", step_seen),
        mock.patch.object(engine.Loop, "_one_step", one_step_timed),
        mock.patch.object(engine.Loop, "go", go_timed),
    ):
        yield


def _prepared(rows: list[tuple[list[int], list[int]]]) -> Any:
    from luthier.data.dataset import Prepared, Rows

    found = Rows()
    for number, (ids, labels) in enumerate(rows):
        found.add(ids, [float(label != -100) for label in labels], number, str(number).encode())
    return Prepared(rows=found, records=len(rows))


def _load_adapter(model: Any, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


if __name__ == "__main__":
    train(jobs.read()).finish()
