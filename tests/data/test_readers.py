"""Files are read as SimpleITK reads them, and DICOM series as the same volume in NIfTI."""

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
from pydicom.uid import (
    CTImageStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    RTDoseStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)
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
from utils.data.volumes import compare_grids, read_geometry, volumes_by_case
from utils.data.volumes import read_image as read_volume
from utils.prediction.scan import find_scans
from utils.system import UserError

HU = toy_case(1)[0]
ORIGIN = (-96.0, -80.0, 10.0)


def assert_as_simpleitk(path: Path) -> None:
    """Compare voxels bit by bit, and geometry, with SimpleITK's reader and reorientation."""
    stored = sitk.ReadImage(str(path), sitk.sitkFloat32)
    expected, volume = sitk.DICOMOrient(stored, "LPS"), read_volume(path)
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array, sitk.GetArrayFromImage(expected))
    assert volume.spacing_mm == expected.GetSpacing()[::-1]
    assert volume.origin_mm == pytest.approx(expected.GetOrigin(), abs=1e-3)
    assert volume.direction == pytest.approx(expected.GetDirection(), abs=1e-5)
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(stored.GetDirection())
    assert volume.stored_orientation == code
    assert vars(read_geometry(path)).items() <= vars(volume).items()


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float64])
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


@pytest.mark.parametrize("suffix", [".nrrd", ".seg.nrrd", ".mha", ".mhd"])
def test_other_formats(tmp_path, suffix):
    turn = Rotation.from_euler("zx", (0.3, 0.2)).as_matrix()
    for number, compressed in enumerate((True, False)):
        image = sitk.GetImageFromArray(HU)
        image.SetSpacing(SPACING[::-1])
        image.SetOrigin(ORIGIN)
        image.SetDirection((turn[:, [1, 0, 2]] * [1, -1, 1]).ravel())
        sitk.WriteImage(image, str(tmp_path / f"{number}{suffix}"), compressed)
        assert_as_simpleitk(tmp_path / f"{number}{suffix}")
    assert volumes_by_case(tmp_path, "--images").keys() == {"0", "1"}


@pytest.mark.parametrize("qfac", [1, -1, 0])
def test_which_of_two_orientations_counts(tmp_path, qfac):
    """The two forms of one file turn it by different angles: refused if they are of one space."""
    path = tmp_path / "a.nii.gz"
    turn = Rotation.from_euler("z", 0.3).as_matrix() * [1.6, 2.0, 5.0]
    rows = {f"srow_{x}": (slice(3), row) for x, row in zip("xyz", turn, strict=True)}
    for qform, sform in itertools.product(range(3), range(3)):
        write_volume(path, HU)
        codes = {"qform_code": (..., qform), "sform_code": (..., sform), "pixdim": (0, qfac)}
        edit_nifti(path, rows | codes | {"quatern_d": (..., 0.1), "qoffset_x": (..., 4.5)})
        if 0 < qform == sform:
            with pytest.raises(UserError, match=r"the same space \(code .\) but lie up to"):
                read_geometry(path)
        else:
            assert_as_simpleitk(path)


@pytest.mark.parametrize("unit", [1, 2, 3])  # metre, mm, micron
def test_unit_of_a_header(tmp_path, unit):
    path, factor = tmp_path / "a.nii.gz", {1: 1e-3, 2: 1, 3: 1e3}[unit]
    write_volume(path, HU)
    expected, header = read_volume(path), nibabel.load(path).header
    names = ["qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"]
    fields = {name: (..., header[name] * factor) for name in names}
    fields["pixdim"] = (slice(1, 4), header["pixdim"][1:4] * factor)
    edit_nifti(path, fields | {"xyzt_units": (..., unit)})
    found = read_volume(path)
    assert found.spacing_mm == pytest.approx(expected.spacing_mm)
    assert found.origin_mm == pytest.approx(expected.origin_mm)


def test_nifti_2(tmp_path):
    write_volume(tmp_path / "a.nii.gz", HU)
    expected, image = read_volume(tmp_path / "a.nii.gz"), nibabel.load(tmp_path / "a.nii.gz")
    second = nibabel.Nifti2Image.from_image(image)
    for header in (second.header, second.header.as_byteswapped(">")):
        path = tmp_path / "b.nii"
        nibabel.Nifti2Image(image.dataobj, None, header).to_filename(path)
        found = read_volume(path)
        assert np.array_equal(found.array, expected.array)
        assert vars(read_geometry(path)) == vars(read_geometry(tmp_path / "a.nii.gz"))


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
    """Change tags of a file, or remove those that become None."""
    entry = pydicom.dcmread(path)
    for name, value in values.items():
        delattr(entry, name) if value is None else setattr(entry, name, value)
    entry.file_meta.MediaStorageSOPClassUID = entry.SOPClassUID
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
        for field in ("shape", "spacing_mm", "origin_mm", "direction"):
            assert getattr(geometry, field) == pytest.approx(getattr(other[case], field))
        assert geometry.stored_orientation == other[case].stored_orientation == "LPS"


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


