"""What a training or validation step reads: tight boxes, targets and embeddings of slices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from perturb import IMAGE_SIZE
from utils.data.slices import Slice, read_instances
from utils.model.embeddings import Embeddings
from utils.system import distributed

TARGET_BYTES = 2**30  # of targets in memory; FLARE22's 25,000 take 35 MB at 256 px, 16 x at 1024


@dataclass(frozen=True)
class Batch:
    """The slices of one step, read into the CPU's memory.

    Attributes:
        slices: B slices.
        tight_boxes: for each slice (K, 4) float32 XYXY in the 1024 frame.
        areas: for each slice (K,) int64, of the masks in pixels of that frame.
        targets: for each slice (K, s, s) uint8, as `TargetStore` gives them.
        loaded: for each slice what `Embeddings.load` gives.
        boxes_in_step: how many boxes all processes have together in a training step.
        loss_weight: by which the sum of this process's losses is multiplied, so that the gradient
            of the step is that of the mean over all boxes. DistributedDataParallel averages over
            the processes; one that has no slice of its own decodes another's with weight 0.
    """

    slices: Sequence[Slice]
    tight_boxes: Sequence[np.ndarray]
    areas: Sequence[np.ndarray]
    targets: Sequence[torch.Tensor]
    loaded: Sequence[torch.Tensor]
    boxes_in_step: int = 0
    loss_weight: float = 0.0


@dataclass(frozen=True)
class Part:
    """The boxes of one decoder call, on the device.

    Attributes:
        embeddings: (b, 256, 64, 64) float32, one per slice.
        boxes: b arrays (k, 4) float32 XYXY in the 1024 frame.
        targets: (sum of k, s, s) float32, the covered share of each pixel.
    """

    embeddings: torch.Tensor
    boxes: Sequence[np.ndarray]
    targets: torch.Tensor


def load_batch(
    slices: Sequence[Slice], embeddings: Embeddings, targets: TargetStore, pin_memory: bool = False
) -> Batch:
    """Read slices; may run in another thread.

    Args:
        slices: B slices.
        embeddings, targets: where their embeddings and their targets come from.
        pin_memory: page-lock the targets, so that a GPU copies them without waiting.

    Raises:
        UserError: a file is damaged, or not the one that dataset.json lists.
    """
    tight_boxes, areas, counts = zip(*(targets.get(entry) for entry in slices), strict=True)
    loaded_targets = [torch.from_numpy(each) for each in counts]
    if pin_memory:
        loaded_targets = [each.pin_memory() for each in loaded_targets]
    loaded = [embeddings.load(entry) for entry in slices]
    return Batch(slices, tight_boxes, areas, loaded_targets, loaded)


def load_step(step: Sequence[Slice], *args, **kwargs) -> Batch:
    """`load_batch` of this process's share of the slices of a training step."""
    own = distributed.shard(step)
    boxes_in_step = sum(len(entry.labels) for entry in step)
    return replace(
        load_batch(own or step[:1], *args, **kwargs),  # all processes take part in every step
        boxes_in_step=boxes_in_step,
        loss_weight=distributed.world_size() / boxes_in_step if own else 0.0,
    )


