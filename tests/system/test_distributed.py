"""Several processes under torchrun, and none."""

import pytest
import torch

from tests.helpers import launch
from utils.system import UserError, distributed

SCRIPT = """
import torch
from utils.system import UserError, command_line, distributed

def refuse():
    raise UserError('no')

def main():
    distributed.init()
    rank = distributed.rank()
    distributed.barrier()
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 2)]
    weights[rank].grad = torch.full((1 + rank,), 1.0 + rank)
    distributed.sum_gradients(weights[: distributed.world_size()])
    facts = [
        distributed.world_size(), distributed.shard('abc'), distributed.broadcast(rank),
        distributed.on_rank_zero(max, rank, 7), distributed.all_reduce_max([rank, -rank]),
        distributed.all_reduce_sum(torch.tensor([1.0 + rank])).item(),
        [weight.grad.tolist() for weight in weights if weight.grad is not None],
    ]
    print(end=f'{rank} {facts}\\n', flush=True)  # in one write
    distributed.barrier()
    distributed.print_once('once')
    distributed.on_rank_zero(refuse)

command_line.run(main)
"""


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (1, "0 [1, 'abc', 0, 7, [0, 0], 1.0, [[1.0]]]"),
        (2, "{} [2, '{}', 0, 7, [1, 0], 3.0, [[1.0], [2.0, 2.0]]]"),
    ],
)
def test_collectives_and_a_refusal_by_rank_zero(tmp_path, processes, expected):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch(processes, tmp_path / "script.py")
    lines = [expected.format(*rank) for rank in ((0, "ac"), (1, "b"))[:processes]]
    assert sorted(done.stdout.splitlines()) == [*lines, "once"], done.stderr
    assert done.returncode and done.stderr.count("error: no") == 1
    assert "gloo" not in done.stderr and 'script.py", line' not in done.stderr, done.stderr


def test_every_process_needs_its_own_gpu(monkeypatch):
    assert distributed.local_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="every process needs its own GPU"):
        distributed.local_device("cuda:1")
    assert distributed.local_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="PyTorch sees 1 here"):
        distributed.local_device("auto")
