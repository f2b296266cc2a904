"""CT volumes and their label maps: pairing, checking, reading and writing.

NIfTI headers are read by nibabel, voxels with one pass over the file: SimpleITK, which writes label
maps and decides on orientations, silently reads NaN, and what a truncated file lacks, as zeros.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk
from nibabel import Nifti1Header
from nibabel.spatialimages import HeaderDataError

from utils.data import dicom
from utils.data.grid import StoredGrid
from utils.data.slices import Geometry
from utils.system.errors import UserError
from utils.system.files import atomic_write, is_file_name, read_bytes

SUFFIXES = (".nii.gz", ".nii")  # in capitals, too
CHANNEL = "_0000"  # suffix of the first image channel in the FLARE22 and nnU-Net layouts
GRID_TOLERANCE = 0.1  # the grids of image and label may differ by this share of a voxel
SPACING_MM = (1e-3, 1e3)  # plausible voxel spacing
HEADER_BYTES = Nifti1Header.sizeof_hdr
MOST_BYTES_BEHIND = 1 << 24  # that may follow the voxels
GZIP_MAGIC, GZIP_MOST_RATIO = b"\x1f\x8b", 1032  # DEFLATE shrinks nothing further

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters becomes a UserError


@dataclass(frozen=True)
class CasePair:
    """The image (a file, or the folder of a DICOM series) and the label map of one case."""

    case: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Volume(Geometry):
    """A volume in LPS.

    Attributes:
        array: (z, y, x) voxels.
        sha256: of the file, or of the files of a DICOM series.
    """

    array: np.ndarray
    sha256: str


# --- Pairing -------------------------------------------------------------------------------------
def find_pairs(
    images: str | Path, labels: str | Path, channel: int | None = None
) -> tuple[list[CasePair], dict[str, str]]:
    """Pair the volumes of two folders and compare their grids; no voxel is read.

    `images/<case>_0000.nii.gz` (or without `_0000`) belongs to `labels/<case>.nii.gz`. Where there
    are several image files per case, `channel` chooses: 1 is `<case>_0001.nii.gz`, others are
    ignored. A folder `images/<case>/` that holds DICOM files is an image too.

    Returns:
        The pairs on one grid, in order of case name, and by case what is wrong with the others.

    Raises:
        UserError: a folder is missing or holds no volume, or its names are ambiguous.
    """
    images, labels = Path(images), Path(labels)
    suffix = CHANNEL if channel is None else f"_{channel:04d}"
    image_of = volumes_by_case(images, "--images", suffix, channel is not None, series=True)
    label_of = volumes_by_case(labels, "--labels")
    pairs: list[CasePair] = []
    bad: dict[str, str] = {}
    for case in sorted(image_of.keys() | label_of):
        if case not in label_of:
            expected = f"{labels / case}.nii.gz"
            bad[case] = f"{image_of[case]}: image without a label (expected {expected})"
        elif case not in image_of:
            expected = f"{images / case}{suffix}.nii.gz"
            bad[case] = f"{label_of[case]}: label without an image (expected {expected})"
        else:
            pair = CasePair(case, image_of[case], label_of[case])
            try:
                check_grids(pair)
                pairs.append(pair)
            except UserError as error:
                bad[case] = str(error)
    return pairs, bad


def nifti_suffix(path: Path) -> str | None:
    """The one of SUFFIXES in which a file's name ends, as it is spelt there; None without one."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
    return suffix and path.name[-len(suffix) :]


