"""Validation of a decoder during training: loss and DSC under several kinds of box."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from perturb import BOX_KINDS, Shift, erring_boxes, read_errors, shift_boxes
from utils.data.slices import Slice
from utils.model.embeddings import Embeddings
from utils.model.segmenter import Segmenter
from utils.system import distributed, signals
from utils.system.device import reading_threads
from utils.system.loops import prefetch, progress_bar
from utils.training.batches import TargetStore, chunks, load_batch
from utils.training.losses import dsc_on_device, segmentation_loss

SHIFT = Shift(0.15, "side")  # of the expansion and shrink boxes
SEED = 20  # the same boxes in every epoch, for every policy and in every run
Prompt = tuple[str, Shift]  # a kind of box and its largest shift
MEASURED = ("measured", SHIFT)  # errs as `perturb.read_errors` says, and has no shift
KINDS: list[Prompt] = [(kind, SHIFT) for kind in BOX_KINDS]


def validation_boxes(
    sample: Slice, tight_boxes: np.ndarray, areas: np.ndarray, prompt: Prompt
) -> np.ndarray:
    """The boxes (K, 4) that a slice is validated on, the same in every epoch and in every run."""
    boxes = []
    masks = zip(sorted(sample.labels), tight_boxes[:, None], areas[:, None], strict=True)
    for label, box, area in masks:
        rng = sample.rng(SEED, "validation", label, 0)
        errs = prompt == MEASURED
        boxes.append(
            erring_boxes(box, area, read_errors(), rng) if errs else shift_boxes(box, *prompt, rng)
        )
    return np.concatenate(boxes)


def validate(
    model: Segmenter,
    embeddings: Embeddings,
    targets: TargetStore,
    samples: Sequence[Slice],
    options: Namespace,
    amp: torch.dtype | None,
) -> dict[str, float]:
    """A row of log.csv: the mean loss, and the mean DSC under each kind of box.

    The loss, over standard, expansion and shrink boxes, lowers the learning rate and chooses the
    best epoch. Scores are at the resolution of the targets; the processes share the slices.
    """
    loss, dsc = mean_scores(model, embeddings, targets, samples, KINDS, options.boxes_per_call, amp)
    row = {f"dsc_{kind}": score for kind, score in zip(BOX_KINDS, dsc, strict=True)}
    return {"val_loss": sum(loss) / len(loss), **row}


def mean_scores(
    model: Segmenter,
    embeddings: Embeddings,
    targets: TargetStore,
    samples: Sequence[Slice],
    prompts: Sequence[Prompt],
    boxes_per_call: int,
    amp: torch.dtype | None,
) -> tuple[list[float], list[float]]:
    """The mean loss and the mean DSC of all instances under each of M prompts; see `validate`.

    Returns:
        M losses and M DSC, each a mean over instances.
    """
    device = model.device
    readers = reading_threads(device)
    load = partial(
        load_batch, embeddings=embeddings, targets=targets, pin_memory=device.type == "cuda"
    )
    # Rows: loss, DSC, instances; one column per prompt. Nothing waits for the device until the end.
    sums = torch.zeros(3, len(prompts), dtype=torch.float64, device=device)
    steps = [[sample] for sample in distributed.shard(samples)]
    batches = prefetch(load, steps, 2 * readers, readers)
    for batch in progress_bar(batches, desc="validating", unit="slice", total=len(steps)):
        (sample,), (tight_boxes,), (areas,) = batch.samples, batch.tight_boxes, batch.areas
        boxes = [validation_boxes(sample, tight_boxes, areas, prompt) for prompt in prompts]
        scores = []
        for chunk in chunks(batch, [np.concatenate(boxes)], embeddings, boxes_per_call):
            with torch.no_grad(), torch.autocast(device.type, amp, enabled=amp is not None):
                logits = model.decode_batch(chunk.embeddings, chunk.boxes)
            measures = (segmentation_loss, dsc_on_device)
            scores.append(torch.stack([measure(logits, chunk.targets) for measure in measures]))
        by_prompt = torch.cat(scores, dim=1).unflatten(1, (len(prompts), -1)).double()  # (2, M, K)
        sums[:2] += by_prompt.sum(dim=2)
        sums[2] += by_prompt.shape[2]
        if distributed.world_size() == 1:  # several could not wait for each other then
            signals.raise_if_pending()
    loss_sums, dsc_sums, (instances, *_) = distributed.all_reduce_sum(sums).tolist()
    return [total / instances for total in loss_sums], [total / instances for total in dsc_sums]


# --- The moving average of the decoder's weights -------------------------------------------------
def update_average(
    decay: float,
    averages: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    count: torch.Tensor,
) -> None:
    """decay * average + (1 - decay) * weights, in place, for `AveragedModel(multi_avg_fn=...)`.

    With `count` steps in the averages the decay is at most (1 + count) / (10 + count), as in
    TensorFlow's ExponentialMovingAverage: otherwise the average of a short run would mostly be the
    weights that it started from. Nothing waits for a GPU.
    """
    share = 1 - ((1 + count) / (10 + count)).clamp(max=decay)
    change = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(change, share)
    torch._foreach_add_(averages, change)


@contextlib.contextmanager
def decoder_in_place(model: Segmenter, decoder: nn.Module) -> Iterator[None]:
    """Within the block the model has another mask decoder, such as the averaged one."""
    own, model.mask_decoder = model.mask_decoder, decoder
    try:
        yield
    finally:
        model.mask_decoder = own
