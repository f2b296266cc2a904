"""One scan: which boxes it has, and the label volume that a model makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

from utils.data.frame import Frame
from utils.data.given_boxes import GivenBox
from utils.data.readers import dicom_files
from utils.data.volumes import CHANNEL, Volume, grey_levels, nifti_suffix, volumes_by_case
from utils.evaluation.models import predict
from utils.model.segmenter import Segmenter
from utils.prediction.propagation import Box, propagate
from utils.system.errors import UserError

KEPT_EMBEDDINGS = 256  # of a scan, 2 MiB each


@dataclass
class ScanPrediction:
    """What a model makes of the boxes of a scan.

    Attributes:
        labels: (z, y, x) uint8 in LPS. Where masks overlap the greater probability wins.
        probabilities: by label, (z, y, x) float32, 0 in slices without a box; empty if not asked.
        boxes: those that were decoded, with those of propagation: label, z, box in native pixels of
            the LPS slice, and whether it was given.
    """

    labels: np.ndarray
    probabilities: dict[str, np.ndarray] = field(default_factory=dict)
    boxes: list[tuple[str, int, Box, bool]] = field(default_factory=list)


def find_scans(path: str | Path) -> dict[str, Path]:
    """Scans by case: one NIfTI file, the folder of one DICOM series, or a folder of either.

    Raises:
        UserError: there is nothing of the kind.
    """
    path = Path(path)
    suffix = nifti_suffix(path)
    if path.is_file() and suffix:
        return {path.name.removesuffix(suffix).removesuffix(CHANNEL): path}
    if not path.is_dir():
        raise UserError(
            f"{path}: not a scan; give a .nii.gz or .nii file, the folder of a DICOM series, or a "
            "folder of either to --predict"
        )
    inner = [child for child in path.iterdir() if child.is_dir() or nifti_suffix(child)]
    if not inner and dicom_files(path):
        return {path.resolve().name: path}
    return volumes_by_case(path, "--predict", CHANNEL, series=True)


def predict_scan(
    model: Segmenter,
    image: Volume,
    window: tuple[float, float],
    boxes: Sequence[GivenBox],
    ids: Mapping[str, int],
    propagated: bool = False,
    probabilities: bool = False,
    amp: torch.dtype | None = None,
) -> ScanPrediction:
    """Segment the boxes of one scan.

    Args:
        model: encodes and decodes.
        image: Hounsfield units, in LPS.
        window: (lowest, highest) HU.
        boxes: at least one.
        ids: by label, its id in the label volume.
        propagated: follow every box through the slices above and below.
        probabilities: keep them.
        amp: the dtype in which the decoder computes, None for fp32.
    """
    slices = _Slices(model, image, window, amp)
    result = ScanPrediction(np.zeros(image.shape, np.uint8))
    highest: dict[int, np.ndarray] = {}  # by z, the logit of the label that has won so far

    def add(label: str, index: int, box: Box, logits: np.ndarray, given: bool) -> None:
        best = highest.setdefault(index, np.zeros(image.shape[1:], np.float32))
        wins = logits > best
        best[wins] = logits[wins]
        result.labels[index][wins] = ids[label]
        if probabilities:
            volume = result.probabilities.setdefault(label, np.zeros(image.shape, np.float32))
            np.maximum(volume[index], expit(logits), out=volume[index])
        result.boxes.append((label, index, box, given))

    by_slice: dict[int, list[GivenBox]] = {}
    for box in sorted(boxes, key=lambda box: (box.index, ids[box.label])):
        by_slice.setdefault(box.index, []).append(box)
    starts = []
    for index, of_slice in by_slice.items():
        logits = slices.decode(index, [box.box for box in of_slice])
        for box, of_box in zip(of_slice, logits, strict=True):
            add(box.label, index, box.box, of_box, True)
            starts.append((box.label, index, of_box > 0))
    if propagated:
        taken = {label: {box.index for box in boxes if box.label == label} for label in ids}
        for label, start, mask in starts:
            follow = partial(propagate, depth=len(image.array), taken=taken[label])
            for index, box, logits in follow(start, mask, slices.decode_one):
                add(label, index, box, logits, False)
    return result


class _Slices:
    """The slices of a scan, encoded when they are needed."""

    def __init__(
        self,
        model: Segmenter,
        image: Volume,
        window: tuple[float, float],
        amp: torch.dtype | None,
    ) -> None:
        self._model, self._array, self._window, self._amp = model, image.array, window, amp
        self._frame = Frame.of(image.shape[1:], image.spacing_mm[1:])
        self._embedding = lru_cache(KEPT_EMBEDDINGS)(self._encode)

    def _encode(self, index: int) -> torch.Tensor:
        grey = grey_levels(self._array[index], self._window)
        image = torch.from_numpy(self._frame.image_to_frame(grey))
        return self._model.encode(image[None], [self._frame])[0].half().cpu()

    def decode(self, index: int, boxes: Sequence[Box]) -> np.ndarray:
        """Mask logits (K, H, W) float32 of K boxes in native pixels."""
        framed = self._frame.boxes_to_frame(np.array(boxes, np.float64))
        embedding = self._embedding(index).float().to(self._model.device)
        return predict(self._model, embedding, framed, self._frame, self._amp).cpu().numpy()

    def decode_one(self, index: int, box: Box) -> np.ndarray:
        """Mask logits (H, W) of one box."""
        return self.decode(index, [box])[0]