def volumes_by_case(
    folder: Path, option: str, strip: str = "", only: bool = False, series: bool = False
) -> dict[str, Path]:
    """The NIfTI files of a folder by case, in order of name.

    Args:
        folder: where to look.
        option: the command-line option that named it, for error messages.
        strip: removed from the end of a file's name to give the case.
        only: ignore files whose names do not end in `strip`.
        series: take folders of DICOM files as well; their names are the cases.

    Raises:
        UserError: the folder is missing or holds none, a name cannot be used, or two files are of
            one case.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of NIfTI files to {option}")
    volumes: dict[str, Path] = {}
    paths: dict[str, Path] = {}  # by case-folded name: macOS takes "Case" and "case" for one file
    for path in sorted(folder.iterdir()):
        suffix = nifti_suffix(path)
        if path.name.startswith("."):
            continue
        if series and path.is_dir() and dicom.holds_dicom(path):
            suffix = ""
        elif suffix is None or not path.is_file():
            continue
        name = path.name.removesuffix(suffix)
        if only and not name.endswith(strip):
            continue
        case = name.removesuffix(strip)
        if not is_file_name(case):
            raise UserError(
                f"{path}: this name is not UTF-8, or holds a colon, a backslash or what cannot be "
                "printed; rename the file"
            )
        if (other := paths.setdefault(case.casefold(), path)) is not path:
            raise UserError(f"{path}: a second file for case {case} beside {other.name}")
        volumes[case] = path
    if not volumes:
        kind = f"file that ends in {strip}" if only else ".nii.gz or .nii file"
        kind += " or DICOM series" if series else ""
        raise UserError(f"{folder}: holds no {kind}; check {option}")
    return volumes


def check_grids(pair: CasePair) -> None:
    """Compare where the voxels of image and label lie; only headers are read.

    Raises:
        UserError: a file is unreadable or not 3D, or the two grids differ in shape or by more than
            GRID_TOLERANCE of a voxel anywhere.
    """
    compare_grids(read_geometry(pair.label), pair.label, read_geometry(pair.image), pair.image.name)


def compare_grids(label: Geometry, path: Path, image: Geometry, image_name: str) -> None:
    """Check that a label map lies on the grid of an image.

    Args:
        label, path: its grid in LPS, and its file.
        image, image_name: the image's, for the message.

    Raises:
        UserError: as `check_grids`.
    """
    if image.shape != label.shape:
        raise UserError(
            f"{path}: shape {label.shape[::-1]} differs from the image's "
            f"{image.shape[::-1]} ({image_name}); resample one onto the other"
        )
    distance = np.linalg.norm(image.corners() - label.corners(), axis=1).max()
    if not distance <= GRID_TOLERANCE * min(image.spacing_mm):
        raise UserError(
            f"{path}: lies up to {distance:.3g} mm off the image's grid ({image_name}): "
            "spacing, origin or direction differ; resample one onto the other"
        )


# --- Reading -------------------------------------------------------------------------------------
def read_geometry(path: Path) -> Geometry:
    """The grid of a NIfTI file or DICOM series in LPS; only headers are read.

    Raises:
        UserError: unreadable, damaged, or no single 3D volume with axes at right angles.
    """
    if path.is_dir():
        return dicom.open_series(path)[1].in_lps()
    try:
        with open(path, "rb") as file, _damage_named(path):
            content = _unzipped(file).read(HEADER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    return _grid_of(path, _header_of(path, content)).in_lps()


def read_image(path: Path) -> Volume:
    """Read a CT volume, a file or a DICOM series: float32 Hounsfield units (z, y, x) in LPS.

    Raises:
        UserError: unreadable, damaged, not 3D, a voxel that is not a finite number, or all voxels
            of one value.
    """
    if path.is_dir():
        files, grid = dicom.open_series(path)
        voxels, digest = dicom.read_pixels(files), dicom.digest(path)
    else:
        grid, voxels, digest = _read_nifti(path)
    with np.errstate(over="ignore"):  # beyond float32 is beyond any window
        array = np.ascontiguousarray(grid.voxels_in_lps(voxels), np.float32)
    if (lowest := array.min()) == array.max():
        raise UserError(f"{path}: every voxel is {lowest:g}; is this a CT image?")
    return Volume(**vars(grid.in_lps()), array=array, sha256=digest)


def check_window(image: np.ndarray, path: Path, window: tuple[float, float]) -> None:
    """Check that a volume has values within a window.

    Raises:
        UserError: all its values lie outside.
    """
    low, high = window
    lowest, highest = image.min(), image.max()
    if lowest >= high or highest <= low:
        raise UserError(
            f"{path}: its values, {lowest:g} to {highest:g}, all lie outside the window of "
            f"{low:g} to {high:g} HU; are they Hounsfield units? See --window"
        )


def grey_levels(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Hounsfield units as grey levels, float 0-255: min-max over the window."""
    low, high = window
    return (np.clip(image, low, high) - low) * (255 / (high - low))


