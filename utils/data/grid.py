"""Grids of voxels, from the axes of their file to LPS (x to the left, y back, z to the head)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from utils.data.slices import Geometry


@dataclass(frozen=True)
class StoredGrid:
    """The grid of a volume as its file stores it; axes are the file's own (i, j, k).

    Attributes:
        size: voxels along i, j, k.
        spacing_mm: (3,) along i, j, k.
        origin_mm: (3,) LPS position of voxel (0, 0, 0).
        axes: (3, 3) direction cosines in LPS, one column per axis.
    """

    size: tuple[int, int, int]
    spacing_mm: np.ndarray
    origin_mm: np.ndarray
    axes: np.ndarray

    def in_lps(self) -> Geometry:
        """The same grid with its axes permuted and flipped to LPS."""
        to_stored = inv_ornt_aff(self._turn(), self.size)  # from indices in LPS to stored ones
        permutation, first_voxel = to_stored[:3, :3], to_stored[:3, 3]
        axes = self.axes @ permutation
        origin = self.axes @ (first_voxel * self.spacing_mm) + self.origin_mm
        order = np.abs(permutation).argmax(axis=0)[::-1]  # stored axes in the order z, y, x
        return Geometry(
            tuple(self.size[axis] for axis in order),
            tuple(self.spacing_mm[order].tolist()),
            tuple(origin.tolist()),
            tuple(axes.ravel().tolist()),
            self._orientation(),
        )

    def voxels_in_lps(self, voxels: np.ndarray) -> np.ndarray:
        """A view (z, y, x) in LPS of the stored voxels (i, j, k)."""
        return apply_orientation(voxels, self._turn()).T

    def _orientation(self) -> str:
        # By SimpleITK, for oblique volumes too: it writes predictions in this orientation.
        cosines = self.axes.ravel().tolist()
        return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(cosines)

    def _turn(self) -> np.ndarray:
        return ornt_transform(axcodes2ornt(self._orientation()), axcodes2ornt("LPS"))
