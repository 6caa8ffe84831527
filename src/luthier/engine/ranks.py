"""The processes of one run: what torchrun started joins together here, each with a GPU of its own where it has one.

Numbers go from rank to rank as CPU tensors, gradients as they lie. Does not know: what the ranks share out.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from luthier.settings import place_among_ranks


def join() -> tuple[int, int]:
    """(rank, ranks): one process, or those that torchrun started. May be called again."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group(_backend())
    return dist.get_rank(), dist.get_world_size()


def add_up(*values: float) -> tuple[float, ...]:
    """Each value's sum over all ranks."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())


def leave() -> None:
    """Before the process ends: one that ends with its connections open may be aborted by a thread that serves them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _backend() -> str:
    """NCCL wants a GPU for each rank of a machine; gloo is content with less, and has to carry what lies on the CPU."""
    if not torch.cuda.is_available():
        return "gloo"
    gpus, (number, here) = torch.cuda.device_count(), place_among_ranks()
    torch.cuda.set_device(number % gpus)
    return "cpu:gloo,cuda:nccl" if here <= gpus else "gloo"
