"""Several processes on one job, as torchrun starts them: who does what, and who writes.

    torchrun --nproc-per-node 2 -- train_adaptive.py ...

The "--" keeps torchrun from reading the script's options. Without torchrun there is one process, of
rank 0, and everything here is a matter of course. Rank 0 is the one that prints and writes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from utils.system.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")


def init() -> None:
    """Meet the other processes that torchrun started, if it did."""
    if not under_torchrun():
        return
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        # gloo beside nccl: what is no tensor on a GPU goes over the CPU.
        gpus = torch.cuda.is_available() and distributed.is_nccl_available()
        # One process may have hours of work more than another: it is waited for.
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=7)
        )


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of several; asked without importing torch."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def local_device(name: str) -> str:
    """The device of this process; with "auto" and "cuda" each process has a GPU of its own.

    Raises:
        UserError: fewer GPUs than processes.
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


def exit_process(status: int) -> NoReturn:
    """End this process with an exit status, as the last thing it does."""
    if world_size() > 1:
        from torch import distributed

        if status == 0:
            distributed.destroy_process_group()
        # gloo's threads may still hold tensors. Where they let go of them while the interpreter is
        # being torn down, the process aborts, and torchrun takes finished work for failed.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def rank() -> int:
    """This process's number, from 0."""
    return _ask("get_rank", 0)


def world_size() -> int:
    """How many processes there are."""
    return _ask("get_world_size", 1)


def _ask(question: str, alone: int) -> int:
    if not under_torchrun():
        return alone
    from torch import distributed

    return getattr(distributed, question)() if distributed.is_initialized() else alone


def shard(items: Sequence[T]) -> Sequence[T]:
    """This process's part of `items`: every world_size()-th of them."""
    return items[rank() :: world_size()]


def print_once(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text)


def barrier() -> None:
    """Go on when all processes are here."""
    if world_size() > 1:
        import torch

        all_reduce_sum(torch.zeros(1))


def broadcast(value: T) -> T:
    """Rank 0's `value`, on every process."""
    if world_size() == 1:
        return value
    from torch import distributed

    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def rank_zero_first(action: Callable[[], object]) -> None:
    """Do something on rank 0, while the others wait for it.

    Raises:
        Exception: of the action, on rank 0; the other processes leave without a word, as they would
            wait in vain.
    """
    failed: Exception | None = None
    if rank() == 0:
        try:
            action()
        except Exception as error:
            failed = error
    if broadcast(failed is not None):
        if failed is None:
            exit_process(2)
        raise failed


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if world_size() > 1:
        from torch import distributed

        distributed.all_reduce(tensor)
    return tensor


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """The largest of each of `values` over all processes. Nothing waits for a GPU."""
    if world_size() == 1:
        return list(values)
    import torch
    from torch import distributed

    tensor = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor.tolist()


def gather(value: T) -> list[T]:
    """Every process's `value`, by rank; on other ranks than 0 the list is empty."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    values: list = [None] * world_size() if rank() == 0 else []
    distributed.gather_object(value, values if rank() == 0 else None)
    return values


def data_parallel(function: Callable[..., torch.Tensor], module: nn.Module) -> Callable:
    """`function` of the parameters of `module`; backward averages their gradients over processes.

    In one process it is `function` itself; in several a DistributedDataParallel with `no_sync`.
    """
    if world_size() == 1:
        return function
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args):
            return function(*args)

    return DistributedDataParallel(Wrapped(), broadcast_buffers=False, gradient_as_bucket_view=True)
