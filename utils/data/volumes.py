"""CT volumes and their label maps: finding, reading, checking and writing."""

import gzip
import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from nibabel import Nifti1Image
from nibabel.orientations import apply_orientation, inv_ornt_aff

from utils.data import readers
from utils.data.readers import READERS, Stored, dicom_files
from utils.data.slices import Geometry
from utils.system import UserError
from utils.system.files import atomic_write, is_file_name, sha256

SUFFIXES = tuple(READERS)  # in capitals, too
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
CHANNEL = "_0000"  # suffix of the first image channel in the FLARE22 and nnU-Net layouts
FILLED = 0.01  # of the window, a share that the values of a CT surely fill
NO_AIR = -200  # HU; a CT has lower ones, if only in its corners


@dataclass(frozen=True, kw_only=True)
class Volume(Geometry):
    """A volume in LPS."""

    array: np.ndarray  # (z, y, x) voxels
    sha256: str  # of the file, of the files of a DICOM series, or of the voxels of an .mhd file
    notes: tuple[str, ...] = ()  # lines for the user


# --- Finding -------------------------------------------------------------------------------------
def volume_suffix(path: Path) -> str | None:
    """The suffix of READERS in which a file's name ends, as spelt in the name, or None."""
    suffix = next((s for s in READERS if path.name.lower().endswith(s)), None)
    return suffix and path.name[-len(suffix) :]


def volumes_by_case(
    folder: Path, option: str, strip: str = "", series: bool = False
) -> dict[str, Path]:
    """The volumes of a folder, which `option` named, by case in order of name.

    A case is a file's name without its suffix and without `strip` at its end. With `series`,
    folders of DICOM files are volumes as well.

    Raises UserError: the folder is missing or holds none, a name cannot be used, or two files are
    of one case.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of volumes to {option}")
    found: dict[str, tuple[str, Path]] = {}  # by case-folded name: macOS takes "A" and "a" for one
    for path in sorted(folder.iterdir()):
        suffix = volume_suffix(path) if path.is_file() else None
        of_series = series and path.is_dir() and dicom_files(path)
        if path.name.startswith(".") or (suffix is None and not of_series):
            continue
        case = path.name.removesuffix(suffix or "").removesuffix(strip)
        if not is_file_name(case):
            raise UserError(
                f"{path}: this name is not UTF-8, or contains a colon, a backslash or unprintable "
                "characters; rename the file"
            )
        _, other = found.setdefault(case.casefold(), (case, path))
        if other is not path:
            raise UserError(f"{path}: a second file for case {case} beside {other.name}")
    if not found:
        kind = f"{', '.join(SUFFIXES)} file{' or DICOM series' if series else ''}"
        raise UserError(f"{folder}: holds no {kind}; check {option}{about_pictures(folder)}")
    return dict(found.values())


def about_pictures(path: Path) -> str:
    """The end of a message, if a file, a folder, or one in it, is or holds 2D pictures."""
    files = [path, *path.glob("*.*"), *path.glob("*/*.*")]
    picture = next((file for file in files if file.suffix.lower() in PICTURES), None)
    return f"; {picture.name} is a picture, not a CT volume; {readers.AS_SLICES}" if picture else ""


# --- Reading -------------------------------------------------------------------------------------
def read_geometry(path: Path) -> Geometry:
    """The grid of a volume in LPS; of files, only the header is read. Errors as its reader's."""
    return _read(path, voxels=False).geometry


def read_image(path: Path) -> Volume:
    """Read a CT volume, a file or a DICOM series: float32 Hounsfield units (z, y, x) in LPS.

    Raises UserError: as its reader's, or all voxels are of one value.
    """
    stored = _read(path)
    with np.errstate(over="ignore"):  # beyond float32 is beyond any window
        array = np.ascontiguousarray(stored.voxels, np.float32)
    lowest, highest, notes = array.min(), array.max(), stored.notes
    if lowest == highest:
        raise UserError(f"{path}: every voxel is {lowest:g}; is this a CT image?")
    if stored.voxels.dtype == np.uint8 or (lowest, highest) == (0, 255):
        raise UserError(
            f"{path}: its values, {lowest:g} to {highest:g}, are those of an 8-bit picture or of a "
            "label map; give the CT in Hounsfield units"
        )
    if lowest >= NO_AIR:
        notes += (
            f"{path}: no value is below {NO_AIR} HU, although air has -1000: check that these are "
            "Hounsfield units, with the rescale intercept applied",
        )
    return _volume(path, stored._replace(notes=notes), array)


