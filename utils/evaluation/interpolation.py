"""From boxes in some slices to boxes in others: interpolation and propagation.

Between two slices with a box of one label, boxes can be interpolated: their edges are linear in z.
A box in one slice can become a volume: upward and downward from it, the box of the next slice is
that of the last mask's largest part, enlarged by MARGIN of its sides. It ends where the mask is
empty, where its area is more than GROWTH times the last one or less than a GROWTH-th of it, and
before a slice for which the same label has a box of its own.

A `Track` says which boxes somebody would draw around a target whose masks are known.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from perturb import tight_boxes
from utils.data.given_boxes import Box, GivenBox
from utils.data.slices import Slice, read_instances

MARGIN = 0.05  # share of the side by which every edge of the last mask's box moves outward
GROWTH = 2.0  # from slice to slice
FAR = 1e9  # pixels: boxes that do not belong together


# --- Interpolation -------------------------------------------------------------------------------
def interpolate(boxes: Sequence[GivenBox], maximum: int = 0) -> list[GivenBox]:
    """Boxes of the slices between two slices with a box of one label, edges linear in z.

    Where a slice has several boxes of a label, each goes on to the one of the other slice with
    which the centres lie least far apart, all pairs together; one without a partner ends there. No
    gap of more than `maximum` slices is filled, if that is not 0.
    """
    result = []
    for label in dict.fromkeys(box.label for box in boxes):
        by_slice: dict[int, list[Box]] = {}
        for box in boxes:
            if box.label == label:
                by_slice.setdefault(box.index, []).append(box.box)
        for low, high in pairwise(sorted(by_slice)):
            if maximum and high - low - 1 > maximum:
                continue
            first, last = np.array(by_slice[low]), np.array(by_slice[high])
            pairs = linear_sum_assignment(_centre_distances(first, last))
            first, last = first[pairs[0]], last[pairs[1]]
            for index in range(low + 1, high):
                edges = first + (last - first) * ((index - low) / (high - low))
                result += [GivenBox(label, index, tuple(box)) for box in edges.tolist()]
    return result


def _centre_distances(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """(K, L): how far apart the centres of boxes (K, 4) and (L, 4) lie."""
    centres = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (first, last)]
    return np.linalg.norm(centres[0][:, None] - centres[1][None], axis=2)


# --- Propagation ---------------------------------------------------------------------------------
def propagate(
    start: int,
    mask: np.ndarray,
    decode: Callable[[int, Sequence[Box]], Sequence[np.ndarray]],
    depth: int,
    taken: Collection[int],
) -> Iterator[tuple[int, Box, np.ndarray]]:
    """Follow a target through the slices above and below slice `start`, where `mask` is its mask.

    `decode` gives mask logits (H, W) for each of the boxes of a slice, `depth` is the number of
    slices, in those `taken` the label has a box of its own. Yields z, box and logits (H, W) of
    every further slice.
    """
    for step in (1, -1):
        last = largest_part(mask)
        for index in range(start + step, depth if step > 0 else -1, step):
            if index in taken or not last.any():
                break
            box = box_around(last)
            logits = decode(index, [box])[0]
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
    low, high = (np.array([columns[n], rows[n]], float) for n in (0, -1))
    margin, last = MARGIN * (high - low + 1), np.array(mask.shape[::-1]) - 1
    return (*np.maximum(low - margin, 0).tolist(), *np.minimum(high + margin, last).tolist())


# --- What somebody would draw --------------------------------------------------------------------
@dataclass(frozen=True)
class Track:
    """A target in neighbouring slices: a label of a case, or a part of one that is an instance."""

    slices: list[Slice] = field(default_factory=list)
    instances: list[int] = field(default_factory=list)  # its id in each slice
    boxes: list[Box] = field(default_factory=list)  # its tight box in each

    @property
    def organ(self) -> tuple[str, str, str]:
        """Data set, case and name of the label."""
        first = self.slices[0]
        return first.dataset, first.case, first.name_of(self.instances[0])

    def key_slices(self, every: int) -> list[int]:
        """Positions of the drawn boxes: in the first slice, every n-th after it, and the last."""
        last = len(self.slices) - 1
        return [*range(0, last, every), last]

    def boxes_of_every(self, every: int) -> list[Box]:
        """A box for each slice: tight in the key slices, interpolated between them."""
        drawn = [GivenBox("", index, self.boxes[index]) for index in self.key_slices(every)]
        every_slice = sorted([*drawn, *interpolate(drawn)], key=lambda box: box.index)
        return [box.box for box in every_slice]


def find_tracks(slices: Sequence[Slice]) -> list[Track]:
    """The tracks of a patient's slices, in order of case and z; each instance is in one.

    A target goes on in a box of its label in the next slice that overlaps its own, of several where
    the centres lie least far apart, all pairs together. Before a gap it ends.
    """
    tracks: list[Track] = []
    for previous, sample in pairwise([None, *slices]):
        native = sample.frame.labels_to_native(read_instances(sample)[0])
        instances, boxes = tight_boxes(native)
        before = []
        if previous and (previous.case, previous.index + 1) == (sample.case, sample.index):
            before = [track for track in tracks if track.slices[-1] is previous]
        last = np.reshape([track.boxes[-1] for track in before], (-1, 4))
        low = np.maximum(last[:, None, :2], boxes[None, :, :2])
        possible = (low <= np.minimum(last[:, None, 2:], boxes[None, :, 2:])).all(axis=2)
        labels = [track.slices[-1].label_of(track.instances[-1]) for track in before]
        possible &= np.equal.outer(labels, [sample.label_of(n) for n in instances.tolist()])
        apart = np.where(possible, _centre_distances(last, boxes), FAR)
        pairs = zip(*linear_sum_assignment(apart), strict=True)
        goes_on = {here: before[there] for there, here in pairs if possible[there, here]}
        for here, instance in enumerate(instances.tolist()):
            if here not in goes_on:
                tracks.append(goes_on.setdefault(here, Track()))
            goes_on[here].slices.append(sample)
            goes_on[here].instances.append(instance)
            goes_on[here].boxes.append(tuple(boxes[here].tolist()))
    return tracks
