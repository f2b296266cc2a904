"""One reader per file format of volumes; each gives the grid and the voxels turned to LPS.

NIfTI is read by nibabel and NumPy, since SimpleITK reads NaN, and what a truncated file lacks, as
zeros without a word. DICOM series are read by SimpleITK once their headers are checked, since its
series reader accepts repeated and tilted slices. Nothing of a header but the geometry goes
anywhere: messages name files alone, and never quote the library's, which may quote a header.
"""

import contextlib
import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel import Nifti1Header
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from nibabel.spatialimages import HeaderDataError

from utils.data.slices import Geometry
from utils.system import UserError

SPACING_MM = (1e-3, 1e3)  # plausible voxel spacing
HEADER_BYTES = Nifti1Header.sizeof_hdr
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, HeaderDataError)
STEP_TOLERANCE = 0.05  # DICOM slices may be off an even spacing by this share of it
TILT_TOLERANCE = 0.1  # and off a line at right angles to them by this share of a pixel
MODALITY = "0008|0060"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters becomes a UserError

Stored = tuple[Geometry, np.ndarray | None]  # in LPS; voxels (z, y, x), None if not asked for


def turn_to_lps(
    size: tuple[int, ...],
    spacing_mm: np.ndarray,
    origin_mm: np.ndarray,
    axes: np.ndarray,
    voxels: np.ndarray | None,
) -> Stored:
    """Permute and flip the axes (i, j, k) of a file to LPS.

    The origin is the LPS position of voxel (0, 0, 0); a column of `axes` has the direction cosines
    of an axis.
    """
    # By SimpleITK, for oblique axes too: "RAS" if they lead to the right, the front and the head.
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(axes.ravel().tolist())
    turn = ornt_transform(axcodes2ornt(code), axcodes2ornt("LPS"))
    to_stored = inv_ornt_aff(turn, size)  # from indices in LPS to those of the file
    permutation, first_voxel = to_stored[:3, :3], to_stored[:3, 3]
    order = np.abs(permutation).argmax(axis=0)[::-1]  # the file's axes in the order z, y, x
    geometry = Geometry(
        tuple(size[axis] for axis in order),
        tuple(spacing_mm[order].tolist()),
        tuple((axes @ (first_voxel * spacing_mm) + origin_mm).tolist()),
        tuple((axes @ permutation).ravel().tolist()),
        code,
    )
    return geometry, None if voxels is None else apply_orientation(voxels, turn).T


# --- NIfTI ---------------------------------------------------------------------------------------
def read_nifti(path: Path, voxels: bool = True) -> Stored:
    """Read a NIfTI-1 file, compressed or not whatever its name, or its header alone.

    Raises UserError: unreadable, damaged, not one 3D volume of one number per voxel, axes that are
    not at right angles, or voxels that are NaN or infinite.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if zipped else file
            content = stream.read(-1 if voxels else HEADER_BYTES)
        header = _nifti_header(path, content)
        size, spacing = header.get_data_shape()[:3], header["pixdim"][1:4].astype(float)
        grid = (size, spacing, *_nifti_position(path, header, spacing))
        if not voxels:
            return turn_to_lps(*grid, None)
        offset, dtype = max(HEADER_BYTES, int(header["vox_offset"])), header.get_data_dtype()
        array = np.frombuffer(content, dtype, math.prod(size), offset).reshape(size, order="F")
        slope, intercept = header.get_slope_inter()  # None without a slope
    except DAMAGE as error:
        raise UserError(f"{path}: damaged or cut short; replace or remove it") from error
    if dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(array))):
        raise UserError(f"{path}: {bad} voxels are NaN or infinite; repair or remove the file")
    if (slope, intercept) not in ((None, None), (1, 0)):
        with np.errstate(over="ignore"):
            array = (array * np.float64(slope) + intercept).astype(np.float32)
    return turn_to_lps(*grid, array)


def _nifti_header(path: Path, content: bytes) -> Nifti1Header:
    """The header at the start of a file, without nibabel's repairs, which are silent."""
    header = Nifti1Header(content[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), check=False)
    if header["sizeof_hdr"] != HEADER_BYTES or header["magic"].item() != b"n+1":
        raise UserError(f"{path}: cannot be read as NIfTI-1; convert, replace or remove it")
    size, kind = header.get_data_shape(), ""
    with contextlib.suppress(KeyError, HeaderDataError):  # no type of NIfTI's
        kind = header.get_data_dtype().kind
    if len(size) < 3 or min(size) < 1 or max(size[3:], default=1) > 1 or kind not in tuple("iuf"):
        raise UserError(
            f"{path}: expected one 3D volume of one number per voxel, found "
            f"{' x '.join(map(str, size))} voxels of NIfTI's type {header['datatype']}; replace or "
            "remove it"
        )
    spacing = header["pixdim"][1:4]
    if not ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all():
        raise UserError(
            f"{path}: spacing must be {SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm, found "
            f"{' x '.join(f'{mm:g}' for mm in spacing)}; correct its header"
        )
    return header


