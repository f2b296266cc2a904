"""Bounding-box perturbation: which boxes the decoder is trained on, and which it is tested on.

Boxes are float32 (K, 4) arrays, XYXY, in pixels of the square image frame (1024 x 1024), maxima
inclusive: a box one pixel wide has x1 == x0, and its width is x1 - x0 + 1. `python perturb.py`
shows what the constants below do to example targets, or with --data to every organ of a data set.

Equation numbers are those of *Optimization of MedSAM model based on bounding box adaptive
perturbation algorithm*. The paper does not define theta_omega, xi or the constants: those here are
this project's readings, as the docstrings say.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# --- Constants: edit them here; READING, DELTA_EXPAND, EPSILON_SHRINK are options too ------------
# delta_expand and epsilon_shrink are pixels of the 1024 frame *for a box as wide as the image*;
# theta_omega and xi scale them down to the box at hand. So value / 1024 is the largest offset as a
# share of the side of any box: 102.4 px is 10 %, 153.6 px is 15 %, 256 px is 25 %. (Under the
# other readings the share depends on the target: see their functions below.)
READING = "width"  # how theta_omega is measured: "width", "cosine" or "area"
DELTA_EXPAND = 102.4  # delta_expand of (3), (4): outward, >= 0, px
DELTA_EXPAND_MAX = 256.0  # delta_max of (3), (4): larger factors are clamped to it, px
EPSILON_SHRINK = -102.4  # epsilon_shrink of (1), (2): inward, <= 0, px
EPSILON_SHRINK_MIN = -256.0  # epsilon_min of (1), (2): smaller factors are clamped to it, px
AREA_SCALE = 10.0  # factor on these four under "area", whose theta_omega is that much smaller
MIXED_TIGHT, MIXED_OUTWARD, MIXED_INWARD = 0.5, 0.25, 0.25  # shares of the three cases of `mixed`
MIXED_SCALE = 2.0  # its delta_expand and epsilon_shrink are by default this many times larger
MIXED_SIZE = 100.0  # sqrt(area), px: `mixed` moves edges of targets below it by smaller shares
MEASURED_TIGHT = 0.3  # share of tight boxes of `measured`; the others err by a row of its table
MEASURED_ROWS = 50  # that row is drawn from at least this many rows, those nearest in size
MEDSAM_SHIFT = 20.0  # MedSAM's largest shift of an edge, px, whatever the size of the target
SAM2_SHARE, SAM2_SHIFT_MAX = 0.1, 20.0  # SAM 2's: this share of the side, and at most this, px
SMALL_SHARE = 0.002  # a small instance covers less than this share of its slice

IMAGE_SIZE = 1024  # side of the image frame, px
ERRORS = str(Path(__file__).parent / "utils/data/errors.csv")  # how drawn boxes err, measured
ERRORS_TRAIN = 5  # up to this number its patients train `measured`, the others make test boxes
BOX_KINDS = ("standard", "expansion", "shrink")  # rows of Table I
LOOSE = "loose"  # a fourth kind, which the paper does not have: every edge errs either way
# And two whose boxes err as those of a protocol of ERRORS: drawn in every n-th slice.
LIKE = {"like every 5": "every 5", "like every 10": "every 10"}


# --- Tight boxes and the coefficients of a box ---------------------------------------------------
def tight_boxes(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest box around each label of a 2D label map (H, W) of integers; 0 is background.

    Returns labels (K,) int64 in ascending order, and boxes (K, 4) float32 XYXY in pixels of `mask`,
    maxima inclusive. An empty map gives K = 0.
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

    Raises ValueError: the boxes are not (K, 4), not finite, or inverted.
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
# maps boxes (K, 4) and the areas (K,) of their masks to (K,) numbers.
def width(boxes: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Box width / image width: an edge moves by the same share of every side of every box."""
    return box_sides(boxes)[:, 0] / IMAGE_SIZE