def no_ct(folder: Path, paths: list[Path]) -> None:
    for path in paths:
        edit(path, Modality="MR")


def moved(z: int, y: float = 0, up: float = 0) -> Callable[[Path, list[Path]], None]:
    position = [ORIGIN[0], ORIGIN[1] + y, ORIGIN[2] + z * SPACING[0] + up]
    return lambda folder, paths: edit(paths[z], ImagePositionPatient=position)


def tilted(folder: Path, paths: list[Path]) -> None:
    for z in (1, 2):
        moved(z, y=1.5 * z)(folder, paths)


def cut(keep: float) -> Callable[[Path, list[Path]], None]:
    return lambda folder, paths: os.truncate(paths[1], int(paths[1].stat().st_size * keep))


BAD = {
    "two series": (second_series, "toy_1: holds 2 series, 3 files like IM21, 2 files like IM21"),
    "a gap": (moved(2, up=5), "lie 10 mm apart, others 5 mm"),
    "one place": (moved(2, up=-5), "lie 5 mm apart, others 0 mm"),
    "tilted": (tilted, "shifted by up to 1.5 pixels: one is missing or repeated, or the gantry"),
    "no CT": (no_ct, "toy_1: holds 0 CT slices and 3 other files, not a volume"),
    "frames": (multi_frame, ": several frames; export it with one file per slice"),
    "other size": (half_as_high, "slices differ in size"),
    "other spacing": (
        changed(PixelSpacing=[3.0, 3.0]),
        "slices differ in size, direction or spacing",
    ),
    "one slice": (
        lambda folder, paths: [p.unlink() for p in paths[1:]],
        "holds 1 CT slice and 0 other files, not a volume; 2D",
    ),
    "cut in half": (cut(0.5), "IM21: cannot be read"),
    "cut by little": (cut(0.995), "IM21: cannot be read"),
    "no position": (changed(ImagePositionPatient=None), "IM21: no slice position"),
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
    assert "holds 2 series" in shown
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    texts = [shown.encode(), *(str(path).encode() + path.read_bytes() for path in written)]
    for secret in (*SECRETS.values(), uid, "Eleonora"):
        assert not any(secret.casefold().encode() in text.lower() for text in texts), secret


def test_series_is_a_scan_to_predict(tmp_path):
    write_series(tmp_path / "series", toy_case(0)[0])
    for path in (tmp_path, tmp_path / "series"):
        assert find_scans(path) == {"series": tmp_path / "series"}


# --- Folders as archives export them -------------------------------------------------------------
def test_what_is_no_slice_is_left_out_and_said(tmp_path):
    """A localizer of the same series, a dose, a screenshot, a report, and a file cut short."""
    paths = write_series(tmp_path / "a", HU)
    expected = read_volume(tmp_path / "a")
    others = {
        "scout": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        "dose": {"SOPClassUID": RTDoseStorage, "Modality": "RTDOSE"},
        "screen": {"SOPClassUID": SecondaryCaptureImageStorage, "ImagePositionPatient": None},
        "report": {"SOPClassUID": EnhancedSRStorage, "Modality": "SR", "PixelData": None},
    }
    for name, changes in others.items():
        shutil.copy(paths[0], tmp_path / "a" / name)
        edit(tmp_path / "a" / name, **changes)
    found = read_volume(tmp_path / "a")
    assert np.array_equal(found.array, expected.array)
    assert found.origin_mm == expected.origin_mm and not expected.notes
    (note,) = found.notes
    assert "dose, report, scout and 1 more: not a CT slice" in note


def test_files_without_a_preamble(tmp_path):
    paths = write_series(tmp_path / "a", HU)
    expected = read_volume(tmp_path / "a")
    for path in paths:
        path.write_bytes(path.read_bytes()[132:])
    assert np.array_equal(read_volume(tmp_path / "a").array, expected.array)


def test_all_that_is_wrong_is_said_at_once(dicom, tmp_path, fails):
    folder = dicom / "images" / "toy_1"
    second_series(folder, [])
    half_as_high(folder, [folder, folder / "IM21"])
    cut(0.5)(folder, [folder, folder / "IM50"])
    message = refused(fails, dicom, tmp_path / "out")
    for expected in ("IM50: cannot be read; holds 2 series", "differ in size"):
        assert expected in message


def test_values_that_may_not_be_in_hu_are_noted(tmp_path):
    for path in write_series(tmp_path / "a", HU + 1024, intercept=0.0):
        edit(path, RescaleIntercept=None)
    rescale, air = read_volume(tmp_path / "a").notes
    assert "no Rescale Intercept" in rescale and "no value is below -200 HU" in air
