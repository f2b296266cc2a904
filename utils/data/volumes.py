"""CT volumes and their label maps: finding, reading, checking and writing."""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel import Nifti1Image
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from utils.data.readers import READERS, Stored, dicom_files, read_dicom
from utils.data.slices import Geometry
from utils.system import UserError
from utils.system.files import atomic_write, is_file_name, sha256

SUFFIXES = tuple(READERS)  # in capitals, too
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
CHANNEL = "_0000"  # suffix of the first image channel in the FLARE22 and nnU-Net layouts
GRID_TOLERANCE = 0.1  # the grids of image and label may differ by this share of a voxel


@dataclass(frozen=True)
class Volume(Geometry):
    """A volume in LPS."""

    array: np.ndarray  # (z, y, x) voxels
    sha256: str  # of the file, or of the files of a DICOM series


# --- Finding -------------------------------------------------------------------------------------
def volume_suffix(path: Path) -> str | None:
    """The one of READERS in which a file's name ends, as it is spelt there; None without one."""
    suffix = next((s for s in READERS if path.name.lower().endswith(s)), None)
    return suffix and path.name[-len(suffix) :]


def volumes_by_case(
    folder: Path, option: str, strip: str = "", only: bool = False, series: bool = False
) -> dict[str, Path]:
    """The volumes of a folder, which `option` named, by case in order of name.

    A case is a file's name without its suffix and without `strip` at its end, which it must have if
    `only`. With `series`, folders of DICOM files are volumes as well.

    Raises UserError: the folder is missing or holds none, a name cannot be used, or two files are
    of one case.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of NIfTI files to {option}")
    found: dict[str, tuple[str, Path]] = {}  # by case-folded name: macOS takes "A" and "a" for one
    for path in sorted(folder.iterdir()):
        suffix = volume_suffix(path) if path.is_file() else None
        of_series = series and path.is_dir() and dicom_files(path)
        if path.name.startswith(".") or (suffix is None and not of_series):
            continue
        name = path.name.removesuffix(suffix or "")
        case = name.removesuffix(strip)
        if only and not name.endswith(strip):
            continue
        if not is_file_name(case):
            raise UserError(
                f"{path}: this name is not UTF-8, or holds a colon, a backslash or what cannot be "
                "printed; rename the file"
            )
        _, other = found.setdefault(case.casefold(), (case, path))
        if other is not path:
            raise UserError(f"{path}: a second file for case {case} beside {other.name}")
    if not found:
        kind = f"file that ends in {strip}" if only else f"{' or '.join(SUFFIXES)} file"
        kind += " or DICOM series" if series else ""
        raise UserError(f"{folder}: holds no {kind}; check {option}{about_pictures(folder)}")
    return dict(found.values())


def about_pictures(folder: Path) -> str:
    """The end of a message, if a folder, or one in it, holds 2D pictures."""
    paths = (path for glob in ("*.*", "*/*.*") for path in folder.glob(glob))
    if picture := next((path for path in paths if path.suffix.lower() in PICTURES), None):
        return (
            f"; {picture.name} is a 2D picture and no CT: such are taken as MedSAM's slices, "
            "imgs/CASE-000.npy, (1024, 1024, 3) floats in [0, 1], and gts/CASE-000.npy, label ids"
        )
    return ""


# --- Reading -------------------------------------------------------------------------------------
def read_geometry(path: Path) -> Geometry:
    """The grid of a volume in LPS; of NIfTI, only the header is read. Errors as its reader's."""
    return _read(path, voxels=False)[0]


def read_image(path: Path) -> Volume:
    """Read a CT volume, a file or a DICOM series: float32 Hounsfield units (z, y, x) in LPS.

    Raises UserError: as its reader's, or all voxels are of one value.
    """
    geometry, voxels = _read(path)
    with np.errstate(over="ignore"):  # beyond float32 is beyond any window
        array = np.ascontiguousarray(voxels, np.float32)
    if (lowest := array.min()) == array.max():
        raise UserError(f"{path}: every voxel is {lowest:g}; is this a CT image?")
    return Volume(**vars(geometry), array=array, sha256=_digest(path))


def read_label_map(path: Path) -> Volume:
    """Read a label map: uint8 label ids (z, y, x) in LPS, 0 is background.

    Raises UserError: as its reader's, or a value is no whole number of 0 to 255.
    """
    geometry, voxels = _read(path)
    if voxels.dtype.kind == "f" and not np.array_equal(voxels, np.rint(voxels)):
        raise UserError(f"{path}: label ids must be whole numbers; is this an image?")
    if voxels.min() < 0 or voxels.max() > 255:
        raise UserError(
            f"{path}: label ids must be 0 to 255, found {voxels.min():g} to {voxels.max():g}"
        )
    array = np.ascontiguousarray(voxels, np.uint8)
    return Volume(**vars(geometry), array=array, sha256=_digest(path))


def _read(path: Path, voxels: bool = True) -> Stored:
    if path.is_dir():
        return read_dicom(path, voxels)
    return READERS[(volume_suffix(path) or SUFFIXES[0]).lower()](path, voxels)


def _digest(path: Path) -> str:
    """SHA-256 of a file, or over the hashes of a series' files, whatever their names are."""
    if path.is_file():
        return sha256(path)
    return hashlib.sha256("".join(sorted(map(sha256, dicom_files(path)))).encode()).hexdigest()


def check_window(image: np.ndarray, path: Path, window: tuple[float, float]) -> None:
    """UserError if all values of a volume, in HU, lie outside a window."""
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


def compare_grids(label: Geometry, path: Path, image: Geometry, image_name: str) -> None:
    """UserError if a label map, of file `path`, does not lie on the grid of an image.

    They must not differ in shape, nor by more than GRID_TOLERANCE of a voxel anywhere.
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


# --- Writing -------------------------------------------------------------------------------------
def write_volume(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write an array (z, y, x) in LPS as NIfTI, in the orientation of its source file."""
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(geometry.stored_orientation))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = geometry.steps, geometry.origin_mm
    affine = np.diag([-1, -1, 1, 1]) @ affine @ inv_ornt_aff(turn, array.shape[::-1])
    image = Nifti1Image(apply_orientation(array.T, turn), affine)
    image.set_qform(affine, code=1)  # of the scanner
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.header["regular"], image.header["pixdim"][4:] = b"r", 0  # as SimpleITK writes them
    content = image.to_bytes()
    with atomic_write(path) as file:
        file.write(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)
