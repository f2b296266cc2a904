"""Scans, and the label volume that a model makes of the boxes in some slices of one.

Between two slices with a box of one label, boxes can be interpolated: their edges are linear in z.
A box in one slice can become a volume: upward and downward from it, the box of the next slice is
that of the last mask's largest part, enlarged by MARGIN of its sides. It ends where the mask is
empty, where its area is more than GROWTH times the last one or less than a GROWTH-th of it, and
before a slice for which the same label has a box of its own.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.special import expit

from utils.data.frame import Frame
from utils.data.given_boxes import GivenBox
from utils.data.readers import dicom_files
from utils.data.volumes import (
    CHANNEL,
    SUFFIXES,
    Volume,
    about_pictures,
    grey_levels,
    volume_suffix,
    volumes_by_case,
)
from utils.evaluation.models import predict
from utils.model.segmenter import Segmenter
from utils.system import UserError

MARGIN = 0.05  # share of the side by which every edge of the last mask's box moves outward
GROWTH = 2.0  # from slice to slice
SOURCES = GIVEN, INTERPOLATED, PROPAGATED = "given", "interpolated", "propagated"  # of boxes
KEPT_EMBEDDINGS = 256  # of a scan, 2 MiB each

Box = tuple[float, float, float, float]  # XYXY in native pixels, maxima inclusive


def find_scans(path: str | Path) -> dict[str, Path]:
    """Scans by case: one file, the folder of one DICOM series, or a folder of either.

    Raises UserError: there is nothing of the kind.
    """
    path = Path(path)
    suffix = volume_suffix(path)
    if path.is_file() and suffix:
        return {path.name.removesuffix(suffix).removesuffix(CHANNEL): path}
    if not path.is_dir():
        raise UserError(
            f"{path}: not a scan; give a file ({', '.join(SUFFIXES)}), the folder of a DICOM "
            f"series, or a folder of either to --predict{about_pictures(path)}"
        )
    inner = [child for child in path.iterdir() if child.is_dir() or volume_suffix(child)]
    if not inner and dicom_files(path):
        return {path.resolve().name: path}
    return volumes_by_case(path, "--predict", CHANNEL, series=True)


@dataclass
class ScanPrediction:
    """What a model makes of the boxes of a scan; volumes are (z, y, x) in LPS."""

    ids: dict[str, int]  # by label, its id in the label volume
    labels: np.ndarray  # uint8; where masks overlap the greater probability wins
    probabilities: dict[str, np.ndarray] | None  # float32 by label; 0 in slices without a box
    boxes: list[tuple[GivenBox, str]] = field(default_factory=list)  # each with one of SOURCES
    _highest: dict[int, np.ndarray] = field(default_factory=dict)  # by z, the logits that won

    def add(self, box: GivenBox, source: str, logits: np.ndarray) -> None:
        """Add a box and its mask, logits (H, W)."""
        self.boxes.append((box, source))
        highest = self._highest.setdefault(box.index, np.zeros(logits.shape, np.float32))
        wins = logits > highest
        highest[wins] = logits[wins]
        self.labels[box.index][wins] = self.ids[box.label]
        if self.probabilities is not None:
            empty = np.zeros(self.labels.shape, np.float32)
            plane = self.probabilities.setdefault(box.label, empty)[box.index]
            np.maximum(plane, expit(logits), out=plane)


class ScanSegmenter:
    """A model on the slices of one scan, which are encoded when they are needed.

    `window` is (lowest, highest) HU, `amp` the dtype in which the decoder computes, None for fp32.
    """

    def __init__(
        self,
        model: Segmenter,
        image: Volume,
        window: tuple[float, float],
        amp: torch.dtype | None = None,
    ) -> None:
        self.model, self.image, self.window, self.amp = model, image, window, amp
        self.frame = Frame.fit(image.shape[1:], image.spacing_mm[1:])
        self._embedding = lru_cache(KEPT_EMBEDDINGS)(self._encode)

    def _encode(self, index: int) -> torch.Tensor:
        grey = grey_levels(self.image.array[index], self.window)
        image = torch.from_numpy(self.frame.image_to_frame(grey))
        return self.model.encode(image[None], [self.frame])[0].half().cpu()

    def decode(self, index: int, boxes: Sequence[Box]) -> np.ndarray:
        """Mask logits (K, H, W) float32 of K boxes of a slice."""
        framed = self.frame.boxes_to_frame(np.array(boxes, np.float64))
        embedding = self._embedding(index).float().to(self.model.device)
        return predict(self.model, embedding, framed, self.frame, self.amp).cpu().numpy()


def predict_scan(
    segmenter: ScanSegmenter,
    boxes: Sequence[GivenBox],
    ids: dict[str, int],
    between: int | None = None,
    propagated: bool = False,
    probabilities: bool = False,
) -> ScanPrediction:
    """Segment the boxes of one scan, at least one, and those that follow from them.

    `ids` are the labels' in the label volume. `between` is the `maximum` of `interpolate`; None
    does not. If `propagated`, slices above and below are segmented as well.
    """
    shape = segmenter.image.shape
    result = ScanPrediction(ids, np.zeros(shape, np.uint8), {} if probabilities else None)
    prompts = [(box, GIVEN) for box in boxes]
    if between is not None:
        prompts += [(box, INTERPOLATED) for box in interpolate(boxes, between)]
    prompts.sort(key=lambda prompt: (prompt[0].index, ids[prompt[0].label]))
    starts = []
    for index, group in groupby(prompts, key=lambda prompt: prompt[0].index):
        of_slice = list(group)
        logits = segmenter.decode(index, [box.box for box, _ in of_slice])
        for (box, source), of_box in zip(of_slice, logits, strict=True):
            result.add(box, source, of_box)
            starts.append((box, of_box > 0))
    for start, mask in starts if propagated else ():
        taken = {box.index for box, _ in starts if box.label == start.label}
        followed = propagate(start.index, mask, segmenter.decode, shape[0], taken)
        for index, edges, logits in followed:
            result.add(GivenBox(start.label, index, edges), PROPAGATED, logits)
    return result


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
            centres = [(of_slice[:, :2] + of_slice[:, 2:]) / 2 for of_slice in (first, last)]
            apart = np.linalg.norm(centres[0][:, None] - centres[1][None], axis=2)
            pairs = linear_sum_assignment(apart)
            first, last = first[pairs[0]], last[pairs[1]]
            for index in range(low + 1, high):
                edges = first + (last - first) * ((index - low) / (high - low))
                result += [GivenBox(label, index, tuple(box)) for box in edges.tolist()]
    return result


# --- Propagation ---------------------------------------------------------------------------------
def propagate(
    start: int,
    mask: np.ndarray,
    decode: Callable[[int, Sequence[Box]], np.ndarray],
    depth: int,
    taken: Collection[int],
) -> Iterator[tuple[int, Box, np.ndarray]]:
    """Follow a target through the slices above and below slice `start`, where `mask` is its mask.

    `decode` gives the mask logits (K, H, W) of a slice for K boxes, `depth` is the number of
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
