"""DSC and NSD by hand, and NSD against MONAI's own implementation of the definition."""

import numpy as np
import pytest
import torch
from monai.metrics import compute_surface_dice
from scipy import ndimage

from utils.evaluation.metrics import bounding_window, dsc, leak, nsd


def square(size: int, start: int, stop: int) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[start:stop, start:stop] = True
    return mask


def blob(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 2.5)
    mask = smooth > np.quantile(smooth, 0.8)
    mask[(slice(0, 1),) * mask.ndim] = False
    return np.pad(mask, 2)


def test_dsc_by_hand():
    target = np.zeros((4, 4), bool)
    target[:2] = True  # 8 pixels
    prediction = np.zeros((4, 4), np.uint8)
    prediction[1:, 0] = 1  # 3 pixels, one shared
    assert dsc(prediction, target) == pytest.approx(2 * 1 / 11)
    assert dsc(target, target) == 1
    assert dsc(~target, target) == 0
    assert dsc(np.stack([prediction] * 2), np.stack([target] * 2)) == pytest.approx(2 / 11)


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5)])
def test_empty_masks(shape):
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    spacing = (1.0,) * len(shape)
    assert dsc(empty, empty) == 1 and nsd(empty, empty, 1, spacing) == 1
    assert dsc(empty, full) == 0 and nsd(empty, full, 1, spacing) == 0
    assert dsc(full, empty) == 0 and nsd(full, empty, 1, spacing) == 0


def test_nsd_of_concentric_squares_by_hand():
    # Straight edges 2 px apart: at 1 mm pixels outside a tolerance of 1.9 mm, inside one of 2 mm
    # but for the corners, which are 2 sqrt(2) mm away.
    inner, outer = square(40, 12, 28), square(40, 10, 30)
    assert nsd(inner, outer, 1.9, (1, 1)) == 0
    assert nsd(inner, outer, 2.9, (1, 1)) == 1
    between = nsd(inner, outer, 2.0, (1, 1))
    assert 0.85 < between < 1
    # The same masks at half the pixel size, and half the tolerance.
    assert nsd(inner, outer, 1.0, (0.5, 0.5)) == pytest.approx(between)


@pytest.mark.parametrize("tolerance", [0.0, 0.9, 1.7, 3.0])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((40, 40), (1.0, 1.0)), ((40, 48), (0.7, 1.3)), ((12, 20, 18), (2.5, 0.8, 1.1))],
)
def test_nsd_is_monai_with_subvoxels(shape, spacing, tolerance):
    for seed in range(3):
        prediction, target = blob(shape, seed), blob(shape, seed + 100)
        target |= np.roll(prediction, 1, axis=0)
        both = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, target)]
        expected = compute_surface_dice(
            *both,
            class_thresholds=[tolerance],
            include_background=True,
            spacing=list(spacing),
            use_subvoxels=True,
        )
        assert nsd(prediction, target, tolerance, spacing) == pytest.approx(
            expected.item(), abs=1e-6
        )


def test_metrics_reject_what_does_not_fit():
    with pytest.raises(ValueError, match="differ in shape"):
        dsc(np.ones((2, 2)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="2 elements"):
        nsd(np.ones((2, 2, 1)), np.ones((2, 2, 1)), 1, (1, 1))


# --- Leak ----------------------------------------------------------------------------------------
def test_leak_by_hand():
    """A target of 4 x 5 pixels of 2 x 1 mm; distances are between pixel centres."""
    target = np.zeros((20, 20), bool)
    target[8:12, 5:10] = True
    assert leak(target, target, 0.0, (2, 1)) == 0
    assert leak(np.zeros_like(target), target, 0.0, (2, 1)) == 0
    grown = target.copy()
    grown[8:12, 5:13] = True  # three columns more: 1, 2 and 3 mm off
    assert leak(grown, target, 2.0, (2, 1)) == 4 / 20
    assert leak(grown, target, 3.0, (2, 1)) == 0
    grown = target.copy()
    grown[8:14, 5:10] = True  # two rows more: 2 and 4 mm off
    assert leak(grown, target, 2.0, (2, 1)) == 5 / 20
    far = np.zeros_like(target)
    far[0, 0] = True  # what is missed does not matter
    assert leak(far, target, 5.0, (2, 1)) == 1 / 20


def test_leak_with_nothing_to_hit():
    empty, some = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    assert leak(empty, empty, 1.0, (1, 1)) == 0
    assert leak(some, empty, 1.0, (1, 1)) == float("inf")
    with pytest.raises(ValueError, match="differ in shape"):
        leak(some, np.eye(5), 1.0, (1, 1))


def test_bounding_window():
    mask = np.zeros((6, 7, 8), bool)
    mask[1, 2:4, 7] = mask[3, 2, 5] = True
    assert bounding_window(mask) == (slice(1, 4), slice(2, 4), slice(5, 8))
