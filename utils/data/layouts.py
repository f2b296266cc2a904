"""Data sets as other programs lay them out: which cases a folder holds, and how to read one.

To add a layout, subclass `Layout` and enter the class in LAYOUTS.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from utils.data import volumes
from utils.data.labels import FLARE22_LABELS, are_flare22, nnunet_names
from utils.data.slices import DATASET_FILE, Geometry, grey_of_floats, read_array
from utils.system import UserError
from utils.system.downloads import DATA, fetch, unpack
from utils.system.files import is_file_name, sha256

GRID = [field.name for field in dataclasses.fields(Geometry)]
MEDSAM_AGAIN = "recreate it with MedSAM's pre_CT_MR.py, or LiteMedSAM's and its npz_to_npy.py"
# Number in the volume, grey levels 0-255 (H, W), and label ids uint8 (H, W).
LabelledSlice = tuple[int, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A scan with labels: the files of its image and label map, or of those of its slices."""

    name: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]


class Layout:
    """A folder of cases; `recognise` finds the class of a folder."""

    parts: tuple[str, ...] = ()  # globs in the folder by which the layout is recognised
    description = ""  # for the screen
    label_names: dict[int, str] = {}  # by label id; empty where nothing tells what the labels are
    windowed = False  # whether its grey levels were made with a window that it does not tell
    is_flare22 = False  # by the names of its files

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cases(self) -> tuple[list[Case], dict[str, str]]:
        """The cases in order of name, and by name what is wrong with those that cannot be used."""
        raise NotImplementedError

    def name_labels(self, names: dict[int, str]) -> None:
        """Give the labels these names by id, in place of its own; UserError if that cannot be."""
        self.label_names = names

    def read(self, case: Case, window: tuple[float, float]) -> tuple[dict, Iterator[LabelledSlice]]:
        """Read a case in a worker process; the window's (lowest, highest) HU become 0 and 255.

        Returns:
            The case's entry in dataset.json: names and hashes of the files (`image`,
            `image_sha256`, `label`, `label_sha256`) and the fields of `Geometry`, of which all but
            `shape` may be None. And its labelled slices.
        """
        raise NotImplementedError


# --- Volumes -------------------------------------------------------------------------------------
class Volumes(Layout):
    """A folder of CT volumes and one of their label maps.

    `images/<case>_0000.nii.gz` (or without `_0000`) belongs to `labels/<case>.nii.gz`; if no names
    match, the numbers in them decide: `img0001` belongs to `label0001`. If there are several image
    files per case, `channel` selects one: 1 is `<case>_0001.nii.gz`, and others are ignored. A
    folder `images/<case>/` that holds DICOM files is an image too.
    """

    description = "images and labels"

    def __init__(self, images: Path, labels: Path, channel: int | None = None) -> None:
        self.images, self.labels, self.channel = images, labels, channel
        self.suffix = volumes.CHANNEL if channel is None else f"_{channel:04d}"
        self.expected = f"{images}/*{self.suffix}.nii.gz", f"{labels}/*.nii.gz"  # * is the case

    def files(self) -> tuple[dict[str, Path], dict[str, tuple[Path, ...]]]:
        """The image and the label maps of each case that has them."""
        images = volumes.volumes_by_case(self.images, "--images", self.suffix, series=True)
        if self.channel is not None:
            images = {n: path for n, path in images.items() if _stem(path).endswith(self.suffix)}
        labels = volumes.volumes_by_case(self.labels, "--labels")
        if not images.keys() & labels.keys():
            of_number, numbers = {_number(name): name for name in images}, {*map(_number, labels)}
            if len(of_number) == len(images) and len(numbers) == len(labels):
                labels = {of_number.get(_number(n), n): path for n, path in labels.items()}
        return images, {name: (path,) for name, path in labels.items()}

    def cases(self) -> tuple[list[Case], dict[str, str]]:
        """Images with label maps on the same grid; of NIfTI, only headers are read."""
        images, labels = self.files()
        cases, bad = [], {}
        for name in sorted(images | labels):
            image, of_case = images.get(name), labels.get(name, ())
            try:
                if image is None or not of_case:
                    lacks = "image without a label" if image else "label without an image"
                    expected = self.expected[bool(image)].replace("*", name)
                    raise UserError(f"{image or of_case[0]}: {lacks} (expected {expected})")
                if not is_file_name(name):
                    raise UserError(f"{image}: {name!r} is not a valid case name; rename it")
                grid = volumes.read_geometry(image)
                for label in of_case:
                    volumes.compare_grids(volumes.read_geometry(label), label, grid, image.name)
                cases.append(Case(name, (image,), of_case))
            except UserError as error:
                bad[name] = str(error)
        return cases, bad

    def read(self, case: Case, window: tuple[float, float]) -> tuple[dict, Iterator[LabelledSlice]]:
        """Read the image and the label map of a case."""
        (image_path,) = case.images
        image = volumes.read_image(image_path)
        labels = self.read_labels(case, image)
        volumes.check_window(image.array, image_path, window)
        entry = {
            "image": image_path.relative_to(self.images).as_posix(),
            "image_sha256": image.sha256,
            "label": case.labels[0].relative_to(self.labels).as_posix(),
            "label_sha256": labels.sha256,
            **{name: getattr(image, name) for name in GRID},
            "notes": [*image.notes, *labels.notes],
        }
        slices = (
            (z, volumes.grey_levels(image.array[z], window), labels.array[z])
            for z in np.flatnonzero(labels.array.any(axis=(1, 2))).tolist()
        )
        return entry, slices

    def read_labels(self, case: Case, image: volumes.Volume) -> volumes.Volume:
        """The label map of a case, on the grid of its image."""
        (path,) = case.labels
        return volumes.on_grid(volumes.read_label_map(path), path, image, case.images[0].name)


