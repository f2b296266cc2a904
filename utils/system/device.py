"""Devices, mixed precision and memory."""

import contextlib
import ctypes
import gc
import math
import os
import re
import sys
from collections.abc import Iterator

import torch

from utils.system import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

READERS = 4  # threads; a step of the decoder takes 10 ms on a GPU, reading a slice 14 ms


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is cuda or else the CPU. UserError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device: unknown device {name!r}; try cuda, cuda:1 or cpu")
    device = torch.device(name)
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise UserError(f"--device {name}: PyTorch does not see that GPU here; use --device cpu")
    return device


def reading_threads(device: torch.device) -> int:
    """How many threads read ahead: on a CPU none, since they would compete with the network."""
    return min(READERS, os.cpu_count() or 1) if device.type == "cuda" else 0


def mixed_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of --amp, None for off; auto is fp16 on cuda and off elsewhere.

    Raises UserError: fp16 on a CPU.
    """
    if amp == "auto":
        amp = "fp16" if device.type == "cuda" else "off"
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use --amp off or bf16")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[amp]


def be_deterministic() -> None:
    """Make PyTorch give the same bits every time, or fail.

    CPUs do so anyway. On CUDA it is slower, and this must be called before anything runs there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for this process; a no-op elsewhere.

    Faulting in the pages of freed blocks again takes up to a third of a step on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # from glibc's malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: reserved on the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def free_gpu_bytes(device: torch.device) -> int:
    """How much memory a GPU has left; 0 for a CPU, whose files the system keeps in memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def free_memory(device: torch.device) -> None:
    """Free the GPU memory that PyTorch caches, and measure the peak from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Raise UserError, with the remedy to try, where the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        phrases = "out of memory|can't allocate memory"  # of a GPU, of a CPU
        if isinstance(error, RuntimeError) and not re.search(phrases, str(error)):
            raise
        raise UserError(f"out of memory: {remedy}") from error
