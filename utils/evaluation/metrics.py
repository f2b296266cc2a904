"""DSC (13) and NSD (14) of binary masks, in 2D and 3D, and how far a mask leaks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import distance_transform_edt
from surface_distance import compute_surface_dice_at_tolerance, compute_surface_distances


def dsc(prediction: np.ndarray, target: np.ndarray) -> float:
    """Dice similarity coefficient (13) 2 |P & T| / (|P| + |T|), 0 to 1; both masks empty: 1."""
    prediction, target = _as_masks(prediction, target)
    size = int(prediction.sum()) + int(target.sum())
    return 2 * int((prediction & target).sum()) / size if size else 1.0


def nsd(
    prediction: np.ndarray, target: np.ndarray, tolerance_mm: float, spacing_mm: Sequence[float]
) -> float:
    """Normalised surface distance (14), 0 to 1: the share of both borders within the tolerance.

    The definition of google-deepmind/surface-distance: borders are weighted by contour length in
    2D and by surface area in 3D. Both masks empty: 1; one empty: 0. Borders up to `tolerance_mm`
    apart agree; `spacing_mm` is along each array axis, (y, x) or (z, y, x). A slice must be 2D: as
    a flat 3D mask its faces would count as surface.
    """
    prediction, target = _as_masks(prediction, target)
    if not prediction.any() or not target.any():  # surface-distance 0.1 fails on these
        return float(not prediction.any() and not target.any())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its scipy.ndimage namespaces
        distances = compute_surface_distances(target, prediction, spacing_mm)
        return float(compute_surface_dice_at_tolerance(distances, tolerance_mm))


def leak(
    prediction: np.ndarray, target: np.ndarray, tolerance_mm: float, spacing_mm: Sequence[float]
) -> float:
    """Area predicted farther than the tolerance outside the target, as a share of the target's.

    Distances are between pixel centres; arguments are as in `nsd`. Not part of the paper: this
    project's measure of a mask that runs into the neighbour, 0 or more. An empty prediction leaks
    nothing; an empty target has no area to share and gives infinity for any other prediction.
    """
    prediction, target = _as_masks(prediction, target)
    outside = prediction & ~target
    if not outside.any():
        return 0.0
    if not target.any():
        return float("inf")
    window = bounding_window(prediction | target)
    distance = distance_transform_edt(~target[window], sampling=spacing_mm)
    return int((outside[window] & (distance > tolerance_mm)).sum()) / int(target.sum())


def bounding_window(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest window that holds all of a mask that is not empty, as an index."""
    axes = range(mask.ndim)
    filled = [np.flatnonzero(mask.any(axis=tuple(a for a in axes if a != axis))) for axis in axes]
    return tuple(slice(int(along[0]), int(along[-1]) + 1) for along in filled)


def _as_masks(prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, target = np.asarray(prediction, bool), np.asarray(target, bool)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} differ in shape")
    return prediction, target
