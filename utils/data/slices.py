"""Slices on disk: `imgs/<case>-<zzz>.npy`, `gts/<case>-<zzz>.npy` and one `dataset.json`.

The names are MedSAM's. Images are uint8 (1024, 1024) grey levels of the CT window, label maps uint8
(1024, 1024) label ids. `preprocess_ct.py` writes them; everything else reads them through here.

An instance is what has a box of its own: a label in a slice or, with --parts, a connected part of
it. The largest part has the label's id; further ones have ids from 255 downward in their slice.
"""

import hashlib
import io
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from perturb import IMAGE_SIZE, box_rng, tight_boxes
from utils.data.frame import Frame
from utils.data.labels import is_name, label_name
from utils.system import UserError
from utils.system.files import is_file_name, read_bytes, read_json, sha256

DATASET_FILE = "dataset.json"
FORMAT = "medsam-adaptive-slices 2"
SPLITS = ("train", "val", "test")
CHANNEL_TOLERANCE = 0.01 / 255  # of MedSAM's floats: its script resizes the channels apart
# How many numbers each field of a NIfTI header holds that says where the volume lies.
NIFTI_FIELDS = {"pixdim": 4, "xyzt_units": 1, "qform_code": 1, "sform_code": 1}
NIFTI_FIELDS |= {f"quatern_{axis}": 1 for axis in "bcd"} | {f"qoffset_{axis}": 1 for axis in "xyz"}
NIFTI_FIELDS |= {f"srow_{axis}": 4 for axis in "xyz"}


@dataclass(frozen=True)
class Slice:
    """One axial slice with at least one label; label ids mean something within a data set only."""

    folder: Path  # of the data set
    dataset: str  # its name
    case: str  # the volume that the slice is from
    patient: str  # the case, unless dataset.json says otherwise
    index: int  # z in the LPS volume, from the feet; the number in the name of MedSAM's slices
    labels: dict[int, int]  # pixels of each instance at native resolution, by its id
    parts: dict[int, tuple[int, int]]  # label id and number, from 2, of further parts, by their id
    label_names: dict[int, str]  # of the data set, by label id
    image_sha256: str  # of the file, when it was written
    label_sha256: str
    frame: Frame  # how the native slice lies in the 1024 frame
    spacing_mm: tuple[float, float] | None  # native, (y, x); None for MedSAM's slices

    @property
    def name(self) -> str:
        """<case>-<zzz>, unique in its data set."""
        return f"{self.case}-{self.index:03d}"

    @property
    def key(self) -> str:
        """<dataset>/<name>, unique among the data sets in use."""
        return f"{self.dataset}/{self.name}"

    def rng(self, seed: int, purpose: str, label: int, draw: int) -> np.random.Generator:
        """The generator of a random box of one label; see `perturb.box_rng`."""
        return box_rng(seed, purpose, self.dataset, self.case, self.index, label, draw)

    def label_of(self, instance: int) -> int:
        """The label id of an instance."""
        return self.parts.get(instance, (instance,))[0]

    def part_of(self, instance: int) -> int:
        """The number of an instance among the parts of its label, from 1."""
        return self.parts.get(instance, (instance, 1))[1]

    def name_of(self, instance: int) -> str:
        """The label name of an instance."""
        return label_name(self.label_names, self.label_of(instance))

    @property
    def image_path(self) -> Path:
        return slice_files(self.folder, self.case, self.index)[0]

    @property
    def label_path(self) -> Path:
        return slice_files(self.folder, self.case, self.index)[1]


