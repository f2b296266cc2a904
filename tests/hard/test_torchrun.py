"""Several processes under torchrun train as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import preprocess, results

ROOT = Path(__file__).resolve().parents[2]
LOSSES = ("train_loss", "val_loss")


def train(processes: int, *words: object) -> subprocess.CompletedProcess:
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone")
    launch = (*launch, "--") if processes > 1 else ()
    return subprocess.run(
        [sys.executable, *launch, "train_adaptive.py", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_are_one_with_the_same_batch(toy_volumes, tmp_path):
    """Three of four slices in the first step, one in the second: a process has none there."""
    logs, moments = [], []
    for processes in (1, 2):  # each encodes for itself
        data = tmp_path / str(processes) / "toy"
        preprocess(toy_volumes, data, "--split", "0.5,0.25,0.25")
        words = ("--data", data, "--work-dir", data.parent, "--run", "r", "--device", "cpu")
        options = ("--batch", 3, "--epochs", 2, "--boxes-per-call", 2)
        run = train(processes, *words, *options)
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout.count("epoch 2/2") == run.stdout.count("next: python") == 1
        refused = train(processes, *words)
        assert refused.returncode and refused.stderr.count("already exists") == 1, refused.stderr
        folder = data.parent / "r"
        logs.append([float(row[name]) for row in results(folder)["log"][1:] for name in LOSSES])
        moments.append(torch.load(folder / "checkpoint_last.pth")["optimizer"]["state"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    # AdamW hides the size of gradients from the losses; its moments do not.
    for key, state in moments[0].items():
        for name in ("exp_avg", "exp_avg_sq"):
            expected, found = state[name], moments[1][key][name]
            assert (found - expected).norm() <= 0.05 * expected.norm(), (key, name)
