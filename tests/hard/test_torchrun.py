"""Several processes under torchrun train as one process does."""

import pytest
import torch

from tests.helpers import launch, preprocess, results

LOSSES = ("train_loss", "val_loss")


def test_two_processes_are_one_with_the_same_batch(toy_volumes, tmp_path):
    """Three of four slices in the first step, one in the second: a process has none there."""
    logs, moments = [], []
    for processes in (1, 2):  # each encodes for itself
        data = tmp_path / str(processes) / "toy"
        preprocess(toy_volumes, data, "--split", "0.5,0.25,0.25")
        words = ("--data", data, "--work-dir", data.parent, "--run", "r", "--device", "cpu")
        options = ("--batch", 3, "--epochs", 2, "--boxes-per-call", 2)
        run = launch(processes, "train_adaptive.py", *words, *options)
        assert run.returncode == 0, run.stdout + run.stderr
        assert run.stdout.count("epoch 2/2") == run.stdout.count("next: python") == 1
        refused = launch(processes, "train_adaptive.py", *words)
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
