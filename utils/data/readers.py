"""One reader per file format of volumes; each returns the grid and the voxels, turned to LPS.

NIfTI is read by nibabel and NumPy, since SimpleITK silently reads NaN, and the missing part of a
truncated file, as zeros. NRRD and MetaImage are read by SimpleITK. So are DICOM series, once their
headers are checked, since its series reader accepts repeated and tilted slices. Only the geometry
of a header is passed on: messages name files, and never quote those of the libraries, which may
quote a header.
"""

import contextlib
import gzip
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from nibabel import Nifti1Header, Nifti2Header
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from nibabel.spatialimages import HeaderDataError

from utils.data.slices import NIFTI_FIELDS, Geometry
from utils.system import UserError, plural

SPACING_MM = (1e-3, 1e3)  # plausible voxel spacing
GRID_TOLERANCE = 0.1  # grids that are the same may differ by this share of a voxel
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, HeaderDataError)
MM_OF_UNIT = {1: 1e3, 3: 1e-3}  # NIfTI's metre and micron; without a unit, mm are meant
STEP_TOLERANCE = 0.05  # DICOM slices may be off an even spacing by this share of it
TILT_TOLERANCE = 0.1  # and off a line at right angles to them by this share of a pixel
IMAGE_TYPE, SOP_CLASS, MODALITY, SERIES = "0008|0008", "0008|0016", "0008|0060", "0020|000e"
POSITION, RESCALE_INTERCEPT = "0020|0032", "0028|1052"
PLACE = (POSITION, "0020|0037", "0028|0030")  # 3 + 6 + 2 numbers: orientation, pixel spacing
TAGS = (IMAGE_TYPE, SOP_CLASS, MODALITY, SERIES, RESCALE_INTERCEPT, *PLACE)
# SOP classes of CT: a frame a file, enhanced, and enhanced as converted from old files.
CT_CLASSES = {f"1.2.840.10008.5.1.4.1.1.2{end}" for end in ("", ".1", ".2")}
SOP_BYTES = re.compile(r"(?:\x02\0\x02|\x08\0\x16)\0(?:UI..|....)([0-9.]+)", re.DOTALL)

AS_SLICES = """2D slices are read in MedSAM's format: imgs/CASE-000.npy, (1024, 1024, 3) floats in \
[0, 1], and gts/CASE-000.npy, label ids"""

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters becomes a UserError


class Stored(NamedTuple):
    """What a file holds, in LPS."""

    geometry: Geometry
    voxels: np.ndarray | None  # (z, y, x); None if not asked for
    rounding: float = 0.0  # the step between the values that the file can store
    notes: tuple[str, ...] = ()  # lines for the user


def turn_to_lps(
    size: tuple[int, ...],
    spacing_mm: np.ndarray,
    origin_mm: np.ndarray,
    axes: np.ndarray,
    voxels: np.ndarray | None,
    nifti_header: dict | None = None,
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
        nifti_header,
    )
    return Stored(geometry, None if voxels is None else apply_orientation(voxels, turn).T)


def _check_grid(path: Path, size: Sequence[int], spacing: np.ndarray, steps: np.ndarray) -> None:
    """UserError unless `steps` (3, 3), mm, are at right angles and have these lengths, mm.

    A column of `steps` leads to the next voxel along an axis. GRID_TOLERANCE holds at the corners.
    """
    found, off = " x ".join(f"{mm:g}" for mm in spacing), np.inf
    if not ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all():
        raise UserError(
            f"{path}: spacing must be {SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm, found {found}; "
            "correct its header"
        )
    lengths = np.linalg.norm(steps, axis=0)
    if np.isfinite(steps).all() and lengths.all():
        left, _, right = np.linalg.svd(steps / lengths)
        off = corner_distance(size, steps, left @ right * spacing)
    if off > GRID_TOLERANCE * spacing.min():
        raise UserError(
            f"{path}: its axes are damaged, or not at right angles (a tilted gantry?), or not as "
            f"long ({' x '.join(f'{mm:.4g}' for mm in lengths)} mm) as its spacing (pixdim) says "
            f"({found} mm); correct its header, or resample it onto a regular grid"
        )


