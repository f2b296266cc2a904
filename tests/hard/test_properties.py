"""What must hold for any masks, logits, boxes and slices, on inputs that hypothesis draws.

Nothing here depends on the values of the constants in perturb.py.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import perturb as p
from perturb import IMAGE_SIZE
from utils.data.frame import Frame
from utils.evaluation.metrics import dsc, leak, nsd
from utils.model.segmenter import logits_to_native
from utils.training.losses import bce_loss, dice_loss, segmentation_loss

PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=100)
FRAMES = settings(PROPERTY, max_examples=30)  # 1024 x 1024 pixels each

SEEDS = st.integers(0, 2**32 - 1)


# --- Scores --------------------------------------------------------------------------------------
MASK_SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 12)] * 2),
    st.tuples(*[st.integers(1, 6)] * 3),
)
DENSITIES = st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.9, 1.0])


@st.composite
def masks(draw, count: int) -> np.ndarray:
    """Masks (count, ...) of one 2D or 3D shape: scattered pixels and blocks, some empty."""
    shape, rng = draw(MASK_SHAPES), np.random.default_rng(draw(SEEDS))
    drawn = []
    for _ in range(count):
        mask = rng.random(shape) < draw(DENSITIES)
        if draw(st.booleans()):
            corners = np.sort(rng.integers(0, shape, (2, len(shape))), axis=0)
            mask[tuple(slice(low, high + 1) for low, high in corners.T)] ^= True
        drawn.append(mask)
    return np.stack(drawn)


@st.composite
def scored(draw, count: int = 2) -> tuple[np.ndarray, float, tuple[float, ...]]:
    """Masks, and a tolerance and a spacing in mm for them.

    Both are in quarters, so that sums of squares are exact: whether a border that lies at the
    tolerance is within it then does not depend on the order of the axes.
    """
    drawn = draw(masks(count))
    axes = drawn.ndim - 1
    spacing = draw(st.lists(st.integers(1, 12), min_size=axes, max_size=axes))
    return drawn, draw(st.integers(0, 24)) / 4, tuple(n / 4 for n in spacing)


@PROPERTY
@given(scored())
def test_dsc_and_nsd_are_symmetric_within_0_and_1_and_1_for_equal_masks(case):
    (prediction, target), tolerance, spacing = case
    overlap, surface = dsc(prediction, target), nsd(prediction, target, tolerance, spacing)
    assert 0 <= overlap <= 1 and 0 <= surface <= 1 + 1e-12
    assert dsc(target, prediction) == overlap
    assert nsd(target, prediction, tolerance, spacing) == surface
    assert (overlap == 1) == (prediction == target).all()
    assert dsc(target, target.copy()) == nsd(target, target.copy(), tolerance, spacing) == 1


@PROPERTY
@given(masks(count=3))
def test_dsc_rises_with_every_pixel_that_is_put_right(drawn):
    prediction, target, right = drawn
    better = np.where(right, target, prediction)
    assert dsc(better, target) >= dsc(prediction, target)
    if (better != prediction).any() and (better & target).any():
        assert dsc(better, target) > dsc(prediction, target)


@PROPERTY
@given(scored(), st.integers(0, 24))
def test_nsd_never_falls_and_leak_never_rises_with_the_tolerance(case, more):
    (prediction, target), tolerance, spacing = case
    larger = tolerance + more / 4
    assert (
        nsd(prediction, target, larger, spacing)
        >= nsd(prediction, target, tolerance, spacing) - 1e-12
    )
    assert leak(prediction, target, larger, spacing) <= leak(prediction, target, tolerance, spacing)


@PROPERTY
@given(scored(), st.integers(-8, 8), st.data())
def test_scores_do_not_depend_on_direction_and_order_of_axes_unit_and_background(case, power, data):
    """At the border of the array as well: surface-distance pads the masks itself."""
    drawn, tolerance, spacing = case
    axes = range(drawn.ndim - 1)
    flipped = tuple(data.draw(st.sets(st.sampled_from(axes))))
    order = data.draw(st.permutations(axes))
    pad = [data.draw(st.tuples(*[st.integers(0, 3)] * 2)) for _ in axes]
    changed = [np.pad(np.flip(mask, flipped).transpose(order), pad) for mask in drawn]
    scale = (tolerance * 2.0**power, [spacing[axis] * 2.0**power for axis in order])
    assert dsc(*changed) == dsc(*drawn)
    assert leak(*changed, *scale) == leak(*drawn, tolerance, spacing)
    assert nsd(*changed, *scale) == pytest.approx(nsd(*drawn, tolerance, spacing), abs=1e-9)


@PROPERTY
@given(scored(count=1), st.integers(0, 3), st.data())
def test_borders_of_a_moved_mask_agree_at_the_distance_it_moved(case, pixels, data):
    (mask,), _, spacing = case
    axis = data.draw(st.sampled_from(range(mask.ndim)))
    pad = [(0, 0)] * mask.ndim
    pad[axis] = (0, 3)
    target = np.pad(mask, pad)
    moved = np.roll(target, pixels, axis)
    assert nsd(moved, target, pixels * spacing[axis], spacing) == pytest.approx(1, abs=1e-12)
    assert leak(moved, target, pixels * spacing[axis], spacing) == 0


@PROPERTY
@given(scored(count=1))
def test_scores_of_one_of_two_equal_parts(case):
    (mask,), tolerance, spacing = case
    assume(mask.any())
    gap = int(tolerance / spacing[0]) + 1  # pixels between the parts, farther than the tolerance
    blank = np.zeros((gap, *mask.shape[1:]), bool)
    both = np.concatenate([mask, blank, mask])
    one = np.concatenate([mask, blank, np.zeros_like(mask)])
    assert dsc(one, both) == pytest.approx(2 / 3)
    assert nsd(one, both, tolerance, spacing) == pytest.approx(2 / 3)
    assert leak(both, one, tolerance, spacing) == 1


@PROPERTY
@given(scored())
def test_leak_is_the_share_of_pixels_far_from_every_pixel_of_the_target(case):
    (prediction, target), tolerance, spacing = case
    assume(target.any())
    predicted, true = (np.argwhere(mask) * spacing for mask in (prediction, target))
    distance = np.linalg.norm(predicted[:, None] - true[None], axis=2).min(axis=1)
    assert leak(prediction, target, tolerance, spacing) == (distance > tolerance).sum() / len(true)


# --- Loss ----------------------------------------------------------------------------------------
LOSSES = (bce_loss, dice_loss, segmentation_loss)
BATCH_SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8))  # K, H, W
SCALES = st.sampled_from([0.0, 1.0, 10.0, 100.0, 1e4])


class Batch:
    """Random tensors (K, H, W) of one shape."""

    def __init__(self, shape: tuple[int, int, int], seed: int, scale: float) -> None:
        self.shape, self.scale = shape, scale
        self.generator = torch.Generator().manual_seed(seed)

    def __repr__(self) -> str:
        return f"Batch({self.shape}, seed {self.generator.initial_seed()}, scale {self.scale:g})"

    def shares(self) -> torch.Tensor:
        """0 to 1; a third each of the pixels are exactly 0 and exactly 1."""
        return (3 * torch.rand(self.shape, generator=self.generator) - 1).clamp(0, 1)

    def binary(self) -> torch.Tensor:
        """0 and 1; each instance has its own share of ones."""
        share = torch.rand(len(self), 1, 1, generator=self.generator)
        return (torch.rand(self.shape, generator=self.generator) < share).float()

    def logits(self) -> torch.Tensor:
        """-scale to scale; a third each of the pixels are at either end."""
        return self.scale * (2 * self.shares() - 1)

    def __len__(self) -> int:
        return self.shape[0]


BATCHES = st.builds(Batch, BATCH_SHAPES, SEEDS, SCALES)


def close(loss: torch.Tensor) -> pytest.approx:
    return pytest.approx(loss.numpy(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@PROPERTY
@given(BATCHES)
def test_loss_and_its_gradient_are_finite_and_the_loss_not_negative(loss, batch):
    logits, targets = batch.logits().requires_grad_(), batch.shares()
    losses = loss(logits, targets)
    assert losses.shape == logits.shape[:1] and losses.isfinite().all()
    assert (losses >= -1e-6).all()
    if loss is dice_loss:
        assert (losses <= 1 + 1e-6).all()
    losses.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@PROPERTY
@given(BATCHES, st.sampled_from([0.1, 1.0, 100.0]))
def test_loss_never_rises_as_logits_move_towards_a_binary_target(loss, batch, step):
    logits, targets = batch.logits(), batch.binary()
    nearer = loss(logits + step * batch.shares() * (2 * targets - 1), targets)
    before = loss(logits, targets)
    assert (nearer <= before + 1e-6 * (1 + before)).all()


@PROPERTY
@given(BATCHES)
def test_gradient_of_bce_is_the_error_however_wrong_the_logit(batch):
    logits, targets = batch.logits().requires_grad_(), batch.shares()
    bce_loss(logits, targets).sum().backward()
    error = logits.detach().sigmoid() - targets
    assert logits.grad.numpy() == close(error / targets[0].numel())


@pytest.mark.parametrize("loss", LOSSES)
@PROPERTY
@given(BATCHES)
def test_loss_of_an_instance_does_not_depend_on_the_others(loss, batch):
    both = batch.logits(), batch.shares()
    together = loss(*both)
    alone = torch.cat([loss(*(one[k : k + 1] for one in both)) for k in range(len(batch))])
    assert alone.numpy() == close(together)
    order = torch.randperm(len(batch), generator=batch.generator)
    assert loss(*(one[order] for one in both)).numpy() == close(together[order])


# --- Boxes ---------------------------------------------------------------------------------------
SIZES = st.sampled_from([IMAGE_SIZE, 1, 7, 64, 256, 2048])
TENTHS = st.integers(0, 4000).map(lambda n: n / 10)
FACTORS = st.tuples(TENTHS, TENTHS.map(lambda n: -n))  # some are beyond the clamps
SHIFTS = st.one_of(
    st.builds(p.Shift, st.integers(-499, 499).map(lambda n: n / 1000), st.just("side")),
    st.builds(p.Shift, st.integers(-400, 400).map(lambda n: n / 10), st.just("px")),
    st.builds(p.Shift, st.integers(-1023, 1023), st.just("px")),
)
ROUNDING = 1e-3  # px; float32 at 2048 px is good to 1.2e-4
AT_ONCE = 640


def random_boxes(rng: np.random.Generator, size: int, count: int = AT_ONCE) -> np.ndarray:
    """Tight boxes (count, 4) of a frame: any, of a pixel, of a few, the whole, and at each border.

    Coordinates are integers, as `tight_boxes` gives them.
    """
    boxes = np.sort(rng.integers(0, size, (count, 2, 2)), axis=1).reshape(-1, 4)
    kind = rng.integers(0, 9, count)
    boxes[kind == 0, 2:] = boxes[kind == 0, :2]
    boxes[kind == 1] = [0, 0, size - 1, size - 1]
    few = kind == 2
    boxes[few, 2:] = boxes[few, :2] + rng.integers(0, 30, (few.sum(), 2))
    for border, column in enumerate(range(4), start=3):
        boxes[kind == border, column] = 0 if column < 2 else size - 1
    return np.minimum(boxes, size - 1).astype(np.float32)


def assert_close(boxes: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(boxes, expected, rtol=0, atol=ROUNDING)


class Replay(np.random.Generator):
    """A generator that gives the numbers that it was made with, and draws the second of cases."""

    def __init__(self, numbers: np.ndarray) -> None:
        super().__init__(np.random.PCG64(0))
        self.numbers = numbers

    def random(self, size=None, **_):
        if size == len(self.numbers):  # which case of a policy
            return np.full(size, 0.6)
        assert size == self.numbers.shape
        return self.numbers


def kinds_of_box(
    size: int, factors: tuple[float, float], shift: p.Shift
) -> Iterator[tuple[str, Callable, Callable]]:
    """Every policy, as it is and literal, every kind of evaluation box, and the sweep.

    Yields:
        A name; a function that makes boxes (K, 4) of tight ones with `rng`; and a function that
        gives the offsets (K, 4) of their edges for random numbers 0 and 1.
    """
    frame = {"image_size": size, "delta_expand": factors[0], "epsilon_shrink": factors[1]}
    for policy in p.POLICIES:

        def ends(tight, policy=policy):
            return [np.tile(bound, 2) for bound in p.offset_range(tight, policy, **frame)]

        yield policy, partial(p.perturb, policy=policy, **frame), ends
        yield f"literal {policy}", partial(p.perturb, policy=policy, literal=True, **frame), ends

    def scaled(at_0: float, at_1: float) -> Callable:
        return lambda tight: [scale * shift.of_edges(tight) for scale in (at_0, at_1)]

    yield "sweep", lambda tight, rng: p.sweep_boxes(tight, shift, size), scaled(1, 1)
    sign = 1 if shift.size >= 0 else -1
    size_of_shift = p.Shift(abs(shift.size), shift.unit)
    for kind, end in (("standard", 0), ("expansion", sign), ("shrink", -sign)):
        make = partial(p.shift_boxes, kind=kind, shift=size_of_shift, image_size=size)
        yield kind, make, scaled(0, end)


def moves(name: str, tight: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """How far the edges (K, 4) have moved: outward, but to the right and down where literal."""
    moved = boxes.astype(np.float64) - tight
    return moved if name.startswith("literal") else moved * [-1, -1, 1, 1]


def test_two_million_random_boxes_stay_boxes_in_the_image_within_their_bounds(tally):
    """The bounds, widened to 0, hold for every box: the border of the image and edges that meet
    can only stop an edge short of its offset.
    """
    checked = 0

    @PROPERTY
    @given(SEEDS, SIZES, FACTORS, SHIFTS)
    def check(seed, other_size, factors, shift):
        nonlocal checked
        rng = np.random.default_rng(seed)
        for size in (IMAGE_SIZE, other_size):
            for name, make, ends in kinds_of_box(size, factors, shift):
                tight = random_boxes(rng, size)
                boxes, again = (make(tight, rng=p.box_rng(seed, name)) for _ in range(2))
                assert (boxes == again).all()
                assert boxes.shape == tight.shape and boxes.dtype == np.float32
                assert (boxes >= 0).all() and (boxes <= size - 1).all()
                assert (boxes[:, 2:] >= boxes[:, :2]).all()
                moved, bounds = moves(name, tight, boxes), ends(tight)
                low = np.minimum(0, np.min(bounds, 0))
                high = np.maximum(0, np.max(bounds, 0))
                assert (moved >= low - ROUNDING).all() and (moved <= high + ROUNDING).all()
                assert (moved[low == 0] >= 0).all() and (moved[high == 0] <= 0).all()
                checked += len(boxes)

    check()
    tally("random boxes checked", checked)
    assert checked >= 2_000_000


@PROPERTY
@given(SEEDS, SIZES, FACTORS, SHIFTS)
def test_an_edge_stops_short_of_its_offset_only_at_the_border_or_where_edges_meet(
    seed, size, factors, shift
):
    rng = np.random.default_rng(seed)
    tight, amount = random_boxes(rng, size, 100), rng.random((100, 4))
    for name, make, ends in kinds_of_box(size, factors, shift):
        if name.endswith("mixed"):  # its cases have ranges of their own, which others have too
            continue
        boxes = make(tight, rng=Replay(amount))
        at_0, at_1 = ends(tight)
        offset = at_0 + (at_1 - at_0) * amount
        moved = moves(name, tight, boxes)
        assert (moved >= np.minimum(offset, 0) - ROUNDING).all()
        assert (moved <= np.maximum(offset, 0) + ROUNDING).all()
        at_border = (boxes == 0) | (boxes == size - 1)
        meet = np.tile(boxes[:, 2:] - boxes[:, :2] <= ROUNDING, 2)
        assert (at_border | meet)[np.abs(offset - moved) > ROUNDING].all()


@PROPERTY
@given(SEEDS, SIZES, FACTORS, SHIFTS)
def test_boxes_of_a_flipped_or_transposed_image_are_the_flipped_or_transposed_boxes(
    seed, size, factors, shift
):
    """Literally, flipped ones are not: both corners move to the right under a positive offset."""

    def flip(boxes: np.ndarray) -> np.ndarray:
        """From left to right."""
        x0, y0, x1, y1 = boxes.T
        return np.stack([size - 1 - x1, y0, size - 1 - x0, y1], axis=1)

    rng = np.random.default_rng(seed)
    tight, amount = random_boxes(rng, size, 100), rng.random((100, 4))
    flipped, transposed = [2, 1, 0, 3], [1, 0, 3, 2]  # the order of the edges
    for name, make, _ in kinds_of_box(size, factors, shift):
        boxes = make(tight, rng=Replay(amount))
        other = make(tight[:, transposed], rng=Replay(amount[:, transposed]))
        assert_close(other, boxes[:, transposed])
        if not name.startswith("literal"):
            assert_close(make(flip(tight), rng=Replay(amount[:, flipped])), flip(boxes))


LABEL_MAPS = arrays(
    st.sampled_from([np.uint8, np.int16, np.int64]),
    array_shapes(min_dims=2, max_dims=2, max_side=10),
    elements=st.integers(0, 4),
)


@PROPERTY
@given(LABEL_MAPS)
def test_tight_box_holds_its_label_and_touches_it_on_every_side(mask):
    labels, boxes = p.tight_boxes(mask)
    assert set(labels.tolist()) == set(mask.ravel().tolist()) - {0}
    assert (np.diff(labels) > 0).all() and labels.dtype == np.int64
    assert boxes.shape == (len(labels), 4) and boxes.dtype == np.float32
    for label, (x0, y0, x1, y1) in zip(labels, boxes.astype(int), strict=True):
        of_label = mask == label
        inside = of_label[y0 : y1 + 1, x0 : x1 + 1]
        assert inside.sum() == of_label.sum()
        for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert side.any()


# --- Frame ---------------------------------------------------------------------------------------
@st.composite
def frames(draw) -> Frame:
    """Frames of small slices that lose no row and no column, of pixels that need not be square."""
    native = draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    quarters = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    frame = Frame.fit(native, tuple(n / 4 for n in quarters))
    assume(not frame.shrinks)
    return frame


def label_map(frame: Frame, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, frame.native).astype(np.uint8)


@PROPERTY
@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)
def test_longer_side_fills_the_frame_and_its_pixels_are_square(native, spacing):
    content = Frame.fit(native, spacing).content
    assert max(content) == IMAGE_SIZE and min(content) >= 1
    extent = np.multiply(native, spacing)
    exact = IMAGE_SIZE * extent / extent.max()
    assert (np.abs(np.array(content) - np.maximum(exact, 1)) <= 0.5 + 1e-9).all()


@FRAMES
@given(frames(), SEEDS)
def test_labels_come_back_from_the_frame_unchanged(frame, seed):
    labels = label_map(frame, seed)
    framed = frame.labels_to_frame(labels)
    height, width = frame.content
    assert (frame.labels_to_native(framed) == labels).all()
    assert not framed[height:].any() and not framed[:, width:].any()


@FRAMES
@given(frames(), SEEDS)
def test_tight_boxes_of_the_frame_are_the_native_ones_to_half_a_pixel(frame, seed):
    labels = label_map(frame, seed)
    native = p.tight_boxes(labels)
    framed = p.tight_boxes(frame.labels_to_frame(labels))
    assert (framed[0] == native[0]).all()
    half = 0.5 * np.tile(np.divide(frame.native, frame.content)[::-1], 2)  # a pixel of the frame
    assert (np.abs(frame.boxes_to_native(framed[1]) - native[1]) <= half + 1e-6).all()


@FRAMES
@given(frames(), SEEDS)
def test_labels_come_back_from_the_frame_as_logits(frame, seed):
    """Where a native pixel is two of the frame or more: bilinear, it then sees itself alone."""
    assume((np.divide(frame.content, frame.native) >= 2).all())
    target = label_map(frame, seed) == 1
    framed = torch.from_numpy(frame.labels_to_frame(target.astype(np.uint8)))
    logits = framed[None].float() - 0.5
    assert ((logits_to_native(logits, frame)[0] > 0).numpy() == target).all()
