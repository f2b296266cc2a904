"""Several processes under torchrun, and none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.system import UserError, distributed

ROOT = Path(__file__).resolve().parents[2]
START = """
import atexit, sys
import torch
from utils.system import command_line, distributed
from utils.system import UserError
atexit.register(lambda: print('torn down'))
def main():
    distributed.init()
"""


def torchrun(processes: int, folder: Path, body: str) -> subprocess.CompletedProcess:
    """Run the lines of `body` in `main` of a script, in one or several processes."""
    script = folder / "script.py"
    lines = [f"    {line}" for line in body.splitlines()]
    script.write_text("\n".join([START, *lines, "command_line.run(main)"]))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    return subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_collectives(tmp_path):
    body = """
rank = distributed.rank()
distributed.barrier()
facts = [
    distributed.world_size(), distributed.shard('abc'), distributed.broadcast(rank),
    distributed.all_reduce_sum(torch.tensor([1.0 + rank])).item(),
    distributed.all_reduce_max([rank, -rank]), distributed.gather(rank),
]
weight = torch.nn.Linear(1, 1, bias=False)
parallel = distributed.data_parallel(weight, weight)
parallel(torch.tensor([[rank + 1.0]])).sum().backward()
print(end=f'{rank} {facts} {weight.weight.grad.item()}\\n', flush=True)  # in one write
distributed.barrier()
distributed.print_once('once')
"""
    two = torchrun(2, tmp_path, body)
    assert two.returncode == 0 and "FutureWarning" not in two.stderr, two.stderr
    assert "0 [2, 'ac', 0, 3.0, [1, 0], [0, 1]] 1.5" in two.stdout
    assert "1 [2, 'b', 0, 3.0, [1, 0], []] 1.5" in two.stdout
    assert two.stdout.count("once") == 1
    # gloo's threads may hold tensors to the end, and abort if the interpreter goes first.
    assert "torn down" not in two.stdout
    one = torchrun(1, tmp_path, body)
    assert one.stdout == "0 [1, 'abc', 0, 1.0, [0, 0], [0]] 1.0\nonce\ntorn down\n"


def test_refusal_by_rank_zero_is_one_line(tmp_path):
    done = torchrun(
        2, tmp_path, "def refuse():\n    raise UserError('no')\ndistributed.rank_zero_first(refuse)"
    )
    assert done.returncode and done.stderr.count("error: no") == 1
    assert "gloo" not in done.stderr and 'script.py", line' not in done.stderr, done.stderr


def test_every_process_needs_its_own_gpu(monkeypatch):
    assert distributed.local_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="every process needs its own GPU"):
        distributed.local_device("cuda:1")
    assert distributed.local_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes, but PyTorch sees 1 GPUs here"):
        distributed.local_device("auto")