class Flare22(Volumes):
    """images/ and labels/; the label ids are FLARE22's if the files have FLARE22's names."""

    parts = ("images", "labels")
    description = "FLARE22's layout"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "images", folder / "labels")
        files = [path for path in self.labels.iterdir() if volumes.volume_suffix(path)]
        if are_flare22([path.name.split(".")[0] for path in files]):
            self.label_names, self.is_flare22 = FLARE22_LABELS, True
            self.description += " and its label names"


class NnUNet(Volumes):
    """nnU-Net's raw data: version 2's dataset.json, or version 1's, which is the Decathlon's."""

    parts = ("imagesTr", "labelsTr", "dataset.json")

    def __init__(self, folder: Path) -> None:
        path = folder / "dataset.json"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            channels = meta.get("channel_names") or meta["modality"]
            channels = {int(number): str(name) for number, name in channels.items()}
            self.label_names = nnunet_names(meta["labels"])
            ct = [number for number, name in channels.items() if name.strip().casefold() == "ct"]
            if len(ct) != 1:
                raise ValueError(f"expected one CT channel, found {', '.join(channels.values())}")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: not nnU-Net's ({type(error).__name__}: {error}); use --images, --labels"
            ) from error
        channel = ct[0] if len(channels) > 1 else None
        super().__init__(folder / "imagesTr", folder / "labelsTr", channel)
        of_channels = "" if channel is None else f", channel {channel} of {len(channels)}"
        self.description = f"nnU-Net's layout{of_channels}, label names of dataset.json"


class Placed(Volumes):
    """Volumes recognised by their paths: `parts` are the globs of images and of label maps.

    The first * stands for the case's name, or for the number in it.
    """

    def __init__(self, folder: Path) -> None:
        self.images = self.labels = folder
        self.places = [part.removesuffix(".*") for part in self.parts]
        self.expected = [f"{folder}/{place}.nii.gz" for place in self.places]
        self.description = "images {} and label maps {}".format(*self.places)

    def files(self) -> tuple[dict[str, Path], dict[str, tuple[Path, ...]]]:
        """The image and the label maps of each case that has them."""
        name = next(part for part in self.places[0].split("/") if "*" in part)
        found: list[dict[str, dict[str, Path]]] = [{}, {}]
        for place, by_case in zip(self.places, found, strict=True):
            pattern = re.compile(re.escape(place).replace(r"\*", "([^/.][^/]*)"))
            for path in sorted(self.images.glob(f"{place}.*")):
                within = path.relative_to(self.images).with_name(_stem(path)).as_posix()
                match = pattern.fullmatch(within)
                if match and volumes.volume_suffix(path):
                    of_case = by_case.setdefault(name.replace("*", match[1]), {})
                    if (other := of_case.setdefault(match[0], path)) is not path:
                        raise UserError(f"{path}: a second file beside {other.name}; remove one")
        images, labels = ({case: (*of.values(),) for case, of in part.items()} for part in found)
        return {case: image for case, (image,) in images.items()}, labels


