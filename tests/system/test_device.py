"""Devices and their precision."""

import pytest
import torch

from utils.system import UserError, device
from utils.system.device import choose_device, mixed_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("gpus", [0, 1])
def test_auto_is_cuda_or_else_the_cpu(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device("auto") == (CUDA if gpus else CPU)
    with pytest.raises(UserError, match=f"--device cuda:{gpus}: PyTorch does not see that GPU"):
        choose_device(f"cuda:{gpus}")
    for name in ("tpu", "cuda:x"):
        with pytest.raises(UserError, match="--device: unknown device .*; try cuda, cuda:1 or"):
            choose_device(name)


def test_half_precision_is_for_cuda():
    assert [mixed_precision("auto", name) for name in (CUDA, CPU)] == [torch.float16, None]
    assert mixed_precision("bf16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="--amp fp16 needs a GPU"):
        mixed_precision("fp16", CPU)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), UserError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), UserError),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
)
def test_out_of_memory_is_one_line_with_a_remedy(error, raised):
    message = "out of memory: try --batch 1" if raised is UserError else "shapes do not match"
    with pytest.raises(raised, match=message), device.explain_out_of_memory("try --batch 1"):
        raise error
