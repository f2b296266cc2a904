"""Synthetic patients: determinism, format, anatomy and the difficulty of the small organs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from utils.data.labels import FLARE22_LABELS
from utils.data.synthetic import SIZE, SyntheticPatient, make_patient, write_patients

PATIENTS = 12
# Mean HU of an organ's pixels, per patient: (lowest, highest) plausible value.
HU_RANGE = {
    1: (85, 135),
    2: (120, 190),
    3: (90, 145),
    4: (60, 125),
    5: (120, 200),
    6: (100, 175),
    7: (20, 110),
    8: (20, 110),
    9: (-15, 40),
    10: (0, 65),
    11: (-300, 60),  # with the air bubble
    12: (25, 75),
    13: (120, 190),
}
SMALL = {7: 0.002, 8: 0.002, 10: 0.002, 9: 0.006}  # largest median share of the slice's area


@pytest.fixture(scope="module")
def cohort() -> list[SyntheticPatient]:
    return [make_patient(np.random.default_rng([0, k])) for k in range(1, PATIENTS + 1)]


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.nii.gz"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _sections(cohort: list[SyntheticPatient], label: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(mask of the organ, label map) of every slice that shows the organ."""
    maps = [plane for patient in cohort for plane in patient.labels]
    return [(plane == label, plane) for plane in maps if (plane == label).any()]


def _offsets(cohort: list[SyntheticPatient], first: int, second: int, axis: int) -> np.ndarray:
    """Centroid of ``first`` minus that of ``second`` along y (0) or x (1), px, slice by slice."""
    return np.array(
        [
            np.nonzero(mask)[axis].mean() - np.nonzero(plane == second)[axis].mean()
            for mask, plane in _sections(cohort, first)
            if (plane == second).any()
        ]
    )


def test_files_depend_on_the_seed_and_the_patient_alone(tmp_path: Path) -> None:
    assert write_patients(tmp_path / "a", 2, 2, seed=3) == ["demo_01", "demo_02"]
    write_patients(tmp_path / "b", 3, 2, seed=3)
    write_patients(tmp_path / "c", 2, 2, seed=4)
    a, b, c = (_digests(tmp_path / name) for name in "abc")
    assert sorted(a) == [
        "images/demo_01_0000.nii.gz",
        "images/demo_02_0000.nii.gz",
        "labels/demo_01.nii.gz",
        "labels/demo_02.nii.gz",
    ]
    assert a.items() <= b.items() and len(b) == 6
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)
    assert len(set(a.values())) == len(a)


def test_files_hold_the_arrays_in_lps(tmp_path: Path) -> None:
    write_patients(tmp_path, 1, 3, seed=7)
    patient = make_patient(np.random.default_rng([7, 1]), 3)
    image = sitk.ReadImage(str(tmp_path / "images" / "demo_01_0000.nii.gz"))
    label = sitk.ReadImage(str(tmp_path / "labels" / "demo_01.nii.gz"))
    for read, array in ((image, patient.hu), (label, patient.labels)):
        assert np.array_equal(sitk.GetArrayFromImage(read), array)
        assert read.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        assert read.GetSpacing()[::-1] == pytest.approx(patient.spacing, abs=1e-5)
    assert image.GetPixelID() == sitk.sitkInt16
    assert label.GetPixelID() == sitk.sitkUInt8


def test_shape_dtype_spacing_and_organs_per_slice(cohort: list[SyntheticPatient]) -> None:
    for patient in cohort:
        assert patient.hu.shape == patient.labels.shape == (4, SIZE, SIZE)
        assert patient.hu.dtype == np.int16 and patient.labels.dtype == np.uint8
        assert 10 <= patient.spacing[0] <= 12
        assert patient.spacing[1] == patient.spacing[2] and 1.4 <= patient.spacing[1] <= 1.5
        assert patient.labels.max() <= 13
    assert len({patient.spacing for patient in cohort}) > 1
    counts = [len(np.unique(plane)) - 1 for patient in cohort for plane in patient.labels]
    assert 8 <= np.mean(counts) <= 11 and min(counts) >= 5
    assert make_patient(np.random.default_rng(0), 1).hu.shape == (1, SIZE, SIZE)


@pytest.mark.parametrize("label", FLARE22_LABELS)
def test_organ_occurs_with_plausible_attenuation(
    cohort: list[SyntheticPatient], label: int
) -> None:
    means = [p.hu[p.labels == label].mean() for p in cohort if (p.labels == label).any()]
    assert len(means) >= PATIENTS / 2
    low, high = HU_RANGE[label]
    assert low <= min(means) and max(means) <= high


