"""Several processes on one training run, one per GPU, as torchrun starts them.

    torchrun --nproc-per-node 2 -- train_adaptive.py ...

Without torchrun there is one process, of rank 0, and every function here is a no-op. Rank 0 prints
and writes.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed, nn

from utils.system import UserError
from utils.system.signals import exit_process, under_torchrun

T = TypeVar("T")


def init() -> None:
    """Join the other processes."""
    if under_torchrun() and not distributed.is_initialized():
        # gloo beside nccl, for objects and CPU tensors. One process may wait hours for another.
        gpus = torch.cuda.is_available() and distributed.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=7))


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def local_device(name: str) -> str:
    """The device of this process, its own GPU; UserError if there are too few, or one is named."""
    gpus = torch.cuda.device_count()
    if world_size() == 1 or name == "cpu" or (name == "auto" and not gpus):
        return name
    if name not in ("auto", "cuda") or int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
        raise UserError(
            f"--device {name}: every process needs its own GPU, but PyTorch sees {gpus} here; use "
            f"--device cuda with --nproc-per-node {max(1, gpus)}, or --device cpu"
        )
    name = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(name)
    return name


def shard(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every world_size()-th one."""
    return items[rank() :: world_size()]


def print_once(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text)


def barrier() -> None:
    """Wait for all processes."""
    all_reduce_max([0])  # distributed.barrier() would start nccl


def broadcast(value: T) -> T:
    """Rank 0's `value`, a picklable object, on every process."""
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def on_rank_zero(function: Callable[..., T], *args: object) -> T:
    """Call a function on rank 0 while the others wait, and return its value on all.

    If it fails there, the others exit silently.
    """
    value, failure = None, None
    if rank() == 0:
        try:
            value = function(*args)
        except Exception as error:
            failure = error
    failed, value = broadcast((failure is not None, value))
    if failure:
        raise failure
    if failed:
        exit_process(2)
    return value


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """The maximum of each of `values` over all processes, computed on the CPU."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor.tolist()


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in one call; a process that has none adds zeros."""
    if world_size() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, gradient in zip(parameters, total.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)


def leave() -> None:
    """Leave the other processes, at the end of work that succeeded."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
