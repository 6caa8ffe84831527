"""The clock inside transformers' Trainer, for every trainer that is one: plain, TRL's, LLaMA-Factory's.

A step's time runs from the end of the step before it, so fetching and collating rows is in it.
Does not know: which trainer it sits in.
"""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import TrainerCallback

from benchmarks.training.drivers import job as jobs


class Clock(TrainerCallback):  # type: ignore[misc]  # its base is unannotated where this is checked
    def __init__(self, job: jobs.Job, record: jobs.Record) -> None:
        self.job, self.record = job, record

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro = args.per_device_train_batch_size
        self.record.notes["micro"] = self.micro
        self.record.notes["gradient_checkpointing"] = bool(args.gradient_checkpointing)
        self.record.begin()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.part(self.micro)
        if self.record.over:
            raise Spent

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.record.gradients((name, weight.grad) for name, weight in model.named_parameters() if weight.requires_grad)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.step_done()
        model = kwargs["model"]
        self.record.learnt((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
        control.should_log = True
        if self.record.over or state.global_step >= self.job.steps:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.record.losses.append(float(logs["loss"]))
            self.record.norms.append(float(logs.get("grad_norm", "nan")))


class Spent(Exception):
    """The seconds of the job are spent in the middle of a step."""


def carry_out(trainer: Any, job: jobs.Job, record: jobs.Record) -> None:
    """Train until the steps or the seconds are at an end, and write what it came to."""
    with contextlib.suppress(Spent):
        trainer.train()
    record.finish()


def arguments(job: jobs.Job) -> dict[str, Any]:
    """What all of them are told alike. A micro-batch of 0 rows is the trainer's own default, 8."""
    micro = min(job.micro or 8, job.rows_per_step)
    return {
        "output_dir": f"{job.out}/trainer",
        "max_steps": job.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job.rows_per_step // micro,
        "learning_rate": job.rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "disable_tqdm": True,
        "use_cpu": True,
    }
