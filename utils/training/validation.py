"""How good a decoder is in the middle of its training: loss, and DSC under three kinds of box."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch

from perturb import BOX_KINDS, Shift, shift_boxes
from utils.data.slices import Slice
from utils.model.embeddings import Embeddings
from utils.model.segmenter import Segmenter
from utils.system import distributed, signals
from utils.system.device import reading_threads, sum_dtype
from utils.system.prefetch import prefetch
from utils.training import losses
from utils.training.batches import TargetStore, decoder_parts, load_batch

SHIFT = Shift(0.15, "side")  # of the expansion and shrink boxes
SEED = 20  # the same boxes in every epoch, for every policy and in every run


def validation_boxes(
    entry: Slice, tight_boxes: np.ndarray, areas: np.ndarray, options: Namespace
) -> list[np.ndarray]:
    """Standard, expansion and shrink boxes (K, 4), the same in every epoch and in every run."""
    return [
        np.concatenate(
            [
                shift_boxes(box[None], kind, SHIFT, entry.rng(SEED, "validation", label, 0))
                for label, box in zip(sorted(entry.labels), tight_boxes, strict=True)
            ]
        )
        for kind in BOX_KINDS
    ]


def validate(
    model: Segmenter,
    embeddings: Embeddings,
    targets: TargetStore,
    slices: Sequence[Slice],
    options: Namespace,
    autocast: torch.autocast,
) -> dict[str, float]:
    """The decoder's mean loss and its mean DSC under each kind of box, as in log.csv.

    The loss is over standard, expansion and shrink boxes. It lowers the learning rate and chooses
    the best epoch.
    """

    def boxes_of(entry: Slice, tight_boxes: np.ndarray, areas: np.ndarray) -> list[np.ndarray]:
        return validation_boxes(entry, tight_boxes, areas, options)

    kinds = len(BOX_KINDS)
    loss, dsc = mean_scores(
        model, embeddings, targets, slices, boxes_of, kinds, options.boxes_per_call, autocast
    )
    row = {f"dsc_{kind}": dsc[n] for n, kind in enumerate(BOX_KINDS)}
    return {"val_loss": sum(loss) / len(loss), **row}


def mean_scores(
    model: Segmenter,
    embeddings: Embeddings,
    targets: TargetStore,
    slices: Sequence[Slice],
    boxes_of: Callable[[Slice, np.ndarray, np.ndarray], list[np.ndarray]],
    kinds: int,
    boxes_per_call: int,
    autocast: torch.autocast,
) -> tuple[list[float], list[float]]:
    """The mean loss and the mean DSC of all instances of `slices` under several boxes of each.

    Args:
        model, embeddings, targets: as in training; scores are at the resolution of the targets.
        slices: to score, which are shared out to all processes.
        boxes_of: maps a slice, its tight boxes (K, 4) and its areas (K,) to M arrays (K, 4).
        kinds: M.
        boxes_per_call: at most this many boxes in one decoder call.
        autocast: mixed precision.

    Returns:
        M losses and M DSC, each a mean over instances.
    """
    on_gpu = model.device.type == "cuda"

    def load(entry: Slice):
        return load_batch([entry], embeddings, targets, pin_memory=on_gpu)

    # Rows: loss, DSC, instances; one column per box of an instance. Nothing waits for the device
    # until the end.
    dtype = sum_dtype(model.device)
    sums = torch.zeros(3, kinds, dtype=dtype, device=model.device)
    readers = reading_threads(model.device)
    for batch in prefetch(load, distributed.shard(slices), 2 * readers, readers):
        boxes = boxes_of(batch.slices[0], batch.tight_boxes[0], batch.areas[0])
        scores = []
        for part in decoder_parts(batch, [np.concatenate(boxes)], embeddings, boxes_per_call):
            with torch.no_grad(), autocast:
                logits = model.decode_batch(part.embeddings, part.boxes)
            measures = (losses.segmentation_loss, losses.dsc_on_device)
            scores.append(torch.stack([measure(logits, part.targets) for measure in measures]))
        by_box = torch.cat(scores, dim=1).unflatten(1, (kinds, -1)).to(dtype)  # (2, M, K)
        sums[:2] += by_box.sum(dim=2)
        sums[2] += by_box.shape[2]
        if distributed.world_size() == 1:  # several could not wait for each other then
            signals.raise_if_pending()
    loss_sums, dsc_sums, instances = distributed.all_reduce_sum(sums).tolist()
    n = instances[0]  # every instance has every box
    return [total / n for total in loss_sums], [total / n for total in dsc_sums]
