"""Scans, and the label volume that a model predicts from boxes in some slices of one."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

from utils.data.frame import Frame
from utils.data.given_boxes import Box, GivenBox
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
from utils.evaluation.interpolation import interpolate, propagate
from utils.evaluation.models import predict
from utils.model.segmenter import Segmenter
from utils.system import UserError

SOURCES = GIVEN, INTERPOLATED, PROPAGATED = "given", "interpolated", "propagated"  # of boxes
KEPT_EMBEDDINGS = 256  # of a scan, 2 MiB each
KEPT_LOGITS = 32  # 1 MiB each of a slice of 512 x 512


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


Prompt = tuple[GivenBox, str]  # a box of a slice, and which of SOURCES it is


@dataclass
class ScanPrediction:
    """What a model predicts from the boxes of a scan; volumes are (z, y, x) in LPS."""

    ids: dict[str, int]  # by label, its id in the label volume
    labels: np.ndarray  # uint8; where masks overlap the greater probability wins
    probabilities: dict[str, np.ndarray] | None  # float32 by label; 0 in slices without a box
    boxes: list[Prompt] = field(default_factory=list)
    _highest: dict[int, np.ndarray] = field(default_factory=dict)  # by z, the logits that won

    def add(self, box: GivenBox, source: str, logits: np.ndarray) -> None:
        """Add a box and its mask, logits (H, W)."""
        self.boxes.append((box, source))
        highest = self._highest.setdefault(box.index, np.zeros(logits.shape, np.float32))
        add_mask(self.labels[box.index], highest, logits, self.ids[box.label])
        if self.probabilities is not None:
            empty = np.zeros(self.labels.shape, np.float32)
            plane = self.probabilities.setdefault(box.label, empty)[box.index]
            np.maximum(plane, expit(logits), out=plane)


def add_mask(labels: np.ndarray, highest: np.ndarray, logits: np.ndarray, number: int) -> None:
    """Write an id into a label map (H, W), where logits (H, W) are above 0 and the highest yet."""
    wins = logits > highest
    highest[wins] = logits[wins]
    labels[wins] = number


class ScanSegmenter:
    """A model on the slices of one scan, which are encoded when they are needed, by any thread.

    `window` is (lowest, highest) HU, `amp` the dtype in which the decoder computes, None for fp32.
    """

    def __init__(
        self,
        model: Segmenter,
        image: Volume,
        window: tuple[float, float],
        amp: torch.dtype | None = None,
        encoded_by: "ScanSegmenter | None" = None,
    ) -> None:
        """The embeddings of `encoded_by`, a model with the same image encoder, are used as well."""
        self.model, self.image, self.window, self.amp = model, image, window, amp
        self.frame = Frame.fit(image.shape[1:], image.spacing_mm[1:])
        self._embeddings: dict[int, torch.Tensor] = {}  # by z
        self._encoding = threading.Lock()
        self._logits = lru_cache(KEPT_LOGITS)(self._decode)
        if encoded_by:
            self.encode = encoded_by.encode

    def is_encoded(self, index: int) -> bool:
        """Whether the embedding of a slice is kept."""
        return index in self._embeddings

    def encode(self, index: int) -> torch.Tensor:
        """The embedding (C, h, w) float16 of a slice, on the CPU."""
        if (embedding := self._embeddings.get(index)) is None:
            with self._encoding:
                if (embedding := self._embeddings.get(index)) is None:
                    grey = grey_levels(self.image.array[index], self.window)
                    image = torch.from_numpy(self.frame.image_to_frame(grey))
                    embedding = self.model.encode(image[None], [self.frame])[0].half().cpu()
                    if len(self._embeddings) == KEPT_EMBEDDINGS:
                        del self._embeddings[next(iter(self._embeddings))]
                    self._embeddings[index] = embedding
        return embedding

    def decode(self, index: int, boxes: Sequence[Box]) -> list[np.ndarray]:
        """Mask logits (H, W) float32 of boxes of a slice; those of the last ones are kept."""
        return [self._logits(index, box) for box in boxes]

    def _decode(self, index: int, box: Box) -> np.ndarray:
        # One box a call: in one call with others its last bits would depend on them.
        framed = self.frame.boxes_to_frame(np.array([box], np.float64))
        embedding = self.encode(index).float().to(self.model.device)
        return predict(self.model, embedding, framed, self.frame, self.amp)[0].cpu().numpy()


def predict_scan(
    segmenter: ScanSegmenter,
    prompts: Mapping[int, Sequence[Prompt]],
    ids: dict[str, int],
    propagated: bool = False,
    probabilities: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> ScanPrediction:
    """Segment the prompts of one scan, by z, and those that follow from them.

    `ids` are the labels' in the label volume. If `propagated`, slices above and below are segmented
    as well. `progress` is called after every slice.
    """
    shape = segmenter.image.shape
    result = ScanPrediction(ids, np.zeros(shape, np.uint8), {} if probabilities else None)
    starts = []
    for index, of_slice in prompts.items():
        logits = segmenter.decode(index, [box.box for box, _ in of_slice])
        for (box, source), of_box in zip(of_slice, logits, strict=True):
            result.add(box, source, of_box)
            starts.append((box, of_box > 0))
        progress()
    for start, mask in starts if propagated else ():
        taken = {box.index for box, _ in starts if box.label == start.label}
        followed = propagate(start.index, mask, segmenter.decode, shape[0], taken)
        for index, edges, logits in followed:
            result.add(GivenBox(start.label, index, edges), PROPAGATED, logits)
    return result


def prompts_by_slice(
    boxes: Sequence[GivenBox], ids: Mapping[str, int], between: int | None = None
) -> dict[int, list[Prompt]]:
    """By z the boxes given, and those interpolated between them; of a slice in the order of `ids`.

    `between` is the `maximum` of `interpolate`; None does not interpolate.
    """
    drawn = [box for box in boxes if box.box]
    dropped = {(box.label, box.index) for box in boxes if not box.box}
    prompts = [(box, GIVEN) for box in drawn]
    for box in interpolate(drawn, between) if between is not None else ():
        if (box.label, box.index) not in dropped:
            prompts.append((box, INTERPOLATED))
    prompts.sort(key=lambda prompt: (prompt[0].index, ids[prompt[0].label]))
    by_slice = groupby(prompts, key=lambda prompt: prompt[0].index)
    return {index: list(of_slice) for index, of_slice in by_slice}
