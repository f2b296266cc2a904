"""What a training or validation step needs of its slices, read ahead in another thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from perturb import IMAGE_SIZE
from utils.data.slices import Slice, read_instances

if TYPE_CHECKING:
    import torch

    from utils.model.embeddings import Embeddings


@dataclass(frozen=True)
class Batch:
    """Slices with their prompts, on the CPU.

    Attributes:
        entries: B slices.
        loaded: of each, what `Embeddings.embed` takes.
        boxes: of each, (K, 4) float32 XYXY in the 1024 frame.
        targets: of each box, (K, s, s) uint8 as `targets_of` gives them.
    """

    entries: Sequence[Slice]
    loaded: Sequence[torch.Tensor]
    boxes: Sequence[np.ndarray]
    targets: Sequence[torch.Tensor]

    def parts(self, most: int) -> list[Batch]:
        """The same boxes in parts of at most `most` each."""
        found: list[list[tuple]] = [[]]
        room = most
        for entry, loaded, boxes, targets in zip(
            self.entries, self.loaded, self.boxes, self.targets, strict=True
        ):
            start = 0
            while start < len(boxes):
                if not room:
                    found.append([])
                    room = most
                stop = min(len(boxes), start + room)
                found[-1].append((entry, loaded, boxes[start:stop], targets[start:stop]))
                room -= stop - start
                start = stop
        return [Batch(*zip(*part, strict=True)) for part in found]


def load_batch(
    entries: Sequence[Slice],
    embeddings: Embeddings,
    resolution: int,
    prompt: Callable[[Slice, np.ndarray], np.ndarray],
) -> Batch:
    """Read slices and make their prompts.

    Args:
        entries: the slices.
        embeddings: where their embeddings come from.
        resolution: of the targets.
        prompt: the boxes (M K, 4) to ask for, of a slice and its tight boxes (K, 4).

    Raises:
        UserError: a file is damaged, or not what dataset.json lists.
    """
    import torch

    boxes, targets = [], []
    for entry in entries:
        tight, target = targets_of(entry, resolution)
        boxes.append(prompt(entry, tight))
        targets.append(torch.from_numpy(target).repeat(len(boxes[-1]) // len(tight), 1, 1))
    loaded = [embeddings.load(entry) for entry in entries]
    return Batch(entries, loaded, boxes, targets)


def targets_of(entry: Slice, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """A slice's tight boxes (K, 4) in the 1024 frame and its targets (K, s, s) uint8.

    s is `resolution`. A target counts the pixels of the 1024 frame, 0 to (1024 / s)^2, that the
    label covers in each of its own: small organs do not vanish or jump to whole pixels.
    `as_shares` makes shares of it.

    Raises:
        UserError: the label map is damaged, or holds other labels than dataset.json lists.
    """
    label_map, labels, boxes = read_instances(entry)
    factor = IMAGE_SIZE // resolution
    targets = np.zeros((len(labels), resolution, resolution), np.uint8)
    for label, (x0, y0, x1, y1), target in zip(labels, boxes.astype(int), targets, strict=True):
        # Within the box, its edges moved to whole pixels of the target.
        rows, columns = slice(y0 // factor, y1 // factor + 1), slice(x0 // factor, x1 // factor + 1)
        part = label_map[
            rows.start * factor : rows.stop * factor, columns.start * factor : columns.stop * factor
        ]
        blocks = (part == label).reshape(
            rows.stop - rows.start, factor, columns.stop - columns.start, factor
        )
        target[rows, columns] = blocks.sum(axis=(1, 3), dtype=np.uint8)
    return boxes, targets


def as_shares(targets: torch.Tensor) -> torch.Tensor:
    """Targets (K, s, s) of `targets_of` as the share of each pixel that is covered, float32."""
    return targets.float() / (IMAGE_SIZE // targets.shape[-1]) ** 2
