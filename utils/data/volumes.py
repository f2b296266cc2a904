"""CT volumes and their label maps: finding, checking and reading them, in one orientation."""

import contextlib
import gzip
import math
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import SimpleITK as sitk

from utils.data import dicom
from utils.data.slices import Geometry
from utils.system.errors import UserError
from utils.system.files import atomic_write, is_file_name, sha256

SUFFIXES = (".nii.gz", ".nii")
CHANNEL = "_0000"  # FLARE22's and nnU-Net's suffix of the first image channel
GZIP_MAGIC = b"\x1f\x8b"
GRID_TOLERANCE = 0.1  # image and label grids may lie apart by this share of a voxel
SPACING_MM = (1e-3, 1e3)  # what a scanner's voxel spacing can be
BLOCK = 1 << 24  # bytes read at once
HEADER = np.dtype(  # of NIfTI-1: what SimpleITK mends or overlooks without a word
    {
        "names": ["size", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl", "form"]
        + ["quaternion", "srow", "magic"],
        "formats": ["i4", "8i2", "i2", "i2", "8f4", "f4", "2f4", "2i2", "6f4", "12f4", "S4"],
        "offsets": [0, 40, 70, 72, 76, 108, 112, 252, 256, 280, 344],
        "itemsize": 348,
    }
)
VOXELS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"} | {
    1024: "i8",
    1280: "u8",
}  # NIfTI's codes of what has one number a voxel

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters becomes a UserError


@dataclass(frozen=True)
class CasePair:
    """The image, a file or the folder of a DICOM series, and the label map of one case."""

    case: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Volume:
    """A volume in LPS orientation: x grows to the patient's left, y to the back, z to the head.

    Attributes:
        array: (z, y, x) voxels.
        spacing_mm: (z, y, x), the order of the array's axes.
        origin_mm: physical position (x, y, z) of voxel (0, 0, 0).
        direction: 3 x 3 direction cosines, row-major, as SimpleITK gives them.
        stored_orientation: the orientation in the file, e.g. "RAS" (towards right, front, head).
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]
    stored_orientation: str


def find_pairs(
    images: str | Path, labels: str | Path, channel: int | None = None
) -> tuple[list[CasePair], list[str]]:
    """Pair the volumes of two folders in the FLARE22 layout, which is nnU-Net's too.

    `images/<case>_0000.nii.gz` (or without `_0000`) belongs to `labels/<case>.nii.gz`. Where images
    have several files a case, `channel` chooses: 1 is `<case>_0001.nii.gz`, and others are not
    looked at. A folder `images/<case>/` that holds DICOM files is an image too.

    Returns:
        The pairs in order of case name, and one line for each file without a partner.

    Raises:
        UserError: a folder is missing or holds no NIfTI file.
    """
    suffix = CHANNEL if channel is None else f"_{channel:04d}"
    image_of = volumes_by_case(Path(images), "--images", suffix, channel is not None, True)
    label_of = volumes_by_case(Path(labels), "--labels")
    pairs = [
        CasePair(case, image_of[case], label_of[case])
        for case in sorted(image_of.keys() & label_of)
    ]
    unpaired = [
        f"{path}: image without a label (expected {Path(labels) / case}.nii.gz)"
        for case, path in sorted(image_of.items())
        if case not in label_of
    ] + [
        f"{path}: label without an image (expected {Path(images) / case}{suffix}.nii.gz)"
        for case, path in sorted(label_of.items())
        if case not in image_of
    ]
    return pairs, unpaired


def volumes_by_case(
    folder: Path, option: str, strip: str = "", only: bool = False, series: bool = False
) -> dict[str, Path]:
    """The NIfTI files of a folder in order of name, by case: the name without suffix and `strip`.

    Args:
        folder: to look in.
        option: that it was given to, for the message.
        strip: what a name may end in, before the suffix.
        only: pass over names that do not.
        series: also take folders of DICOM files, as cases of their names.

    Raises:
        UserError: the folder is missing or holds none, a name cannot be used, or two files are of
            one case.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of NIfTI files to {option}")
    found: dict[str, Path] = {}
    spelled: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
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
        # Case by case: Windows and macOS take "Case" and "case" for one file.
        if (other := spelled.setdefault(case.casefold(), path)) is not path:
            raise UserError(f"{path}: a second file for case {case} beside {other.name}")
        found[case] = path
    if not found:
        of = f"file that ends in {strip}" if only else ".nii.gz or .nii file"
        of += " or DICOM series" if series else ""
        raise UserError(f"{folder}: holds no {of}; check {option}")
    return found


