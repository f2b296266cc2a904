"""How far a training run is, and the checkpoint from which it can go on."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from utils.data.slices import Slice
from utils.model.checkpoints import read_checkpoint, save_checkpoint
from utils.system import distributed, signals
from utils.system.device import sum_dtype
from utils.system.errors import UserError
from utils.system.signals import Interrupted

# Below this scale of the loss in fp16 the gradients themselves are not finite, not their scale.
SMALLEST_SCALE = 2.0**-14
NEVER = 2**31 - 1  # steps until the scaler tries a larger scale


class Progress:
    """The next step to take, the running loss of the epoch, and the rows of finished epochs.

    Attributes:
        epoch, step: the next step; epochs count from 1, steps from 0.
        seconds: how long the epoch has taken so far.
        history: one row of log.csv for each finished epoch, epoch 0 first.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.epoch, self.step, self.seconds = 1, 0, 0.0
        self.history: list[dict] = []
        self._steps = 0  # since training began, skipped ones included
        self._optimizer, self._scaler = optimizer, scaler
        self._adapts = scaler.get_growth_interval() < NEVER  # in fp16
        self._start_epoch(0.0, 0.0)

    def _start_epoch(self, loss: float, boxes: float) -> None:
        device = self._optimizer.param_groups[0]["params"][0].device
        # Summed on the device, so that no step waits for it: the loss, its boxes, and the first
        # step whose loss or gradient was not finite.
        self._sums = torch.tensor([loss, boxes, math.inf], dtype=sum_dtype(device)).to(device)
        self._steps_applied = self._optimizer_steps()

    def _optimizer_steps(self) -> torch.Tensor:
        """How many steps AdamW has taken, on the device; the scaler skips some."""
        parameter = self._optimizer.param_groups[0]["params"][0]
        state = self._optimizer.state.get(parameter)
        return state["step"].clone() if state else torch.zeros((), device=parameter.device)

    def add_step(self, loss_sum: torch.Tensor, boxes: int) -> None:
        """Count a step that the optimizer has taken or the scaler has skipped.

        Args:
            loss_sum: () sum of this process's losses.
            boxes: how many boxes all processes had together.
        """
        loss_sum = distributed.all_reduce_sum(loss_sum.to(self._sums.dtype))
        applied = self._optimizer_steps()
        finite = loss_sum.isfinite() & (applied > self._steps_applied)
        self._steps_applied = applied
        self._sums[0] += torch.where(finite, loss_sum, 0)
        self._sums[1] += finite * boxes
        # fp16 overflows now and then and recovers: there, only an unbroken series counts.
        first_bad = self._sums[2].clamp(max=self.step)
        recovered = math.inf if self._adapts else self._sums[2]
        self._sums[2] = torch.where(finite, recovered, first_bad)
        self.step += 1
        self._steps += 1

    @property
    def first_bad_step(self) -> int | None:
        """The first step of the epoch whose loss or gradient was not finite; waits for the device.

        In fp16 the scaler skips such steps and lowers its scale: they count from when that does
        not help any more.
        """
        bad = self._sums[2].item()
        if math.isinf(bad) or (self._adapts and self._scaler.get_scale() >= SMALLEST_SCALE):
            return None
        return int(bad)

    @property
    def train_loss(self) -> float:
        """The mean loss of the epoch so far, NaN before its first step; waits for the device."""
        loss, boxes, _ = self._sums.tolist()
        return loss / boxes if boxes else math.nan

    @property
    def skipped_steps(self) -> int:
        """How many steps of this epoch the scaler skipped; waits for the device."""
        earlier = sum(row["skipped_steps"] for row in self.history)
        return self._steps - int(self._optimizer_steps()) - earlier

    def end_epoch(self, row: dict) -> bool:
        """Keep the epoch's row and go on to the next; whether its validation loss is the lowest.

        It has to be lower than that of epoch 0, the weights before training, as well.
        """
        lowest = min(earlier["val_loss"] for earlier in self.history)
        self.history.append(row)
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self._start_epoch(0.0, 0.0)
        return row["val_loss"] < lowest

    @property
    def best_epoch(self) -> int:
        """The finished epoch with the lowest validation loss; 0 is before training."""
        return min(self.history, key=lambda row: row["val_loss"])["epoch"]

    def state_dict(self) -> dict:
        """Everything but the optimizer's and the scaler's own states."""
        loss, boxes, _ = self._sums.tolist()
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "steps": self._steps,
            "loss_sum": loss,
            "boxes": boxes,
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`; the optimizer's state is loaded before."""
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self._steps, self.history = state["steps"], state["history"]
        self._start_epoch(state["loss_sum"], state["boxes"])


def make_scaler(device: torch.device, amp: torch.dtype | None) -> torch.amp.GradScaler:
    """A gradient scaler: it skips steps with non-finite gradients; in fp16 it adapts its scale too.

    In fp32 and bf16 the scale stays 1, and a skipped step ends the run.
    """
    if amp == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=NEVER)


def raise_if_not_finite(
    progress: Progress, steps: Sequence[Sequence[Slice]], decoder: nn.Module, path: Path
) -> None:
    """Stop a run whose loss or gradient is not finite; waits for the device.

    Args:
        progress: of the run.
        steps: the slices of each step of the epoch.
        decoder: in fp32 and bf16 as it was before that step, since the scaler skipped it.
        path: of the file that keeps the decoder and the names of the slices, for whoever looks for
            the cause; `boxes_of_run` makes the boxes again.

    Raises:
        UserError: the loss or a gradient was not finite.
    """
    bad = progress.first_bad_step
    if bad is None:
        return
    names = [entry.key for entry in steps[bad]]
    if distributed.rank() == 0:
        position = {"epoch": progress.epoch, "step": bad, "slices": names}
        save_checkpoint(path, position | {"mask_decoder": decoder.state_dict()})
    raise UserError(
        f"{path.parent}: the loss or its gradient is not finite at epoch {progress.epoch}, slice "
        f"{', '.join(names)}; the decoder is kept in {path.name}; start a new run with a smaller "
        "--lr or --amp off"
    )


class Intervals:
    """When a run checks its loss, saves, or stops: after the same step on all processes.

    Args:
        check_seconds, save_seconds: between two checks of the loss and between two checkpoints.
    """

    def __init__(self, check_seconds: float, save_seconds: float) -> None:
        self._seconds = (check_seconds, save_seconds)
        self._last = [time.monotonic()] * 2

    def due(self) -> tuple[int, bool, bool]:
        """The signal to stop at, or 0; whether to check the loss; whether to save."""
        now = time.monotonic()
        elapsed = [
            now - last >= seconds for last, seconds in zip(self._last, self._seconds, strict=True)
        ]
        stop, check, save = distributed.all_reduce_max([signals.pending(), *elapsed])
        check = check or stop or save
        self._last = [now if check else self._last[0], now if save else self._last[1]]
        return stop, bool(check), bool(save)


class Checkpoint:
    """checkpoint_last.pth: the states of everything that changes while a run trains.

    Args:
        path: of the file.
        stateful: by name, objects with `state_dict` and `load_state_dict`, in the order in which
            they are loaded; one of them is `progress`.
    """

    def __init__(self, path: Path, **stateful) -> None:
        self._path, self._stateful = path, stateful

    def save(self) -> None:
        """Write the file on rank 0; the old one stays until the new one is whole."""
        if distributed.rank() == 0:
            state = {name: part.state_dict() for name, part in self._stateful.items()}
            save_checkpoint(self._path, state | {"rng": torch.get_rng_state()})

    def load(self) -> bool:
        """Load the states; False if nothing has been saved yet.

        Raises:
            UserError: the file is damaged or belongs to another version or model.
        """
        if not self._path.exists():
            return False
        state = read_checkpoint(self._path)
        try:
            for name, part in self._stateful.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["rng"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self._path}: not a checkpoint of this run or version; start a new run"
            ) from error
        return True

    @contextlib.contextmanager
    def saved_on_interrupt(self) -> Iterator[None]:
        """Save when Ctrl-C or SIGTERM ends the block.

        Raises:
            Interrupted: again, with what was saved as its message.
        """
        try:
            yield
        except Interrupted as stop:
            progress = self._stateful["progress"]
            if not progress.history:
                raise
            self.save()
            distributed.barrier()  # torchrun would end the others in the middle of saving
            raise Interrupted(
                stop.signal, f"stopped at epoch {progress.epoch}, step {progress.step}, and saved"
            ) from None