def cosine(boxes: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Cosine similarity of the mask and the whole image, both binary: sqrt(area) / image side.

    The share of a side shrinks for targets that do not fill their box.
    """
    return np.sqrt(areas) / IMAGE_SIZE


def area(boxes: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """IoU of the mask and the whole image: area / image area.

    With 1024 px an edge of a round target of 300 px moves by up to 23 % of the side, of one of
    130 px by 10 %, of one of 30 px by 2 %.
    """
    return areas / IMAGE_SIZE**2


READINGS = {reading.__name__: reading for reading in (width, cosine, area)}


def theta_omega(boxes: np.ndarray, areas: np.ndarray, reading: str = READING) -> np.ndarray:
    """Size coefficient theta_omega (K,) of targets, by one of READINGS; see there."""
    return READINGS[reading](boxes, np.asarray(areas, np.float64))


def xi(boxes: np.ndarray) -> np.ndarray:
    """Shape coefficient xi (K,) of boxes (K, 4): box width / box height.

    Our reading: with it the offset is the same share of both sides of a box.
    """
    sides = box_sides(boxes)
    return sides[:, 0] / sides[:, 1]


# --- Policies ------------------------------------------------------------------------------------
# A policy is a function and its entry in POLICIES. It maps what it names of
#     sides (K, 2): width and height of each box, px
#     areas (K,): of the masks, px
#     epsilon, delta (K, 2): the offsets of (1)-(4) along x and y, px
#     errors: measured errors, as of `read_errors`
#     rng: the source of randomness, for a policy that draws what kind of box it makes
# to the lowest and highest offset of an edge, px, outward positive: x and y (K, 2) or XYXY (K, 4).
Range = tuple[np.ndarray, np.ndarray]


def none(sides, **_) -> Range:
    """0: tight boxes, the control that the paper lacks."""
    return 0 * sides, 0 * sides


def medsam(sides, **_) -> Range:
    """0 ... MEDSAM_SHIFT: what MedSAM was trained on."""
    return 0 * sides, np.full_like(sides, MEDSAM_SHIFT)


def bidirectional(sides, **_) -> Range:
    """+-MEDSAM_SHIFT: the ablation's row with delta_expand and epsilon_shrink alone."""
    return np.full_like(sides, -MEDSAM_SHIFT), np.full_like(sides, MEDSAM_SHIFT)


def scaled(sides, delta, **_) -> Range:
    """0 ... delta: the ablation's row with theta_omega and xi alone."""
    return 0 * sides, delta


def adaptive(epsilon, delta, **_) -> Range:
    """epsilon ... delta: the proposed method."""
    return epsilon, delta


def mixed(sides, areas, epsilon, delta, rng, **_) -> Range:
    """A box is tight, or all its edges move outward, 0 ... delta, or all inward, epsilon ... 0.

    Ours, not the paper's. With independent edges, as in `adaptive`, a tight box never occurs, and
    one that is too small on all sides once in 16; people draw boxes of one kind or the other. As
    errors on small targets are only a few pixels, their epsilon and delta shrink with sqrt(area).
    """
    shares = (MIXED_TIGHT, MIXED_OUTWARD, MIXED_INWARD)
    tight, outward, inward = range(3)
    kind = rng.choice((tight, outward, inward), (len(sides), 1), p=shares)
    reach = np.minimum(1, np.sqrt(areas) / MIXED_SIZE)[:, None]
    return np.where(kind == inward, reach * epsilon, 0), np.where(kind == outward, reach * delta, 0)


def measured(sides, areas, errors, rng, **_) -> Range:
    """A box is tight, or has the measured error of a target of similar size. Ours."""
    tight = rng.random((len(sides), 1)) < MEASURED_TIGHT
    outward = np.where(tight, 0.0, draw_errors(errors, areas, rng) * np.tile(sides, 2))
    return outward, outward


def sam2(sides, **_) -> Range:
    """+-SAM2_SHARE of the side, at most SAM2_SHIFT_MAX: what SAM 2 was trained on."""
    shift = np.minimum(SAM2_SHARE * sides, SAM2_SHIFT_MAX)
    return -shift, shift


POLICIES = {
    policy.__name__: policy
    for policy in (none, medsam, bidirectional, scaled, adaptive, mixed, measured, sam2)
}


# --- Measured errors -----------------------------------------------------------------------------
@functools.cache
def read_errors(path: str | None = None, protocol: str | None = None) -> np.ndarray:
    """Read a table, see utils/training/errors.py: size and shares (N, 5), in order of size.

    Without a path, the rows of ERRORS from its training patients; with a `protocol`, such as
    "every 5", the rows of that protocol from the other patients, for testing.
    """
    table = np.genfromtxt(path or ERRORS, delimiter=",", dtype=str)[1:]  # without the header
    if path is None:
        train = table[:, 1].astype(int) <= ERRORS_TRAIN
        table = table[~train & (table[:, 0] == protocol) if protocol else train]
    table = table[:, 2:].astype(np.float64)
    return table[np.argsort(table[:, 0], kind="stable")]


def draw_errors(errors: np.ndarray, areas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw shares (K, 4) of the sides by which edges lie outward, XYXY, for areas (K,) in px.

    Each is one of the MEASURED_ROWS rows of `errors` (or a twentieth, if more) nearest in size.
    """
    near = min(len(errors), max(MEASURED_ROWS, len(errors) // 20))
    place = np.searchsorted(errors[:, 0], np.sqrt(areas))
    rows = np.clip(place - near // 2, 0, len(errors) - near)
    return errors[rows + rng.integers(near, size=len(areas)), 1:]


# --- Training boxes ------------------------------------------------------------------------------
NO_SHARE = f"expected pixels, not a share of the side; 15 % of it is {0.15 * IMAGE_SIZE:g}"


def unclamped_factors(
    policy: str, reading: str, delta_expand: float | None, epsilon_shrink: float | None
) -> tuple[float, float]:
    """delta_expand and epsilon_shrink of a `Perturbation` before they are clamped, px."""
    scale = AREA_SCALE if reading == "area" else 1.0
    scale *= MIXED_SCALE if policy == "mixed" else 1.0
    return (
        scale * DELTA_EXPAND if delta_expand is None else delta_expand,
        scale * EPSILON_SHRINK if epsilon_shrink is None else epsilon_shrink,
    )


@dataclass(frozen=True)
class Perturbation:
    """How training boxes are made: a policy, and the factors of (1)-(4) that it uses.

    Raises ValueError: an unknown policy or reading, a factor of the wrong sign or of a fraction of
    a pixel, or shares of `mixed` that do not add up to 1.
    """

    policy: str = "adaptive"  # one of POLICIES
    reading: str = READING  # of theta_omega, one of READINGS
    # In px of the image frame for theta_omega = 1; larger ones become their bounds. None becomes
    # the constant above, times what reading and policy scale it by.
    delta_expand: float | None = None
    epsilon_shrink: float | None = None
    literal: bool = False  # apply (5)-(8) as they are printed, see `perturb`
    errors: str | None = None  # path of a table for `measured`, in the place of ERRORS

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}: choose from {', '.join(POLICIES)}")
        if self.reading not in READINGS:
            raise ValueError(f"unknown reading {self.reading!r}: choose from {', '.join(READINGS)}")
        shares = (MIXED_TIGHT, MIXED_OUTWARD, MIXED_INWARD)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"MIXED_TIGHT, ... are {shares}: must be 0 or more and add up to 1")
        delta, epsilon = self.delta_expand, self.epsilon_shrink
        delta, epsilon = unclamped_factors(self.policy, self.reading, delta, epsilon)
        if not delta >= 0:
            raise ValueError(f"delta_expand must be >= 0 (it expands), got {delta:g}")
        if not epsilon <= 0:
            raise ValueError(f"epsilon_shrink must be <= 0 (it shrinks), got {epsilon:g}")
        if 0 < min(delta or 1, -epsilon or 1) < 1:
            raise ValueError(f"delta_expand {delta:g}, epsilon_shrink {epsilon:g}: {NO_SHARE}")
        bound = AREA_SCALE if self.reading == "area" else 1.0
        object.__setattr__(self, "delta_expand", min(delta, bound * DELTA_EXPAND_MAX))
        object.__setattr__(self, "epsilon_shrink", max(epsilon, bound * EPSILON_SHRINK_MIN))


def offsets(boxes: np.ndarray, areas: np.ndarray, perturbation: Perturbation) -> np.ndarray:
    """Equations (1)-(4): the offsets between which an edge of each box may move.

    Of tight boxes (K, 4) and the areas (K,) of their masks in the same pixels: (K, 4) float64 px,
    columns epsilon_1, epsilon_2, delta_1, delta_2 (1 is x, 2 is y).
    """
    epsilon_shrink, delta_expand = perturbation.epsilon_shrink, perturbation.delta_expand
    theta = theta_omega(boxes, areas, perturbation.reading)
    theta_by_xi = theta / xi(boxes)
    epsilon_1 = epsilon_shrink * theta  # (1)
    epsilon_2 = epsilon_shrink * theta_by_xi  # (2)
    delta_1 = delta_expand * theta  # (3)
    delta_2 = delta_expand * theta_by_xi  # (4)
    return np.stack((epsilon_1, epsilon_2, delta_1, delta_2), axis=1)


def edge_offsets(boxes, areas, rng, perturbation: Perturbation) -> Range:
    """The policy's lowest and highest offset (K, 4) of each edge, px; see `perturb`."""
    epsilon, delta = np.hsplit(offsets(boxes, areas, perturbation), 2)
    known = {"sides": box_sides(boxes), "areas": areas, "epsilon": epsilon, "delta": delta}
    known |= {"errors": read_errors(perturbation.errors), "rng": rng}
    low, high = POLICIES[perturbation.policy](**known)
    return np.tile(low, 4 // low.shape[1]), np.tile(high, 4 // high.shape[1])


def perturb(
    boxes: np.ndarray, areas: np.ndarray, rng: np.random.Generator, perturbation: Perturbation
) -> np.ndarray:
    """Training boxes, (5)-(8): every edge of every box moves by its own uniform offset.

    The text and Fig. 3 of the paper say that delta expands and epsilon shrinks, so an offset is
    applied outward on each edge. Taken literally, (5)-(8) move both corners by the same signed
    interval, under which a negative epsilon *grows* the box at its top-left corner;
    `perturbation.literal` does that. Where |epsilon| = delta the two are the same distribution.

    The boxes are tight ones (K, 4), XYXY in pixels of the image frame, the areas (K,) those of
    their masks. The policy's range takes the place of epsilon and delta in (5)-(8). 4 K numbers are
    drawn, then those of the policy. Returns (K, 4) float32 boxes; see `keep_box`.
    """
    u = rng.random((len(boxes), 4))  # one number per edge, in the order of XYXY
    epsilon, delta = edge_offsets(boxes, areas, rng, perturbation)
    uniform = epsilon + (delta - epsilon) * u  # U(epsilon, delta)
    alpha_1, alpha_2, beta_1, beta_2 = np.asarray(boxes, np.float64).T
    # Outward is towards smaller coordinates at the top-left corner alpha.
    sign = 1 if perturbation.literal else -1
    moved = (
        alpha_1 + sign * uniform[:, 0],  # (5)
        alpha_2 + sign * uniform[:, 1],  # (6)
        beta_1 + uniform[:, 2],  # (7)
        beta_2 + uniform[:, 3],  # (8)
    )
    return keep_box(boxes, np.stack(moved, axis=1))


def move_edges(boxes: np.ndarray, outward: np.ndarray) -> np.ndarray:
    """Boxes (K, 4) whose edges moved outward by `outward` (K, 4) px; see `keep_box`."""
    return keep_box(boxes, boxes + np.array([-1.0, -1.0, 1.0, 1.0]) * outward)


def keep_box(boxes: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Keep boxes valid: edges stop where they would cross, and at the image's border.

    From `boxes` (K, 4) before the move and `moved` (K, 4) after it: (K, 4) float32 boxes within
    [0, IMAGE_SIZE - 1], x1 >= x0 and y1 >= y0.
    """
    low, high = moved[:, :2], moved[:, 2:]
    start = np.asarray(boxes[:, :2], np.float64)
    length, moved_length = boxes[:, 2:] - start, high - low
    passed = moved_length < 0
    share = np.divide(length, length - moved_length, out=np.zeros_like(length), where=passed)
    meeting = start + share * (low - start)
    stopped = np.hstack((np.where(passed, meeting, low), np.where(passed, meeting, high)))
    return np.clip(stopped, 0, IMAGE_SIZE - 1).astype(np.float32)


# --- Evaluation boxes ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Shift:
    """How far the edges of an evaluation box lie from those of the tight one."""

    size: float  # a share of the side that the edge moves along, or pixels of the image frame
    unit: str  # "side" or "px"

    def __post_init__(self) -> None:
        if self.unit not in ("side", "px"):
            raise ValueError(f"unknown unit {self.unit!r}: choose side or px")
        if self.unit == "side" and not abs(self.size) < 0.5:
            raise ValueError(f"a shift must be less than half the side, got {self}")
        if not abs(self.size) < IMAGE_SIZE:
            raise ValueError(f"a shift must be less than the image, got {self}")

    @classmethod
    def parse(cls, text: str) -> "Shift":
        """Read "15%" (of the side) or "20px"; ValueError if it is neither, or out of range."""
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


def shift_boxes(boxes: np.ndarray, kind: str, shift: Shift, rng: np.random.Generator) -> np.ndarray:
    """The boxes of the evaluation (rows of Table I), made of tight boxes (K, 4); see `keep_box`.

    A kind is "standard" (as given), "expansion" (each edge moves outward by U(0, shift)), "shrink"
    (inward by U(0, shift)) or "loose" (by U(-shift, shift)); 4 K numbers are drawn, whatever it is.
    """
    u = rng.random((len(boxes), 4))
    outward = {"standard": 0 * u, "expansion": u, "shrink": -u, LOOSE: 2 * u - 1}[kind]
    return move_edges(boxes, outward * shift.of_edges(boxes))


def erring_boxes(
    boxes: np.ndarray, areas: np.ndarray, errors: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Tight boxes (K, 4) with errors drawn from a table, see `draw_errors`."""
    return move_edges(boxes, draw_errors(errors, areas, rng) * np.tile(box_sides(boxes), 2))


def box_families(shifts: Sequence[Shift]) -> list[tuple[str, Shift]]:
    """The families of boxes on which decoders are judged: eight with shares and pixels."""
    both_ways = [(kind, shift) for shift in shifts for kind in ("expansion", "shrink")]
    tight, *like = [(kind, Shift(0.0, "side")) for kind in ("standard", *LIKE)]
    return [tight, *both_ways, (LOOSE, shifts[0]), *like]


def sweep_boxes(boxes: np.ndarray, shift: Shift) -> np.ndarray:
    """The boxes of the robustness curve: `shift_boxes` by the whole `shift`, outward positive."""
    return move_edges(boxes, shift.of_edges(boxes))


# --- Random numbers ------------------------------------------------------------------------------
def box_rng(
    seed: int, purpose: str, dataset: str, case: str, index: int, label: int, draw: int
) -> np.random.Generator:
    """The generator of every random box: of one label in one slice, for one draw or epoch.

    Boxes drawn from it are the same for every model, in any order of slices and with any number of
    processes, and do not depend on those of other labels. The `purpose` is "training",
    "validation", "evaluation" or "preview".
    """
    key = (seed, purpose, dataset, case, index, label, draw)
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


if __name__ == "__main__":  # python perturb.py draws and counts: see utils/preview/command.py
    from utils.preview.options import parse_options

    options = parse_options()  # before the imports that take time

    from utils.preview.command import main
    from utils.system.command_line import run

    run(main, options)
