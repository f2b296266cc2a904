"""What a training or validation step reads: tight boxes, targets and embeddings of slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from perturb import IMAGE_SIZE, Perturbation, perturb
from utils.data.slices import Slice, read_instances
from utils.model.embeddings import Embeddings


@dataclass(frozen=True)
class Batch:
    """The B slices of one step, read into the CPU's memory."""

    samples: Sequence[Slice]
    tight_boxes: Sequence[np.ndarray]  # of each slice (K, 4) float32 XYXY in the 1024 frame
    areas: Sequence[np.ndarray]  # of each slice (K,) int64, of the masks in pixels of that frame
    targets: Sequence[torch.Tensor]  # of each slice (K, s, s) uint8, as `TargetStore` gives them
    loaded: Sequence[torch.Tensor]  # of each slice what `Embeddings.load` gives


@dataclass(frozen=True)
class Chunk:
    """The boxes of one decoder call, on the device."""

    embeddings: torch.Tensor  # (b, C, h, w) float32, one per slice
    boxes: Sequence[np.ndarray]  # b arrays (k, 4) float32 XYXY in the 1024 frame
    targets: torch.Tensor  # (sum of k, s, s) float32, the covered share of each pixel


def load_batch(
    samples: Sequence[Slice], embeddings: Embeddings, targets: TargetStore, pin_memory: bool = False
) -> Batch:
    """Read B slices; none for a process that has no share of a step. May run in another thread.

    `pin_memory` page-locks the targets, so that a GPU copies them without waiting. UserError: a
    file is damaged, or not the one that dataset.json lists.
    """
    batch = Batch(samples, [], [], [], [embeddings.load(sample) for sample in samples])
    for sample in samples:
        boxes, areas, counts = targets.get(sample)
        counts = torch.from_numpy(counts)
        batch.tight_boxes.append(boxes)
        batch.areas.append(areas)
        batch.targets.append(counts.pin_memory() if pin_memory else counts)
    return batch


def training_boxes(
    sample: Slice,
    tight_boxes: np.ndarray,
    areas: np.ndarray,
    perturbation: Perturbation,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """The boxes (K, 4) that a slice is trained on in an epoch, by (1)-(8).

    `tight_boxes` (K, 4) are XYXY in the 1024 frame, `areas` (K,) of the masks in its pixels.
    """
    boxes = []
    for label, box, area in zip(sorted(sample.labels), tight_boxes, areas, strict=True):
        rng = sample.rng(seed, "training", label, epoch)
        boxes.append(perturb(box[None], area[None], rng, perturbation))
    return np.concatenate(boxes)


def chunks(
    batch: Batch, boxes: Sequence[np.ndarray], embeddings: Embeddings, boxes_per_call: int
) -> Iterator[Chunk]:
    """Bring a batch to the device, in chunks of at most `boxes_per_call` boxes.

    Fewer take less memory; the gradient of the step stays the same. `boxes` has for each slice
    (M K, 4): M boxes for each of its K targets, in the targets' order.
    """
    spans: list[list[tuple[int, slice]]] = []  # of each chunk: slice of the batch, its boxes
    room = 0
    for index, prompted in enumerate(boxes):
        start = 0
        while start < len(prompted):
            if not room:
                spans.append([])
                room = boxes_per_call
            stop = min(len(prompted), start + room)
            spans[-1].append((index, slice(start, stop)))
            room -= stop - start
            start = stop
    if not spans:
        return
    embedded = embeddings.embed(batch.loaded, batch.samples)
    targets = [
        each.repeat(len(prompted) // len(each), 1, 1)
        for each, prompted in zip(batch.targets, boxes, strict=True)
    ]
    for of_chunk in spans:
        target = torch.cat([targets[index][span] for index, span in of_chunk])
        yield Chunk(
            embedded
            if len(spans) == 1
            else torch.stack([embedded[index] for index, _ in of_chunk]),
            [boxes[index][span] for index, span in of_chunk],
            coverage(target.to(embedded.device, non_blocking=True)),
        )


def coverage(targets: torch.Tensor) -> torch.Tensor:
    """Targets (K, s, s) of `TargetStore` as the covered share of each pixel, float32."""
    return targets.float() / (IMAGE_SIZE // targets.shape[-1]) ** 2


# --- Targets -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Crop:
    """The window of a target outside which it is 0."""

    rows: slice
    columns: slice
    counts: np.ndarray  # (h, w) uint8


class TargetStore:
    """Tight boxes and targets of slices, kept in memory once they were read.

    Of a target only the window of its box is kept: FLARE22's 25,000 masks take 35 MB at 256 px.
    """

    def __init__(self, resolution: int) -> None:
        """`resolution` is the side of the targets in pixels, 256 or 1024."""
        self._resolution = resolution
        self._kept: dict[str, tuple[np.ndarray, list[Crop]]] = {}

    def get(self, sample: Slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tight boxes (K, 4) of a slice, the areas (K,) of its masks, its targets (K, s, s).

        Boxes and areas are in pixels of the 1024 frame, targets are uint8, and s is the resolution.
        A target counts the pixels of the 1024 frame, 0 to (1024 / s)^2, that the label covers in
        each of its own: small organs neither vanish nor jump to whole pixels. `coverage` turns the
        counts into shares. Other threads may call it at the same time.

        Raises UserError: the label map is damaged, or holds other labels than dataset.json lists.
        """
        if sample.key not in self._kept:
            self._kept[sample.key] = target_crops(sample, self._resolution)
        boxes, crops = self._kept[sample.key]
        targets = np.zeros((len(crops), self._resolution, self._resolution), np.uint8)
        for target, crop in zip(targets, crops, strict=True):
            target[crop.rows, crop.columns] = crop.counts
        areas = np.array([crop.counts.sum(dtype=np.int64) for crop in crops])
        return boxes, areas, targets


def target_crops(sample: Slice, resolution: int) -> tuple[np.ndarray, list[Crop]]:
    """The tight boxes (K, 4) of a slice in the 1024 frame and the windows of its K targets.

    Raises UserError: as `TargetStore.get`.
    """
    label_map, labels, boxes = read_instances(sample)
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
