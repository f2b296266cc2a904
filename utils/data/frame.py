"""The 1024 frame, which slices, boxes and networks share.

An axial slice is scaled so that its longer side fills 1024 pixels and padded right and bottom,
never squashed. Positions go from one frame to another by pixel *edges*: pixel i of n covers
[i, i + 1] / n of the side, so its centre lies at (i + 0.5) / n.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from perturb import IMAGE_SIZE


@dataclass(frozen=True)
class Frame:
    """How a native axial slice lies in the 1024 frame."""

    native: tuple[int, int]  # (height, width) in the slice's own pixels
    content: tuple[int, int]  # of the part of the 1024 frame that it fills, at the top left

    @classmethod
    def fit(cls, native: tuple[int, int], spacing_mm: tuple[float, float] = (1.0, 1.0)) -> "Frame":
        """The frame of a slice of `native` (height, width) pixels of `spacing_mm` (y, x).

        The longer side in mm becomes 1024 px, so that pixels of the frame are square.
        """
        extent = [n * mm for n, mm in zip(native, spacing_mm, strict=True)]
        scale = IMAGE_SIZE / max(extent)
        height, width = (max(1, min(IMAGE_SIZE, round(side * scale))) for side in extent)
        return cls((int(native[0]), int(native[1])), (height, width))

    def image_to_frame(self, image: np.ndarray) -> np.ndarray:
        """Scale a native slice (H, W) of grey levels 0-255 to uint8 (1024, 1024), padded with 0.

        Bicubic, anti-aliased when shrinking. By Pillow: scikit-image takes ten times as long and
        would not reproduce existing data sets byte for byte.
        """
        height, width = self.content
        source = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
        scaled = np.asarray(source.resize((width, height), Image.Resampling.BICUBIC))
        framed = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        framed[:height, :width] = np.clip(np.rint(scaled), 0, 255)
        return framed

    def labels_to_frame(self, labels: np.ndarray) -> np.ndarray:
        """Scale a native label map (H, W) to (1024, 1024) by nearest neighbour, padded with 0."""
        rows, columns = map(_nearest, self.native, self.content)
        framed = np.zeros((IMAGE_SIZE, IMAGE_SIZE), labels.dtype)
        framed[: len(rows), : len(columns)] = labels[:, columns][rows]  # rows are copied whole
        return framed

    def labels_to_native(self, labels: np.ndarray) -> np.ndarray:
        """Bring a label map (1024, 1024) back to native (H, W) by nearest neighbour.

        Inverts `labels_to_frame` exactly for slices that the frame does not shrink.
        """
        rows, columns = map(_nearest, self.content, self.native)
        return labels[rows][:, columns]

    def labels_there_and_back(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Round trip of a native label map (H, W): in the frame, back, and how many labels vanish.

        Both have the same labels. None is lost unless the frame has fewer rows or columns.
        """
        framed = self.labels_to_frame(labels)
        if self.content[0] >= self.native[0] and self.content[1] >= self.native[1]:
            return framed, labels, 0
        lost = np.setdiff1d(labels, framed)
        # Every label in the frame comes back: a native pixel, being smaller, has its centre in
        # every pixel of the frame.
        return framed, self.labels_to_native(framed), int(np.count_nonzero(lost))

    def boxes_to_native(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (K, 4) XYXY of the 1024 frame in native pixels, by pixel edges; for drawing."""
        inclusive = np.array([0, 0, 1, 1])
        (height, width), (y, x) = self.native, self.content
        return (boxes + inclusive) * np.tile([width / x, height / y], 2) - inclusive

    def boxes_to_frame(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (K, 4) XYXY in native pixels, maxima inclusive, as float32 boxes of the 1024 frame.

        Their edges are rounded as `labels_to_frame` rounds those of a mask, so that the tight box
        of a mask becomes the tight box of that mask in the frame. A box keeps a pixel at least.
        """
        (height, width), (y, x) = self.native, self.content
        native, content = np.tile([width, height], 2), np.tile([x, y], 2)
        edges = np.asarray(boxes, np.float64) + np.array([0, 0, 1, 1])
        moved = np.ceil((2 * content * edges - native) / (2 * native))  # exact for whole pixels
        low = np.clip(moved[:, :2], 0, content[:2] - 1)
        high = np.clip(moved[:, 2:] - 1, low, content[:2] - 1)
        return np.hstack((low, high)).astype(np.float32)


def _nearest(source: int, target: int) -> np.ndarray:
    """For each of `target` pixels along an axis, the one of `source` pixels under its centre."""
    return ((2 * np.arange(target) + 1) * source) // (2 * target)  # in integers, exactly


def rescale_boxes(boxes: np.ndarray, source: int, target: int) -> np.ndarray:
    """Boxes (K, 4) XYXY, maxima inclusive, from a square frame of `source` px to one of `target`.

    By pixel edges: minima scale as they are, maxima as max + 1.
    """
    inclusive = np.array([0, 0, 1, 1], np.float32)
    return ((boxes + inclusive) * (target / source) - inclusive).astype(np.float32)
