"""Bounding-box perturbation: which boxes the decoder is trained on, and which it is tested on.

Boxes are float32 (K, 4) arrays, XYXY, in pixels of the square image frame (1024 x 1024), maxima
inclusive: a box one pixel wide has x1 == x0, and its width is x1 - x0 + 1.

See what the constants below do to a large, a small and an elongated target, to those of a slice,
and to every organ of a data set:

    python perturb.py                                            writes work_dir/perturb.png
    python perturb.py --delta-expand 204.8 --epsilon-shrink -51.2
    python perturb.py --image DATA/imgs/x-042.npy --label DATA/gts/x-042.npy
    python perturb.py --data DATA                                and work_dir/perturb.csv
    python perturb.py --data FLARE22Train/labels --policies medsam,adaptive

--data takes a folder of preprocess_ct.py, or label volumes alone. It prints, by label, how large
the tight boxes are, how far each policy moves their edges, how often a box's area more than
doubles, and the IoU with the tight box, which the picture shows for small masks and for large ones.

The equation numbers are those of *Optimization of MedSAM model based on bounding box adaptive
perturbation algorithm*. The paper defines neither theta_omega and xi nor the constants; what is
implemented here is this project's reading of them, told in the docstrings.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

# --- The constants. Edit them here, or override the first two with options of the scripts. -------
# delta_expand and epsilon_shrink are pixels of the 1024 frame, *for a box as wide as the image*;
# theta_omega and xi scale them down to the box at hand. So value / 1024 is the largest offset as a
# share of the side of any box: 102.4 px is 10 %, 153.6 px is 15 %, 256 px is 25 %.
DELTA_EXPAND = 102.4  # delta_expand of (3), (4): outward, >= 0. 10 % of the side.
DELTA_EXPAND_MAX = 256.0  # delta_max: larger values are clamped to it. 25 % of the side.
EPSILON_SHRINK = -102.4  # epsilon_shrink of (1), (2): inward, <= 0. 10 % of the side.
EPSILON_SHRINK_MIN = -256.0  # epsilon_min: smaller values are clamped to it. 25 % of the side.
MEDSAM_SHIFT = 20.0  # MedSAM's fixed shift, pixels of the 1024 frame, whatever the box:
#                      2 % of the side of a liver 1000 px wide, 100 % of an adrenal gland of 20 px.
SAM2_SHARE = 0.1  # what SAM 2 trains with: this share of the side, both ways ...
SAM2_SHIFT_MAX = 20.0  # ... but at most this many pixels.

POLICIES = ("none", "medsam", "bidirectional", "scaled", "adaptive", "sam2")
SMALL_SHARE = 0.002  # a small instance covers less than this share of its slice

BOX_KINDS = ("standard", "expansion", "shrink")
IMAGE_SIZE = 1024


# --- Tight boxes and the coefficients of a box ---------------------------------------------------
def tight_boxes(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest box around each label of a 2D label map.

    Args:
        mask: (H, W) integer or bool array; 0 is background.

    Returns:
        labels (K,) int64 in ascending order, and boxes (K, 4) float32 XYXY in pixels of `mask`,
        maxima inclusive. An empty map gives K = 0.

    Raises:
        ValueError: `mask` is not a two-dimensional array of integers.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iub":
        raise ValueError(f"expected a 2D integer label map, got {mask.dtype} of shape {mask.shape}")
    if not mask.any():
        return np.empty(0, np.int64), np.empty((0, 4), np.float32)
    left, top, right, bottom = _extent(mask)  # sorting what lies in here is several times faster
    window = mask[top : bottom + 1, left : right + 1]
    labels = np.unique(window).astype(np.int64)
    labels = labels[labels != 0]
    boxes = np.array([_extent(window == label) for label in labels], np.float32)
    return labels, boxes + np.array([left, top, left, top], np.float32)


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The tight box (x0, y0, x1, y1) of what is not 0; there is something."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def box_sides(boxes: np.ndarray) -> np.ndarray:
    """Widths and heights (K, 2) float64 of boxes (K, 4), counted in pixels: x1 - x0 + 1.

    Raises:
        ValueError: the boxes are not (K, 4), not finite, or inverted.
    """
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"expected boxes of shape (K, 4), got {boxes.shape}")
    if not np.isfinite(boxes).all():
        raise ValueError("a box has a coordinate that is not finite")
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    if (sides < 1).any():
        raise ValueError("a box is inverted: expected XYXY with x1 >= x0 and y1 >= y0")
    return sides


def theta_omega(boxes: np.ndarray, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Size coefficient theta_omega (K,) of boxes (K, 4): box width / image width.

    Our reading (omega for width); the paper leaves it open. A ratio of areas, or its root, would
    follow the target's size as well: this function is the one place to change.
    """
    return box_sides(boxes)[:, 0] / image_size


