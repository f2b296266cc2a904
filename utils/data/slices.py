"""Slices on disk: `imgs/<case>-<zzz>.npy`, `gts/<case>-<zzz>.npy` and one `dataset.json`.

The names are MedSAM's. Images are uint8 (1024, 1024) grey levels of the CT window, label maps uint8
(1024, 1024) label ids; `preprocess_ct.py` writes them, everything else reads them through here.
"""

import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from perturb import IMAGE_SIZE, tight_boxes
from utils.data.frame import Frame
from utils.data.labels import is_label_name
from utils.system.errors import UserError
from utils.system.files import is_file_name, read_bytes, read_json, sha256, write_new

DATASET_FILE = "dataset.json"
FORMAT = "medsam-adaptive-slices 2"
ENTRIES = {"format", "window", "label_names", "split", "min_pixels", "cases"}  # of dataset.json
GEOMETRY = ("spacing_mm", "origin_mm", "direction", "stored_orientation")  # of a case, or null
SPLITS = ("train", "val", "test")
MOST_VOXELS = 2**15 - 1  # along an axis: NIfTI's most
T = TypeVar("T")
MOST_BYTES = 3 * 8 * IMAGE_SIZE**2 + 4096  # of a slice: MedSAM's float64 with three channels


@dataclass(frozen=True)
class Slice:
    """One axial slice with at least one label.

    Attributes:
        folder: the data set's folder.
        dataset: the data set's name, which keeps label ids of several sets apart.
        case: the patient.
        index: z in the LPS volume, from the feet; of MedSAM's slices the number in their name.
        labels: pixels of each label at native resolution, by label id.
        label_names: the data set's names of label ids.
        image_sha256, label_sha256: hashes of the two files when they were written.
        frame: how the native slice lies in the 1024 frame.
        spacing_mm: native pixel size (y, x); None where it is not known, as of MedSAM's slices.
    """

    folder: Path
    dataset: str
    case: str
    index: int
    labels: dict[int, int]
    label_names: dict[int, str]
    image_sha256: str
    label_sha256: str
    frame: Frame
    spacing_mm: tuple[float, float] | None

    @property
    def name(self) -> str:
        """<case>-<zzz>, unique in its data set."""
        return slice_name(self.case, self.index)

    @property
    def key(self) -> str:
        """Tells the slice from every other one of the data sets in use."""
        return f"{self.dataset}/{self.name}"

    @property
    def image_path(self) -> Path:
        """uint8 (1024, 1024) grey levels of the window."""
        return self.folder / "imgs" / f"{self.name}.npy"

    @property
    def label_path(self) -> Path:
        """uint8 (1024, 1024) label ids."""
        return self.folder / "gts" / f"{self.name}.npy"


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a case's volume lie, in LPS; array axes are (z, y, x).

    Attributes:
        shape, spacing_mm: (z, y, x).
        origin_mm: physical position (x, y, z) of voxel (0, 0, 0).
        direction: 3 x 3 direction cosines, row-major, as SimpleITK gives them.
        stored_orientation: the orientation in the source file, e.g. "RAS".
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]
    stored_orientation: str


@dataclass(frozen=True)
class SliceDataset:
    """A folder of slices. `sha256` is that of its dataset.json, which holds the slices' hashes.

    Of MedSAM's slices neither window nor geometry is known.
    """

    folder: Path
    name: str
    sha256: str
    window: tuple[float, float] | None
    slices: dict[str, list[Slice]]  # by split
    geometry: dict[str, Geometry]  # by case, where it is known
    dropped_masks: dict[str, int]  # by case: masks that were too small to keep
    volumes: dict[str, str]  # by case: hash of the source image

    def split(self, name: str) -> list[Slice]:
        """The slices of one split, or of "all", in order of case and z."""
        if name == "all":
            every = (entry for part in self.slices.values() for entry in part)
            return sorted(every, key=lambda entry: (entry.case, entry.index))
        return self.slices[name]


def slice_name(case: str, index: int) -> str:
    """The file name of a slice without its suffix: <case>-<zzz>."""
    return f"{case}-{index:03d}"


def repeated_images(hashes: Mapping[T, str]) -> Iterator[tuple[T, T]]:
    """Pairs of cases that were made from one image: a later one, and the first."""
    first: dict[str, T] = {}
    for case, digest in hashes.items():
        if first.setdefault(digest, case) != case:
            yield case, first[digest]


def open_datasets(folders: Sequence[str | Path]) -> list[SliceDataset]:
    """Open folders that are used together; their names must differ.

    Raises:
        UserError: as `open_dataset`, two folders of one name, or a patient in two splits.
    """
    datasets = [open_dataset(folder) for folder in folders]
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--data: two folders are named {name!r}; rename one to tell them apart"
            )
    split = {
        (dataset.folder, entry.case): part
        for dataset in datasets
        for part in SPLITS
        for entry in dataset.split(part)
    }
    every = {(d.folder, case): digest for d in datasets for case, digest in d.volumes.items()}
    for case, other in repeated_images(every):
        if split[case] != split[other]:
            raise UserError(
                f"{case[0] / DATASET_FILE}: {case[1]} ({split[case]}) is the same image as "
                f"{other[1]} ({split[other]}) of {other[0]}: a patient in two splits; preprocess "
                "without it"
            )
    return datasets


