"""What must hold for any masks, logits and boxes, whatever the constants in perturb.py are."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import perturb as p
from perturb import IMAGE_SIZE
from utils.evaluation.scoring import dsc, leak, nsd
from utils.preview.command import offset_range
from utils.training.losses import bce_loss, dice_loss, segmentation_loss

PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=100)
SEEDS = st.integers(0, 2**32 - 1)


# --- Scores --------------------------------------------------------------------------------------
MASK_SHAPES = st.one_of(st.tuples(*[st.integers(1, 12)] * 2), st.tuples(*[st.integers(1, 6)] * 3))
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
    """Masks, and a tolerance and a spacing in quarters of mm, so that sums of squares are exact."""
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
    small, large = ((prediction, target, tolerance + n / 4, spacing) for n in (0, more))
    assert nsd(*large) >= nsd(*small) - 1e-12 and leak(*large) <= leak(*small)


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
@given(scored())
def test_leak_is_the_share_of_pixels_far_from_every_pixel_of_the_target(case):
    (prediction, target), tolerance, spacing = case
    assume(target.any())
    predicted, true = (np.argwhere(mask) * spacing for mask in (prediction, target))
    distance = np.linalg.norm(predicted[:, None] - true[None], axis=2).min(axis=1)
    assert leak(prediction, target, tolerance, spacing) == (distance > tolerance).sum() / len(true)


# --- Loss ----------------------------------------------------------------------------------------
LOSSES = (bce_loss, dice_loss, segmentation_loss)
SCALES = st.sampled_from([0.0, 1.0, 10.0, 100.0, 1e4])


@st.composite
def batches(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (K, H, W) from -scale to scale and targets from 0 to 1; a third are at either end."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    shares = (3 * torch.rand(2, *shape, generator=generator) - 1).clamp(0, 1)
    return draw(SCALES) * (2 * shares[0] - 1), shares[1]


@pytest.mark.parametrize("loss", LOSSES)
@PROPERTY
@given(batches())
def test_loss_and_its_gradient_are_finite_and_the_loss_not_negative(loss, batch):
    logits, targets = batch[0].requires_grad_(), batch[1]
    losses = loss(logits, targets)
    assert losses.shape == logits.shape[:1] and losses.isfinite().all()
    assert (losses >= -1e-6).all() and (loss is not dice_loss or (losses <= 1 + 1e-6).all())
    losses.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@PROPERTY
@given(batches(), st.sampled_from([0.1, 1.0, 100.0]))
def test_loss_never_rises_as_logits_move_towards_a_binary_target(loss, batch, step):
    logits, targets = batch[0], (batch[1] > 0.5).float()
    before, nearer = loss(logits, targets), loss(logits + step * (2 * targets - 1), targets)
    assert (nearer <= before + 1e-6 * (1 + before)).all()


# --- Boxes ---------------------------------------------------------------------------------------
TENTHS = st.integers(10, 4000).map(lambda n: n / 10) | st.just(0.0)  # some are beyond the bounds
SHIFTS = st.one_of(
    st.builds(p.Shift, st.integers(0, 499).map(lambda n: n / 1000), st.just("side")),
    st.builds(p.Shift, st.integers(0, 1023), st.just("px")),
)
LAST = IMAGE_SIZE - 1
ROUNDING = 1e-3  # px; float32 at 1024 px is good to 6e-5


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Tight boxes (count, 4): any, of a pixel, of a few, the whole image, and at each border."""
    boxes = np.sort(rng.integers(0, IMAGE_SIZE, (count, 2, 2)), axis=1).reshape(-1, 4)
    kind = rng.integers(0, 9, count)
    boxes[kind == 0, 2:] = boxes[kind == 0, :2]
    boxes[kind == 1] = [0, 0, LAST, LAST]
    few = kind == 2
    boxes[few, 2:] = boxes[few, :2] + rng.integers(0, 30, (few.sum(), 2))
    for border, column in enumerate(range(4), start=3):
        boxes[kind == border, column] = 0 if column < 2 else LAST
    return np.clip(boxes, 0, LAST).astype(np.float32)


