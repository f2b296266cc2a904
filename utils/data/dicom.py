"""A folder of one DICOM series as a CT volume.

Of the headers only what places the voxels is used, and nothing of them goes into any file or
message: those name files alone.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from utils.system.errors import UserError
from utils.system.files import sha256

MAGIC, MAGIC_AT = b"DICM", 128
STEP_TOLERANCE = 0.05  # slices may lie this share of their distance off an even spacing
TILT_TOLERANCE = 0.1  # and this share of a pixel off a line at right angles to them
SERIES, MODALITY, FRAMES = "0020|000e", "0008|0060", "0028|0008"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
ROWS, COLUMNS = "0028|0010", "0028|0011"


@dataclass(frozen=True)
class Series:
    """The files of a series and where its voxels lie, as SimpleITK says it (x, y, z).

    Attributes:
        files: in order along the third axis.
        size, spacing, origin: x, y, z; spacing and origin in mm.
        direction: 3 x 3 direction cosines, row-major.
    """

    files: tuple[Path, ...]
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]


def holds_dicom(folder: Path) -> bool:
    """Whether there is a DICOM file in the folder or below it."""
    return any(map(_is_dicom, _files_in(folder)))


def digest(folder: Path) -> str:
    """SHA-256 that tells the series' files from others, whatever they are named."""
    hashes = sorted(sha256(path) for path in _files_in(folder) if _is_dicom(path))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def open_series(folder: Path) -> Series:
    """Read the headers of a folder's series and see that its slices make a volume.

    Raises:
        UserError: no DICOM file or several series; not CT; several frames a file; slices that
            differ in size or direction, are missing, lie at one place, or are tilted.
    """
    paths = [path for path in _files_in(folder) if _is_dicom(path)]
    headers = {path: _header_of(path) for path in paths}
    by_series: dict[str, list[Path]] = defaultdict(list)
    for path, header in headers.items():
        by_series[header.get(SERIES, "")].append(path)
    if len(by_series) != 1:
        shown = "; ".join(
            f"{len(files)} files, the first {files[0].relative_to(folder)}"
            for files in by_series.values()
        )
        raise UserError(
            f"{folder}: expected one DICOM series, found {len(by_series)} ({shown or 'no file'}); "
            "leave one in the folder"
        )
    slices = []
    for path, header in headers.items():
        try:
            modality = header.get(MODALITY, "").strip()
            frames = int(header.get(FRAMES, "1"))
            size = (int(header[COLUMNS]), int(header[ROWS]))
            pixel = _numbers(header[PIXEL_SPACING], 2)[::-1]  # DICOM: between rows first
            across = _numbers(header[ORIENTATION], 6).reshape(2, 3)
            place = _numbers(header[POSITION], 3)
        except (KeyError, ValueError):
            raise UserError(
                f"{path}: says not where its pixels lie (no image, or damaged); remove it"
            ) from None
        if modality != "CT":
            raise UserError(f"{path}: is not a CT image; give CT, or remove it")
        if frames != 1:
            raise UserError(f"{path}: holds several frames; export it as one file a slice")
        slices.append((path, size, pixel, across, place))
    return _volume_of(folder, slices)


def read_series(folder: Path) -> sitk.Image:
    """The series as float32 Hounsfield units, rescale slope and intercept applied.

    Raises:
        UserError: as `open_series`, or the pixels of a file cannot be read.
    """
    series = open_series(folder)
    planes = []
    for path in series.files:
        try:
            plane = sitk.ReadImage(str(path), sitk.sitkFloat32, "GDCMImageIO")
        except RuntimeError as error:
            if "allocat" in str(error):
                raise MemoryError from error
            raise UserError(f"{path}: its pixels cannot be read; replace or remove it") from None
        planes.append(sitk.GetArrayFromImage(plane)[0])
    image = sitk.GetImageFromArray(np.stack(planes))
    image.SetSpacing(series.spacing)
    image.SetOrigin(series.origin)
    image.SetDirection(series.direction)
    return image


def _files_in(folder: Path) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    shown = (p for p in paths if not any(n.startswith(".") for n in p.relative_to(folder).parts))
    return sorted(path for path in shown if path.name != "DICOMDIR")


def _is_dicom(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(MAGIC_AT + len(MAGIC))[MAGIC_AT:] == MAGIC
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error


def _header_of(path: Path) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # its text may quote the header
        raise UserError(f"{path}: cannot be read as a DICOM image; remove or replace it") from None
    if reader.GetNumberOfComponents() != 1:
        raise UserError(f"{path}: has colours; give CT, or remove it")
    wanted = (SERIES, MODALITY, FRAMES, POSITION, ORIENTATION, PIXEL_SPACING)
    wanted += (ROWS, COLUMNS)
    return {key: reader.GetMetaData(key) for key in wanted if reader.HasMetaDataKey(key)}


def _numbers(text: str, count: int) -> np.ndarray:
    numbers = np.array([float(part) for part in text.split("\\")])
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(text)
    return numbers


def _volume_of(folder: Path, slices: list[tuple]) -> Series:
    first, size, pixel, across, _ = slices[0]
    normal = np.cross(*across)
    if min(pixel) <= 0 or not np.allclose(across @ across.T, np.eye(2), atol=1e-3):
        raise UserError(f"{first}: its pixels have no size or direction; replace or remove it")
    for path, *others, _ in slices:
        if others[0] != size or not all(
            np.allclose(one, other, atol=1e-3)
            for one, other in zip(others[1:], (pixel, across), strict=True)
        ):
            raise UserError(
                f"{path}: differs from {first.name} in size, spacing or direction; leave one "
                "volume in the folder"
            )
    if len(slices) == 1:
        raise UserError(f"{first}: is the only slice; a volume needs two or more")
    slices = sorted(slices, key=lambda entry: float(entry[-1] @ normal))
    places = np.array([place for *_, place in slices])
    along = places @ normal
    step = (along[-1] - along[0]) / (len(slices) - 1)
    steps = np.diff(along)
    if steps.min() < 1e-3:
        one, other = (slices[steps.argmin() + n][0].name for n in (0, 1))
        raise UserError(f"{folder}: {one} and {other} lie at one place; leave one of them")
    usual = float(np.sort(steps)[(len(steps) - 1) // 2])
    if np.abs(steps - usual).max() > STEP_TOLERANCE * usual:
        odd = int(np.abs(steps - usual).argmax())
        one, other = (slices[odd + n][0].name for n in (0, 1))
        raise UserError(
            f"{folder}: {one} and {other} lie {steps[odd]:.4g} mm apart, others {usual:.4g} mm: a "
            "slice is missing, or their distance changes; complete it, or resample it"
        )
    if np.abs((places - places[0]) @ across.T).max() > TILT_TOLERANCE * min(pixel):
        raise UserError(
            f"{folder}: its slices are shifted against each other (a tilted gantry?); resample it "
            "onto a regular grid"
        )
    direction = np.stack([*across, normal], axis=1)  # columns are the voxel axes
    return Series(
        files=tuple(path for path, *_ in slices),
        size=(*size, len(slices)),
        spacing=(float(pixel[0]), float(pixel[1]), float(step)),
        origin=tuple(map(float, places[0])),
        direction=tuple(map(float, direction.ravel())),
    )
