"""Bounding-box perturbation: which boxes the decoder is trained on, and which it is tested on.

Boxes are float32 (K, 4) arrays, XYXY, in pixels of the square image frame (1024 x 1024), maxima
inclusive: a box one pixel wide has x1 == x0, and its width is x1 - x0 + 1.

See what the constants below do to drawn targets, to the targets of a slice, or to every organ of
a data set (a folder of preprocess_ct.py, or label volumes):

    python perturb.py                                            writes work_dir/perturb.png
    python perturb.py --delta-expand 204.8 --epsilon-shrink -51.2
    python perturb.py --image DATA/imgs/x-042.npy --label DATA/gts/x-042.npy
    python perturb.py --data DATA                                also writes work_dir/perturb.csv

Equation numbers are those of *Optimization of MedSAM model based on bounding box adaptive
perturbation algorithm*. The paper defines neither theta_omega and xi nor the constants: these are
this project's readings, and the docstrings say so.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# --- Constants: edit them here; the first three are options of the scripts too -------------------
# delta_expand and epsilon_shrink are pixels of the 1024 frame *for a box as wide as the image*;
# theta_omega and xi scale them down to the box at hand. So value / 1024 is the largest offset as a
# share of the side of any box: 102.4 px is 10 %, 153.6 px is 15 %, 256 px is 25 %. (Under the
# readings "cosine" and "area" the share depends on the target: see their functions below.)
READING = "width"  # how theta_omega is measured: "width", "cosine" or "area"
DELTA_EXPAND = 102.4  # delta_expand of (3), (4): outward, >= 0, px
DELTA_EXPAND_MAX = 256.0  # delta_max of (3), (4): larger factors are clamped to it, px
EPSILON_SHRINK = -102.4  # epsilon_shrink of (1), (2): inward, <= 0, px
EPSILON_SHRINK_MIN = -256.0  # epsilon_min of (1), (2): smaller factors are clamped to it, px
AREA_SCALE = 10.0  # the four constants above are this many times larger under the reading "area",
#                    whose theta_omega is about that many times smaller
MIXED_TIGHT, MIXED_OUTWARD, MIXED_INWARD = 0.5, 0.25, 0.25  # shares of the three cases of `mixed`
MIXED_SCALE = 2.0  # its delta_expand and epsilon_shrink are by default this many times larger
MEDSAM_SHIFT = 20.0  # MedSAM's shift of an edge, px of the 1024 frame, whatever the box:
#                      2 % of the side of a liver 1000 px wide, 100 % of an adrenal gland of 20 px
SAM2_SHARE = 0.1  # SAM 2's shift of an edge: this share of the side ...
SAM2_SHIFT_MAX = 20.0  # ... and at most this, px
SMALL_SHARE = 0.002  # a small instance covers less than this share of its slice

IMAGE_SIZE = 1024  # side of the image frame, px
BOX_KINDS = ("standard", "expansion", "shrink")  # rows of Table I
LOOSE = "loose"  # a fourth kind, which the paper does not have: every edge errs either way


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
    x0, y0, x1, y1 = _extent(mask)  # np.unique sorts: on the part with labels it is much faster
    window = mask[y0 : y1 + 1, x0 : x1 + 1]
    labels = np.unique(window).astype(np.int64)
    labels = labels[labels != 0]
    boxes = np.array([_extent(window == label) for label in labels], np.float32)
    return labels, boxes + np.array([x0, y0, x0, y0], np.float32)


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The tight box (x0, y0, x1, y1) of all nonzero pixels of a mask that has some."""
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


