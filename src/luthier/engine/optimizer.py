"""AdamW on float32 masters, whatever the model computes in.

A bfloat16 weight near 1.0 cannot move by less than 0.004, so small updates would vanish. The masters take the updates
and the model's copies are rounded from them after each step. Gradients of micro-batches are added up in float32 too.
With float32 weights the masters are the weights. Does not know: losses, schedules, files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def adamw(values: Iterable[Tensor], weight_decay: float = 0.0) -> torch.optim.AdamW:
    """In one kernel: on a GPU that saves the launches of a dozen, on a processor most passes over memory. It takes no
    values that have gaps between their rows (an adapter in float32 lies in the matrices that are multiplied)."""
    values = list(values)
    fused = all(value.is_contiguous() for value in values)
    return torch.optim.AdamW(
        values, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, foreach=not fused, fused=fused
    )


class Masters:
    """Float32 masters of the trainable parameters, by name, with their AdamW state (Loshchilov & Hutter, 2019).

    `steady` gradients keep their place from step to step. That is for few and small ones: made anew in each backward
    pass, they would lie between all that it has for a moment, and that would find no room any more where it just was.
    """

    def __init__(self, parameters: Mapping[str, Parameter], weight_decay: float, steady: bool = False) -> None:
        self.parameters, self.steady = dict(parameters), steady
        self.values: dict[str, Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()
            for name, parameter in self.parameters.items()
        }
        self.optimizer = adamw(self.values.values(), weight_decay)
        if steady:
            for value in self.values.values():
                value.grad = torch.zeros_like(value)

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=not self.steady)

    @torch.no_grad()
    def collect(self) -> None:
        """Move the gradients of a micro-batch from the parameters to the masters."""
        held, added = [], []
        for name, parameter in self.parameters.items():
            master = self.values[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                held.append(master.grad)
                added.append(parameter.grad)
            parameter.grad = None
        if held:
            torch._foreach_add_(held, added)

    def reduce(self) -> None:
        """Add up the gradients of all ranks; a rank that had no micro-batch adds zeros."""
        if not dist.is_initialized():
            return
        for master in self.values.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        flat = torch.cat([master.grad.flatten() for master in self.values.values() if master.grad is not None])
        dist.all_reduce(flat)
        start = 0
        for master in self.values.values():
            assert master.grad is not None
            master.grad.copy_(flat[start : start + master.numel()].view_as(master.grad))
            start += master.numel()

    def step(self, learning_rate: float, max_norm: float) -> float:
        """Clip, update, and round the model's weights from the masters; returns the gradient norm before clipping.

        A non-finite norm changes nothing, so that the caller can stop with the weights as they were.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.values.values()), max_norm))
        if norm == norm and norm != float("inf"):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            self.publish()
        self.clear()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        if others := [name for name, parameter in self.parameters.items() if self.values[name] is not parameter]:
            torch._foreach_copy_([self.parameters[name] for name in others], [self.values[name] for name in others])

    def state(self) -> dict[str, Tensor]:
        """Everything to go on, as named tensors: master.*, first.*, second.* moments."""
        tensors = {f"master.{name}": value.detach() for name, value in self.values.items()}
        for name, value in self.values.items():
            state = self.optimizer.state.get(value)
            if state:
                tensors[f"first.{name}"] = state["exp_avg"]
                tensors[f"second.{name}"] = state["exp_avg_sq"]
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        beside = self.optimizer.defaults["fused"]  # its kernel looks for the number of steps there
        for name, value in self.values.items():
            value.copy_(tensors[f"master.{name}"])
            if f"first.{name}" in tensors:
                self.optimizer.state[value] = {
                    "step": torch.tensor(float(step), device=value.device if beside else "cpu"),
                    "exp_avg": tensors[f"first.{name}"].to(value.device, copy=True),
                    "exp_avg_sq": tensors[f"second.{name}"].to(value.device, copy=True),
                }
        self.publish()