def check_geometry(pair: CasePair) -> None:
    """Compare the headers of image and label; no voxel is read.

    Raises:
        UserError: a file is unreadable, not 3D, or the two grids differ in shape or by more than
            GRID_TOLERANCE of a voxel anywhere.
    """
    image, label = _grid(pair.image), _grid(pair.label)
    if image.size != label.size:
        raise UserError(
            f"{pair.label}: shape {label.size} differs from the image's {image.size} "
            f"({pair.image.name}); resample one onto the other"
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.size])).reshape(3, -1).T
    apart = np.linalg.norm(image.positions(corners) - label.positions(corners), axis=1).max()
    if not apart <= GRID_TOLERANCE * min(image.spacing):
        raise UserError(
            f"{pair.label}: lies up to {apart:.3g} mm off the image's grid ({pair.image.name}): "
            "spacing, origin or direction differ; resample one onto the other"
        )


@dataclass(frozen=True)
class _Grid:
    """Where the voxels of a file lie; all (x, y, z), in the file's order, mm."""

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    def positions(self, indices: np.ndarray) -> np.ndarray:
        """Physical positions (N, 3) of voxel indices (N, 3)."""
        return (indices * self.spacing) @ np.reshape(self.direction, (3, 3)).T + self.origin

    def in_lps(self) -> "_Grid":
        """The same grid, its axes turned as reading turns them (sitk.DICOMOrient)."""
        axes = np.reshape(self.direction, (3, 3))
        # SimpleITK's own choice of which axis is which, for oblique volumes too.
        name = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.direction)
        order = [next(i for i, c in enumerate(name) if c in pair) for pair in ("LR", "PA", "SI")]
        turned = [i for i in order if name[i] in "RAI"]
        last = np.zeros(3)
        last[turned] = np.array(self.size)[turned] - 1
        signs = np.array([-1.0 if i in turned else 1.0 for i in order])
        return _Grid(
            tuple(self.size[i] for i in order),
            tuple(self.spacing[i] for i in order),
            tuple(self.positions(last[None])[0]),
            tuple((axes[:, order] * signs).ravel()),
        )


def _grid(path: Path) -> _Grid:
    """The grid of a volume in LPS; no voxel is read.

    Raises:
        UserError: as `check_geometry`.
    """
    if path.is_dir():
        found = dicom.open_series(path)
        return _Grid(found.size, found.spacing, found.origin, found.direction).in_lps()
    header = _read_header(path)
    geometry = (header.GetSize(), header.GetSpacing(), header.GetOrigin(), header.GetDirection())
    return _Grid(*geometry).in_lps()


def _read_header(path: Path) -> sitk.ImageFileReader:
    stored = _stored_header(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NiftiImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise UserError(
                f"{path}: its axes are not at right angles (a tilted gantry?); resample it onto a "
                "regular grid"
            ) from error
        raise UserError(f"{path}: cannot be read as NIfTI; replace or remove it") from error
    size = tuple(stored["dim"][1:4].tolist())
    if reader.GetSize() != size or reader.GetNumberOfComponents() != 1:
        raise UserError(f"{path}: damaged header; replace or remove it")
    return reader


def _stored_header(path: Path) -> np.void:
    """The header as it is in the file, an element of HEADER.

    Raises:
        UserError: it is not NIfTI's, or holds what no volume can have.
    """
    try:
        with _decompressed(path) as file:
            content = file.read(HEADER.itemsize)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path}: cannot read: {error.strerror}") from error
        raise UserError(f"{path}: damaged or cut short; replace or remove it") from error
    if content[:4] == (540).to_bytes(4, "little"):
        raise UserError(f"{path}: is NIfTI-2; convert it to NIfTI-1")
    order = "<" if content[:4] == (HEADER.itemsize).to_bytes(4, "little") else ">"
    header = np.frombuffer(content.ljust(HEADER.itemsize, b"\0"), HEADER.newbyteorder(order))[0]
    if header["size"] != HEADER.itemsize or header["magic"] != b"n+1":
        raise UserError(f"{path}: cannot be read as NIfTI; replace or remove it")
    dim = header["dim"]
    if not 1 <= dim[0] <= 7 or (dim[1 : dim[0] + 1] < 1).any():
        raise UserError(f"{path}: damaged header: dimensions {dim.tolist()}; replace or remove it")
    extra = [number for number in dim[4 : dim[0] + 1].tolist() if number > 1]
    if dim[0] < 3 or extra or int(header["datatype"]) not in VOXELS:
        found = " x ".join(map(str, dim[1 : dim[0] + 1].tolist()))
        if int(header["datatype"]) not in VOXELS:
            found += f" voxels of NIfTI's type {header['datatype']}, such as RGB"
        raise UserError(
            f"{path}: expected one 3D volume of one number a voxel, found {found}; replace or "
            "remove it"
        )
    spacing = header["pixdim"][1:4]
    if not ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all():
        raise UserError(
            f"{path}: spacing must be {SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm, found "
            f"{' x '.join(f'{mm:g}' for mm in spacing)}; correct its header"
        )
    qform, sform = (header["form"] > 0).tolist()
    numbers = [header["scl"], *[header["quaternion"]] * qform, *[header["srow"]] * sform]
    sane = np.isfinite(np.concatenate(numbers)).all()
    if not (sane and HEADER.itemsize <= header["vox_offset"] < 2**31):
        raise UserError(
            f"{path}: damaged header: scale, orientation or offset is no sensible number; replace "
            "or remove it"
        )
    return header