def corner_distance(size: Sequence[int], one: np.ndarray, other: np.ndarray) -> float:
    """How far two affines, without an origin (3, 3) or with one (3, 4), move a corner, mm."""
    corners = np.vstack([np.indices((2, 2, 2)).reshape(3, 8) * np.reshape(size, (3, 1)), [1] * 8])
    return np.linalg.norm((one - other) @ corners[: one.shape[1]], axis=0).max()


def _check_finite(path: Path, voxels: np.ndarray) -> None:
    if voxels.dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(voxels))):
        raise UserError(f"{path}: {bad} voxels are NaN or infinite; repair or remove the file")


def _not_one_volume(path: Path, size: Sequence[int], kind: str) -> UserError:
    return UserError(
        f"{path}: expected one 3D volume with one value per voxel, found "
        f"{' x '.join(map(str, size))} voxels of {kind}; replace or remove it"
    )


# --- NIfTI ---------------------------------------------------------------------------------------
def read_nifti(path: Path, voxels: bool = True) -> Stored:
    """Read a NIfTI file, compressed or not whatever its name, or its header alone.

    Raises UserError: unreadable, damaged, not one 3D volume with one value per voxel, axes that are
    not at right angles, contradictory header fields, or voxels that are NaN or infinite.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if zipped else file
            content = stream.read(-1 if voxels else Nifti2Header.sizeof_hdr)
        header = _nifti_header(path, content)
        size, place, array = header.get_data_shape()[:3], _nifti_place(path, header), None
        slope, intercept = header.get_slope_inter()  # None without a slope
        if voxels:
            start, dtype = max(header.sizeof_hdr, header["vox_offset"]), header.get_data_dtype()
            array = np.frombuffer(content, dtype, math.prod(size), int(start))
            array = array.reshape(size, order="F")
    except DAMAGE as error:
        raise UserError(f"{path}: damaged or truncated; replace or remove it") from error
    scaled = voxels and (slope, intercept) not in ((None, None), (1, 0))
    if voxels:
        _check_finite(path, array)
    if scaled:
        with np.errstate(over="ignore"):
            array = (array * np.float64(slope) + intercept).astype(np.float32)
    fields = {name: np.ravel(header[name])[:count] for name, count in NIFTI_FIELDS.items()}
    fields = {name: tuple(np.nan_to_num(each).tolist()) for name, each in fields.items()}
    stored = turn_to_lps(size, *place, array, fields)
    return stored._replace(rounding=abs(slope) if scaled else 0.0)


def _nifti_header(path: Path, content: bytes) -> Nifti1Header:
    """The header at the start of a file, without nibabel's repairs, which are silent."""
    starts = (int.from_bytes(content[:4], order) for order in ("little", "big"))
    kind = Nifti2Header if Nifti2Header.sizeof_hdr in starts else Nifti1Header
    header = kind(content[: kind.sizeof_hdr].ljust(kind.sizeof_hdr, b"\0"), check=False)
    if header["sizeof_hdr"] != kind.sizeof_hdr or header["magic"].item() != kind.single_magic:
        raise UserError(f"{path}: cannot be read as NIfTI; convert, replace or remove it")
    size, number = header.get_data_shape(), ""
    with contextlib.suppress(KeyError, HeaderDataError):  # no type of NIfTI's
        number = header.get_data_dtype().kind
    if len(size) < 3 or min(size) < 1 or max(size[3:], default=1) > 1 or number not in tuple("iuf"):
        raise _not_one_volume(path, size, f"NIfTI's type {header['datatype']}")
    return header


