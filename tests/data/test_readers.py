"""NIfTI is read as SimpleITK reads it, and DICOM series as the same volume in NIfTI."""

import gzip
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.spatial.transform import Rotation

from tests.helpers import (
    SPACING,
    assert_same_slices,
    edit_nifti,
    preprocess,
    refused,
    toy_case,
    write_cases,
    write_volume,
)
from utils.data.slices import open_dataset
from utils.data.volumes import compare_grids, read_geometry
from utils.data.volumes import read_image as read_volume
from utils.prediction.scan import find_scans

HU = toy_case(1)[0]
ORIGIN = (-96.0, -80.0, 10.0)


def assert_as_simpleitk(path: Path) -> None:
    """Compare voxels bit by bit, and geometry, with SimpleITK's reader and reorientation."""
    stored = sitk.ReadImage(str(path), sitk.sitkFloat32, "NiftiImageIO")
    expected, volume = sitk.DICOMOrient(stored, "LPS"), read_volume(path)
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array, sitk.GetArrayFromImage(expected))
    assert volume.spacing_mm == expected.GetSpacing()[::-1]
    assert volume.origin_mm == pytest.approx(expected.GetOrigin(), abs=1e-3)
    assert volume.direction == pytest.approx(expected.GetDirection(), abs=1e-5)
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(stored.GetDirection())
    assert volume.stored_orientation == code
    assert vars(read_geometry(path)).items() <= vars(volume).items()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_every_orientation(tmp_path, dtype):
    path = tmp_path / "a.nii.gz"
    for order in itertools.permutations(("LR", "PA", "IS")):
        for name in map("".join, itertools.product(*order)):
            write_volume(path, HU.clip(0).astype(dtype), orientation=name)
            assert_as_simpleitk(path)
            assert read_geometry(path).stored_orientation == name


