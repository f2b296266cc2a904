"""A folder with one DICOM CT series as a volume: how scanners and public archives give CT.

Only the headers' geometry is used, and nothing else of them reaches a file or a message: messages
name files alone, and never quote the library's, which may quote a header.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from utils.data.grid import StoredGrid
from utils.system.errors import UserError
from utils.system.files import sha256

MAGIC, MAGIC_OFFSET = b"DICM", 128
STEP_TOLERANCE = 0.05  # slices may be off an even spacing by this share of it
TILT_TOLERANCE = 0.1  # and off a line at right angles to them by this share of a pixel
SERIES, MODALITY = "0020|000e", "0008|0060"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"


@dataclass(frozen=True)
class _Plane:
    """What the header of a file says of its slice; mm in LPS.

    Attributes:
        series: UID of the series.
        layout: columns, rows, spacing along a row and along a column, and direction cosines of a
            row and of a column: what all slices of a volume share.
        position: of the first pixel (x, y, z).
    """

    path: Path
    series: str
    layout: np.ndarray
    position: np.ndarray


def holds_dicom(folder: Path) -> bool:
    """Whether there is a DICOM file in the folder or below it."""
    return any(map(_is_dicom, _files_in(folder)))


def digest(folder: Path) -> str:
    """SHA-256 over the hashes of the series' files, whatever their names are."""
    hashes = sorted(sha256(path) for path in _files_in(folder) if _is_dicom(path))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def open_series(folder: Path) -> tuple[list[Path], StoredGrid]:
    """Read the headers of a folder's series and check that its slices make a volume.

    Returns:
        The files in order along the grid's third axis, and the grid.

    Raises:
        UserError: no DICOM file or several series; not CT; several frames per file; slices that
            differ in size or direction, are missing, lie at one place, or are tilted.
    """
    planes = [_read_plane(path) for path in _files_in(folder) if _is_dicom(path)]
    by_series: dict[str, list[Path]] = {}
    for plane in planes:
        by_series.setdefault(plane.series, []).append(plane.path.relative_to(folder))
    if len(by_series) != 1:
        listed = "; ".join(f"{len(f)} files, the first {f[0]}" for f in by_series.values())
        raise UserError(
            f"{folder}: expected one DICOM series, found {len(by_series)} ({listed or 'no file'}); "
            "leave one in the folder"
        )
    return _stack(folder, planes)


def read_pixels(files: list[Path]) -> np.ndarray:
    """Voxels (i, j, k) of a series, float32 HU with rescale slope and intercept applied.

    Raises:
        UserError: the pixels of a file cannot be read.
    """
    slices = []
    for path in files:
        try:
            image = sitk.ReadImage(str(path), sitk.sitkFloat32, "GDCMImageIO")
        except RuntimeError as error:
            if "allocat" in str(error):
                raise MemoryError from error
            raise UserError(f"{path}: its pixels cannot be read; replace or remove it") from None
        slices.append(sitk.GetArrayFromImage(image)[0])
    return np.stack(slices).T


def _files_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path.name != "DICOMDIR"
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _is_dicom(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(MAGIC_OFFSET + len(MAGIC))[MAGIC_OFFSET:] == MAGIC
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error


def _read_plane(path: Path) -> _Plane:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise UserError(f"{path}: cannot be read as a DICOM image; remove or replace it") from None

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else ""

    def numbers(tag: str, count: int) -> np.ndarray:
        values = np.array([float(part) for part in text(tag).split("\\")])
        if len(values) != count or not np.isfinite(values).all():
            raise ValueError
        return values

    if text(MODALITY) != "CT" or reader.GetNumberOfComponents() != 1:
        raise UserError(f"{path}: is not a CT image; give CT, or remove it")
    try:
        spacing = numbers(PIXEL_SPACING, 2)[::-1]  # DICOM: along a column first
        axes, position = numbers(ORIENTATION, 6), numbers(POSITION, 3)
    except ValueError:
        raise UserError(
            f"{path}: does not say where its pixels lie (no image, or damaged); remove it"
        ) from None
    if reader.GetSize()[2:] not in ((), (1,)):
        raise UserError(f"{path}: holds several frames; export it as one file per slice")
    row, column = axes[:3], axes[3:]
    angles = [row @ row - 1, column @ column - 1, row @ column]
    if spacing.min() <= 0 or np.abs(angles).max() > 1e-3:
        raise UserError(f"{path}: its pixels have no size or direction; replace or remove it")
    layout = np.concatenate([reader.GetSize()[:2], spacing, axes])
    return _Plane(path, text(SERIES), layout, position)


def _stack(folder: Path, planes: list[_Plane]) -> tuple[list[Path], StoredGrid]:
    first = planes[0]
    if len(planes) == 1:
        raise UserError(f"{first.path}: is the only slice; a volume needs two or more")
    for plane in planes:
        if not np.allclose(plane.layout, first.layout, rtol=0, atol=1e-3):
            raise UserError(
                f"{plane.path}: differs from {first.path.name} in size, spacing or direction; "
                "leave one volume in the folder"
            )
    size, spacing = first.layout[:2].astype(int).tolist(), first.layout[2:4]
    in_plane = first.layout[4:].reshape(2, 3)
    normal = np.cross(*in_plane)
    planes = sorted(planes, key=lambda plane: float(plane.position @ normal))
    positions = np.array([plane.position for plane in planes])
    steps = np.diff(positions @ normal)
    usual = float(np.quantile(steps, 0.5, method="lower"))
    odd = int(np.abs(steps - usual).argmax() if steps.min() >= 1e-3 else steps.argmin())
    one, other = planes[odd].path.name, planes[odd + 1].path.name
    if steps.min() < 1e-3:
        raise UserError(f"{folder}: {one} and {other} lie at one place; leave one of them")
    if np.abs(steps - usual).max() > STEP_TOLERANCE * usual:
        raise UserError(
            f"{folder}: {one} and {other} lie {steps[odd]:.4g} mm apart, others {usual:.4g} mm: a "
            "slice is missing, or their distance changes; complete it, or resample it"
        )
    if np.abs((positions - positions[0]) @ in_plane.T).max() > TILT_TOLERANCE * spacing.min():
        raise UserError(
            f"{folder}: its slices are shifted against each other (a tilted gantry?); resample it "
            "onto a regular grid"
        )
    grid = StoredGrid(
        (*size, len(planes)),
        np.array([*spacing, steps.mean()]),
        positions[0],
        np.stack([*in_plane, normal], axis=1),
    )
    return [plane.path for plane in planes], grid
