"""Synthetic patients: determinism, format, anatomy and the difficulty of the small organs."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from utils.data.labels import FLARE22_LABELS
from utils.data.synthetic import SIZE, SyntheticPatient, make_patient, write_patients

PATIENTS = 8
# Mean HU of an organ's pixels, per patient: (lowest, highest) plausible value.
HU_RANGE = {
    **{1: (85, 135), 2: (120, 190), 3: (90, 145), 4: (60, 125), 5: (120, 200), 6: (100, 175)},
    **{7: (20, 110), 8: (20, 110), 9: (-15, 40), 10: (0, 65), 11: (-300, 60), 12: (25, 75)},
    13: (120, 190),
}
SMALL = {7: 0.002, 8: 0.002, 10: 0.002, 9: 0.006}  # largest median share of the slice's area


@pytest.fixture(scope="module")
def cohort() -> list[SyntheticPatient]:
    return [make_patient(np.random.default_rng([0, k])) for k in range(1, PATIENTS + 1)]


def _sections(cohort: list[SyntheticPatient], label: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(mask of the organ, label map) of every slice that shows the organ."""
    maps = [plane for patient in cohort for plane in patient.labels]
    return [(plane == label, plane) for plane in maps if (plane == label).any()]


def test_files_depend_on_the_seed_and_the_patient_alone(tmp_path: Path) -> None:
    assert write_patients(tmp_path / "a", 2, 2, seed=3) == ["demo_01", "demo_02"]
    write_patients(tmp_path / "b", 3, 2, seed=3)
    write_patients(tmp_path / "c", 2, 2, seed=4)
    a, b, c = (
        {file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.nii.gz")}
        for name in "abc"
    )
    assert a.items() <= b.items() and (len(a), len(b)) == (4, 6)
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)


def test_files_hold_the_arrays_in_lps(tmp_path: Path) -> None:
    write_patients(tmp_path, 1, 3, seed=7)
    patient = make_patient(np.random.default_rng([7, 1]), 3)
    for file, array, kind in (
        ("images/demo_01_0000.nii.gz", patient.hu, sitk.sitkInt16),
        ("labels/demo_01.nii.gz", patient.labels, sitk.sitkUInt8),
    ):
        read = sitk.ReadImage(str(tmp_path / file))
        assert np.array_equal(sitk.GetArrayFromImage(read), array) and read.GetPixelID() == kind
        assert read.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
        assert read.GetSpacing()[::-1] == pytest.approx(patient.spacing, abs=1e-5)


def test_shape_spacing_and_organs_per_slice(cohort: list[SyntheticPatient]) -> None:
    for patient in cohort:
        assert patient.hu.shape == patient.labels.shape == (4, SIZE, SIZE)
        z, y, x = patient.spacing
        assert 10 <= z <= 12 and 1.4 <= y == x <= 1.5 and patient.labels.max() <= 13
    counts = [len(np.unique(plane)) - 1 for patient in cohort for plane in patient.labels]
    assert 8 <= np.mean(counts) <= 11 and min(counts) >= 5


@pytest.mark.parametrize("label", FLARE22_LABELS)
def test_organ_occurs_in_one_piece_with_plausible_attenuation(cohort, label: int) -> None:
    means = [p.hu[p.labels == label].mean() for p in cohort if (p.labels == label).any()]
    assert len(means) >= PATIENTS / 2
    low, high = HU_RANGE[label]
    assert low <= min(means) and max(means) <= high
    assert all(ndimage.label(mask)[1] == 1 for mask, _ in _sections(cohort, label))


@pytest.mark.parametrize(
    ("first", "second", "axis", "sign"),
    # Of the first one's centroid less the second one's: x grows to the left, y to the back.
    [(1, 3, "x", -1), (2, 6, "x", -1), (13, 5, "x", 1), (8, 5, "x", 1), (2, 1, "y", 1)],
)
def test_relative_positions(cohort, first, second, axis, sign) -> None:
    both = [plane for _, plane in _sections(cohort, first) if (plane == second).any()]
    assert len(both) >= 6
    for plane in both:
        one, other = (np.nonzero(plane == k)["yx".index(axis)].mean() for k in (first, second))
        assert sign * (one - other) > 0


@pytest.mark.parametrize("label", SMALL)
def test_small_organs_are_small(cohort: list[SyntheticPatient], label: int) -> None:
    areas = [mask.mean() for mask, _ in _sections(cohort, label)]
    assert np.median(areas) < SMALL[label] and min(areas) * SIZE * SIZE >= 16
