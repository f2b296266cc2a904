"""The progress of a training run, and the checkpoint from which it can resume."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from utils.model.checkpoints import read_checkpoint, save_checkpoint
from utils.system import UserError, distributed, signals
from utils.system.signals import Interrupted


class Progress:
    """The next step to take, the running loss of the epoch, and the rows of finished epochs."""

    def __init__(self, device: torch.device) -> None:
        self.epoch, self.step = 1, 0  # the next step
        self.seconds = 0.0  # that the epoch has taken so far
        self.boxes = 0  # of all processes in this epoch, and the sum of this process's losses
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.history: list[dict] = []  # a row of log.csv per finished epoch, epoch 0 first

    def mean_loss(self) -> float:
        """The mean loss of the epoch so far; waits for the device and for the other processes.

        Raises UserError: it is not finite.
        """
        mean = distributed.all_reduce_sum(self.loss_sum.clone()).item() / max(self.boxes, 1)
        if not math.isfinite(mean):
            raise UserError(
                f"the loss is {mean} in epoch {self.epoch}, by step {self.step}; start a new run "
                "with a smaller --lr or --amp off"
            )
        return mean

    def end_epoch(self, row: dict) -> bool:
        """Keep the epoch's row and go on to the next; whether its validation loss is the lowest.

        It has to be lower than that of epoch 0, the weights before training, as well.
        """
        best = not self.history or row["val_loss"] < min(e["val_loss"] for e in self.history)
        self.history.append(row)
        if row["epoch"]:
            self.epoch, self.step, self.seconds, self.boxes = self.epoch + 1, 0, 0.0, 0
            self.loss_sum.zero_()
        return best

    @property
    def best_epoch(self) -> int:
        """The finished epoch with the lowest validation loss; 0 is before training."""
        return min(self.history, key=lambda row: row["val_loss"])["epoch"]

    def state_dict(self) -> dict:
        """Everything, with the loss of all processes together."""
        loss_sum = distributed.all_reduce_sum(self.loss_sum.clone()).item()
        return {**vars(self), "loss_sum": loss_sum}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`."""
        vars(self).update(state, loss_sum=self.loss_sum)
        self.loss_sum.fill_(state["loss_sum"] if distributed.rank() == 0 else 0.0)


class Intervals:
    """When a run checks its loss, saves, or stops: after the same step on all processes."""

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

    `stateful` are objects with `state_dict` and `load_state_dict`, by name.
    """

    def __init__(self, path: Path, progress: Progress, **stateful) -> None:
        self._path, self._progress = path, progress
        self._stateful = {**stateful, "progress": progress}

    def save(self) -> None:
        """Write the file on rank 0; the old one stays until the new one is complete."""
        state = {name: each.state_dict() for name, each in self._stateful.items()}
        if distributed.rank() == 0:
            save_checkpoint(self._path, state)

    def load(self) -> bool:
        """Load the states; False if nothing has been saved yet.

        Raises UserError: the file is damaged or belongs to another version or model.
        """
        if not self._path.exists():
            return False
        state = read_checkpoint(self._path)
        try:
            for name, each in self._stateful.items():
                each.load_state_dict(state[name])
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
            if not self._progress.history:
                raise
            self.save()
            distributed.barrier()  # torchrun would end the others in the middle of saving
            position = f"epoch {self._progress.epoch}, step {self._progress.step}"
            raise Interrupted(stop.signal, f"stopped at {position}, and saved") from None
