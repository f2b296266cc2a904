"""Slices on disk: `imgs/<case>-<zzz>.npy`, `gts/<case>-<zzz>.npy` and one `dataset.json`.

The names are MedSAM's. Images are uint8 (1024, 1024) grey levels of the CT window, label maps uint8
(1024, 1024) label ids; `preprocess_ct.py` writes them, everything else reads them through here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perturb import tight_boxes
from utils.cli import UserError
from utils.files import read_json, sha256
from utils.frame import FRAME_SIZE, Frame

DATASET_FILE = "dataset.json"
FORMAT = "medsam-adaptive-slices 1"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Slice:
    """One axial slice with at least one label.

    Attributes:
        folder: the data set's folder.
        dataset: the data set's name, which keeps label ids of several sets apart.
        case: the patient.
        index: z in the LPS volume, from the feet.
        labels: pixels of each label at native resolution, by label id.
        label_names: the data set's names of label ids.
        image_sha256: hash of the image file when it was written.
        frame: how the native slice lies in the 1024 frame.
        spacing_mm: native pixel size (y, x).
    """

    folder: Path
    dataset: str
    case: str
    index: int
    labels: dict[int, int]
    label_names: dict[int, str]
    image_sha256: str
    frame: Frame
    spacing_mm: tuple[float, float]

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
    """A folder of slices. `sha256` is that of its dataset.json, which holds the images' hashes."""

    folder: Path
    name: str
    sha256: str
    window: tuple[float, float]
    slices: dict[str, list[Slice]]  # by split
    geometry: dict[str, Geometry]  # by case
    dropped_masks: dict[str, int]  # by case: masks that were too small to keep

    def split(self, name: str) -> list[Slice]:
        """The slices of one split, or of "all", in order of case and z."""
        if name == "all":
            every = (entry for part in self.slices.values() for entry in part)
            return sorted(every, key=lambda entry: (entry.case, entry.index))
        return self.slices[name]


def slice_name(case: str, index: int) -> str:
    """The file name of a slice without its suffix: <case>-<zzz>."""
    return f"{case}-{index:03d}"


def label_name(names: dict[int, str], label: int) -> str:
    """The name of a label id, or "label 7" for one without a name."""
    return names.get(label, f"label {label}")


def open_datasets(folders: Sequence[str | Path]) -> list[SliceDataset]:
    """Open folders that are used together; their names must differ.

    Raises:
        UserError: as `open_dataset`, or two folders of one name.
    """
    datasets = [open_dataset(folder) for folder in folders]
    names = [dataset.name for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--data: two folders are named {name!r}; rename one to tell them apart"
            )
    return datasets


def open_dataset(folder: str | Path) -> SliceDataset:
    """Read a folder's dataset.json and see that the files it lists are there.

    Raises:
        UserError: no dataset.json, one of another format, or a slice that is missing.
    """
    folder = Path(folder)
    path = folder / DATASET_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it with preprocess_ct.py --out {folder}")
    if not path.is_file():
        raise UserError(f"{folder}: holds no {DATASET_FILE}; give a folder of preprocess_ct.py")
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise UserError(f"{path}: not of format {FORMAT!r}; preprocess the volumes again")
    name = folder.resolve().name
    slices: dict[str, list[Slice]] = {split: [] for split in SPLITS}
    geometry: dict[str, Geometry] = {}
    dropped: dict[str, int] = {}
    try:
        names = {int(label): str(text) for label, text in meta["label_names"].items()}
        for case, entry in sorted(meta["cases"].items()):
            frame = Frame(tuple(entry["frame"]["native"]), tuple(entry["frame"]["content"]))
            geometry[case] = Geometry(
                tuple(entry["shape"]),
                tuple(entry["spacing_mm"]),
                tuple(entry["origin_mm"]),
                tuple(entry["direction"]),
                str(entry["stored_orientation"]),
            )
            dropped[case] = int(entry["dropped_masks"])
            for index, item in sorted(entry["slices"].items(), key=lambda pair: int(pair[0])):
                slices[entry["split"]].append(
                    Slice(
                        folder=folder,
                        dataset=name,
                        case=case,
                        index=int(index),
                        labels={int(label): int(n) for label, n in item["labels"].items()},
                        label_names=names,
                        image_sha256=item["image_sha256"],
                        frame=frame,
                        spacing_mm=tuple(entry["spacing_mm"][1:]),
                    )
                )
        window = (float(meta["window"][0]), float(meta["window"][1]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); preprocess the volumes again"
        ) from error
    for entry in (s for part in slices.values() for s in part):
        for file in (entry.image_path, entry.label_path):
            if not file.is_file():
                raise UserError(f"{file}: listed in {DATASET_FILE} but missing; preprocess again")
    return SliceDataset(folder, name, sha256(path), window, slices, geometry, dropped)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image slice: uint8 (1024, 1024) grey levels.

    MedSAM's own (1024, 1024, 3) float arrays in [0, 1] are taken as well.

    Raises:
        UserError: unreadable, or an array of another kind.
    """
    image = _load_array(path)
    if image.shape == (FRAME_SIZE, FRAME_SIZE, 3) and image.dtype.kind == "f":
        image = image[..., 0]
        if not (image.min() >= 0 and image.max() <= 1):
            raise UserError(f"{path}: MedSAM's float images lie in [0, 1]; this one does not")
        image = np.rint(image * 255).astype(np.uint8)
    return _check_slice(path, image)


def read_instances(entry: Slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slice's label map, uint8 (1024, 1024), with its labels (K,) and their tight boxes (K, 4).

    Labels and boxes are as `perturb.tight_boxes` gives them.

    Raises:
        UserError: as `read_label_map`, or other labels than dataset.json lists.
    """
    label_map = read_label_map(entry.label_path)
    labels, boxes = tight_boxes(label_map)
    if set(labels.tolist()) != entry.labels.keys():
        raise UserError(
            f"{entry.label_path}: holds labels {labels.tolist()}, {DATASET_FILE} lists "
            f"{sorted(entry.labels)}; preprocess again"
        )
    return label_map, labels, boxes


def read_label_map(path: str | Path) -> np.ndarray:
    """Read a label slice: uint8 (1024, 1024) label ids.

    Raises:
        UserError: unreadable, or an array of another kind.
    """
    return _check_slice(path, _load_array(path))


def _load_array(path: str | Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged or not a NumPy array; preprocess again") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: expected one array (.npy), found an archive")
    return array


def _check_slice(path: str | Path, array: np.ndarray) -> np.ndarray:
    if array.shape != (FRAME_SIZE, FRAME_SIZE) or array.dtype != np.uint8:
        raise UserError(
            f"{path}: expected uint8 ({FRAME_SIZE}, {FRAME_SIZE}), found {array.dtype} "
            f"{array.shape}; preprocess again"
        )
    return array