@contextlib.contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, of a gzip file those inside it, whatever its name."""
    with open(path, "rb") as file:
        zipped = file.read(2) == GZIP_MAGIC
        file.seek(0)
        if zipped:
            with gzip.GzipFile(fileobj=file) as inner:
                yield inner
        else:
            yield file


def digest(path: Path) -> str:
    """SHA-256 of a volume's file, or of the files of a DICOM series."""
    return dicom.digest(path) if path.is_dir() else sha256(path)


def read_image(path: Path) -> Volume:
    """Read a CT volume, a file or a DICOM series: float32 Hounsfield units (z, y, x) in LPS.

    Raises:
        UserError: unreadable, damaged, not 3D, a voxel that is not a finite number, or all of them
            of one value.
    """
    if path.is_dir():
        volume = _in_lps(dicom.read_series(path))
    else:
        volume = _read_lps(path, sitk.sitkFloat32)
    if (lowest := volume.array.min()) == volume.array.max():
        raise UserError(f"{path}: every voxel is {lowest:g}; is this a CT image?")
    return volume


def read_label_map(path: Path) -> Volume:
    """Read a label map: uint8 label ids (z, y, x) in LPS, 0 is background.

    Raises:
        UserError: unreadable, damaged, not 3D, or a value that is no whole number of 0 to 255.
    """
    volume = _read_lps(path, None)
    array = volume.array
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise UserError(f"{path}: label ids must be whole numbers; is this an image?")
    if array.min() < 0 or array.max() > 255:
        raise UserError(
            f"{path}: label ids must be 0 to 255, found {array.min():g} to {array.max():g}"
        )
    return Volume(
        array.astype(np.uint8),
        volume.spacing_mm,
        volume.origin_mm,
        volume.direction,
        volume.stored_orientation,
    )


def write_label_map(path: Path, labels: np.ndarray, geometry: Geometry) -> None:
    """Write labels (z, y, x) uint8 in LPS as NIfTI, in the orientation of their source file.

    Raises:
        UserError: the file cannot be written.
    """
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(tuple(reversed(geometry.spacing_mm)))
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction)
    image = sitk.DICOMOrient(image, geometry.stored_orientation)
    with tempfile.TemporaryDirectory() as folder:  # SimpleITK writes by name, not to a file object
        whole = Path(folder) / "labels.nii"
        try:
            sitk.WriteImage(image, str(whole))
            content = whole.read_bytes()
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: cannot write; is {folder} full?") from error
    missing = HEADER.itemsize + labels.nbytes - len(content)
    if missing > 0:  # SimpleITK says nothing of a full disk
        raise UserError(f"{path}: cannot write: {missing:,} bytes found no room in {folder}")
    with atomic_write(path) as file:
        file.write(gzip.compress(content, mtime=0) if path.name.endswith(".gz") else content)


def _read_lps(path: Path, pixel_type: int | None) -> Volume:
    _read_header(path)
    _check_voxels(path, _stored_header(path))
    try:
        output = sitk.sitkUnknown if pixel_type is None else pixel_type  # unknown: as stored
        image = sitk.ReadImage(str(path), output, "NiftiImageIO")
    except RuntimeError as error:
        if "allocat" in str(error):  # its voxels were seen just before: they are there
            raise MemoryError from error
        raise UserError(f"{path}: damaged; replace or remove it") from error
    return _in_lps(image)


def _in_lps(image: sitk.Image) -> Volume:
    stored = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    image = sitk.DICOMOrient(image, "LPS")
    return Volume(
        sitk.GetArrayFromImage(image),
        tuple(reversed(image.GetSpacing())),
        image.GetOrigin(),
        image.GetDirection(),
        stored,
    )


def _check_voxels(path: Path, header: np.void) -> None:
    """See that all voxels are there and finite.

    SimpleITK does not: it reads what a file cut short lacks, and NaN, as zeros without a word.
    """
    kind = np.dtype(VOXELS[int(header["datatype"])]).newbyteorder(header["dim"].dtype.byteorder)
    left = math.prod(header["dim"][1:4].tolist()) * kind.itemsize
    bad = 0
    try:
        with _decompressed(path) as file:
            file.seek(int(header["vox_offset"]))
            while left:
                block = file.read(min(left, BLOCK))
                if not block:
                    raise EOFError
                left -= len(block)
                if kind.kind == "f":
                    bad += int((~np.isfinite(np.frombuffer(block, kind))).sum())
            # gzip compares its checksum at the end, which may be far in a file made to fill a disk.
            if file.read(BLOCK) and file.read(1):
                raise EOFError
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut short; replace or remove it") from error
    if bad:
        raise UserError(f"{path}: {bad} voxels are NaN or infinite; repair or remove the file")
