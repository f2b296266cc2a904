"""Several processes on one job, one per GPU, as torchrun starts them: names over torch.distributed.

    torchrun --nproc-per-node 2 -- train_adaptive.py ...

The "--" keeps torchrun from reading the script's options. Without torchrun there is one process, of
rank 0, and every function here is a no-op. Rank 0 prints and writes. This is for users with several
GPUs, or with several machines that share a disk. torch is imported where it is needed, so that a
script's --help does not wait for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from utils.system.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")
_group: ModuleType | None = None  # torch.distributed, once `init` has joined several processes


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def init() -> None:
    """Join the other processes."""
    global _group
    if not under_torchrun() or _group:
        return
    import torch
    from torch import distributed

    # gloo beside nccl, for objects and CPU tensors. One process may wait hours for another.
    gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(days=7))
    _group = distributed


def rank() -> int:
    """The number of this process, from 0."""
    return _group.get_rank() if _group else 0


def world_size() -> int:
    """The number of processes."""
    return _group.get_world_size() if _group else 1


def exit_process(status: int) -> NoReturn:
    """End this process, as the last thing it does."""
    if not _group:
        sys.exit(status)
    if status == 0:
        _group.destroy_process_group()
    # gloo's threads may still hold tensors; releasing them while the interpreter is torn down
    # aborts the process, and torchrun reports finished work as failed.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def local_device(name: str) -> str:
    """The device of this process: with "auto" and "cuda" every process has its own GPU.

    Raises:
        UserError: there are fewer GPUs than processes, or one GPU was named for all.
    """
    if world_size() == 1 or name == "cpu":
        return name
    import torch

    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name}: every process needs its own GPU; use --device cuda")
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"{processes} processes, but PyTorch sees {gpus} GPUs here; use --nproc-per-node "
            f"{max(1, gpus)} or --device cpu"
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
    if not _group:
        return value
    values = [value]
    _group.broadcast_object_list(values)
    return values[0]


def rank_zero_first(action: Callable[[], object]) -> None:
    """Do something on rank 0 while the others wait; if it fails there, the others exit silently."""
    failure: Exception | None = None
    if rank() == 0:
        try:
            action()
        except Exception as error:
            failure = error
    if broadcast(failure is not None):
        if failure is None:
            exit_process(2)
        raise failure


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if _group:
        _group.all_reduce(tensor)
    return tensor


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """The maximum of each of `values` over all processes, computed on the CPU."""
    if not _group:
        return list(values)
    import torch

    tensor = torch.tensor(values, dtype=torch.int64)
    _group.all_reduce(tensor, _group.ReduceOp.MAX)
    return tensor.tolist()


def gather(value: T) -> list[T]:
    """Every process's `value` by rank, on rank 0; an empty list on the others."""
    if not _group:
        return [value]
    values: list = [None] * world_size() if rank() == 0 else []
    _group.gather_object(value, values if rank() == 0 else None)
    return values


def data_parallel(function: Callable[..., torch.Tensor], module: nn.Module) -> Callable:
    """Wrap a function of `module`'s parameters so that backward averages their gradients.

    With one process it is `function` itself, otherwise a DistributedDataParallel with `no_sync`.
    """
    if not _group:
        return function
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args):
            return function(*args)

    return DistributedDataParallel(Wrapped(), gradient_as_bucket_view=True)