def test_oblique_axes(tmp_path):
    for number, turn in enumerate(Rotation.random(25, random_state=0).as_matrix()):
        image = sitk.GetImageFromArray(HU)
        image.SetSpacing((0.7, 1.3, 2.9))
        image.SetOrigin((-31.5, 120.25, 7.125))
        image.SetDirection((turn * [1, 1, (-1) ** number]).ravel())
        sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
        assert_as_simpleitk(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("qfac", [1, -1, 0])
def test_which_of_two_orientations_counts(tmp_path, qfac):
    """The two forms of one file turn it by different angles, or the s-form is skewed."""
    path = tmp_path / "a.nii.gz"
    turn = Rotation.from_euler("z", 0.3).as_matrix() * [1.6, 2.0, 5.0]
    skewed = turn + [[0, 0.5, 0], [0, 0, 0], [0, 0, 0]]
    for axes, qform, sform in itertools.product((turn, skewed), range(3), range(3)):
        if qform or axes is turn:
            write_volume(path, HU)
            rows = {f"srow_{x}": (slice(3), row) for x, row in zip("xyz", axes, strict=True)}
            codes = {"qform_code": (..., qform), "sform_code": (..., sform), "pixdim": (0, qfac)}
            edit_nifti(path, rows | codes | {"quatern_d": (..., 0.1), "qoffset_x": (..., 4.5)})
            assert_as_simpleitk(path)


@pytest.mark.parametrize("scale", [(2, 0), (1, -1024), (0.1, -3.3), (0, 0), (-1, 0)])
def test_slope_and_intercept(tmp_path, scale):
    path = tmp_path / "a.nii.gz"
    write_volume(path, HU)
    edit_nifti(path, {"scl_slope": (..., scale[0]), "scl_inter": (..., scale[1])})
    assert_as_simpleitk(path)


def test_big_endian_several_gzip_members_and_uncompressed(tmp_path):
    """As other programs write: bytes swapped, or blocks compressed one by one as bgzip does."""
    path = tmp_path / "a.nii.gz"
    write_volume(path, HU)
    expected = read_volume(path)
    little = gzip.decompress(path.read_bytes())
    for content in (little, gzip.compress(little[:9000]) + gzip.compress(little[9000:])):
        path.write_bytes(content)
        assert np.array_equal(read_volume(path).array, expected.array)
    swapped = nibabel.Nifti1Header(little[:348]).as_byteswapped(">")
    path.write_bytes(swapped.binaryblock + little[348:352] + HU.astype(">i2").tobytes())
    assert np.array_equal(read_volume(path).array, expected.array)
    assert read_volume(path).origin_mm == expected.origin_mm
    assert_as_simpleitk(path.rename(tmp_path / "a.nii"))


SECRETS = {
    "PatientName": "Planted^Eleonora",
    "PatientID": "PLANTED-4711",
    "AccessionNumber": "PLANTEDACC99",
    "InstitutionName": "Planted Hospital",
    "StudyDescription": "planted study",
}


def write_series(
    folder: Path,
    hu: np.ndarray,
    slope: float = 1.0,
    intercept: float = -1024.0,
    across: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
) -> list[Path]:
    """Write a volume (z, y, x) as files whose names are not in the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    series, normal = generate_uid(), np.cross(across[:3], across[3:])
    paths = []
    for z, plane in enumerate(hu):
        entry = pydicom.Dataset()
        for name, value in SECRETS.items():
            setattr(entry, name, value)
        entry.SOPClassUID, entry.SOPInstanceUID = CTImageStorage, generate_uid()
        entry.Modality, entry.SeriesInstanceUID = "CT", series
        entry.StudyInstanceUID = generate_uid()
        entry.Rows, entry.Columns = plane.shape
        entry.PixelSpacing = [SPACING[1], SPACING[2]]  # between rows, between columns
        entry.SliceThickness = 1.0  # not the slices' distance
        entry.ImageOrientationPatient = list(map(float, across))
        entry.ImagePositionPatient = [float(v) for v in ORIGIN + z * SPACING[0] * normal]
        entry.SamplesPerPixel, entry.PhotometricInterpretation = 1, "MONOCHROME2"
        entry.BitsAllocated = entry.BitsStored = 16
        entry.HighBit, entry.PixelRepresentation = 15, 1
        entry.RescaleSlope, entry.RescaleIntercept = slope, intercept
        entry.PixelData = np.rint((plane - intercept) / slope).astype("<i2").tobytes()
        entry.file_meta = pydicom.dataset.FileMetaDataset()
        entry.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(folder / f"IM{(z * 7 + 5) % 10}{z}")
        entry.save_as(paths[-1], enforce_file_format=True)
    return paths


def edit(path: Path, **values) -> None:
    entry = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(entry, name, value)
    entry.save_as(path)


@pytest.fixture
def dicom(tmp_path) -> Path:
    """Three toy cases: DICOM series with NIfTI labels."""
    folder = tmp_path / "ct"
    write_cases(folder, 3)
    shutil.rmtree(folder / "images")
    for number in range(3):
        write_series(folder / "images" / f"toy_{number}", toy_case(number)[0])
    return folder


def test_series_gives_the_slices_of_the_nifti(dicom, tmp_path):
    write_cases(tmp_path / "nifti", 3)
    first, second = (dicom / "images" / f"toy_{number}" for number in (0, 1))
    (first / "DICOMDIR").write_bytes(bytes(128) + b"DICM of the CD")
    (first / "notes.txt").write_text("no slice")
    (dicom / "images" / "empty").mkdir()
    (second / "S1").mkdir()
    for path in second.glob("IM*"):  # as on a CD
        path.rename(second / "S1" / path.name)
    preprocess(dicom, tmp_path / "dicom")
    preprocess(tmp_path / "nifti", tmp_path / "out")
    assert_same_slices(tmp_path / "dicom", tmp_path / "out")
    one, other = (open_dataset(tmp_path / name).geometry for name in ("dicom", "out"))
    for case, geometry in one.items():  # NIfTI's numbers are single precision
        for field, value in vars(geometry).items():
            expected = getattr(other[case], field)
            assert value == (expected if isinstance(value, str) else pytest.approx(expected))


@pytest.mark.parametrize(
    "across",
    [
        (1, 0, 0, 0, -1, 0),
        (-1, 0, 0, 0, 1, 0),
        (0, 1, 0, 0, 0, -1),  # sagittal
        (np.cos(0.2), np.sin(0.2), 0, -np.sin(0.2), np.cos(0.2), 0),
    ],
)
def test_series_is_read_as_simpleitk_reads_it(tmp_path, across):
    """However the slices lie and are scaled; label maps of that grid fit in any orientation."""
    series = write_series(tmp_path / "a", toy_case(0)[0], 0.5, -2000.0, across)[0].parent
    expected = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series)))
    assert expected.GetSpacing() == pytest.approx(SPACING[::-1])
    for orientation in ("RAS", "SPL"):  # a program may store its labels in another order
        path = tmp_path / f"{orientation}.nii.gz"
        sitk.WriteImage(sitk.DICOMOrient(expected > 50, orientation), str(path))
        compare_grids(read_geometry(path), path, read_geometry(series), "a")
    volume, expected = read_volume(series), sitk.DICOMOrient(expected, "LPS")
    assert np.array_equal(volume.array, sitk.GetArrayFromImage(expected))
    assert volume.origin_mm == pytest.approx(expected.GetOrigin(), abs=1e-4)
    assert volume.direction == pytest.approx(expected.GetDirection(), abs=1e-6)
    assert volume.spacing_mm == pytest.approx(expected.GetSpacing()[::-1])


def test_hash_is_of_the_files_not_of_their_names(tmp_path):
    paths = write_series(tmp_path / "a", toy_case(0)[0])
    before = read_volume(tmp_path / "a").sha256
    paths[0].rename(tmp_path / "a" / "z")
    assert read_volume(tmp_path / "a").sha256 == before
    edit(paths[1], RescaleIntercept=7.0)
    assert read_volume(tmp_path / "a").sha256 != before


def changed(**values: object) -> Callable[[Path, list[Path]], None]:
    return lambda folder, paths: edit(paths[1], **values)


def half_as_high(folder: Path, paths: list[Path]) -> None:
    edit(paths[1], Rows=40, PixelData=pydicom.dcmread(paths[1]).PixelData[: 40 * 96 * 2])


def second_series(folder: Path, paths: list[Path]) -> None:
    write_series(folder / "more", toy_case(1)[0][:2])


def multi_frame(folder: Path, paths: list[Path]) -> None:
    edit(paths[0], NumberOfFrames=2, PixelData=pydicom.dcmread(paths[0]).PixelData * 2)


def moved(z: int, y: float = 0, up: float = 0) -> Callable[[Path, list[Path]], None]:
    position = [ORIGIN[0], ORIGIN[1] + y, ORIGIN[2] + z * SPACING[0] + up]
    return lambda folder, paths: edit(paths[z], ImagePositionPatient=position)


def tilted(folder: Path, paths: list[Path]) -> None:
    for z in (1, 2):
        moved(z, y=1.5 * z)(folder, paths)


def cut(keep: float) -> Callable[[Path, list[Path]], None]:
    return lambda folder, paths: os.truncate(paths[1], int(paths[1].stat().st_size * keep))


BAD = {
    "two series": (second_series, "of the 5 files in one"),
    "a gap": (moved(2, up=5), "lie 10 mm apart, others 5 mm"),
    "one place": (moved(2, up=-5), "lie 5 mm apart, others 0 mm"),
    "tilted": (tilted, "shifted by up to 1.5 pixels: one is missing or repeated, or the gantry"),
    "no CT": (changed(Modality="MR"), "not CT alone"),
    "frames": (multi_frame, "cannot be read as slices of one size, one a file"),
    "other size": (half_as_high, "cannot be read as slices of one size"),
    "other spacing": (changed(PixelSpacing=[3.0, 3.0]), "differ in direction or spacing"),
    "one slice": (lambda folder, paths: [p.unlink() for p in paths[1:]], "two or more slices"),
    "cut in half": (cut(0.5), "IM21: expected one DICOM series, found 2 of the 3 files in one"),
    "cut by little": (cut(0.995), "IM21: expected"),
    "no position": (changed(ImagePositionPatient=None), "that say where they lie"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_series_is_one_line_without_names(dicom, tmp_path, fails, kind):
    damage, expected = BAD[kind]
    folder = dicom / "images" / "toy_1"
    damage(folder, [next(folder.glob(f"IM?{z}")) for z in range(3)])
    message = refused(fails, dicom, tmp_path / "out")
    assert expected in message and "toy_1" in message
    assert not any(secret in message for secret in SECRETS.values())


def test_nothing_of_a_header_but_geometry_goes_anywhere(dicom, tmp_path, capfd):
    series = next((dicom / "images" / "toy_0").iterdir())
    uid = pydicom.dcmread(series).SeriesInstanceUID
    assert b"Planted^Eleonora" in series.read_bytes()
    second_series(dicom / "images" / "toy_2", [])
    meta = preprocess(dicom, tmp_path / "out", "--skip-bad")
    assert meta["cases"].keys() == {"toy_0", "toy_1"}
    shown = "".join(capfd.readouterr())
    assert "of the 5 files in one" in shown
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    texts = [shown.encode(), *(str(path).encode() + path.read_bytes() for path in written)]
    for secret in (*SECRETS.values(), uid, "Eleonora"):
        assert not any(secret.casefold().encode() in text.lower() for text in texts), secret


def test_series_is_a_scan_to_predict(tmp_path):
    write_series(tmp_path / "series", toy_case(0)[0])
    for path in (tmp_path, tmp_path / "series"):
        assert find_scans(path) == {"series": tmp_path / "series"}