@dataclass(frozen=True)
class Geometry:
    """The grid of a case's volume in LPS; array axes are (z, y, x), positions (x, y, z) in mm."""

    shape: tuple[int, int, int]  # (z, y, x)
    spacing_mm: tuple[float, float, float]  # (z, y, x)
    origin_mm: tuple[float, float, float] = (0, 0, 0)  # position of voxel (0, 0, 0)
    direction: tuple[float, ...] = (1, 0, 0, 0, 1, 0, 0, 0, 1)  # 3 x 3, row-major, as SimpleITK's
    stored_orientation: str = "LPS"  # of the source's axes: "RAS" is to the right, front, head
    # NIFTI_FIELDS of the source, as they stand there; None for other files and earlier versions
    nifti_header: dict[str, tuple[float, ...]] | None = None

    @property
    def steps(self) -> np.ndarray:
        """(3, 3): its columns lead, in mm, from a voxel to the next one in x, y and z."""
        return np.reshape(self.direction, (3, 3)) * self.spacing_mm[::-1]

    @property
    def affine(self) -> np.ndarray:
        """(3, 4): from indices x, y, z, 1 to positions."""
        return np.column_stack([self.steps, self.origin_mm])

    def indices_of(self, positions: np.ndarray) -> np.ndarray:
        """Indices (N, 3) x, y, z, fractions too, of positions (N, 3)."""
        return np.linalg.solve(self.steps, (positions - np.array(self.origin_mm)).T).T

    def from_stored(self, indices: np.ndarray, back: bool = False) -> np.ndarray:
        """Indices (N, 3) x, y, z in LPS of those along the axes of the source file; or `back`."""
        affine = inv_ornt_aff(self.turn, self.shape[::-1])
        return apply_affine(np.linalg.inv(affine) if back else affine, indices)

    @property
    def turn(self) -> np.ndarray:
        """Turns axes in LPS to those of the source file, for nibabel's `apply_orientation`."""
        return ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(self.stored_orientation))


@dataclass(frozen=True)
class SliceDataset:
    """A folder of slices."""

    folder: Path
    name: str  # in dataset.json; the folder's for files of earlier versions
    sha256: str  # of dataset.json, which holds the hashes of all slices
    window: tuple[float, float] | None  # (lowest, highest) HU; None for MedSAM's slices
    slices: dict[str, list[Slice]]  # by split, in order of case and z
    geometry: dict[str, Geometry]  # by case; none for MedSAM's slices
    dropped_masks: dict[str, int]  # by case, how many masks were too small to keep
    volumes: dict[str, str]  # by case, the SHA-256 of the source image

    def images(self, split: str) -> dict[str, str]:
        """By case of a split, the SHA-256 of its source image, by which patients are recognised."""
        return {sample.case: self.volumes[sample.case] for sample in self.split(split)}

    @property
    def label_names(self) -> dict[int, str]:
        """Names by label id, of the labels that have one."""
        return self.split("all")[0].label_names

    def split(self, name: str) -> list[Slice]:
        """The slices of one split, or of "all", in order of case and z."""
        if name == "all":
            every = (sample for part in self.slices.values() for sample in part)
            return sorted(every, key=lambda sample: (sample.case, sample.index))
        return self.slices[name]


def slice_files(folder: Path, case: str, index: int) -> tuple[Path, Path]:
    """The image and the label map of a slice."""
    name = f"{case}-{index:03d}.npy"
    return folder / "imgs" / name, folder / "gts" / name


def repeated_images(hashes: Mapping[Hashable, str]) -> Iterator[tuple]:
    """Pairs of cases made from the same image: the later one and the first one."""
    first: dict[str, Hashable] = {}
    for case, digest in hashes.items():
        if first.setdefault(digest, case) != case:
            yield case, first[digest]


def open_datasets(folders: Sequence[str | Path]) -> list[SliceDataset]:
    """Open folders of preprocess_ct.py that are used together.

    Raises UserError: as `open_dataset`, two data sets of one name, or an image in two splits.
    """
    datasets = [open_dataset(folder) for folder in folders]
    by_name: dict[str, SliceDataset] = {}
    splits: dict[tuple[str, str], str] = {}  # by data set and case, of cases that have slices
    for dataset in datasets:
        if (other := by_name.setdefault(dataset.name, dataset)) is not dataset:
            raise UserError(
                f"--data: {other.folder} and {dataset.folder} are both named {dataset.name!r}; "
                f'change the "name" in one {DATASET_FILE}'
            )
        splits |= {(s.dataset, s.case): split for split in SPLITS for s in dataset.split(split)}
    hashes = {case: by_name[case[0]].volumes[case[1]] for case in splits}
    for case, other in repeated_images(hashes):
        if splits[case] != splits[other]:
            raise UserError(
                f"{by_name[case[0]].folder / DATASET_FILE}: {case[1]} ({splits[case]}) is the same "
                f"image as {other[1]} ({splits[other]}) of {by_name[other[0]].folder}: a patient "
                "in two splits; preprocess without it"
            )
    return datasets