def mask_areas(mask: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The areas (K,) int64 of labels (K,) in a 2D label map, in its pixels."""
    return np.array([np.count_nonzero(mask == label) for label in labels], np.int64)


# Readings of theta_omega. The paper calls it a "similarity coefficient between the segmentation
# domain and the global domain", measured on the binarised sample, and does not define it. A reading
# maps boxes (K, 4), the areas (K,) of their masks and the side of the image, px, to (K,) numbers.
def width(boxes: np.ndarray, areas: np.ndarray, image_size: int) -> np.ndarray:
    """Box width / image width: an edge moves by the same share of every side of every box."""
    return box_sides(boxes)[:, 0] / image_size


def cosine(boxes: np.ndarray, areas: np.ndarray, image_size: int) -> np.ndarray:
    """Cosine similarity of the mask and the whole image, both binary: sqrt(area) / image side.

    The share of a side shrinks for targets that do not fill their box.
    """
    return np.sqrt(areas) / image_size


def area(boxes: np.ndarray, areas: np.ndarray, image_size: int) -> np.ndarray:
    """IoU of the mask and the whole image: area / image area.

    Small targets get a smaller share of their side: with 1024 px an edge of a round target of
    300 px moves by up to 23 % of the side, of one of 130 px by 10 %, of one of 30 px by 2 %.
    """
    return areas / image_size**2


READINGS = {"width": width, "cosine": cosine, "area": area}


def theta_omega(
    boxes: np.ndarray,
    areas: np.ndarray | None = None,
    image_size: int = IMAGE_SIZE,
    reading: str = READING,
) -> np.ndarray:
    """Size coefficient theta_omega (K,) of targets, by one of READINGS.

    Args:
        boxes: (K, 4) tight boxes, XYXY, pixels of the image_size x image_size frame.
        areas: (K,) areas of the masks in the same pixels; "width" does without them.
        image_size: side of that frame in pixels.
        reading: one of READINGS.

    Raises:
        ValueError: an unknown reading, or areas that are missing or not K positive numbers.
    """
    if reading not in READINGS:
        raise ValueError(f"unknown reading {reading!r}: choose from {', '.join(READINGS)}")
    if reading != "width":
        areas = np.asarray(areas, np.float64)
        if areas.shape != (len(boxes),) or not (areas > 0).all():
            raise ValueError(
                f"the reading {reading!r} needs the area of each of {len(boxes)} masks"
            )
    return READINGS[reading](boxes, areas, image_size)


def xi(boxes: np.ndarray) -> np.ndarray:
    """Shape coefficient xi (K,) of boxes (K, 4): box width / box height.

    Our reading: with it the offset is the same share of both sides of a box.
    """
    sides = box_sides(boxes)
    return sides[:, 0] / sides[:, 1]


def default_factors(reading: str = READING, policy: str | None = None) -> tuple[float, float]:
    """The default delta_expand and epsilon_shrink, px, of a reading of theta_omega and a policy."""
    scale = AREA_SCALE if reading == "area" else 1.0
    scale *= MIXED_SCALE if policy == "mixed" else 1.0
    return scale * DELTA_EXPAND, scale * EPSILON_SHRINK


def clamp_factors(
    delta_expand: float, epsilon_shrink: float, reading: str = READING
) -> tuple[float, float]:
    """The factors within bounds: delta_expand <= delta_max, epsilon_shrink >= epsilon_min.

    Raises:
        ValueError: a factor has the wrong sign or is not a number.
    """
    if not delta_expand >= 0:
        raise ValueError(f"delta_expand must be >= 0 (it expands), got {delta_expand:g}")
    if not epsilon_shrink <= 0:
        raise ValueError(f"epsilon_shrink must be <= 0 (it shrinks), got {epsilon_shrink:g}")
    scale = AREA_SCALE if reading == "area" else 1.0
    return min(delta_expand, scale * DELTA_EXPAND_MAX), max(
        epsilon_shrink, scale * EPSILON_SHRINK_MIN
    )


def offsets(
    boxes: np.ndarray,
    image_size: int = IMAGE_SIZE,
    delta_expand: float | None = None,
    epsilon_shrink: float | None = None,
    areas: np.ndarray | None = None,
    reading: str = READING,
) -> np.ndarray:
    """Equations (1)-(4): the offsets between which an edge of each box may move.

    Args:
        boxes: (K, 4) XYXY, pixels of the image_size x image_size frame.
        image_size: side of that frame in pixels.
        delta_expand, epsilon_shrink: pixels of the same frame, >= 0 and <= 0, clamped to their
            bounds; by default those of the reading.
        areas, reading: as in `theta_omega`.

    Returns:
        (K, 4) float32 pixels, columns epsilon_1, epsilon_2, delta_1, delta_2 (1 is x, 2 is y).
    """
    delta_default, epsilon_default = default_factors(reading)
    delta_expand, epsilon_shrink = clamp_factors(
        delta_default if delta_expand is None else delta_expand,
        epsilon_default if epsilon_shrink is None else epsilon_shrink,
        reading,
    )
    theta = theta_omega(boxes, areas, image_size, reading)
    theta_by_xi = theta / xi(boxes)
    epsilon_1 = epsilon_shrink * theta  # (1)
    epsilon_2 = epsilon_shrink * theta_by_xi  # (2)
    delta_1 = delta_expand * theta  # (3)
    delta_2 = delta_expand * theta_by_xi  # (4)
    return np.stack((epsilon_1, epsilon_2, delta_1, delta_2), axis=1).astype(np.float32)


# --- Policies ------------------------------------------------------------------------------------
# A policy is a function and its entry in POLICIES. It maps
#     sides (K, 2): width and height of each box, px
#     epsilon, delta (K, 2): the offsets of (1)-(4) along x and y, px
# to the cases between which a box is drawn by lot, one for all policies but `mixed`. A case is its
# share of the boxes, and the lowest and the highest offset (K, 2) of an edge along x and y, px,
# outward positive.
Case = tuple[float, np.ndarray, np.ndarray]


def none(sides: np.ndarray, epsilon: np.ndarray, delta: np.ndarray) -> list[Case]:
    """0: tight boxes, the control that the paper lacks."""
    return [(1.0, 0 * sides, 0 * sides)]


def medsam(sides: np.ndarray, epsilon: np.ndarray, delta: np.ndarray) -> list[Case]:
    """0 ... MEDSAM_SHIFT: what MedSAM was trained on."""
    return [(1.0, 0 * sides, np.full_like(sides, MEDSAM_SHIFT))]


def bidirectional(sides: np.ndarray, epsilon: np.ndarray, delta: np.ndarray) -> list[Case]:
    """+-MEDSAM_SHIFT: the ablation's row with delta_expand and epsilon_shrink alone."""
    return [(1.0, np.full_like(sides, -MEDSAM_SHIFT), np.full_like(sides, MEDSAM_SHIFT))]


def scaled(sides: np.ndarray, epsilon: np.ndarray, delta: np.ndarray) -> list[Case]:
    """0 ... delta: the ablation's row with theta_omega and xi alone."""
    return [(1.0, 0 * sides, delta)]


def adaptive(sides: np.ndarray, epsilon: np.ndarray, delta: np.ndarray) -> list[Case]:
    """epsilon ... delta: the proposed method."""
    return [(1.0, epsilon, delta)]


def mixed(sides: np.ndarray, epsilon: np.ndarray, delta: np.ndarray) -> list[Case]:
    """A box is tight, or all its edges move outward, 0 ... delta, or all inward, epsilon ... 0.

    Ours, not the paper's. With independent edges, as in `adaptive`, a tight box never occurs, and
    one that is too small on all sides once in 16; people draw boxes of one kind or the other.
    """
    return [
        (MIXED_TIGHT, 0 * sides, 0 * sides),
        (MIXED_OUTWARD, 0 * sides, delta),
        (MIXED_INWARD, epsilon, 0 * sides),
    ]


def sam2(sides: np.ndarray, epsilon: np.ndarray, delta: np.ndarray) -> list[Case]:
    """+-SAM2_SHARE of the side, at most SAM2_SHIFT_MAX: what SAM 2 was trained on."""
    shift = np.minimum(SAM2_SHARE * sides, SAM2_SHIFT_MAX)
    return [(1.0, -shift, shift)]


POLICIES = {
    "none": none,
    "medsam": medsam,
    "bidirectional": bidirectional,
    "scaled": scaled,
    "adaptive": adaptive,
    "mixed": mixed,
    "sam2": sam2,
}


def policy_cases(
    boxes: np.ndarray,
    policy: str,
    image_size: int = IMAGE_SIZE,
    delta_expand: float | None = None,
    epsilon_shrink: float | None = None,
    areas: np.ndarray | None = None,
    reading: str = READING,
) -> list[Case]:
    """The cases of `policy` for boxes (K, 4).

    Args:
        boxes: (K, 4) tight boxes, XYXY, pixels of the image_size x image_size frame.
        policy: one of POLICIES.
        delta_expand, epsilon_shrink: as in `offsets`; by default those of reading and policy.
        image_size, areas, reading: as in `offsets`.

    Raises:
        ValueError: an unknown policy, or shares that are not parts of 1.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}: choose from {', '.join(POLICIES)}")
    delta_default, epsilon_default = default_factors(reading, policy)
    delta_expand = delta_default if delta_expand is None else delta_expand
    epsilon_shrink = epsilon_default if epsilon_shrink is None else epsilon_shrink
    bounds = offsets(boxes, image_size, delta_expand, epsilon_shrink, areas, reading)
    bounds = bounds.astype(np.float64)
    cases = POLICIES[policy](box_sides(boxes), bounds[:, :2], bounds[:, 2:])
    shares = [share for share, _, _ in cases]
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"the shares of {policy!r}, {shares}, must be 0 or more and add up to 1")
    return cases


def offset_range(
    boxes: np.ndarray, policy: str, *args: object, **kwargs: object
) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest offset of an edge under `policy`, in pixels, outward positive.

    Args:
        boxes: (K, 4) tight boxes, XYXY.
        policy: one of POLICIES.
        args, kwargs: as in `policy_cases`.

    Returns:
        Two (K, 2) float64 arrays: the bounds for the x edges (column 0) and the y edges (column 1).

    Raises:
        ValueError: an unknown policy.
    """
    _, lows, highs = zip(*policy_cases(boxes, policy, *args, **kwargs), strict=True)
    return np.min(lows, axis=0), np.max(highs, axis=0)


# --- Training boxes ------------------------------------------------------------------------------
def perturb(
    boxes: np.ndarray,
    policy: str,
    rng: np.random.Generator,
    image_size: int = IMAGE_SIZE,
    delta_expand: float | None = None,
    epsilon_shrink: float | None = None,
    areas: np.ndarray | None = None,
    reading: str = READING,
    literal: bool = False,
) -> np.ndarray:
    """Training boxes, (5)-(8): every edge of every box moves by its own uniform offset.

    The text and Fig. 3 of the paper say that delta expands and epsilon shrinks, so an offset is
    applied outward on each edge. Taken literally, (5)-(8) move both corners by the same signed
    interval, under which a negative epsilon *grows* the box at its top-left corner; `literal=True`
    does that. Where |epsilon| = delta the two are the same distribution.

    Args:
        boxes: (K, 4) XYXY, pixels of the image_size x image_size frame, maxima inclusive.
        policy: one of POLICIES; it takes the place of epsilon and delta in (5)-(8).
        rng: the source of randomness; 4 K numbers are drawn and, by a policy of several cases,
            then K more.
        image_size, delta_expand, epsilon_shrink, areas, reading: as in `policy_cases`.
        literal: add the offset to the coordinates of both corners, as printed.

    Returns:
        (K, 4) float32 boxes within [0, image_size - 1], x1 >= x0 and y1 >= y0.
    """
    cases = policy_cases(boxes, policy, image_size, delta_expand, epsilon_shrink, areas, reading)
    u = rng.random((len(boxes), 4)).T  # one number per edge, in the order of XYXY
    low, high = _draw_cases(cases, rng)
    (epsilon_1, epsilon_2), (delta_1, delta_2) = low.T, high.T
    alpha_1, alpha_2, beta_1, beta_2 = np.asarray(boxes, np.float64).T
    sign = 1 if literal else -1  # outward is towards smaller coordinates at the top-left corner
    moved = (
        alpha_1 + sign * _uniform(epsilon_1, delta_1, u[0]),  # (5)
        alpha_2 + sign * _uniform(epsilon_2, delta_2, u[1]),  # (6)
        beta_1 + _uniform(epsilon_1, delta_1, u[2]),  # (7)
        beta_2 + _uniform(epsilon_2, delta_2, u[3]),  # (8)
    )
    return keep_box(boxes, np.stack(moved, axis=1), image_size)


def _draw_cases(cases: list[Case], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest offset (K, 2) of each box, from a case that is drawn for it."""
    shares, lows, highs = zip(*cases, strict=True)
    if len(cases) == 1:
        return lows[0], highs[0]
    boxes = np.arange(len(lows[0]))
    drawn = np.searchsorted(np.cumsum(shares)[:-1], rng.random(len(boxes)), side="right")
    return np.stack(lows)[drawn, boxes], np.stack(highs)[drawn, boxes]


def _uniform(low: np.ndarray, high: np.ndarray, u: np.ndarray) -> np.ndarray:
    """U(low, high), from u of U(0, 1)."""
    return low + (high - low) * u


def move_edges(boxes: np.ndarray, outward: np.ndarray, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """Boxes (K, 4) whose edges moved outward by `outward` (K, 4) px; see `keep_box`."""
    return keep_box(boxes, boxes + np.array([-1.0, -1.0, 1.0, 1.0]) * outward, image_size)


def keep_box(boxes: np.ndarray, moved: np.ndarray, image_size: int) -> np.ndarray:
    """Keep a box a box: edges stop where they would pass each other, and at the image's border.

    Args:
        boxes: (K, 4) XYXY before the move, pixels of the frame, maxima inclusive.
        moved: (K, 4) XYXY after it; edges of small targets may have passed each other.
        image_size: side of the frame in pixels.

    Returns:
        (K, 4) float32 boxes within [0, image_size - 1], x1 >= x0 and y1 >= y0.
    """
    low, high = moved[:, :2], moved[:, 2:]
    start = np.asarray(boxes[:, :2], np.float64)
    length, moved_length = boxes[:, 2:] - start, high - low
    passed = moved_length < 0
    share = np.divide(length, length - moved_length, out=np.zeros_like(length), where=passed)
    meeting = start + share * (low - start)
    stopped = np.hstack((np.where(passed, meeting, low), np.where(passed, meeting, high)))
    return np.clip(stopped, 0, image_size - 1).astype(np.float32)


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

    def of_edges(self, boxes: np.ndarray) -> np.ndarray:
        """The shift (K, 4) float64 of each edge of boxes (K, 4), XYXY, in pixels."""
        sides = np.tile(box_sides(boxes), 2)
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
        kind: "standard" (as given), "expansion" (each edge outward by U(0, shift)), "shrink" (each
            edge inward by U(0, shift)) or "loose" (each edge by U(-shift, shift)).
        shift: the largest shift of an edge, >= 0.
        rng: the source of randomness; 4 K numbers are drawn, whatever the kind.
        image_size: side of the frame in pixels.

    Returns:
        (K, 4) float32 boxes within [0, image_size - 1], x1 >= x0 and y1 >= y0.

    Raises:
        ValueError: an unknown kind, or a negative shift.
    """
    if kind not in (*BOX_KINDS, LOOSE):
        raise ValueError(f"unknown box kind {kind!r}: choose from {', '.join((*BOX_KINDS, LOOSE))}")
    if not shift.size >= 0:
        raise ValueError(f"a shift must be 0 or more (the kind gives the direction), got {shift}")
    u = rng.random((len(boxes), 4))
    outward = {"standard": 0 * u, "expansion": u, "shrink": -u, LOOSE: 2 * u - 1}[kind]
    return move_edges(boxes, outward * shift.of_edges(boxes), image_size)


def box_families(shifts: Sequence[Shift]) -> list[tuple[str, Shift]]:
    """The families of boxes over which a decoder must be good: kind and largest shift of each.

    They are tight boxes, expansion and shrink boxes of each of `shifts`, and loose boxes of the
    first. With 15 % of the side and 20 px, as in evaluation by default, that is six.
    """
    both_ways = [(kind, shift) for shift in shifts for kind in ("expansion", "shrink")]
    return [("standard", shifts[0]), *both_ways, (LOOSE, shifts[0])]


def sweep_boxes(boxes: np.ndarray, shift: Shift, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """The boxes of the robustness curve: `shift_boxes` by the whole `shift`, outward positive."""
    return move_edges(boxes, shift.of_edges(boxes), image_size)


def box_rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone, e.g. (seed, case, slice, label).

    Boxes drawn from it are the same for every model, in any order of slices and with any number of
    workers, and can be drawn again.
    """
    digest = hashlib.sha256("\0".join(str(part) for part in key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


if __name__ == "__main__":  # python perturb.py draws and counts: see utils/preview/command.py
    from utils.preview.command import main
    from utils.system.command_line import run

    run(main)