def test_air_outside_and_correlated_noise(cohort: list[SyntheticPatient]) -> None:
    for patient in cohort:
        # The corners show air and nothing but the noise of the reconstruction kernel.
        corner = patient.hu[:, :24, :24].astype(float)
        assert -1005 < corner.mean() < -990
        assert 8 < corner.std() < 16
        assert 0.25 < np.corrcoef(corner[..., 1:].ravel(), corner[..., :-1].ravel())[0, 1] < 0.9
        liver = ndimage.binary_erosion(patient.labels[0] == 1, iterations=3)
        assert 8 < patient.hu[0][liver].std() < 25


@pytest.mark.parametrize(
    "first, second, axis, side",
    [
        (1, 3, "x", "right"),  # liver, spleen
        (6, 5, "x", "right"),  # vena cava, aorta
        (2, 6, "x", "right"),  # right kidney, vena cava
        (13, 5, "x", "left"),  # left kidney, aorta
        (7, 5, "x", "right"),  # right adrenal, aorta
        (8, 5, "x", "left"),  # left adrenal, aorta
        (9, 4, "x", "right"),  # gallbladder, pancreas
        (11, 1, "x", "left"),  # stomach, liver
        (2, 1, "y", "posterior"),  # right kidney, liver
        (13, 1, "y", "posterior"),  # left kidney, liver
        (5, 13, "y", "anterior"),  # aorta, left kidney
        (4, 5, "y", "anterior"),  # pancreas, aorta
        (10, 5, "y", "anterior"),  # esophagus, aorta
        (11, 13, "y", "anterior"),  # stomach, left kidney
    ],
)
def test_relative_positions(
    cohort: list[SyntheticPatient], first: int, second: int, axis: str, side: str
) -> None:
    offsets = _offsets(cohort, first, second, "yx".index(axis))
    assert len(offsets) >= 6
    sign = {"right": -1, "left": 1, "anterior": -1, "posterior": 1}[side]
    assert (sign * offsets > 0).all()


def test_spine_lies_behind_the_aorta_in_the_midline(cohort: list[SyntheticPatient]) -> None:
    for patient in cohort:
        for hu, plane in zip(patient.hu, patient.labels, strict=True):
            y, x = (int(v.mean()) for v in np.nonzero(plane == 5))
            # The largest bony region near the aorta is the vertebra.
            near = hu[y - 10 : y + 50, x - 40 : x + 30] > 180
            near &= plane[y - 10 : y + 50, x - 40 : x + 30] == 0
            rows, _ = np.nonzero(ndimage.binary_opening(near, iterations=1))
            assert len(rows) > 150 and rows.mean() - 10 > 8


def test_anatomy_changes_along_z(cohort: list[SyntheticPatient]) -> None:
    def area(label: int, z: int) -> float:
        return float(np.mean([(patient.labels[z] == label).sum() for patient in cohort]))

    assert area(1, 0) < area(1, 3)  # the liver shrinks downwards
    for lower in (2, 9, 12, 13):
        assert area(lower, 0) > area(lower, 3)
    assert area(10, 0) == 0 < area(10, 3)


@pytest.mark.parametrize("label", SMALL)
def test_small_organs_are_small(cohort: list[SyntheticPatient], label: int) -> None:
    areas = [mask.mean() for mask, _ in _sections(cohort, label)]
    assert np.median(areas) < SMALL[label]
    assert min(areas) * SIZE * SIZE >= 16


@pytest.mark.parametrize("label", [4, 7, 8, 9, 10, 12])
def test_small_organs_lie_against_a_labelled_neighbour(
    cohort: list[SyntheticPatient], label: int
) -> None:
    sections = _sections(cohort, label)
    close = [
        (plane[ndimage.binary_dilation(mask, iterations=2) & ~mask] > 0).any()
        for mask, plane in sections
    ]
    assert np.mean(close) > 0.6


def test_organ_masks_are_connected(cohort: list[SyntheticPatient]) -> None:
    counts = [
        ndimage.label(mask)[1] for label in FLARE22_LABELS for mask, _ in _sections(cohort, label)
    ]
    assert np.mean(np.array(counts) == 1) > 0.97


def test_patients_differ(cohort: list[SyntheticPatient]) -> None:
    widths = [np.ptp(np.nonzero((patient.hu[0] > -300).any(axis=0))[0]) for patient in cohort]
    assert np.std(widths) > 4
    first, second = (cohort[k].labels[1] == 1 for k in (0, 1))
    overlap = 2 * (first & second).sum() / (first.sum() + second.sum())
    assert 0.4 < overlap < 0.95