def read_label_map(path: Path) -> Volume:
    """Read a label map: uint8 label ids (z, y, x) in LPS, 0 is background.

    Raises:
        UserError: unreadable, damaged, not 3D, or a value that is no whole number of 0 to 255.
    """
    grid, voxels, digest = _read_nifti(path)
    if voxels.dtype.kind == "f" and not np.array_equal(voxels, np.rint(voxels)):
        raise UserError(f"{path}: label ids must be whole numbers; is this an image?")
    if voxels.min() < 0 or voxels.max() > 255:
        raise UserError(
            f"{path}: label ids must be 0 to 255, found {voxels.min():g} to {voxels.max():g}"
        )
    array = np.ascontiguousarray(grid.voxels_in_lps(voxels), np.uint8)
    return Volume(**vars(grid.in_lps()), array=array, sha256=digest)


def _read_nifti(path: Path) -> tuple[StoredGrid, np.ndarray, str]:
    """The grid, the voxels (i, j, k) with slope and intercept applied, and the file's SHA-256.

    The file is read and decompressed once, to its end, where gzip compares its checksum.

    Raises:
        UserError: unreadable, damaged, not 3D, or voxels that are NaN or infinite.
    """
    content = read_bytes(path)
    with _damage_named(path):
        file = _unzipped(io.BytesIO(content))
        header = _header_of(path, file.read(HEADER_BYTES))
        dtype, shape = header.get_data_dtype(), header.get_data_shape()[:3]
        size = dtype.itemsize * int(np.prod(shape, dtype=object))
        if size > len(content) * GZIP_MOST_RATIO:  # before memory is asked for
            raise EOFError
        file.seek(int(header["vox_offset"]))
        stored = file.read(size)
        if len(stored) < size or len(file.read(MOST_BYTES_BEHIND + 1)) > MOST_BYTES_BEHIND:
            raise EOFError
    voxels = np.frombuffer(stored, dtype).reshape(shape, order="F")
    if dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(voxels))):
        raise UserError(f"{path}: {bad} voxels are NaN or infinite; repair or remove the file")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if abs(slope) < np.finfo(np.float64).eps:
        slope = 1.0  # as SimpleITK does; NIfTI would ignore the intercept as well
    if (slope, intercept) != (1.0, 0.0):
        with np.errstate(over="ignore"):
            voxels = (voxels * np.float64(slope) + intercept).astype(np.float32)
    return _grid_of(path, header), voxels, hashlib.sha256(content).hexdigest()


def _unzipped(file: BinaryIO) -> BinaryIO:
    """The file itself, or what a gzip file contains, whatever its name."""
    zipped = file.read(2) == GZIP_MAGIC
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if zipped else file


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut short; replace or remove it") from error


