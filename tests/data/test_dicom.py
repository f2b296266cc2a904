"""DICOM series written by pydicom: the same slices as from NIfTI, or one line without names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import eval as evaluation
import preprocess_ct
from tests.helpers import SHAPE, SPACING, refused, toy_case, write_cases, write_volume
from utils.data import dicom
from utils.data.slices import open_dataset, read_image, read_label_map
from utils.data.volumes import check_grids, find_pairs
from utils.data.volumes import read_image as read_volume

ORIGIN = (-96.0, -80.0, 10.0)
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
    origin: tuple[float, ...] = ORIGIN,
    slope: float = 1.0,
    intercept: float = -1024.0,
    across: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    uid: str | None = None,
) -> list[Path]:
    """Write a volume (z, y, x) as files whose names are not in the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    normal = np.cross(across[:3], across[3:])
    paths = []
    for z, plane in enumerate(hu):
        entry = pydicom.Dataset()
        for name, value in SECRETS.items():
            setattr(entry, name, value)
        entry.SOPClassUID, entry.SOPInstanceUID = CTImageStorage, generate_uid()
        entry.Modality, entry.SeriesInstanceUID, entry.StudyInstanceUID = "CT", uid, generate_uid()
        entry.Rows, entry.Columns = plane.shape
        entry.PixelSpacing = [SPACING[1], SPACING[2]]  # between rows, between columns
        entry.SliceThickness = 1.0  # not the slices' distance
        entry.ImageOrientationPatient = list(map(float, across))
        entry.ImagePositionPatient = [float(v) for v in origin + z * SPACING[0] * normal]
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
    """Change tags of a file."""
    entry = pydicom.dcmread(path)
    for name, value in values.items():
        setattr(entry, name, value)
    entry.save_as(path)


@pytest.fixture
def volumes(tmp_path) -> Path:
    """Three toy cases: DICOM series with NIfTI labels."""
    folder = tmp_path / "ct"
    write_cases(folder, 3)
    shutil.rmtree(folder / "images")
    for number in range(3):
        write_series(folder / "images" / f"toy_{number}", toy_case(number)[0])
    return folder


def test_series_gives_the_slices_of_the_nifti(volumes, tmp_path, capsys):
    write_cases(tmp_path / "nifti", 3)
    (volumes / "images" / "toy_0" / "DICOMDIR").write_bytes(b"of the CD")
    (volumes / "images" / "toy_0" / "notes.txt").write_text("no slice")
    (volumes / "images" / "empty").mkdir()
    for name, folder in (("dicom", volumes), ("nifti", tmp_path / "nifti")):
        options = ["--input", str(folder), "--out", str(tmp_path / name / "out"), "--workers", "1"]
        preprocess_ct.main(options)
    assert f"{volumes}: FLARE22's layout, with DICOM series for images" in capsys.readouterr().out
    one, other = (open_dataset(tmp_path / name / "out") for name in ("dicom", "nifti"))
    assert [s.name for s in one.split("all")] == [s.name for s in other.split("all")]
    for a, b in zip(one.split("all"), other.split("all"), strict=True):
        assert np.array_equal(read_image(a.image_path), read_image(b.image_path))
        assert np.array_equal(read_label_map(a.label_path), read_label_map(b.label_path))
    for case, geometry in one.geometry.items():  # NIfTI's numbers are single precision
        for field, value in vars(geometry).items():
            expected = getattr(other.geometry[case], field)
            assert value == (expected if isinstance(value, str) else pytest.approx(expected))


def test_rescaling_is_applied(tmp_path):
    hu = toy_case(0)[0].astype(float)
    write_series(tmp_path / "a", hu, slope=0.5, intercept=-2000.0)
    assert np.allclose(read_volume(tmp_path / "a").array, hu, atol=0.26)


@pytest.mark.parametrize(
    "across",
    [
        (1, 0, 0, 0, -1, 0),
        (-1, 0, 0, 0, 1, 0),
        (0, 1, 0, 0, 0, -1),  # sagittal
        (np.cos(0.2), np.sin(0.2), 0, -np.sin(0.2), np.cos(0.2), 0),
    ],
)
def test_geometry_is_simpleitks_own(tmp_path, across):
    """However the slices lie, and label maps written on that grid fit in any orientation."""
    write_series(tmp_path / "images" / "a", toy_case(0)[0], across=across)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "images/a")))
    expected = reader.Execute()
    assert expected.GetSpacing() == pytest.approx(SPACING[::-1])
    labels = sitk.Cast(expected > 50, sitk.sitkUInt8)
    (tmp_path / "labels").mkdir()
    for orientation in ("RAS", "SPL"):  # a program may store it in another order
        path = tmp_path / "labels" / "a.nii.gz"
        sitk.WriteImage(sitk.DICOMOrient(labels, orientation), str(path))
        pairs, bad = find_pairs(tmp_path / "images", tmp_path / "labels")
        assert not bad
        check_grids(pairs[0])
    volume, expected = read_volume(tmp_path / "images" / "a"), sitk.DICOMOrient(expected, "LPS")
    assert np.array_equal(volume.array, sitk.GetArrayFromImage(expected))
    assert volume.origin_mm == pytest.approx(expected.GetOrigin(), abs=1e-4)
    assert volume.direction == pytest.approx(expected.GetDirection(), abs=1e-6)
    assert volume.spacing_mm == pytest.approx(expected.GetSpacing()[::-1])