def xi(boxes: np.ndarray) -> np.ndarray:
    """Shape coefficient xi (K,) of boxes (K, 4): box width / box height.

    Our reading; with it theta_omega / xi is the box's height / image width, so that the offset is
    the same share of both sides.
    """
    sides = box_sides(boxes)
    return sides[:, 0] / sides[:, 1]


def clamp_factors(delta_expand: float, epsilon_shrink: float) -> tuple[float, float]:
    """The factors within bounds: delta_expand <= delta_max, epsilon_shrink >= epsilon_min.

    Raises:
        ValueError: a factor has the wrong sign or is not a number.
    """
    if not delta_expand >= 0:
        raise ValueError(f"delta_expand must be >= 0 (it expands), got {delta_expand:g}")
    if not epsilon_shrink <= 0:
        raise ValueError(f"epsilon_shrink must be <= 0 (it shrinks), got {epsilon_shrink:g}")
    return min(delta_expand, DELTA_EXPAND_MAX), max(epsilon_shrink, EPSILON_SHRINK_MIN)


def offsets(
    boxes: np.ndarray,
    image_size: int = IMAGE_SIZE,
    delta_expand: float = DELTA_EXPAND,
    epsilon_shrink: float = EPSILON_SHRINK,
) -> np.ndarray:
    """Offsets of equations (1)-(4): the bounds between which each edge of a box may move.

        epsilon_1 = epsilon_shrink * theta_omega    epsilon_2 = epsilon_shrink * theta_omega / xi
        delta_1   = delta_expand * theta_omega      delta_2   = delta_expand * theta_omega / xi

    Args:
        boxes: (K, 4) XYXY, pixels of the image_size x image_size frame.
        image_size: side of that frame in pixels.
        delta_expand, epsilon_shrink: pixels of the same frame, >= 0 and <= 0; clamped to
            DELTA_EXPAND_MAX and EPSILON_SHRINK_MIN.

    Returns:
        (K, 4) float32 pixels, columns epsilon_1, epsilon_2, delta_1, delta_2 (index 1 is x).

    Raises:
        ValueError: a factor of the wrong sign, or boxes that are not boxes.
    """
    delta_expand, epsilon_shrink = clamp_factors(delta_expand, epsilon_shrink)
    along_x = theta_omega(boxes, image_size)
    along_y = along_x / xi(boxes)
    columns = (
        epsilon_shrink * along_x,
        epsilon_shrink * along_y,
        delta_expand * along_x,
        delta_expand * along_y,
    )
    return np.stack(columns, axis=1).astype(np.float32)