def _nifti_place(path: Path, header: Nifti1Header) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spacing in mm, origin and axes, by the form that SimpleITK takes; LPS without either.

    That is the s-form if it is the scanner's (code 1), else the q-form. A bad one is refused beside
    a good one: what one program reads must not hide what another will.
    """
    mm = MM_OF_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    size, spacing = header.get_data_shape()[:3], mm * header["pixdim"][1:4].astype(float)
    turned, forms = header.copy(), []
    turned["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 counts as 1
    codes = [("sform", int(header["sform_code"])), ("qform", int(header["qform_code"]))]
    for name, code in codes if codes[0][1] == 1 else codes[::-1]:
        affine = np.full((3, 4), np.nan)
        with contextlib.suppress(ValueError, HeaderDataError):  # no unit quaternion
            affine = mm * getattr(turned, f"get_{name}")()[:3]
        if code:
            _check_grid(path, size, spacing, affine[:, :3])
            forms.append(affine)
    if not forms:
        _check_grid(path, size, spacing, np.diag(spacing))
        return spacing, np.zeros(3), np.eye(3)
    off = corner_distance(size, forms[0], forms[-1])
    if codes[0][1] == codes[1][1] and off > GRID_TOLERANCE * spacing.min():
        raise UserError(
            f"{path}: its q-form and s-form claim the same space (code {codes[0][1]}) but lie up "
            f"to {off:.3g} mm apart; correct its header"
        )
    from_ras = np.array([-1, -1, 1])
    axes = forms[0][:, :3] / np.linalg.norm(forms[0][:, :3], axis=0)
    return spacing, forms[0][:, 3] * from_ras, axes * from_ras[:, None]


# --- NRRD and MetaImage --------------------------------------------------------------------------
def read_itk(path: Path, voxels: bool = True) -> Stored:
    """Read a NRRD or MetaImage file, or its header alone. Errors as `read_nifti`'s."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        size, numbers = reader.GetSize(), reader.GetNumberOfComponents()
        if len(size) != 3 or numbers > 1:
            raise _not_one_volume(path, size, f"{numbers} values (overlapping segments?)")
        array = sitk.GetArrayFromImage(reader.Execute()).T if voxels else None
    except (RuntimeError, OSError, *DAMAGE) as error:
        raise UserError(
            f"{path}: damaged, truncated, without its data file, or too large for memory; "
            "replace or remove it"
        ) from error
    if voxels:
        _check_finite(path, array)
    spacing, axes = np.array(reader.GetSpacing()), np.reshape(reader.GetDirection(), (3, 3))
    _check_grid(path, size, spacing, axes * spacing)
    return turn_to_lps(size, spacing, np.array(reader.GetOrigin()), axes, array)


# --- DICOM ---------------------------------------------------------------------------------------
def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder or below it, in order of name."""
    return [path for path in sorted(folder.rglob("[!.]*")) if path.is_file() and _is_dicom(path)]


def _is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark or, as old files, begins with a tag of group 2 or 8."""
    with open(path, "rb") as file:
        start = file.read(132)
    old = start[:2] in (b"\x02\0", b"\x08\0") and start[3:4] == b"\0"
    return (start[128:] == b"DICM" or old) and path.name != "DICOMDIR"


class _CTFile(NamedTuple):
    """A file with a CT slice, or with several as frames."""

    path: Path
    size: tuple[int, ...]  # x, y, frames
    tags: dict[str, str]
    place: list[float] | None  # the numbers of the tags PLACE; None if they are amiss


