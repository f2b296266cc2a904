"""MedSAM's training slices: `imgs/<case>-<zzz>.npy` and `gts/<case>-<zzz>.npy`.

MedSAM's pre_CT_MR.py writes images of (1024, 1024, 3) floats in [0, 1], the same grey three times
but for the rounding of its cubic resizing. LiteMedSAM's pre_CT_MR.py and npz_to_npy.py keep the
native size (H, W). Label maps are uint8 ids of the same size. zzz counts the slices that were kept
and is not z. Spacing, window and orientation are not in them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.data.slices import grey_of_floats, read_array, slice_name
from utils.system.errors import UserError
from utils.system.files import is_file_name, sha256

AGAIN = "make it again with MedSAM's pre_CT_MR.py, or LiteMedSAM's and its npz_to_npy.py"


@dataclass(frozen=True)
class NpyCase:
    """The slices of one case: the two files of each, image and label map, by their number."""

    case: str
    files: dict[int, tuple[Path, Path]]

    @property
    def image(self) -> Path:
        """All of its images, as a pattern."""
        return self._pattern(0)

    @property
    def label(self) -> Path:
        """All of its label maps, as a pattern."""
        return self._pattern(1)

    def _pattern(self, part: int) -> Path:
        return next(iter(self.files.values()))[part].with_name(f"{self.case}-*.npy")


def find_cases(images: Path, labels: Path) -> tuple[list[NpyCase], dict[str, str]]:
    """Pair the slices of two folders.

    Returns:
        The cases in order of name, and by case what is wrong with the others, e.g. a slice that
        lacks one of its two files.

    Raises:
        UserError: a folder is missing or holds no slice, or a name cannot be used.
    """
    image_of, label_of = _by_case(images), _by_case(labels)
    cases: list[NpyCase] = []
    bad: dict[str, str] = {}
    spellings: dict[str, str] = {}  # macOS takes "Case" and "case" for one file
    for case in sorted(image_of.keys() | label_of):
        image_files, label_files = image_of.get(case, {}), label_of.get(case, {})
        unpaired = sorted(image_files.keys() ^ label_files)
        if (other := spellings.setdefault(case.casefold(), case)) != case:
            bad[case] = f"{images}: {other} and {case} differ in case alone; rename one"
        elif unpaired:
            folders = (images, labels) if unpaired[0] in image_files else (labels, images)
            name = f"{slice_name(case, unpaired[0])}.npy"
            bad[case] = (
                f"{folders[0] / name}: not in {folders[1]}; slices of this case with only one of "
                f"the two files: {len(unpaired)}; {AGAIN}"
            )
        else:
            cases.append(NpyCase(case, {n: (image_files[n], label_files[n]) for n in image_files}))
    return cases, bad


def _by_case(folder: Path) -> dict[str, dict[int, Path]]:
    """The .npy files of a folder by case and number, both in order."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    cases: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix != ".npy" or path.name.startswith("."):
            continue
        match = re.fullmatch(r"(.+)-([0-9]{3,6})", path.stem)
        name = match and is_file_name(match[1]) and slice_name(match[1], int(match[2]))
        if name != path.stem:
            raise UserError(f"{path}: expected a name like CASE-042.npy; rename or remove it")
        cases.setdefault(match[1], {})[int(match[2])] = path
    if not cases:
        raise UserError(f"{folder}: holds no CASE-042.npy; is this MedSAM's?")
    return {case: dict(sorted(files.items())) for case, files in cases.items()}


def read_case(case: NpyCase) -> tuple[dict, Iterator[tuple[int, np.ndarray, np.ndarray]]]:
    """Check all files of a case.

    Returns:
        The case's entry in dataset.json, in which what is not known is None, and its slices:
        number, grey levels (H, W) uint8, label ids (H, W) uint8.

    Raises:
        UserError: a file that is unreadable, damaged or of another kind, or slices of different
            sizes.
    """
    shape: tuple[int, ...] = ()
    digests = hashlib.sha256(), hashlib.sha256()
    for index, files in case.files.items():
        _, labels = _read_slice(*files)
        if shape and labels.shape != shape:
            raise UserError(f"{files[1]}: {labels.shape}, others of its case {shape}; {AGAIN}")
        shape = labels.shape
        for path, digest in zip(files, digests, strict=True):
            digest.update(f"{index} {sha256(path)}\n".encode())
    entry = {
        "image": case.image.name,
        "image_sha256": digests[0].hexdigest(),
        "label": case.label.name,
        "label_sha256": digests[1].hexdigest(),
        "shape": [max(case.files) + 1, *shape],
        "spacing_mm": None,
        "origin_mm": None,
        "direction": None,
        "stored_orientation": None,
    }
    return entry, ((index, *_read_slice(*files)) for index, files in case.files.items())


def _read_slice(image: Path, label: Path) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels and label ids (H, W), uint8."""
    grey, labels = read_array(image, AGAIN), read_array(label, AGAIN)
    if grey.ndim != 3 or grey.shape[2] != 3 or grey.dtype.kind != "f":
        raise UserError(
            f"{image}: expected (1024, 1024, 3) floats, found {grey.dtype} {grey.shape}; {AGAIN}"
        )
    if labels.dtype.kind not in "bui" or labels.shape != grey.shape[:2]:
        raise UserError(
            f"{label}: expected {grey.shape[:2]} whole numbers as its image, found {labels.dtype} "
            f"{labels.shape}; {AGAIN}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() <= 255:
        raise UserError(f"{label}: label ids must be 0 to 255, found {labels.max()}; {AGAIN}")
    return grey_of_floats(image, grey), labels.astype(np.uint8)