def open_dataset(folder: str | Path) -> SliceDataset:
    """Read a folder's dataset.json, in which users may have edited splits and label names.

    Raises UserError: no dataset.json, one of another format, something in it is missing or of the
    wrong type, a patient is in two splits, or a slice file is missing.
    """
    folder = Path(folder)
    path = folder / DATASET_FILE
    if not path.is_file():
        problem = f"holds no {DATASET_FILE}" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: {problem}; give the --out of preprocess_ct.py, whose --input takes CT "
            "volumes and MedSAM's slices"
        )
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise UserError(f"{path}: not of format {FORMAT!r}; preprocess the volumes again")
    try:
        dataset = _parse_dataset(meta, folder, sha256(path))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); correct it, or preprocess the "
            "volumes again"
        ) from error
    first: dict[str, tuple[str, str]] = {}
    for split, samples in dataset.slices.items():
        for sample in samples:
            other, other_split = first.setdefault(sample.patient, (sample.case, split))
            if other_split != split:
                raise UserError(
                    f"{path}: {other} ({other_split}) and {sample.case} ({split}) are of patient "
                    f"{sample.patient}: a patient in two splits; give them one split"
                )
            for file in (sample.image_path, sample.label_path):
                if not file.is_file():
                    raise UserError(f"{file}: listed in {DATASET_FILE}, missing; preprocess again")
    return dataset


def _parse_dataset(meta: dict, folder: Path, digest: str) -> SliceDataset:
    """A data set from its dataset.json, or Python's errors for what is missing or damaged."""
    label_names = {int(label): name for label, name in meta["label_names"].items()}
    name = meta.get("name", folder.resolve().name)
    if not all(map(is_name, (name, *label_names.values()))):
        raise ValueError(f"name {name!r} or label names {list(label_names.values())}")
    cases = dict(sorted(meta["cases"].items()))
    slices: dict[str, list[Slice]] = {split: [] for split in SPLITS}
    geometry: dict[str, Geometry] = {}
    for case, record in cases.items():
        if not is_file_name(case):
            raise ValueError(f"case name {case!r}")
        if record["split"] not in SPLITS:
            raise ValueError(f"split of {case} is {record['split']!r}, not one of {SPLITS}")
        if not is_name(patient := record.get("patient", case)):
            raise ValueError(f"patient of {case} is {patient!r}")
        if record["spacing_mm"] is not None:
            geometry[case] = Geometry(
                shape=_numbers(record["shape"], 3, int),
                spacing_mm=_numbers(record["spacing_mm"], 3),
                origin_mm=_numbers(record["origin_mm"], 3),
                direction=_numbers(record["direction"], 9),
                stored_orientation=str(record["stored_orientation"]),
                nifti_header=(header := record.get("nifti_header"))
                and {name: _numbers(header[name], n) for name, n in NIFTI_FIELDS.items()},
            )
        frame = Frame(*(_numbers(record["frame"][part], 2, int) for part in ("native", "content")))
        if max(frame.content) > IMAGE_SIZE:
            raise ValueError(f"frame of {case}")
        spacing = geometry[case].spacing_mm[1:] if case in geometry else None
        for index, item in sorted((int(z), item) for z, item in record["slices"].items()):
            labels = {int(label): int(pixels) for label, pixels in item["labels"].items()}
            parts = {int(n): _numbers(part, 2, int) for n, part in item.get("parts", {}).items()}
            hashes = str(item["image_sha256"]), str(item["label_sha256"])
            where = folder, name, case, patient, index
            sample = Slice(*where, labels, parts, label_names, *hashes, frame, spacing)
            slices[record["split"]].append(sample)
    if not any(slices.values()):
        raise ValueError("no slice")
    return SliceDataset(
        folder=folder,
        name=name,
        sha256=digest,
        window=None if meta["window"] is None else _numbers(meta["window"], 2),
        slices=slices,
        geometry=geometry,
        dropped_masks={case: int(record["dropped_masks"]) for case, record in cases.items()},
        volumes={case: str(record["image_sha256"]) for case, record in cases.items()},
    )