def open_dataset(folder: str | Path) -> SliceDataset:
    """Read a folder's dataset.json and see that the files it lists are there.

    Raises:
        UserError: no dataset.json, one of another format, a damaged one, or a slice that is
            missing.
    """
    folder = Path(folder)
    path = folder / DATASET_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it with preprocess_ct.py --out {folder}")
    if not path.is_file():
        if all((folder / part).is_dir() for part in ("imgs", "gts")):
            raise UserError(
                f"{folder}: holds no {DATASET_FILE}; if it is MedSAM's, give it to "
                "preprocess_ct.py --input, and here what that makes"
            )
        raise UserError(f"{folder}: holds no {DATASET_FILE}; give a folder of preprocess_ct.py")
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise UserError(f"{path}: not of format {FORMAT!r}; preprocess the volumes again")
    try:
        dataset = _dataset_of(meta, folder, sha256(path))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); preprocess the volumes again"
        ) from error
    for entry in dataset.split("all"):
        for file in (entry.image_path, entry.label_path):
            if not file.is_file():
                raise UserError(f"{file}: listed in {DATASET_FILE} but missing; preprocess again")
    return dataset


# --- dataset.json, which may come from anywhere: nothing in it is taken for granted ---------------
def _dataset_of(meta: dict, folder: Path, digest: str) -> SliceDataset:
    """A data set from its dataset.json.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: something in it is missing,
            or is not what preprocess_ct.py writes.
    """
    if meta.keys() != ENTRIES:
        raise ValueError(f"entries {sorted(meta.keys() ^ ENTRIES)}")
    name = folder.resolve().name
    names = {_number(label, 0, 255): text for label, text in meta["label_names"].items()}
    for text in names.values():
        if not is_label_name(text):
            raise ValueError(f"label name {text!r}")
    window = None if meta["window"] is None else _finite(meta["window"], 2)
    if window and not window[0] < window[1]:
        raise ValueError(f"window {window}")
    slices: dict[str, list[Slice]] = {split: [] for split in SPLITS}
    geometry: dict[str, Geometry] = {}
    for case, entry in sorted(meta["cases"].items()):
        if not is_file_name(case):
            raise ValueError(f"case name {case!r}")
        shape = _shape_of(entry)
        spacing = None
        if any(entry[field] is not None for field in GEOMETRY):
            geometry[case] = _geometry_of(entry, shape)
            spacing = geometry[case].spacing_mm[1:]
        frame = Frame.of(shape[1:], spacing or (1.0, 1.0))
        if entry["frame"] != {"native": list(frame.native), "content": list(frame.content)}:
            raise ValueError(f"frame of {case}")
        items = {_number(z, 0, shape[0] - 1): s for z, s in entry["slices"].items()}
        for index, item in sorted(items.items()):
            pixels = shape[1] * shape[2]
            labels = {_number(i, 1, 255): _whole(n, 1, pixels) for i, n in item["labels"].items()}
            slices[entry["split"]].append(
                Slice(
                    folder=folder,
                    dataset=name,
                    case=case,
                    index=index,
                    labels=labels,
                    label_names=names,
                    image_sha256=_hash(item["image_sha256"]),
                    label_sha256=_hash(item["label_sha256"]),
                    frame=frame,
                    spacing_mm=spacing,
                )
            )
            if not labels:
                raise ValueError(f"no label in {slice_name(case, index)}")
    if not any(slices.values()):
        raise ValueError("no slice")
    cases = meta["cases"].items()
    return SliceDataset(
        folder=folder,
        name=name,
        sha256=digest,
        window=window,
        slices=slices,
        geometry=geometry,
        dropped_masks={case: _whole(entry["dropped_masks"], 0, 2**31) for case, entry in cases},
        volumes={case: _hash(entry["image_sha256"]) for case, entry in cases},
    )


def _shape_of(entry: dict) -> tuple[int, int, int]:
    deep, *sides = entry["shape"]
    height, width = (_whole(side, 1, MOST_VOXELS) for side in sides)
    return _whole(deep, 1, MOST_VOXELS), height, width


