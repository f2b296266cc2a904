"""How good a decoder is in the middle of its training: loss and DSC under three kinds of box."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch

from perturb import BOX_KINDS, Shift, box_rng, shift_boxes
from utils.data.slices import Slice
from utils.model.embeddings import Embeddings
from utils.model.segmenter import Segmenter
from utils.system import distributed, signals
from utils.system.prefetch import prefetch
from utils.training import losses
from utils.training.batches import decoder_parts, load_batch

SHIFT = Shift(0.15, "side")  # of the expansion and shrink boxes
SEED = 20  # the same boxes in every epoch, for every policy and in every run


def validation_boxes(entry: Slice, tight_boxes: np.ndarray) -> np.ndarray:
    """Standard, expansion and shrink boxes (3 K, 4) of a slice, the same in every run and epoch."""
    rng = box_rng(SEED, entry.case, entry.index)
    return np.concatenate([shift_boxes(tight_boxes, kind, SHIFT, rng) for kind in BOX_KINDS])


def validate(
    model: Segmenter,
    embeddings: Embeddings,
    slices: Sequence[Slice],
    options: Namespace,
    autocast: torch.autocast,
) -> dict[str, float]:
    """Mean loss and DSC of the decoder over standard, expansion and shrink boxes, as in log.csv."""
    on_gpu = model.device.type == "cuda"

    def load(entry: Slice):
        return load_batch([entry], embeddings, options.loss_resolution, pin_memory=on_gpu)

    # Rows: loss, DSC, boxes; one column per box kind. Nothing waits for the device until the end.
    sums = torch.zeros(3, len(BOX_KINDS), dtype=torch.float64, device=model.device)
    for batch in prefetch(load, distributed.shard(slices), depth=2 if on_gpu else 0):
        boxes = [validation_boxes(batch.slices[0], batch.tight_boxes[0])]
        scores = []
        for part in decoder_parts(batch, boxes, embeddings, options.boxes_per_call):
            with torch.no_grad(), autocast:
                logits = model.decode_batch(part.embeddings, part.boxes)
            measures = (losses.segmentation_loss, losses.dsc_on_device)
            scores.append(torch.stack([measure(logits, part.targets) for measure in measures]))
        by_kind = torch.cat(scores, dim=1).unflatten(1, (len(BOX_KINDS), -1)).double()
        sums[:2] += by_kind.sum(dim=2)
        sums[2] += by_kind.shape[2]
        if distributed.world_size() == 1:  # several could not wait for each other then
            signals.raise_if_pending()
    loss_sums, score_sums, boxes = distributed.all_reduce_sum(sums).tolist()
    means = {
        f"dsc_{kind}": score / count
        for kind, score, count in zip(BOX_KINDS, score_sums, boxes, strict=True)
    }
    return {"val_loss": sum(loss_sums) / sum(boxes), **means}
