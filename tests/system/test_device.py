"""Devices and their precision; Apple's GPU by mock alone."""

import pytest
import torch

from utils.system.device import choose_device, mixed_precision, reading_threads, sum_dtype
from utils.system.errors import UserError

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes PyTorch see these kinds of GPU."""

    def visible(*kinds):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int("cuda" in kinds))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)

    return visible


def test_auto_is_cuda_or_else_the_cpu(gpus):
    for kinds, device in (((), CPU), (("cuda",), CUDA), (("mps",), CPU)):
        gpus(*kinds)
        assert choose_device("auto") == device


def test_gpu_that_is_not_there_is_refused(gpus):
    gpus("mps")
    assert choose_device("mps") == MPS
    gpus()
    with pytest.raises(UserError, match="--device mps: PyTorch sees no Apple GPU here"):
        choose_device("mps")
    with pytest.raises(UserError, match="--device cuda: PyTorch does not see that GPU here"):
        choose_device("cuda")
    for name in ("tpu", "meta"):
        with pytest.raises(UserError, match="--device: unknown device"):
            choose_device(name)


def test_half_precision_is_for_cuda():
    assert [mixed_precision("auto", device) for device in (CUDA, CPU, MPS)] == [
        torch.float16,
        None,
        None,
    ]
    assert mixed_precision("bf16", CPU) == torch.bfloat16
    for amp in ("fp16", "bf16"):
        with pytest.raises(UserError, match=f"--amp {amp}: on mps training runs in fp32"):
            mixed_precision(amp, MPS)
    with pytest.raises(UserError, match="--amp fp16 needs a GPU"):
        mixed_precision("fp16", CPU)


def test_sums_are_float64_where_there_is_float64():
    assert [sum_dtype(device) for device in (CUDA, CPU, MPS)] == [
        torch.float64,
        torch.float64,
        torch.float32,
    ]


def test_threads_read_ahead_for_a_gpu_as_far_as_there_are_cores(monkeypatch):
    for cores, threads in ((2, 2), (16, 4), (None, 1)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert [reading_threads(device) for device in (CUDA, CPU)] == [threads, 0]