class TotalSegmentator(Placed):
    """One mask file per organ, of which a case may have any; where masks overlap, the first wins.

    Ids follow the alphabetical order of file names, or `name_labels`, which also selects organs.
    """

    parts = ("*/ct.*", "*/segmentations/*.*")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        organs = {_stem(path) for paths in self.files()[1].values() for path in paths}
        self.label_names = dict(enumerate(sorted(organs), start=1))

    def name_labels(self, names: dict[int, str]) -> None:
        if unknown := sorted(set(names.values()) - set(self.label_names.values())):
            known = ", ".join(self.label_names.values())
            raise UserError(f"--label-names: no file is named {unknown[0]}; choose from {known}")
        self.label_names = names

    def read_labels(self, case: Case, image: volumes.Volume) -> volumes.Volume:
        """The masks of a case as one label map; a note counts overlaps."""
        ids = {name: label for label, name in self.label_names.items()}
        merged, overlap = np.uint8(0), 0
        for path in case.labels:
            volume = volumes.on_grid(volumes.read_label_map(path), path, image, case.name)
            mask = (volume.array > 0) * np.uint8(ids.get(_stem(path), 0))
            overlap += np.count_nonzero((mask > 0) & (merged > 0))
            merged = np.where(merged, merged, mask)
        digest, notes = _digest([_stem(path) for path in case.labels], case.labels), ()
        if overlap:
            notes = (f"{case.name}: {overlap} voxels are in two masks; the first mask wins",)
        return dataclasses.replace(volume, array=merged, sha256=digest, notes=notes)


def _stem(path: Path) -> str:
    return path.name.removesuffix(volumes.volume_suffix(path) or "")


def _number(name: str) -> str:
    """The last digits in a name."""
    return re.search(r"[0-9]*(?=[^0-9]*$)", name)[0]


# --- The CVPR 2024 challenge's archives ----------------------------------------------------------
class Cvpr24(Layout):
    """`<case>.npz` with imgs (D, H, W) uint8 grey levels, gts (D, H, W) label ids, and spacing.

    The spacing is SimpleITK's (x, y, z) in mm. The archives hold the labelled slices, so z counts
    those; they do not say where in the patient they lie, and are taken as LPS.
    """

    parts = ("*.npz",)
    windowed = True
    description = "the CVPR 2024 challenge's archives (z counts the slices in them)"

    def cases(self) -> tuple[list[Case], dict[str, str]]:
        """Every archive."""
        paths = sorted(self.folder.glob("[!.]*.npz"))
        return [Case(path.stem, (path,), (path,)) for path in paths], {}

    def read(self, case: Case, window: tuple[float, float]) -> tuple[dict, Iterator[LabelledSlice]]:
        """Read an archive. Its grey levels stay as they are, whatever the window."""
        (path,) = case.images
        try:
            with np.load(path, allow_pickle=False) as archive:
                images, labels = archive["imgs"], archive["gts"]
                x, y, z = map(float, archive["spacing"])
            found = [f"{array.dtype} {array.shape}" for array in (images, labels)]
            if images.ndim != 3 or images.dtype != np.uint8 or found[0] != found[1]:
                raise ValueError(" and ".join(found))
        except Exception as error:  # a damaged archive raises almost anything
            expected = "imgs and gts (D, H, W) uint8 of CT, and spacing"
            raise UserError(f"{path}: expected {expected}, found {error}") from error
        entry = {
            **dict.fromkeys(("image", "label"), path.name),
            **dict.fromkeys(("image_sha256", "label_sha256"), sha256(path)),
            **vars(Geometry(images.shape, (z, y, x))),
        }
        labelled = np.flatnonzero(labels.any(axis=(1, 2))).tolist()
        return entry, ((z, images[z], labels[z]) for z in labelled)


# --- MedSAM's slices -----------------------------------------------------------------------------
class MedSAMSlices(Layout):
    """MedSAM's training slices: `imgs/<case>-<zzz>.npy` and `gts/<case>-<zzz>.npy`.

    MedSAM's images are (1024, 1024, 3) floats in [0, 1], the same grey in all channels up to the
    rounding of its cubic resizing; LiteMedSAM's keep the native size (H, W). Label maps are uint8
    ids of the same size. zzz counts the slices that were kept and is not z.
    """

    parts = ("imgs", "gts")
    windowed = True
    description = "MedSAM's slices (no spacing, window or orientation: NSD will be in pixels)"

    def cases(self) -> tuple[list[Case], dict[str, str]]:
        """Cases whose slices have both files."""
        if (self.folder / DATASET_FILE).exists():
            raise UserError(f"{self.folder}: already preprocessed; use train_adaptive.py --data")
        folders = [self.folder / part for part in self.parts]
        images, labels = ({path.name for path in part.glob("[!.]*.npy")} for part in folders)
        files: dict[str, list[str]] = {}
        for name in sorted(images | labels, key=lambda name: (len(name), name)):
            match = re.fullmatch(r"(.+)-([0-9]{3}|[1-9][0-9]{3,5})\.npy", name)
            if not match or not is_file_name(name):
                raise UserError(f"{self.folder}: {name}: not named like CASE-042.npy; rename it")
            files.setdefault(match[1], []).append(name)
        if not files:
            raise UserError(f"{self.folder}: holds no imgs/CASE-042.npy; is this MedSAM's data?")
        cases, bad = [], {}
        for case, names in sorted(files.items()):
            if alone := [name for name in names if name not in images & labels]:
                bad[case] = f"{self.folder}: {alone[0]}: missing from imgs/ or gts/; {MEDSAM_AGAIN}"
            else:
                cases.append(Case(case, *(tuple(part / n for n in names) for part in folders)))
        return cases, bad

    def read(self, case: Case, window: tuple[float, float]) -> tuple[dict, Iterator[LabelledSlice]]:
        """Read the slices of a case. Their grey levels stay as they are, whatever the window."""
        numbers = [int(path.stem.rpartition("-")[2]) for path in case.images]
        slices = [_read_medsam(*files) for files in zip(case.images, case.labels, strict=True)]
        shape = slices[0][1].shape
        for path, (_, labels) in zip(case.labels, slices, strict=True):
            if labels.shape != shape:
                raise UserError(f"{path}: {labels.shape}, but others {shape}; {MEDSAM_AGAIN}")
        entry = {
            **dict.fromkeys(("image", "label"), f"{case.name}-*.npy"),
            "image_sha256": _digest(numbers, case.images),
            "label_sha256": _digest(numbers, case.labels),
            **dict.fromkeys(GRID),
            "shape": [max(numbers) + 1, *shape],
        }
        return entry, ((number, *arrays) for number, arrays in zip(numbers, slices, strict=True))