def read_label_map(path: Path) -> Volume:
    """Read a label map: uint8 label ids (z, y, x) in LPS, 0 is background.

    Values that differ from whole numbers only by the rounding of the file become whole.

    Raises UserError: as its reader's, or a value is not a whole number from 0 to 255.
    """
    stored = _read(path)
    voxels = np.rint(stored.voxels) if stored.voxels.dtype.kind == "f" else stored.voxels
    rounding = min(stored.rounding / 2, 0.25) + 256 * np.finfo(np.float32).eps
    if voxels is not stored.voxels and np.abs(voxels - stored.voxels).max() > rounding:
        raise UserError(f"{path}: label ids must be whole numbers; is this an image?")
    if voxels.min() < 0 or voxels.max() > 255:
        raise UserError(
            f"{path}: label ids must be 0 to 255, found {voxels.min():g} to {voxels.max():g}"
        )
    return _volume(path, stored, np.ascontiguousarray(voxels, np.uint8))


def _volume(path: Path, stored: Stored, array: np.ndarray) -> Volume:
    digest = hashlib.sha256(array).hexdigest() if path.suffix == ".mhd" else _digest(path)
    return Volume(**vars(stored.geometry), array=array, sha256=digest, notes=stored.notes)


def _read(path: Path, voxels: bool = True) -> Stored:
    if path.is_dir():
        return readers.read_dicom(path, voxels)
    return READERS[(volume_suffix(path) or SUFFIXES[0]).lower()](path, voxels)


def _digest(path: Path) -> str:
    """SHA-256 of a file, or over the hashes of a series' files, whatever their names are."""
    if path.is_file():
        return sha256(path)
    return hashlib.sha256("".join(sorted(map(sha256, dicom_files(path)))).encode()).hexdigest()


def check_window(image: np.ndarray, path: Path, window: tuple[float, float]) -> None:
    """UserError if the values of a volume, in HU, lie outside a window or hardly fill it."""
    low, high = window
    lowest, highest = image.min(), image.max()
    share = (min(highest, high) - max(lowest, low)) / (high - low)
    if share < FILLED:
        where = "all lie outside" if share <= 0 else f"fill under {FILLED:.0%} of"
        raise UserError(
            f"{path}: its values, {lowest:g} to {highest:g}, {where} the window of "
            f"{low:g} to {high:g} HU; are they Hounsfield units? See --window"
        )


def grey_levels(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Hounsfield units as grey levels, float 0-255: min-max over the window."""
    low, high = window
    return (np.clip(image, low, high) - low) * (255 / (high - low))


def compare_grids(label: Geometry, path: Path, image: Geometry, image_name: str) -> np.ndarray:
    """Where a label map, of file `path`, begins on the grid of an image: x, y, z in voxels.

    Raises UserError: it is off that grid, or a part of it, by more than GRID_TOLERANCE of a voxel.
    """
    size, of_label = np.array(image.shape[::-1]), np.array(label.shape[::-1])
    start = np.rint(image.indices_of(np.array([label.origin_mm]))[0])
    start = np.clip(start, 0, np.maximum(size - of_label, 0)).astype(int)
    part = np.column_stack([image.steps, image.steps @ start + image.origin_mm])
    distance = readers.corner_distance(of_label - 1, part, label.affine)
    fits = distance <= readers.GRID_TOLERANCE * min(image.spacing_mm)
    if not (fits and (of_label <= size).all()):
        raise UserError(
            f"{path}: shape {label.shape[::-1]} lies up to {distance:.3g} mm off the image's grid "
            f"({image_name}, shape {image.shape[::-1]}): shape, spacing, origin or direction "
            "differ; resample one onto the other"
        )
    return start


def on_grid(label: Volume, path: Path, image: Geometry, image_name: str) -> Volume:
    """A label map on the whole grid of an image; UserError as `compare_grids`."""
    x, y, z = compare_grids(label, path, image, image_name)
    if label.shape == image.shape:
        return label
    array = np.zeros(image.shape, np.uint8)
    depth, height, width = label.shape
    array[z : z + depth, y : y + height, x : x + width] = label.array
    note = f"{path}: covers {depth} of {len(array)} slices, {width} x {height} pixels; 0 elsewhere"
    grid = {field.name: getattr(image, field.name) for field in fields(Geometry)}
    return replace(label, **grid, array=array, notes=(*label.notes, note))


# --- Writing -------------------------------------------------------------------------------------
def write_volume(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write an array (z, y, x) in LPS as NIfTI, in the orientation of its source file.

    Both forms, their codes and the unit are those of a source that is NIfTI.
    """
    affine = np.diag([-1, -1, 1, 1]) @ np.vstack([geometry.affine, [0, 0, 0, 1]])
    affine = affine @ inv_ornt_aff(geometry.turn, array.shape[::-1])
    image = Nifti1Image(apply_orientation(array.T, geometry.turn), affine)
    image.set_qform(affine, code=1)  # of the scanner
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.header["regular"], image.header["pixdim"][4:] = b"r", 0  # as SimpleITK writes them
    if geometry.nifti_header:
        image = Nifti1Image(image.dataobj, None, image.header)  # which keeps what follows
        for name, values in geometry.nifti_header.items():
            image.header[name].flat[: len(values)] = values
    content = image.to_bytes()
    with atomic_write(path) as file:
        file.write(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)
