"""The running loss, steps that are not finite, and checkpoints, on a decoder of one parameter."""

import math

import pytest
import torch
from torch import nn

from tests.helpers import without_float64
from utils.model.checkpoints import read_checkpoint
from utils.system.errors import UserError
from utils.system.signals import Interrupted
from utils.training import progress as training
from utils.training.progress import (
    Checkpoint,
    Intervals,
    Progress,
    make_scaler,
    raise_if_not_finite,
)

HALF = torch.float16


class Entry:
    def __init__(self, key: str) -> None:
        self.key = key


class Toy:
    """Everything that changes in a training; the loss is `factor` times the weight."""

    def __init__(self, amp: torch.dtype | None = None) -> None:
        self.decoder = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.decoder.weight)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=0.1, fused=True)
        self.scaler = make_scaler(torch.device("cpu"), amp)
        self.progress = Progress(self.optimizer, self.scaler)

    def step(self, factor: float = 1.0, boxes: int = 2) -> None:
        loss = self.decoder.weight.sum() * factor
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.add_step(loss.detach(), boxes)

    def check(self, path) -> None:
        steps = [[Entry(f"slice {n}")] for n in range(9)]
        raise_if_not_finite(self.progress, steps, self.decoder, path)

    def checkpoint(self, path) -> Checkpoint:
        return Checkpoint(
            path,
            mask_decoder=self.decoder,
            optimizer=self.optimizer,
            scaler=self.scaler,
            progress=self.progress,
        )


def row(toy: Toy, loss: float = 1.0) -> dict:
    skipped = toy.progress.skipped_steps
    return {"epoch": toy.progress.epoch, "val_loss": loss, "skipped_steps": skipped}


def test_train_loss_is_the_mean_over_boxes():
    toy = Toy()
    assert math.isnan(toy.progress.train_loss)
    toy.step(boxes=1)
    weight = toy.decoder.weight.item()
    toy.step(boxes=3)
    assert toy.progress.train_loss == pytest.approx((1 + weight) / 4)
    assert toy.progress.step == 2


def test_progress_needs_no_float64_on_an_apple_gpu(monkeypatch):
    with pytest.raises(AssertionError), without_float64():
        Toy()
    monkeypatch.setattr(training, "sum_dtype", lambda _: torch.float32)
    with without_float64():
        toy = Toy()
        for _ in range(3):
            toy.step()
        saved = toy.progress.state_dict()
        toy.progress.load_state_dict(saved)
    expected = Toy()
    for _ in range(3):
        expected.step()
    assert toy.progress.train_loss == pytest.approx(expected.progress.train_loss)
    assert toy.progress.first_bad_step is None and toy.progress.skipped_steps == 0


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_first_step_that_is_not_finite_stops_the_run_and_changes_nothing(tmp_path, amp):
    toy = Toy(amp)
    toy.step()
    toy.check(tmp_path / "bad.pth")
    weight = toy.decoder.weight.item()
    for _ in range(2):
        toy.step(math.nan)
    with pytest.raises(UserError, match="not finite at epoch 1, slice slice 1; the decoder is"):
        toy.check(tmp_path / "bad.pth")
    kept = read_checkpoint(tmp_path / "bad.pth")
    assert (kept["epoch"], kept["step"], kept["slices"]) == (1, 1, ["slice 1"])
    assert kept["mask_decoder"]["weight"].item() == toy.decoder.weight.item() == weight
    assert toy.progress.train_loss == 0.5  # one loss of 1 over two boxes


def test_gradient_that_is_not_finite_counts_as_well(tmp_path):
    toy = Toy()
    hook = toy.decoder.weight.register_hook(lambda gradient: gradient * math.inf)
    toy.step()
    hook.remove()
    toy.step()
    assert toy.progress.skipped_steps == 1
    with pytest.raises(UserError, match="slice 0"):
        toy.check(tmp_path / "bad.pth")


