"""The running loss, checkpoints, and what is due when, on a decoder of one parameter."""

import pytest
import torch
from torch import nn

from utils.system import UserError
from utils.training.checkpoint import Checkpoint, Intervals, Progress


class Toy:
    """Everything that changes in a training; the loss is the weight."""

    def __init__(self) -> None:
        self.decoder = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.decoder.weight)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=0.1, fused=True)
        self.progress = Progress(torch.device("cpu"))

    def step(self, boxes: int = 2) -> None:
        loss = self.decoder.weight.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.progress.loss_sum += loss.detach()
        self.progress.boxes += boxes
        self.progress.step += 1

    def end_epoch(self, loss: float) -> bool:
        epoch = self.progress.epoch if self.progress.history else 0
        return self.progress.end_epoch({"epoch": epoch, "val_loss": loss})

    def checkpoint(self, path) -> Checkpoint:
        return Checkpoint(path, self.progress, decoder=self.decoder, optimizer=self.optimizer)


def test_the_mean_loss_is_over_boxes():
    toy = Toy()
    toy.step(boxes=1)
    weight = toy.decoder.weight.item()
    toy.step(boxes=3)
    assert toy.progress.mean_loss() == pytest.approx((1 + weight) / 4)


def test_best_epoch_has_the_lowest_loss_of_all_epoch_0_included():
    toy = Toy()
    found = [(toy.end_epoch(0.5), toy.progress.best_epoch)]
    for loss in (0.9, 0.5, 0.4, 0.4, 0.3):
        toy.step()
        found.append((toy.end_epoch(loss), toy.progress.best_epoch))
    assert found == [(True, 0), (False, 0), (False, 0), (True, 3), (False, 3), (True, 5)]
    assert (toy.progress.epoch, toy.progress.step, toy.progress.boxes) == (6, 0, 0)
    assert toy.progress.mean_loss() == 0


@pytest.mark.parametrize("key", ["optimizer", "progress"])
def test_checkpoint_of_another_version_is_refused(tmp_path, key):
    path = tmp_path / "last.pth"
    Toy().checkpoint(path).save()
    state = torch.load(path, weights_only=True)
    state[key].clear()
    torch.save(state, path)
    with pytest.raises(UserError, match="not a checkpoint of this run"):
        Toy().checkpoint(path).load()


def test_pauses_are_due_after_their_seconds_or_a_signal(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    intervals = Intervals(1.0, 300.0)
    due = []
    for clock[0] in (0.5, 1.0, 1.5, 300.0, 300.5):
        due.append(intervals.due())
    quiet, check, save = (0, False, False), (0, True, False), (0, True, True)
    assert due == [quiet, check, quiet, save, quiet]
    monkeypatch.setattr("utils.system.signals.pending", lambda: 15)
    assert intervals.due() == (15, True, False)