def _digest(names: Sequence[int | str], paths: Sequence[Path]) -> str:
    lines = (f"{name} {sha256(path)}\n" for name, path in zip(names, paths, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_medsam(image: Path, label: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels and label ids (H, W), uint8, of one of MedSAM's slices."""
    grey, labels = read_array(image, MEDSAM_AGAIN), read_array(label, MEDSAM_AGAIN)
    kinds = grey.ndim, grey.dtype.kind, labels.dtype
    if kinds != (3, "f", np.uint8) or grey.shape != (*labels.shape, 3):
        found = f"{grey.dtype} {grey.shape}, {label.parent.name}: {labels.dtype} {labels.shape}"
        expected = "floats (H, W, 3), and label ids uint8 (H, W)"
        raise UserError(f"{image}: expected {expected}, found {found}; {MEDSAM_AGAIN}")
    return grey_of_floats(image, grey), labels


LAYOUTS: dict[str, type[Layout]] = {
    "flare22": Flare22,
    "nnunet": NnUNet,
    "totalsegmentator": TotalSegmentator,
    "medsam": MedSAMSlices,
    "cvpr24": Cvpr24,
}
PLACES = {  # of images and of label maps, see `Placed`
    "lits": ("volume-*.*", "segmentation-*.*"),
    "btcv": ("img/img*.*", "label/label*.*"),
    "kits": ("*/imaging.*", "*/segmentation.*"),
}
LAYOUTS |= {name: type(name, (Placed,), {"parts": parts}) for name, parts in PLACES.items()}


# --- Finding a data set --------------------------------------------------------------------------
def recognise(folder: str | Path, layout: str = "auto") -> Layout:
    """How a folder is laid out: one of LAYOUTS, or "auto", by the names of what is in it.

    Raises UserError: no such folder, no layout or several, or a dataset.json that cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give --input the data set's folder")
    if layout not in ("auto", *LAYOUTS):
        raise UserError(f"--layout: expected auto, {', '.join(LAYOUTS)}, got {layout}")
    parts = {name: kind.parts for name, kind in LAYOUTS.items() if layout in ("auto", name)}
    matching = [name for name in parts if all(any(folder.glob(p)) for p in parts[name])]
    if len(matching) > 1:
        raise UserError(f"{folder}: could be {' or '.join(matching)}; choose with --layout")
    if not matching:
        note = volumes.about_pictures(folder)
        expected = "; ".join(f"{name}: {', '.join(parts[name])}" for name in parts)
        raise UserError(f"{folder}: not laid out as {expected}; use --images and --labels{note}")
    return LAYOUTS[matching[0]](folder)


def download(name: str, out: str | Path) -> Path:
    """Fetch a public data set beside `out`, unpack it, and give its folder of images/ and labels/.

    Raises UserError: `out` is where the data set is unpacked; or as `fetch` and `unpack`.
    """
    out = Path(out).resolve()
    folder = out.parent / Path(DATA[name].file).stem
    if out == folder:
        raise UserError(f"{out}: is where the data set is unpacked; choose another --out")
    if not folder.is_dir():  # if it is there it is whole, and the archive may have been removed
        archive = fetch(DATA[name], out.parent)
        unpack(archive, folder)
        print(f"{folder}: unpacked; {archive} can be removed")
    # The archive may hold the two folders, or one folder with them (and __MACOSX beside it).
    inner = [path.parent for path in folder.glob("*/images") if (path.parent / "labels").is_dir()]
    return min(inner, default=folder)