def test_hash_is_of_the_files_not_of_their_names(tmp_path):
    paths = write_series(tmp_path / "a", toy_case(0)[0])
    before = dicom.digest(tmp_path / "a")
    paths[0].rename(tmp_path / "a" / "z")
    assert dicom.digest(tmp_path / "a") == before
    edit(paths[1], RescaleIntercept=7.0)
    assert dicom.digest(tmp_path / "a") != before


# --- What is refused -----------------------------------------------------------------------------
def changed(**values: object) -> Callable[[Path, list[Path]], None]:
    """Change tags of the second slice."""
    return lambda folder, paths: edit(paths[1], **values)


def half_as_high(folder: Path, paths: list[Path]) -> None:
    edit(paths[1], Rows=40, PixelData=pydicom.dcmread(paths[1]).PixelData[: 40 * 96 * 2])


def second_series(folder: Path, paths: list[Path]) -> None:
    write_series(folder / "more", toy_case(1)[0][:2])


def multi_frame(folder: Path, paths: list[Path]) -> None:
    entry = pydicom.dcmread(paths[0])
    edit(paths[0], NumberOfFrames=2, PixelData=entry.PixelData * 2)


def moved(z: int, **by: float) -> Callable[[Path, list[Path]], None]:
    def change(folder: Path, paths: list[Path]) -> None:
        x, y, height = pydicom.dcmread(paths[z]).ImagePositionPatient
        shifted = [x + by.get("x", 0), y + by.get("y", 0), height + by.get("up", 0)]
        edit(paths[z], ImagePositionPatient=shifted)

    return change


def tilted(folder: Path, paths: list[Path]) -> None:
    for z in range(len(paths)):
        moved(z, y=1.5 * z)(folder, paths)


def cut(keep: float) -> Callable[[Path, list[Path]], None]:
    def change(folder: Path, paths: list[Path]) -> None:
        content = paths[1].read_bytes()
        paths[1].write_bytes(content[: int(len(content) * keep)])

    return change


BAD = {
    "two series": (second_series, "expected one DICOM series, found 2 (3 files, the first IM"),
    "a gap": (moved(2, up=5), "10 mm apart"),
    "one place": (moved(2, up=-5), "lie at one place"),
    "tilted": (tilted, "a tilted gantry?"),
    "no CT": (changed(Modality="MR"), "is not a CT image"),
    "frames": (multi_frame, "holds several frames"),
    "other size": (half_as_high, "differs from"),
    "other spacing": (changed(PixelSpacing=[3.0, 3.0]), "differs from"),
    "one slice": (lambda folder, paths: [p.unlink() for p in paths[1:]], "is the only slice"),
    "cut in half": (cut(0.5), "IM"),
    "cut by little": (cut(0.995), "IM"),
    "cut in the header": (cut(0.02), "IM"),
    "no position": (changed(ImagePositionPatient=None), "does not say where its pixels lie"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_series_is_one_line_without_names(volumes, tmp_path, fails, kind):
    damage, expected = BAD[kind]
    folder = volumes / "images" / "toy_1"
    damage(folder, [path for z in range(SHAPE[0]) for path in folder.glob(f"IM?{z}")])
    message = refused(fails, volumes, tmp_path / "out")
    assert expected in message and "toy_1" in message
    assert not any(secret in message for secret in SECRETS.values())


def test_label_on_another_grid_is_refused(volumes, tmp_path, fails):
    write_volume(volumes / "labels" / "toy_1.nii.gz", toy_case(1)[1], origin=(-90.0, -80.0, 10.0))
    assert "lies up to 6 mm off the image's grid" in refused(fails, volumes, tmp_path / "out")


def test_nothing_of_a_header_but_geometry_goes_anywhere(volumes, tmp_path, capfd):
    series = next((volumes / "images" / "toy_0").iterdir())
    uid = pydicom.dcmread(series).SeriesInstanceUID
    assert b"Planted^Eleonora" in series.read_bytes()
    second_series(volumes / "images" / "toy_2", [])
    options = ["--images", volumes / "images", "--labels", volumes / "labels", "--skip-bad"]
    preprocess_ct.main([*map(str, options), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["cases"].keys() == {
        "toy_0",
        "toy_1",
    }
    shown = "".join(capfd.readouterr())
    assert "found 2" in shown
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    texts = [shown.encode(), *(str(path).encode() + path.read_bytes() for path in written)]
    for secret in (*SECRETS.values(), uid, "Eleonora"):
        assert not any(secret.casefold().encode() in text.lower() for text in texts), secret


def test_predictions_on_a_series_are_those_on_the_same_volume_as_nifti(tmp_path):
    """By eval.py --predict; the label volume lies on the series."""
    hu, _ = toy_case(0)
    write_series(tmp_path / "series", hu)
    write_volume(tmp_path / "scan.nii.gz", hu, origin=ORIGIN)
    (tmp_path / "boxes.csv").write_text("label,z,x0,y0,x1,y1\nliver,1,20,22,48,58\n")
    model = ("--models", "lite_medsam", "--window", "flare22", "--device", "cpu")
    made = []
    for scan in ("series", "scan.nii.gz"):
        words = ("--predict", tmp_path / scan, "--boxes", tmp_path / "boxes.csv", *model)
        out = tmp_path / f"out of {scan}"
        evaluation.main([*map(str, words), "--out", str(out)])
        (path,) = out.glob("*.nii.gz")
        made.append(sitk.ReadImage(str(path)))
    first, second = map(sitk.GetArrayFromImage, made)
    assert (first == second).all() and first.any()
    for read in ("GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(made[0], read)() == pytest.approx(getattr(made[1], read)(), abs=1e-5)
