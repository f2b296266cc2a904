"""An optimisation step, and all that a checkpoint has to hold."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from utils.model.segmenter import Segmenter
from utils.system import distributed
from utils.system.errors import UserError
from utils.training.batches import Batch, as_shares, load_batch
from utils.training.losses import resize_logits, segmentation_loss

if TYPE_CHECKING:
    import numpy as np

    from utils.data.slices import Slice
    from utils.model.embeddings import Embeddings

START = {"epoch": 1, "step": 0, "loss_sum": 0.0, "instances": 0.0, "seconds": 0.0, "steps": 0}
SCALE_LEAST = 2.0**-14  # of the loss in fp16: below it the gradients are at fault, not their scale


class Trainer:
    """A mask decoder in training: AdamW, ReduceLROnPlateau, mixed precision, and the position.

    Attributes:
        device: that of the decoder.
        autocast: of mixed precision.
        at: the next step to take, the epoch's running sums up to there (as of `look`), and how many
            steps were taken since training began.
        history: a row for each epoch that is done.
        read_ahead: how many batches to load ahead, in another thread.
    """

    STATE = {"mask_decoder", "optimizer", "scheduler", "scaler", "rng", "at", "history"}

    def __init__(
        self,
        model: Segmenter,
        embeddings: Embeddings,
        *,
        lr: float,
        weight_decay: float,
        factor: float,
        patience: int,
        amp: torch.dtype | None,
        boxes_per_call: int,
    ) -> None:
        """Make the optimiser and its helpers.

        Args:
            model, embeddings: what is trained, on the model's device, and on what.
            lr, weight_decay: of AdamW.
            factor, patience: of ReduceLROnPlateau.
            amp: the number format of mixed precision, or None for fp32.
            boxes_per_call: at most so many boxes go through the decoder at once.
        """
        self.device = model.device
        self._embeddings = embeddings
        self.read_ahead = 2 if self.device.type == "cuda" else 0
        self.autocast = torch.autocast(self.device.type, amp, enabled=amp is not None)
        self._boxes_per_call = boxes_per_call
        self._decode = model.decode_batch
        self._decode_together = distributed.data_parallel(model.decode_batch, model.mask_decoder)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Fused: one pass over the weights, and a gradient scaler that does not wait for the GPU.
        self._optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
        self._scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self._optimizer, factor=factor, patience=patience
        )
        # It leaves out a step whose gradient is not finite, without waiting for a GPU. In fp16 that
        # happens, and it lowers its scale; otherwise it changes nothing, and `look` tells.
        self._skips = amp == torch.float16
        fixed = {} if self._skips else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
        self._scaler = torch.amp.GradScaler(self.device.type, **fixed)
        self._stateful = {
            "mask_decoder": model.mask_decoder,
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "scaler": self._scaler,
        }
        self.at = dict(START)
        self.history: list[dict] = []
        self.begin_epoch()

    # --- Steps -----------------------------------------------------------------------------------
    def begin_epoch(self) -> None:
        """Take the running sums from `at`."""
        # On the device, so that no step waits for it: loss, instances, first step without a loss.
        start = [self.at["loss_sum"], self.at["instances"], math.inf]
        self._sums = torch.tensor(start, dtype=torch.float64).to(self.device)

    def step(self, batch: Batch, instances: int, counts: bool = True) -> None:
        """One step of AdamW on the mean loss of the boxes of all processes.

        Args:
            batch: this process's part of them.
            instances: how many boxes all processes have together.
            counts: False for a process that has none of them: its batch keeps it in step with the
                others, for all have to take part in a step, and changes nothing.
        """
        self._optimizer.zero_grad(set_to_none=True)
        before = self._steps_done().clone()
        loss_sum = torch.zeros((), device=self.device)
        parts = self._parts(batch)
        # DistributedDataParallel averages the gradients over the processes.
        weight = distributed.world_size() / instances if counts else 0.0
        for number, (part, embeddings) in enumerate(parts, 1):
            with self._apart(number < len(parts)):  # gradients are exchanged once, at the end
                with self.autocast:
                    logits = self._decode_together(embeddings, part.boxes)
                losses = segmentation_loss(*self._comparable(logits, part))
                self._scaler.scale(losses.sum() * weight).backward()
            loss_sum += losses.detach().sum() * counts
        self._scaler.step(self._optimizer)
        self._scaler.update()

        loss_sum = distributed.all_reduce_sum(loss_sum.double())
        finite = loss_sum.isfinite() & (self._steps_done() > before)
        self._sums[0] += torch.where(finite, loss_sum, 0)
        self._sums[1] += finite * instances
        since = math.inf if self._skips else self._sums[2]  # fp16: of an unbroken series of them
        self._sums[2] = torch.where(finite, since, self._sums[2].clamp(max=self.at["step"]))
        self.at["step"] += 1
        self.at["steps"] += 1

    def _steps_done(self) -> torch.Tensor:
        """How many steps AdamW has taken, on the device."""
        first = self._optimizer.param_groups[0]["params"][0]
        state = self._optimizer.state.get(first)
        return state["step"] if state else torch.zeros((), device=self.device)

    @torch.no_grad()
    def predict(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and targets of a batch, both (K, s, s) float32, in the order of its boxes."""
        found = []
        for part, embeddings in self._parts(batch):
            with self.autocast:
                logits = self._decode(embeddings, part.boxes)
            found.append(self._comparable(logits, part))
        logits, targets = zip(*found, strict=True)
        return torch.cat(logits), torch.cat(targets)

    def load(
        self,
        entries: Sequence[Slice],
        resolution: int,
        prompt: Callable[[Slice, np.ndarray], np.ndarray],
    ) -> Batch:
        """`load_batch` with this trainer's embeddings, page-locked where a GPU copies it."""
        batch = load_batch(entries, self._embeddings, resolution, prompt)
        if self.device.type != "cuda":
            return batch
        return replace(batch, targets=[targets.pin_memory() for targets in batch.targets])

    def _parts(self, batch: Batch) -> list[tuple[Batch, torch.Tensor]]:
        """A batch in parts of at most boxes_per_call boxes, with their slices' embeddings."""
        embeddings = self._embeddings.embed(batch.loaded, batch.entries)
        parts = replace(batch, loaded=list(embeddings)).parts(self._boxes_per_call)
        if len(parts) == 1:
            return [(batch, embeddings)]
        return [(part, torch.stack(list(part.loaded))) for part in parts]

    def _comparable(self, logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits at the resolution of the batch's targets, and these."""
        targets = torch.cat(list(batch.targets)).to(self.device, non_blocking=True)
        return resize_logits(logits.float(), targets.shape[-1]), as_shares(targets)

    def _apart(self, apart: bool) -> contextlib.AbstractContextManager:
        """Without the other processes, if there are any."""
        if apart and distributed.world_size() > 1:
            return self._decode_together.no_sync()
        return contextlib.nullcontext()

    def look(self) -> int | None:
        """Bring the running sums into `at`; on a GPU this waits for all steps until now.

        Returns:
            The first step of the epoch whose loss or gradient was not finite, or None. The decoder
            is as it was before it, but for later steps. In fp16 such steps are `skipped` and not
            told, unless they come again and again: then it is the first of the series.
        """
        self.at["loss_sum"], self.at["instances"], bad = self._sums.tolist()
        if math.isinf(bad) or (self._skips and self._scaler.get_scale() >= SCALE_LEAST):
            return None
        return int(bad)

    @property
    def train_loss(self) -> float:
        """The epoch's mean loss up to the last `look`; NaN before its first step."""
        return self.at["loss_sum"] / self.at["instances"] if self.at["instances"] else math.nan

    @property
    def skipped(self) -> int:
        """How many steps of this epoch changed nothing, since their gradient was not finite."""
        earlier = sum(row["skipped_steps"] for row in self.history)
        return self.at["steps"] - int(self._steps_done()) - earlier

    def inputs(self, batch: Batch) -> dict:
        """A batch and the decoder as they are, as a checkpoint to look into."""
        return {
            "slices": [entry.key for entry in batch.entries],
            "boxes": [torch.from_numpy(boxes) for boxes in batch.boxes],
            "targets": list(batch.targets),
            "loaded": list(batch.loaded),
            "mask_decoder": self._stateful["mask_decoder"].state_dict(),
        }

    # --- Epochs and checkpoints ------------------------------------------------------------------
    def end_epoch(self, row: dict) -> bool:
        """Keep an epoch's row and go on to the next; whether its validation loss was the lowest."""
        self._scheduler.step(row["val_loss"])
        best = min((r["val_loss"] for r in self.history if r["epoch"] > 0), default=math.inf)
        self.history.append(row)
        self.at = START | {"epoch": self.at["epoch"] + 1, "steps": self.at["steps"]}
        self.begin_epoch()
        return row["val_loss"] < best

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self._optimizer.param_groups[0]["lr"]

    def state(self) -> dict:
        """Everything needed to go on after the last `look`: a dict with the keys STATE."""
        state = {name: part.state_dict() for name, part in self._stateful.items()}
        return state | {"rng": torch.get_rng_state(), "at": self.at, "history": self.history}

    def load_state(self, state: dict) -> None:
        """Go on from a `state`.

        Raises:
            UserError: it is not that of such a trainer; some of it may have been loaded.
        """
        fresh = self.state()
        try:
            for name, part in self._stateful.items():
                if name == "optimizer":  # its options are PyTorch's, and change with its version
                    groups = (part["param_groups"] for part in (state[name], fresh[name]))
                    used = ([{k: g[k] for k in ("params", "lr")} for g in each] for each in groups)
                    _check_alike(*used, name)
                else:
                    _check_alike(state[name], fresh[name], name)
                part.load_state_dict(state[name])
            for parameter, moments in self._optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    _check_alike(moments[name], parameter.detach(), name)
                _check_alike(moments["step"], torch.zeros(()), "step")
            _check_alike(state["at"], START, "at")
            if [row["epoch"] for row in state["history"]] != [*range(state["at"]["epoch"])]:
                raise ValueError("history")
            names = state["history"][0].keys() | {"epoch", "val_loss", "skipped_steps"}
            for row in state["history"]:
                _check_alike(row, dict.fromkeys(names, 0.0), "history")
            torch.set_rng_state(state["rng"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise UserError(f"not a checkpoint of this run ({error})") from error
        self.at, self.history = state["at"], state["history"]
        self.begin_epoch()


def _check_alike(found: object, fresh: object, where: str) -> None:
    """See that two states have the same structure; numbers and tensors may differ in value.

    Raises:
        ValueError: they do not; `where` says in what.
    """
    numbers = (int, float)
    same = type(found) is type(fresh) or (type(found) in numbers and type(fresh) in numbers)
    if same and isinstance(fresh, torch.Tensor):
        same = found.shape == fresh.shape and found.dtype == fresh.dtype
        same = same and found.layout == fresh.layout and bool(found.isfinite().all())
    elif same and isinstance(fresh, dict):
        same = found.keys() == fresh.keys()
    elif same and isinstance(fresh, list):
        same = len(found) == len(fresh)
    if not same:
        raise ValueError(where)
    if isinstance(fresh, dict):
        for key in fresh:
            _check_alike(found[key], fresh[key], f"{where}: {key}")
    elif isinstance(fresh, list):
        for pair in zip(found, fresh, strict=True):
            _check_alike(*pair, where)


def dsc_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """DSC (13) of each mask, (K,) of logits and targets (K, s, s), at 0 and one half.

    Both masks empty: 1, as in utils.evaluation.metrics, which is the one to report; this one
    stays on the device.
    """
    masks, wanted = (logits > 0).flatten(1), (targets >= 0.5).flatten(1)
    size = masks.sum(dim=1) + wanted.sum(dim=1)
    return torch.where(size > 0, 2 * (masks & wanted).sum(dim=1) / size.clamp(min=1), 1.0)