def _header_of(path: Path, content: bytes) -> Nifti1Header:
    """A NIfTI-1 header without nibabel's repairs, which are silent.

    Raises:
        UserError: not NIfTI-1, damaged, or not of one 3D volume with one number per voxel.
    """
    header = Nifti1Header(content.ljust(HEADER_BYTES, b"\0")[:HEADER_BYTES], check=False)
    if header["sizeof_hdr"] != HEADER_BYTES or header["magic"].item() != b"n+1":
        raise UserError(f"{path}: cannot be read as NIfTI-1; convert, replace or remove it")
    dims, *sides = header["dim"].tolist()
    if not 1 <= dims <= 7 or min(sides[:dims]) < 1:
        raise UserError(f"{path}: damaged header: dimensions {[dims, *sides]}; replace it")
    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError):
        dtype = None
    numeric = dtype is not None and dtype.kind in "iuf" and dtype.itemsize <= 8
    if dims < 3 or max(sides[3:dims], default=1) > 1 or not numeric:
        found = " x ".join(map(str, sides[:dims]))
        kind = "" if numeric else f" voxels of NIfTI's type {header['datatype']}, such as RGB"
        raise UserError(
            f"{path}: expected one 3D volume of one number per voxel, found {found}{kind}; replace "
            "or remove it"
        )
    spacing = header["pixdim"][1:4]
    if not ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all():
        raise UserError(
            f"{path}: spacing must be {SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm, found "
            f"{' x '.join(f'{mm:g}' for mm in spacing)}; correct its header"
        )
    scale = header["scl_slope"], header["scl_inter"]
    if not (np.isfinite(scale).all() and HEADER_BYTES <= header["vox_offset"] < 2**31):
        raise UserError(f"{path}: damaged header: scale or offset; replace or remove it")
    return header


def _grid_of(path: Path, header: Nifti1Header) -> StoredGrid:
    """The grid that SimpleITK finds in a header, from pixdim and the s-form or q-form.

    The s-form counts if its axes are at right angles and either its code is 1 (scanner) or there
    is no q-form; without both the axes are LPS.

    Raises:
        UserError: a form that holds no sensible numbers, or only an s-form with oblique angles.
    """
    spacing = header["pixdim"][1:4].astype(float)
    has_qform, has_sform = header["qform_code"] > 0, header["sform_code"] > 0
    affine = axes = None
    with np.errstate(all="ignore"):  # the numbers are checked below
        if has_sform:
            affine = header.get_sform()
            axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        orthogonal = has_sform and np.allclose(axes @ axes.T, np.eye(3), atol=1e-4)
        if has_qform and not (orthogonal and header["sform_code"] == 1):
            header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 counts as 1
            try:
                affine = header.get_qform()
            except (ValueError, HeaderDataError):  # no unit quaternion
                affine = np.full((4, 4), np.nan)
            axes = affine[:3, :3] / spacing
        elif has_sform and not orthogonal and np.isfinite(affine).all():
            raise UserError(
                f"{path}: its axes are not at right angles (a tilted gantry?); resample it onto a "
                "regular grid"
            )
    if affine is None:
        return StoredGrid(header.get_data_shape()[:3], spacing, np.zeros(3), np.eye(3))
    if not np.isfinite([*affine.ravel(), *axes.ravel()]).all():
        raise UserError(f"{path}: damaged header: orientation; replace or remove it")
    from_ras = np.array([-1, -1, 1])
    shape = header.get_data_shape()[:3]
    return StoredGrid(shape, spacing, affine[:3, 3] * from_ras, axes * from_ras[:, None])


# --- Writing -------------------------------------------------------------------------------------
def write_volume(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write an array (z, y, x) in LPS as NIfTI, in the orientation of its source file.

    Raises:
        UserError: the file cannot be written.
    """
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed(geometry.spacing_mm)))
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction)
    image = sitk.DICOMOrient(image, geometry.stored_orientation)
    with tempfile.TemporaryDirectory() as folder:  # SimpleITK writes by name, not to a file object
        whole = Path(folder) / "volume.nii"
        try:
            sitk.WriteImage(image, str(whole))
            content = whole.read_bytes()
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: cannot write; is {folder} full?") from error
    missing = HEADER_BYTES + array.nbytes - len(content)
    if missing > 0:  # SimpleITK reports no full disk
        raise UserError(f"{path}: cannot write: {missing:,} bytes did not fit in {folder}")
    with atomic_write(path) as file:
        file.write(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)