def _geometry_of(entry: dict, shape: tuple[int, int, int]) -> Geometry:
    spacing = _finite(entry["spacing_mm"], 3)
    orientation = entry["stored_orientation"]
    if min(spacing) <= 0:
        raise ValueError(f"spacing {spacing}")
    axes = {"R": "x", "L": "x", "A": "y", "P": "y", "I": "z", "S": "z"}
    if type(orientation) is not str or sorted(map(axes.get, orientation)) != ["x", "y", "z"]:
        raise ValueError(f"orientation {orientation!r}")
    direction = _finite(entry["direction"], 9)
    matrix = np.reshape(direction, (3, 3))
    if np.abs(matrix).max() > 1.001 or not np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-3):
        raise ValueError("direction is no rotation")
    return Geometry(shape, spacing, _finite(entry["origin_mm"], 3), direction, orientation)


def _whole(value: object, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number of {least} to {most}")
    return value


def _number(text: str, least: int, most: int) -> int:
    """A whole number as JSON's keys have it: without sign, blanks or leading zeros."""
    if not re.fullmatch("0|[1-9][0-9]{0,9}", text):
        raise ValueError(f"{text!r} is no whole number")
    return _whole(int(text), least, most)


def _finite(values: Iterable, count: int) -> tuple[float, ...]:
    numbers = tuple(values)
    if len(numbers) != count or not all(type(number) in (int, float) for number in numbers):
        raise ValueError(f"{numbers} are not {count} numbers")
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{numbers} are not finite")
    return tuple(float(number) for number in numbers)


def _hash(value: object) -> str:
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
        raise ValueError(f"{value!r} is no SHA-256")
    return value


# --- The files of a slice ------------------------------------------------------------------------
def write_slice(path: Path, array: np.ndarray) -> str:
    """Write an image or label map, uint8 (1024, 1024), to a folder that is aside; its SHA-256.

    Raises:
        UserError: it cannot be written.
    """
    memory = io.BytesIO()
    np.lib.format.write_array(memory, array, allow_pickle=False)
    write_new(path, memory.getbuffer())
    return hashlib.sha256(memory.getbuffer()).hexdigest()


def read_image(path: str | Path, digest: str | None = None) -> np.ndarray:
    """Read an image slice: uint8 (1024, 1024) grey levels.

    MedSAM's own (1024, 1024, 3) float arrays in [0, 1] are taken as well.

    Args:
        path: the file.
        digest: its SHA-256, if it is known.

    Raises:
        UserError: unreadable, not the file that `digest` is of, or an array of another kind.
    """
    image = read_array(path, digest=digest)
    if image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype.kind == "f":
        image = grey_of_floats(path, image)
    return _check_slice(path, image)


def grey_of_floats(path: str | Path, image: np.ndarray) -> np.ndarray:
    """The grey levels (H, W) uint8 of an image as MedSAM has them, (H, W, 3) floats in [0, 1].

    Raises:
        UserError: a value outside, naming `path`.
    """
    image = image[..., 0]
    if not (image.size and image.min() >= 0 and image.max() <= 1):
        raise UserError(f"{path}: MedSAM's float images lie in [0, 1]; this one does not")
    return np.rint(image * 255).astype(np.uint8)


def read_label_map(path: str | Path, digest: str | None = None) -> np.ndarray:
    """Read a label slice: uint8 (1024, 1024) label ids; arguments and errors as `read_image`."""
    return _check_slice(path, read_array(path, digest=digest))


def read_instances(entry: Slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slice's label map, uint8 (1024, 1024), with its labels (K,) and their tight boxes (K, 4).

    Labels and boxes are as `perturb.tight_boxes` gives them.

    Raises:
        UserError: the label map is not the one that dataset.json lists, or holds other labels.
    """
    label_map = read_label_map(entry.label_path, entry.label_sha256)
    labels, boxes = tight_boxes(label_map)
    if set(labels.tolist()) != entry.labels.keys():
        raise UserError(
            f"{entry.label_path}: holds labels {labels.tolist()}, {DATASET_FILE} lists "
            f"{sorted(entry.labels)}; preprocess again"
        )
    return label_map, labels, boxes


def read_array(
    path: str | Path, what_to_do: str = "preprocess again", digest: str | None = None
) -> np.ndarray:
    """The array of an .npy file, of which nothing is executed and at most MOST_BYTES are read.

    Raises:
        UserError: unreadable, too large, or not the file that `digest` is of, with `what_to_do`.
    """
    try:
        too_large = Path(path).stat().st_size > MOST_BYTES
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    if too_large:
        raise UserError(f"{path}: larger than a slice can be; {what_to_do}")
    content = read_bytes(path)
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path}: changed or damaged; {what_to_do}")
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # a damaged header is read as Python's own literals
        raise UserError(f"{path}: damaged or not a NumPy array; {what_to_do}") from error


def _check_slice(path: str | Path, array: np.ndarray) -> np.ndarray:
    if array.shape != (IMAGE_SIZE, IMAGE_SIZE) or array.dtype != np.uint8:
        raise UserError(
            f"{path}: expected uint8 ({IMAGE_SIZE}, {IMAGE_SIZE}), found {array.dtype} "
            f"{array.shape}; preprocess again"
        )
    return array