def test_fp16_skips_an_overflow_lowers_its_scale_and_goes_on(tmp_path):
    toy = Toy(HALF)
    scale = toy.scaler.get_scale()
    toy.step(math.inf)
    assert toy.decoder.weight.item() == 1 and toy.scaler.get_scale() == scale / 2
    toy.step()
    toy.check(tmp_path / "bad.pth")
    assert toy.progress.skipped_steps == 1 and toy.decoder.weight.item() != 1


def test_fp16_stops_when_a_smaller_scale_does_not_help(tmp_path):
    """An overflow of the first step, which fp16 often has, is not what is to blame."""
    toy = Toy(HALF)
    for factor in (math.inf, 1.0, math.nan, math.nan):
        toy.step(factor)
    toy.check(tmp_path / "bad.pth")  # the scale may have been too large
    toy.scaler.update(training.SMALLEST_SCALE / 2)
    with pytest.raises(UserError, match="slice 2"):
        toy.check(tmp_path / "bad.pth")


def test_skipped_steps_are_counted_by_epoch_and_after_resuming(tmp_path):
    toy = Toy(HALF)
    toy.progress.history.append({"epoch": 0, "val_loss": 1.0, "skipped_steps": 0})
    for factors in ((math.inf, 1.0), (math.inf,), (1.0,)):
        for factor in factors:
            toy.step(factor)
        toy.checkpoint(tmp_path / "last.pth").save()
        toy = Toy(HALF)
        assert toy.checkpoint(tmp_path / "last.pth").load()
        assert toy.progress.skipped_steps == factors.count(math.inf)
        toy.progress.end_epoch(row(toy))
    assert [each["skipped_steps"] for each in toy.progress.history] == [0, 1, 1, 0]


def test_best_epoch_has_the_lowest_loss_of_all_epoch_0_included():
    toy = Toy()
    toy.progress.history.append({"epoch": 0, "val_loss": 0.5, "skipped_steps": 0})
    found = []
    for loss in (0.9, 0.5, 0.4, 0.4, 0.3):
        best = toy.progress.end_epoch(row(toy, loss))
        found.append((best, toy.progress.best_epoch))
    assert found == [(False, 0), (False, 0), (True, 3), (False, 3), (True, 5)]
    assert toy.progress.epoch == 6 and toy.progress.step == 0


def test_resumed_training_takes_the_same_steps(tmp_path):
    path = tmp_path / "last.pth"
    toy, resumed = Toy(), Toy()
    assert not resumed.checkpoint(path).load()
    for _ in range(3):
        toy.step()
    toy.checkpoint(path).save()
    assert resumed.checkpoint(path).load()
    for each in (toy, resumed):
        each.step()
    assert torch.equal(toy.decoder.weight, resumed.decoder.weight)
    assert toy.progress.state_dict() == resumed.progress.state_dict()


@pytest.mark.parametrize("change", [lambda s: s.pop("optimizer"), lambda s: s["progress"].clear()])
def test_checkpoint_of_another_version_is_refused(tmp_path, change):
    path = tmp_path / "last.pth"
    Toy().checkpoint(path).save()
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(UserError, match="not a checkpoint of this run"):
        Toy().checkpoint(path).load()


def test_signal_saves_only_what_there_is(tmp_path):
    toy = Toy()
    checkpoint = toy.checkpoint(tmp_path / "last.pth")
    with pytest.raises(Interrupted, match="^interrupted$"), checkpoint.saved_on_interrupt():
        raise Interrupted(2)
    assert not (tmp_path / "last.pth").exists()
    toy.progress.history.append({"epoch": 0, "val_loss": 1.0, "skipped_steps": 0})
    toy.step()
    with (
        pytest.raises(Interrupted, match="stopped at epoch 1, step 1, and saved") as stop,
        checkpoint.saved_on_interrupt(),
    ):
        raise Interrupted(15)
    assert stop.value.signal == 15 and (tmp_path / "last.pth").exists()


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