def kinds_of_box(
    tight: np.ndarray, factors: tuple[float, float], shift: p.Shift
) -> Iterator[tuple[Callable, np.ndarray, np.ndarray, list[int]]]:
    """For every policy, oriented and literal, and every kind of evaluation box: a function of `rng`
    that makes boxes (K, 4) of `tight`, the lowest and the highest offset of their edges, and the
    sign of an offset that moves an edge to the right or down."""
    areas = (p.box_sides(tight).prod(axis=1) / 2).astype(int)
    outward, literally = [-1, -1, 1, 1], [1, 1, 1, 1]
    for policy in p.POLICIES:
        if policy == "measured":  # whose rows are too many to be all drawn
            errors = p.read_errors(p.ERRORS)[:, 1:]
            ends = (np.full((len(tight), 2), end) for end in (errors.min(), errors.max()))
            ends = [end * p.box_sides(tight) for end in ends]
        else:
            ends = offset_range(tight, areas, p.Perturbation(policy, "width", *factors))
        low, high = (np.tile(bound, 2) for bound in ends)
        for literal, sign in ((False, outward), (True, literally)):
            perturbation = p.Perturbation(policy, "width", *factors, literal)
            yield partial(p.perturb, tight, areas, perturbation=perturbation), low, high, sign
    edges = shift.of_edges(tight)
    ranges = {"standard": (0, 0), "expansion": (0, 1), "shrink": (-1, 0), p.LOOSE: (-1, 1)}
    for kind, (low, high) in ranges.items():
        yield partial(p.shift_boxes, tight, kind, shift), low * edges, high * edges, outward


def test_two_million_random_boxes_stay_boxes_in_the_image_within_their_bounds():
    """Borders, and edges that meet, can only stop an edge short of its offset."""
    checked = []

    @PROPERTY
    @given(SEEDS, st.tuples(TENTHS, TENTHS.map(lambda n: -n)), SHIFTS)
    def check(seed, factors, shift):
        tight = random_boxes(np.random.default_rng(seed), 1200)
        for make, low, high, sign in kinds_of_box(tight, factors, shift):
            boxes, again = (make(rng=np.random.default_rng(seed)) for _ in range(2))
            assert (boxes == again).all()
            assert boxes.shape == tight.shape and boxes.dtype == np.float32
            assert (boxes >= 0).all() and (boxes <= LAST).all()
            assert (boxes[:, 2:] >= boxes[:, :2]).all()
            moved, low, high = (boxes - tight) * sign, np.minimum(0, low), np.maximum(0, high)
            assert (moved >= low - ROUNDING).all() and (moved <= high + ROUNDING).all()
            assert (moved[low == 0] >= 0).all() and (moved[high == 0] <= 0).all()
            checked.append(len(boxes))

    check()
    assert sum(checked) >= 2_000_000


@PROPERTY
@given(SEEDS, st.sampled_from([3, 30, 300, 1100]))
def test_edges_stop_only_at_the_border_and_where_they_meet_and_mirrored_edges_alike(seed, largest):
    rng = np.random.default_rng(seed)
    tight, outward = random_boxes(rng, 300), rng.uniform(-largest, largest, (300, 4))
    boxes = p.move_edges(tight, outward)
    moved = (boxes - tight) * [-1, -1, 1, 1]
    assert (moved >= np.minimum(outward, 0) - ROUNDING).all()
    assert (moved <= np.maximum(outward, 0) + ROUNDING).all()
    meet = np.tile(boxes[:, 2:] - boxes[:, :2] <= ROUNDING, 2)
    stopped = np.abs(outward - moved) > ROUNDING
    assert ((boxes == 0) | (boxes == LAST) | meet)[stopped].all()
    mirror, transpose = [2, 1, 0, 3], [1, 0, 3, 2]  # left to right, x for y: the order of the edges
    flip = np.array([LAST, 0, LAST, 0])
    mirrored = p.move_edges(np.abs(flip - tight[:, mirror]), outward[:, mirror])
    assert mirrored == pytest.approx(np.abs(flip - boxes[:, mirror]), abs=ROUNDING)
    transposed = p.move_edges(tight[:, transpose], outward[:, transpose])
    assert transposed == pytest.approx(boxes[:, transpose], abs=ROUNDING)


@PROPERTY
@given(SEEDS, st.sampled_from([np.uint8, np.int16, np.int64]))
def test_tight_box_holds_its_label_and_touches_it_on_every_side(seed, dtype):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 5, rng.integers(1, 10, 2)).astype(dtype)
    labels, boxes = p.tight_boxes(mask)
    assert labels.tolist() == [label for label in np.unique(mask) if label]
    for label, (x0, y0, x1, y1) in zip(labels, boxes.astype(int), strict=True):
        inside = (mask == label)[y0 : y1 + 1, x0 : x1 + 1]
        assert inside.sum() == (mask == label).sum()
        assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
