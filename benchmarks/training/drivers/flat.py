"""The flat loop that a careful person writes by hand: transformers and PEFT with all that helps and nothing else.

Weights and adapters in the precision that the processor multiplies faster, with float32 masters, causal SDPA without a
mask (padding lies to the right, where no real token sees it), rows of a step sorted by length, head at learnt positions
only and its gradient taken slice by slice, no checkpointing. With the setting "reference" the same arithmetic in
float32, one row at a time and with the model's own logits at every position: what the gate compares with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.training.drivers import job as jobs

SLICE = 1024  # positions whose logits exist at once


def load(job: jobs.Job, dtype: torch.dtype) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if job.full:
        return model
    return PeftModel.from_pretrained(model, job.adapter, is_trainable=True, autocast_adapter_dtype=False)


def batch(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row, _ in rows])
    labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for _, row in rows])
    return ids, labels


def backward(model: Any, rows: list[tuple[list[int], list[int]]], learnt: int) -> float:
    """Add the gradients of these rows; returns their share of the step's mean loss."""
    ids, labels = batch(rows)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    chosen = wanted != -100
    picked, targets = hidden[chosen], wanted[chosen]
    leaf = picked.detach().requires_grad_()
    total = 0.0
    for start in range(0, len(targets), SLICE):
        part = slice(start, start + SLICE)
        logits = base.lm_head(leaf[part]).float()
        loss = torch.nn.functional.cross_entropy(logits, targets[part], reduction="sum") / learnt
        loss.backward()
        total += float(loss.detach())
    picked.backward(leaf.grad)
    return total


def backward_plainly(model: Any, rows: list[tuple[list[int], list[int]]], learnt: int) -> float:
    """The same by the model's own forward, one row at a time: slow, and hard to get wrong."""
    total = 0.0
    for ids, labels in rows:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum") / learnt
        loss.backward()
        total += float(loss.detach())
    return total


def train(job: jobs.Job) -> jobs.Record:
    """Carry out the job in this process."""
    plainly = job.setting == "reference"
    model = load(job, torch.float32 if plainly else getattr(torch, job.precision))
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    masters = {name: weight.detach().float().clone() for name, weight in learning.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=job.rate, weight_decay=0.0, foreach=True)
    rows, record = jobs.rows(job), jobs.Record(job)
    model.train()
    record.begin()
    for start in range(0, len(rows), job.rows_per_step):
        step = rows[start : start + job.rows_per_step]
        learnt = sum(label != -100 for _, labels in step for label in labels[1:])
        loss = 0.0
        for at in range(0, len(step), job.micro):
            part = step[at : at + job.micro]
            loss += (backward_plainly if plainly else backward)(model, part, learnt)
            for name, weight in learning.items():
                if weight.grad is not None:
                    master, gradient = masters[name], weight.grad.float()
                    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                    weight.grad = None
            record.part(len(part))
        record.gradients((name, master.grad) for name, master in masters.items())
        record.norms.append(float(torch.nn.utils.clip_grad_norm_(list(masters.values()), 1.0)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, weight in learning.items():
                weight.copy_(masters[name])
        record.losses.append(loss)
        record.step_done()
        record.learnt(masters.items())
        if record.over:
            break
    return record


if __name__ == "__main__":
    train(jobs.read()).finish()
