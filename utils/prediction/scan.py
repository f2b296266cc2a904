"""Scans, and the label volume that a model makes of the boxes in some slices of one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
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
from utils.evaluation.interpolation import Box, interpolate, propagate
from utils.evaluation.models import predict
from utils.model.segmenter import Segmenter
from utils.system import UserError

SOURCES = GIVEN, INTERPOLATED, PROPAGATED = "given", "interpolated", "propagated"  # of boxes
KEPT_EMBEDDINGS = 256  # of a scan, 2 MiB each


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