def _numbers(values: Sequence, count: int, kind: type = float) -> tuple:
    """`count` finite numbers of JSON as floats, or as whole numbers from 1."""
    numbers = tuple(kind(value) for value in values)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{values} are not {count} finite numbers")
    if kind is int and min(numbers) < 1:
        raise ValueError(f"{values} are not sizes")
    return numbers


# --- The files of a slice ------------------------------------------------------------------------
def write_slice(path: Path, array: np.ndarray) -> str:
    """Write an image or label map, uint8 (1024, 1024), and return the SHA-256 of the file."""
    np.save(memory := io.BytesIO(), array, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(memory.getbuffer())  # NumPy's own error does not say that the disk is full
    return sha256(path)


def read_image(path: str | Path, digest: str | None = None) -> np.ndarray:
    """Grey levels, uint8 (1024, 1024), of a file of them or of MedSAM's floats (1024, 1024, 3).

    Raises UserError: unreadable, not of the SHA-256 `digest`, or an array of another shape or type.
    """
    image = read_array(path, digest=digest)
    if image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype.kind == "f":
        image = grey_of_floats(path, image)
    return _check_slice(path, image)


def grey_of_floats(path: str | Path, image: np.ndarray) -> np.ndarray:
    """Grey levels (H, W) uint8 of MedSAM's (H, W, 3) floats, which must be grey and in [0, 1]."""
    if not (image.size and image.min() >= 0 and image.max() <= 1):
        raise UserError(f"{path}: expected MedSAM's floats in [0, 1], found others or NaN")
    if np.abs(image - image[..., :1]).max() > CHANNEL_TOLERANCE:
        raise UserError(f"{path}: its three channels differ; is this a colour image, not CT?")
    return np.rint(image[..., 0] * 255).astype(np.uint8)


def read_label_map(path: str | Path, digest: str | None = None) -> np.ndarray:
    """Label ids, uint8 (1024, 1024), of a file; errors as `read_image`."""
    return _check_slice(path, read_array(path, digest=digest))


def read_instances(sample: Slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slice's label map, uint8 (1024, 1024), its instances (K,), and tight boxes (K, 4) XYXY.

    Raises UserError: the label map or its labels are not those that dataset.json lists.
    """
    label_map = read_label_map(sample.label_path, sample.label_sha256)
    labels, boxes = tight_boxes(label_map)
    if set(labels.tolist()) != sample.labels.keys():
        raise UserError(
            f"{sample.label_path}: holds labels {labels.tolist()}, {DATASET_FILE} lists "
            f"{sorted(sample.labels)}; preprocess again"
        )
    return label_map, labels, boxes


def read_array(
    path: str | Path, remedy: str = "preprocess again", digest: str | None = None
) -> np.ndarray:
    """The array of an .npy file without pickled objects; UserErrors end in `remedy`."""
    content = read_bytes(path)
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise UserError(f"{path}: changed or damaged; {remedy}")
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # a damaged header, parsed as a Python literal, raises anything
        raise UserError(f"{path}: damaged or not a NumPy array; {remedy}") from error


def _check_slice(path: str | Path, array: np.ndarray) -> np.ndarray:
    if array.shape != (IMAGE_SIZE, IMAGE_SIZE) or array.dtype != np.uint8:
        raise UserError(
            f"{path}: expected uint8 ({IMAGE_SIZE}, {IMAGE_SIZE}), found {array.dtype} "
            f"{array.shape}; preprocess again"
        )
    return array