def _nifti_position(
    path: Path, header: Nifti1Header, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Origin and axes by the form that SimpleITK takes: the first whose axes are at right angles.

    The s-form goes first if it is the scanner's (code 1), else the q-form. LPS without either.
    """
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 counts as 1
    sform, qform = header.get_sform(coded=True)[0], None
    with contextlib.suppress(ValueError, HeaderDataError):  # no unit quaternion
        qform = header.get_qform(coded=True)[0]
    if header["sform_code"] == header["qform_code"] == 0:
        return np.zeros(3), np.eye(3)
    for affine in (sform, qform) if header["sform_code"] == 1 else (qform, sform):
        if affine is not None and np.isfinite(affine).all() and affine[:3, :3].any(axis=0).all():
            lengths = spacing if affine is qform else np.linalg.norm(affine[:3, :3], axis=0)
            axes = affine[:3, :3] / lengths
            if np.allclose(axes @ axes.T, np.eye(3), atol=1e-4):
                from_ras = np.array([-1, -1, 1])
                return affine[:3, 3] * from_ras, axes * from_ras[:, None]
    raise UserError(
        f"{path}: its axes are damaged, or not at right angles (a tilted gantry?); resample it "
        "onto a regular grid, or replace it"
    )


# --- DICOM ---------------------------------------------------------------------------------------
def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder or below it, in order of name."""
    return [path for path in sorted(folder.rglob("[!.]*")) if path.is_file() and _is_dicom(path)]


def _is_dicom(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM" and path.name != "DICOMDIR"


def read_dicom(folder: Path, voxels: bool = True) -> Stored:
    """Read a folder with one CT series: float32 HU. Its grid alone takes as long as its voxels.

    Raises UserError: fewer than two slices, several series, not CT, several frames per file, or
    slices that differ in size or direction, are missing, repeated, tilted or unreadable.
    """
    files, reader = dicom_files(folder), sitk.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(folder), "", False, True)  # of one series, in order
    others = sorted(set(files) - set(map(Path, names)))
    if others or len(files) < 2:
        raise UserError(
            f"{others[0] if others else folder}: expected one DICOM series, found {len(names)} of "
            f"the {len(files)} files in one; leave one series of two or more slices, and no "
            "damaged file"
        )
    reader.SetFileNames(names)
    reader.SetOutputPixelType(sitk.sitkFloat32)
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
        modalities = {reader.GetMetaData(z, MODALITY).strip() for z in range(len(names))}
        texts = [
            "\\".join(reader.GetMetaData(z, tag) for tag in (POSITION, ORIENTATION, PIXEL_SPACING))
            for z in range(len(names))
        ]
        numbers = np.array([text.split("\\") for text in texts], np.float64).reshape(-1, 11)
    except (RuntimeError, ValueError) as error:
        if "allocat" in str(error):
            raise MemoryError from error
        path = next((name for name in names if name in str(error)), folder)
        raise UserError(
            f"{path}: cannot be read as slices of one size, one a file, that say where they lie; "
            "replace or remove it"
        ) from None
    if modalities != {"CT"} or np.ptp(numbers[:, 3:], axis=0).max() > 1e-3:
        raise UserError(
            f"{folder}: not CT alone, or its slices differ in direction or spacing; leave one CT "
            "series"
        )
    pixel_mm = numbers[0, :8:-1]  # DICOM gives that along a column first
    axes = np.stack([numbers[0, 3:6], numbers[0, 6:9], np.cross(*numbers[0, 3:9].reshape(2, 3))], 1)
    step = _even_step(folder, names, numbers[:, :3] @ axes / [*pixel_mm, 1])
    return turn_to_lps(
        image.GetSize(),
        np.array([*pixel_mm, step]),
        numbers[0, :3],
        axes,
        sitk.GetArrayFromImage(image).T if voxels else None,
    )


def _even_step(folder: Path, names: Sequence[str], positions: np.ndarray) -> float:
    """The distance of slices, mm; UserError if one is missing, repeated or shifted.

    `positions` (slices, 3) are along a row and along a column, px, and along the normal, mm.
    """
    order = np.argsort(positions[:, 2])  # where slices are repeated, they are in another order
    steps, shift = np.diff(positions[order, 2]), np.ptp(positions[:, :2], axis=0).max()
    usual = np.quantile(steps, 0.5, method="lower")
    odd = int(np.abs(steps - usual).argmax())
    even = usual >= SPACING_MM[0] and abs(steps[odd] - usual) <= STEP_TOLERANCE * usual
    if not even or shift > TILT_TOLERANCE or (np.diff(order) < 0).any():
        one, other = (Path(names[z]).name for z in order[odd : odd + 2])
        raise UserError(
            f"{folder}: {one} and {other} lie {steps[odd]:.4g} mm apart, others {usual:.4g} mm, "
            f"and slices are shifted by up to {shift:.2g} pixels: one is missing or repeated, or "
            "the gantry was tilted; complete it, or resample it onto a regular grid"
        )
    return float(steps.mean())


READERS = {".nii.gz": read_nifti, ".nii": read_nifti}  # of files; a folder is a DICOM series