class TargetStore:
    """Tight boxes and targets of slices, kept in memory once they were read.

    Of a target only the window of its box is kept. When they take TARGET_BYTES, further slices are
    read again at every use.
    """

    def __init__(self, resolution: int) -> None:
        """`resolution` is the side of the targets in pixels, 256 or 1024."""
        self._resolution = resolution
        self._kept: dict[str, tuple[np.ndarray, list[Crop]]] = {}
        self._room = TARGET_BYTES

    def get(self, entry: Slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tight boxes (K, 4) of a slice, the areas (K,) of its masks, its targets (K, s, s).

        Boxes and areas are in pixels of the 1024 frame, targets are uint8, and s is the resolution.
        A target counts the pixels of the 1024 frame, 0 to (1024 / s)^2, that
        the label covers in each of its own: small organs neither vanish nor jump to whole pixels.
        `coverage` turns the counts into shares. Other threads may call it at the same time.

        Raises:
            UserError: the label map is damaged, or holds other labels than dataset.json lists.
        """
        boxes, crops = self._kept.get(entry.key) or self._read(entry)
        targets = np.zeros((len(crops), self._resolution, self._resolution), np.uint8)
        for target, crop in zip(targets, crops, strict=True):
            target[crop.rows, crop.columns] = crop.counts
        areas = np.array([crop.counts.sum(dtype=np.int64) for crop in crops])
        return boxes, areas, targets

    def _read(self, entry: Slice) -> tuple[np.ndarray, list[Crop]]:
        boxes, crops = target_crops(entry, self._resolution)
        size = sum(crop.counts.nbytes for crop in crops)
        if size <= self._room:
            self._kept[entry.key] = boxes, crops
            self._room -= size
        return boxes, crops


@dataclass(frozen=True)
class Crop:
    """The window of a target outside which it is 0.

    Attributes:
        rows, columns: where the window lies in the target.
        counts: (h, w) uint8, the window.
    """

    rows: slice
    columns: slice
    counts: np.ndarray


def target_crops(entry: Slice, resolution: int) -> tuple[np.ndarray, list[Crop]]:
    """The tight boxes (K, 4) of a slice in the 1024 frame and the windows of its K targets.

    Raises:
        UserError: as `TargetStore.get`.
    """
    label_map, labels, boxes = read_instances(entry)
    factor = IMAGE_SIZE // resolution
    crops = []
    for label, (x0, y0, x1, y1) in zip(labels, boxes.astype(int), strict=True):
        # The box, its edges moved outward to whole pixels of the target.
        rows, columns = slice(y0 // factor, y1 // factor + 1), slice(x0 // factor, x1 // factor + 1)
        window = label_map[
            rows.start * factor : rows.stop * factor, columns.start * factor : columns.stop * factor
        ]
        blocks = (window == label).reshape(
            rows.stop - rows.start, factor, columns.stop - columns.start, factor
        )
        crops.append(Crop(rows, columns, blocks.sum(axis=(1, 3), dtype=np.uint8)))
    return boxes, crops


def coverage(targets: torch.Tensor) -> torch.Tensor:
    """Targets (K, s, s) of `TargetStore` as the covered share of each pixel, float32."""
    return targets.float() / (IMAGE_SIZE // targets.shape[-1]) ** 2


def decoder_parts(
    batch: Batch, boxes: Sequence[np.ndarray], embeddings: Embeddings, boxes_per_call: int
) -> Iterator[Part]:
    """Bring a batch to the device, in parts that the decoder's memory holds.

    Args:
        batch: B slices.
        boxes: for each slice (M K, 4): M boxes for each of its K targets, in the targets' order.
        embeddings: that loaded the batch.
        boxes_per_call: at most this many boxes in a part. Fewer take less memory; the gradient of
            the step stays the same.
    """
    embedded = embeddings.embed(batch.loaded, batch.slices)
    targets = [
        each.repeat(len(prompted) // len(each), 1, 1)
        for each, prompted in zip(batch.targets, boxes, strict=True)
    ]
    pieces: list[list[tuple[int, slice]]] = [[]]  # for each part: slice of the batch, its boxes
    room = boxes_per_call
    for index, prompted in enumerate(boxes):
        start = 0
        while start < len(prompted):
            if not room:
                pieces.append([])
                room = boxes_per_call
            stop = min(len(prompted), start + room)
            pieces[-1].append((index, slice(start, stop)))
            room -= stop - start
            start = stop
    for part in pieces:
        whole = len(pieces) == 1
        target = torch.cat([targets[index][span] for index, span in part])
        yield Part(
            embedded if whole else torch.stack([embedded[index] for index, _ in part]),
            [boxes[index][span] for index, span in part],
            coverage(target.to(embedded.device, non_blocking=True)),
        )


def accumulate(parts: Iterable[Part], decode: Callable) -> Iterator[Part]:
    """The parts of one step, whose gradients processes exchange once, after the last of them.

    Args:
        parts: one or more, each gone through forward and backward before the next.
        decode: `distributed.data_parallel` of the model's `decode_batch`.
    """
    no_sync = getattr(decode, "no_sync", contextlib.nullcontext)
    parts = iter(parts)
    part = next(parts)
    for following in parts:
        with no_sync():
            yield part
        part = following
    yield part
