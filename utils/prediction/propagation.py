"""A box in one slice becomes a volume: every mask gives the box of the next slice.

Upward and downward from the slice of the box, the box of the next slice is that of the last mask's
largest part, enlarged by MARGIN of its sides. It ends where the mask is empty, where its area is
more than GROWTH times the last one or less than a GROWTH-th of it, and before a slice for which the
same label has a box of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
from scipy import ndimage

MARGIN = 0.05  # share of the side by which every edge of the last mask's box moves outward
GROWTH = 2.0  # from slice to slice

Box = tuple[float, float, float, float]  # XYXY in native pixels, maxima inclusive


def propagate(
    start: int,
    mask: np.ndarray,
    segment: Callable[[int, Box], np.ndarray],
    depth: int,
    taken: Collection[int],
) -> Iterator[tuple[int, Box, np.ndarray]]:
    """Follow a target through the slices above and below the one that has its box.

    Args:
        start: z of that slice.
        mask: (H, W) bool, its mask there.
        segment: gives the mask logits (H, W) of a slice for a box.
        depth: how many slices there are.
        taken: z of slices where the label has a box of its own.

    Yields:
        z, box and logits (H, W) of every further slice.
    """
    for step in (1, -1):
        last = largest_part(mask)
        for index in range(start + step, depth if step > 0 else -1, step):
            if index in taken or not last.any():
                break
            box = box_around(last)
            logits = segment(index, box)
            part = largest_part(logits > 0)
            ratio = part.sum() / last.sum()
            if not 1 / GROWTH <= ratio <= GROWTH:
                break
            yield index, box, logits
            last = part


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask (H, W) bool; an empty mask stays empty."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def box_around(mask: np.ndarray) -> Box:
    """The box of a mask (H, W) that is not empty, enlarged by MARGIN, within the slice."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    low = np.array([columns[0], rows[0]], float)
    high = np.array([columns[-1], rows[-1]], float)
    margin = MARGIN * (high - low + 1)
    last = np.array(mask.shape[::-1]) - 1
    x0, y0 = np.maximum(low - margin, 0).tolist()
    x1, y1 = np.minimum(high + margin, last).tolist()
    return x0, y0, x1, y1