# --- Training boxes ------------------------------------------------------------------------------
def offset_range(
    boxes: np.ndarray,
    policy: str,
    image_size: int = IMAGE_SIZE,
    delta_expand: float = DELTA_EXPAND,
    epsilon_shrink: float = EPSILON_SHRINK,
) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest offset of an edge under `policy`, in pixels, outward positive.

        none           0
        medsam         0 ... 20 px                       what MedSAM was trained on
        bidirectional  -20 ... 20 px                     + delta_expand, epsilon_shrink
        scaled         0 ... delta                       + theta_omega, xi
        adaptive       epsilon ... delta                 + both: the proposed method
        sam2           +-10 % of the side, at most 20 px what SAM 2 was trained on

    Returns:
        Two (K, 2) float64 arrays: the bounds for the x edges (column 0) and the y edges (column 1).

    Raises:
        ValueError: an unknown policy; otherwise as `offsets`.
    """
    sides = box_sides(boxes)
    zero = np.zeros_like(sides)
    if policy == "none":
        return zero, zero
    if policy == "medsam":
        return zero, zero + MEDSAM_SHIFT
    if policy == "bidirectional":
        return zero - MEDSAM_SHIFT, zero + MEDSAM_SHIFT
    if policy == "sam2":
        shift = np.minimum(SAM2_SHARE * sides, SAM2_SHIFT_MAX)
        return -shift, shift
    if policy in ("scaled", "adaptive"):
        bounds = offsets(boxes, image_size, delta_expand, epsilon_shrink).astype(np.float64)
        return (bounds[:, :2] if policy == "adaptive" else zero), bounds[:, 2:]
    raise ValueError(f"unknown policy {policy!r}: choose from {', '.join(POLICIES)}")


def perturb(
    boxes: np.ndarray,
    policy: str,
    rng: np.random.Generator,
    image_size: int = IMAGE_SIZE,
    delta_expand: float = DELTA_EXPAND,
    epsilon_shrink: float = EPSILON_SHRINK,
    literal: bool = False,
) -> np.ndarray:
    """Training boxes: every edge of every box moved by its own uniform offset, (5)-(8).

    The text and Fig. 3 of the paper say that delta expands and epsilon shrinks, so an offset is
    applied outward on each edge. Taken literally, (5)-(8) move both corners by the same signed
    interval, under which a negative epsilon *grows* the box at its top-left corner; `literal=True`
    does that. Where |epsilon| = delta the two are the same distribution.

    Args:
        boxes: (K, 4) XYXY, pixels of the image_size x image_size frame, maxima inclusive.
        policy: one of POLICIES, see `offset_range`.
        rng: the source of randomness; 4 K numbers are drawn, whatever the policy.
        image_size, delta_expand, epsilon_shrink: as in `offsets`.
        literal: add the offset to the coordinates of both corners, as printed.

    Returns:
        (K, 4) float32 boxes within [0, image_size - 1], x1 >= x0 and y1 >= y0.

    Raises:
        ValueError: as `offset_range`.
    """
    low, high = offset_range(boxes, policy, image_size, delta_expand, epsilon_shrink)
    amount = rng.random((len(low), 2, 2))  # (box, corner, axis)
    offset = low[:, None] + (high - low)[:, None] * amount
    return move_edges(boxes, offset, image_size, outward=not literal)


# --- Evaluation boxes ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Shift:
    """How far the edges of an evaluation box lie from those of the tight one.

    Attributes:
        size: a share of the box's side (width for the x edges, height for the y edges), or pixels
            of the 1024 frame.
        unit: "side" or "px".
    """

    size: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in ("side", "px"):
            raise ValueError(f"unknown unit {self.unit!r}: choose side or px")
        if self.unit == "side" and not abs(self.size) < 0.5:
            raise ValueError(f"a shift must be less than half the side, got {self}")
        if not abs(self.size) < IMAGE_SIZE:
            raise ValueError(f"a shift must be less than the image, got {self}")

    @classmethod
    def parse(cls, text: str) -> "Shift":
        """Read "15%" (of the side) or "20px" (of the 1024 frame).

        Raises:
            ValueError: neither, or out of range.
        """
        for suffix, unit, scale in (("%", "side", 100.0), ("px", "px", 1.0)):
            if text.endswith(suffix):
                return cls(float(text.removesuffix(suffix)) / scale, unit)
        raise ValueError(f"expected a share of the side like 15% or pixels like 20px, got {text!r}")

    def __str__(self) -> str:
        return f"{100 * self.size:g}%" if self.unit == "side" else f"{self.size:g}px"

    def along(self, sides: np.ndarray) -> np.ndarray:
        """The shift (K, 2) in pixels for boxes of `sides` (K, 2), width and height."""
        return self.size * sides if self.unit == "side" else np.full_like(sides, self.size)


def shift_boxes(
    boxes: np.ndarray,
    kind: str,
    shift: Shift,
    rng: np.random.Generator,
    image_size: int = IMAGE_SIZE,
) -> np.ndarray:
    """The boxes of the evaluation (rows of Table I).

    Args:
        boxes: (K, 4) tight boxes, XYXY pixels of the image_size x image_size frame.
        kind: "standard" (as given), "expansion" (each edge outward by U(0, shift)) or "shrink"
            (each edge inward by U(0, shift)).
        shift: the largest shift of an edge, >= 0.
        rng: the source of randomness; 4 K numbers are drawn, whatever the kind.

    Returns:
        (K, 4) float32 boxes within [0, image_size - 1], x1 >= x0 and y1 >= y0. A box that would
        shrink past itself, as small organs do under a shift in pixels, stops where its edges meet.

    Raises:
        ValueError: an unknown kind, or a negative shift.
    """
    if kind not in BOX_KINDS:
        raise ValueError(f"unknown box kind {kind!r}: choose from {', '.join(BOX_KINDS)}")
    if not shift.size >= 0:
        raise ValueError(f"a shift must be 0 or more, its direction is the kind's; got {shift}")
    sides = box_sides(boxes)
    direction = {"standard": 0.0, "expansion": 1.0, "shrink": -1.0}[kind]
    offset = direction * shift.along(sides)[:, None] * rng.random((len(sides), 2, 2))
    return move_edges(boxes, offset, image_size, outward=True)


def sweep_boxes(boxes: np.ndarray, shift: Shift, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """The boxes of the robustness curve: every edge moved by the whole `shift`, outward positive.

    Arguments, frame and result are those of `shift_boxes`; nothing is random.
    """
    sides = box_sides(boxes)
    offset = np.repeat(shift.along(sides)[:, None], 2, axis=1)
    return move_edges(boxes, offset, image_size, outward=True)


def box_rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone, e.g. (seed, case, slice, label).

    Boxes drawn from it are the same for every model, in any order of slices and with any number of
    workers, and can be drawn again.
    """
    digest = hashlib.sha256("\0".join(str(part) for part in key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def move_edges(boxes: np.ndarray, offset: np.ndarray, image_size: int, outward: bool) -> np.ndarray:
    """Move the corners of boxes (K, 4) by `offset` (K, corner, axis) and keep the result a box.

    Args:
        boxes: (K, 4) XYXY, pixels of the image_size x image_size frame, maxima inclusive.
        offset: (K, 2, 2) pixels, (box, corner, axis).
        image_size: side of that frame in pixels.
        outward: positive is away from the box's middle; otherwise towards larger coordinates.

    Returns:
        (K, 4) float32 boxes within [0, image_size - 1]. A box that would shrink past itself, as
        small targets do, stops where its edges meet.
    """
    corners = np.asarray(boxes, np.float64).reshape(-1, 2, 2)
    move = np.array([-1.0, 1.0])[:, None] * offset if outward else np.asarray(offset)
    length = corners[:, 1] - corners[:, 0]
    closing = move[:, 0] - move[:, 1]  # by how much the edges come closer
    past = closing > length
    share = np.divide(length, closing, out=np.ones_like(length), where=past)
    corners = corners + share[:, None] * move
    corners[:, 1] = np.maximum(corners[:, 0], corners[:, 1])  # rounding
    return np.clip(corners, 0, image_size - 1).reshape(-1, 4).astype(np.float32)


if __name__ == "__main__":  # python perturb.py draws and counts: see utils/preview/command.py
    from utils.preview.command import main
    from utils.system.command_line import run

    run(main)