def _read_tags(path: Path) -> _CTFile | None:
    """What matters of a file's header; None if SimpleITK cannot read it as an image."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    tags = {tag: reader.GetMetaData(tag).strip() for tag in TAGS if reader.HasMetaDataKey(tag)}
    place = None
    with contextlib.suppress(ValueError):
        numbers = [float(n) for tag in PLACE for n in tags.get(tag, "").split("\\")]
        place = numbers if len(numbers) == 11 else None
    return _CTFile(path, reader.GetSize(), tags, place)


def _ct_files(folder: Path) -> tuple[list[_CTFile], tuple[str, ...]]:
    """The files of the CT series in a folder, and lines for the user; UserError if one is amiss."""
    files, others, damaged = [], [], []
    for path in dicom_files(folder):
        if file := _read_tags(path):
            scout = "LOCALIZER" in file.tags.get(IMAGE_TYPE, "")
            placed = file.tags.get(SOP_CLASS) in CT_CLASSES or POSITION in file.tags
            ct = file.tags.get(MODALITY) == "CT" and placed and not scout
            files.append(file) if ct else others.append(path)
            continue
        with open(path, "rb") as stream:
            found = SOP_BYTES.search(stream.read(4096).decode("latin-1"))
        (others if found and found[1] not in CT_CLASSES else damaged).append(path)
    problems = [f"{_names(damaged)}: cannot be read"] if damaged else []
    series: dict[str | None, list[Path]] = {}
    for file in files:
        series.setdefault(file.tags.get(SERIES), []).append(file.path)
    if len(series) > 1:
        kinds = (f"{len(paths)} files like {paths[0].name}" for paths in series.values())
        problems.append(f"holds {len(series)} series, {', '.join(kinds)}")
    if frames := [file.path for file in files if file.size[2] > 1]:
        problems.append(f"{_names(frames)}: several frames; export it with one file per slice")
    elif lost := [file.path for file in files if file.place is None]:
        problems.append(f"{_names(lost)}: no slice position")
    elif files and (
        np.ptp([file.place[3:] for file in files], axis=0).max() > 1e-3
        or len({file.size for file in files}) > 1
    ):
        problems.append("slices differ in size, direction or spacing")
    if len(files) < 2 and not damaged and not frames:
        count = f"{plural(len(files), 'CT slice')} and {plural(len(others), 'other file')}"
        problems.append(f"holds {count}, not a volume; {AS_SLICES}")
    if problems:
        raise UserError(f"{folder}: {'; '.join(problems)}; keep one complete CT series")
    notes = [f"{_names(others)}: not a CT slice (report, localizer, ...); left out"] * bool(others)
    if not all(RESCALE_INTERCEPT in file.tags for file in files):
        notes.append("has no Rescale Intercept; its values are taken as Hounsfield units")
    return files, tuple(f"{folder}: {note}" for note in notes)


def _names(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(path.name for path in paths[:3]) + more


def read_dicom(folder: Path, voxels: bool = True) -> Stored:
    """Read a folder with one CT series: float32 HU; other files are left out and noted.

    Raises UserError: no CT slices, or several series, slices that differ in size or direction, are
    missing, repeated, tilted or unreadable; all problems with files are reported at once.
    """
    files, notes = _ct_files(folder)
    places = np.array([file.place for file in files])
    pixel_mm = places[0, :8:-1]  # DICOM gives that along a column first
    axes = np.stack([places[0, 3:6], places[0, 6:9], np.cross(*places[0, 3:9].reshape(2, 3))], 1)
    positions = places[:, :3] @ axes / [*pixel_mm, 1]
    order = np.argsort(positions[:, 2], kind="stable")
    names = [str(files[z].path) for z in order]
    step, array = _even_step(folder, names, positions[order]), None
    if voxels:
        try:
            array = sitk.GetArrayFromImage(sitk.ReadImage(names, sitk.sitkFloat32, "GDCMImageIO")).T
        except RuntimeError:
            problem = "its voxels cannot be read, or do not fit in memory"
            raise UserError(f"{folder}: {problem}; replace or remove it") from None
    size = (*files[0].size[:2], len(places))
    spacing, origin = np.array([*pixel_mm, step]), places[order[0], :3]
    return turn_to_lps(size, spacing, origin, axes, array)._replace(notes=notes)


def _even_step(folder: Path, names: Sequence[str], positions: np.ndarray) -> float:
    """The distance of slices, mm; UserError if one is missing, repeated or shifted.

    `positions` (slices, 3) are along a row and along a column, px, and along the normal, mm.
    """
    steps, shift = np.diff(positions[:, 2]), np.ptp(positions[:, :2], axis=0).max()
    usual = np.quantile(steps, 0.5, method="lower")
    odd = int(np.abs(steps - usual).argmax())
    even = usual >= SPACING_MM[0] and abs(steps[odd] - usual) <= STEP_TOLERANCE * usual
    if not even or shift > TILT_TOLERANCE:
        one, other = (Path(name).name for name in names[odd : odd + 2])
        raise UserError(
            f"{folder}: {one} and {other} lie {steps[odd]:.4g} mm apart, others {usual:.4g} mm, "
            f"and slices are shifted by up to {shift:.2g} pixels: one is missing or repeated, or "
            "the gantry was tilted; complete it, or resample it onto a regular grid"
        )
    return float(steps.mean())


READERS = {  # of files; a folder is a DICOM series
    **dict.fromkeys((".nii.gz", ".nii"), read_nifti),
    **dict.fromkeys((".seg.nrrd", ".nrrd", ".mha", ".mhd"), read_itk),
}
