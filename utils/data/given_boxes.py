"""Boxes that people drew, from a table, a rough label map, or 3D Slicer's ROI markups.

    boxes.csv       case,label,z,x0,y0,x1,y1: one row per box, in voxel indices of the stored file,
                    maxima inclusive; fractions are allowed in x and y, and `case` may be left out
    rough.nii.gz    a label map on the scan's grid: the box of each label in each axial slice
    box.mrk.json    ROIs, LPS or RAS as the file says: a box in every slice whose middle they span

A label is an id, 1 to 255, or a name.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perturb import tight_boxes
from utils.data.labels import is_name
from utils.data.slices import Geometry
from utils.data.volumes import SUFFIXES, compare_grids, nifti_suffix, read_label_map
from utils.system.errors import UserError
from utils.system.files import read_bytes

NUMBERS = ("z", "x0", "y0", "x1", "y1")
MARKUPS = (".mrk.json", ".json")
SUPPORTED = f"a .csv, a label map ({' or '.join(SUFFIXES)}), or 3D Slicer's .mrk.json"


@dataclass(frozen=True)
class GivenBox:
    """A box around one label in an axial slice of a volume in LPS.

    Attributes:
        label: its id as text, or its name.
        index: z of the slice.
        box: x0, y0, x1, y1 in native pixels of the slice, maxima inclusive.
        where: the file, and the row or what else of it, for messages.
    """

    label: str
    index: int
    box: tuple[float, float, float, float]
    where: str


class BoxFile:
    """The boxes of one file.

    Attributes:
        path: of the file.
        cases: whose boxes it holds; None if it does not say.
    """

    def __init__(self, path: Path, cases: set[str] | None = None) -> None:
        self.path, self.cases = path, cases

    def of(self, case: str, geometry: Geometry) -> list[GivenBox]:
        """The boxes of one case.

        Args:
            case: its name.
            geometry: the grid of its image.

        Raises:
            UserError: a box outside the volume, or slices that are not axial.
        """
        raise NotImplementedError


def read_boxes(path: str | Path) -> BoxFile:
    """Open a file of boxes and check what can be checked without a scan.

    Raises:
        UserError: unreadable, of no kind that is supported, without a box, or with a bad one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give {SUPPORTED} to --boxes")
    if path.name.lower().endswith(".csv"):
        return _Table(path)
    if nifti_suffix(path):
        return _RoughLabels(path)
    if path.name.lower().endswith(MARKUPS):
        return _Markups(path)
    raise UserError(f"{path}: not a file of boxes; give {SUPPORTED}")


# --- A table -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Row:
    case: str | None
    label: str
    corners: tuple[float, ...]  # z, x0, y0, x1, y1
    where: str


class _Table(BoxFile):
    """boxes.csv."""

    def __init__(self, path: Path) -> None:
        self._rows = list(_read_rows(path))
        cases = {row.case for row in self._rows}
        super().__init__(path, None if None in cases else cases)

    def of(self, case: str, geometry: Geometry) -> list[GivenBox]:
        if geometry.stored_orientation[2] not in "SI":
            raise UserError(
                f"{self.path}: its z counts slices that are not axial, as the scan of {case} is "
                f"stored as {geometry.stored_orientation}; store it with its third axis from foot "
                "to head, or give a label map"
            )
        boxes = []
        for row in self._rows:
            if row.case in (None, case):
                z, x0, y0, x1, y1 = row.corners
                ends = geometry.from_stored(np.array([[x0, y0, z], [x1, y1, z]]))
                boxes.append(_box_within(ends, row.label, geometry, row.where))
        return boxes


def _read_rows(path: Path) -> list[_Row]:
    """The rows of a table.

    Raises:
        UserError: not a table of boxes, or the first row that is bad.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        table = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
        columns = [name.strip() for name in table.fieldnames or ()]
        table.fieldnames = columns
        lines = list(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); save it as CSV") from error
    missing = [name for name in ("label", *NUMBERS) if name not in columns]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(missing)}; the first line must be "
            "case,label,z,x0,y0,x1,y1 (case is optional)"
        )
    if not lines:
        raise UserError(f"{path}: holds no box; add a row for each")
    return [_row_of(line, f"{path}, row {number}") for number, line in enumerate(lines, start=2)]


def _row_of(line: dict, where: str) -> _Row:
    numbers = []
    for name in NUMBERS:
        text = (line[name] or "").strip()
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{where}: {name} is {text!r}, not a number")
        numbers.append(number)
    z, x0, y0, x1, y1 = numbers
    if z != int(z):
        raise UserError(f"{where}: z is {z:g}; slices are counted in whole numbers from 0")
    if x1 < x0 or y1 < y0:
        raise UserError(
            f"{where}: inverted, x {x0:g} to {x1:g} and y {y0:g} to {y1:g}; x0 and y0 are the "
            "minima"
        )
    label = (line["label"] or "").strip()
    _check_label(label, where)
    case = (line.get("case") or "").strip() or None
    return _Row(case, label, tuple(numbers), where)


# --- A rough label map ---------------------------------------------------------------------------
class _RoughLabels(BoxFile):
    """A NIfTI label map."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._volume = read_label_map(path)
        if not self._volume.array.any():
            raise UserError(f"{path}: holds no label, and so no box")

    def of(self, case: str, geometry: Geometry) -> list[GivenBox]:
        compare_grids(self._volume, self.path, geometry, case)
        boxes = []
        for index in np.flatnonzero(self._volume.array.any(axis=(1, 2))).tolist():
            labels, tight = tight_boxes(self._volume.array[index])
            for label, box in zip(labels.tolist(), tight.tolist(), strict=True):
                where = f"{self.path}, label {label}"
                boxes.append(GivenBox(str(label), index, tuple(box), where))
        return boxes


# --- 3D Slicer's markups -------------------------------------------------------------------------
class _Markups(BoxFile):
    """ROIs of a .mrk.json.

    Orientation is a 3 x 3 matrix, row by row, whose columns are the ROI's axes. A ROI that is
    turned against the volume gives the box around it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            markups = json.loads(read_bytes(path).decode("utf-8-sig"))["markups"]
            rois = [markup for markup in markups if markup["type"] == "ROI"]
            self._rois = [_roi_of(path, roi, number) for number, roi in enumerate(rois, start=1)]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: not 3D Slicer's markups ({type(error).__name__}: {error}); save the ROI "
                "as .mrk.json"
            ) from error
        if not self._rois:
            raise UserError(f"{path}: holds no ROI, but other markups or none; draw a ROI")

    def of(self, case: str, geometry: Geometry) -> list[GivenBox]:
        boxes = []
        for label, corners, where in self._rois:
            indices = geometry.indices_of(corners)
            low, high = indices.min(axis=0), indices.max(axis=0)  # of voxels' centres
            first, last = math.ceil(low[2] - 1e-6), math.floor(high[2] + 1e-6)
            if first > last:
                raise UserError(f"{where}: lies between two slices of {case}; make it thicker")
            size = np.array(geometry.shape[::-1])
            if (low > size - 0.5).any() or (high < -0.5).any():
                raise _outside(where, geometry)
            # What lies beyond the volume is cut off: a ROI is easily drawn a little too far.
            x0, y0 = np.clip(low[:2] + 0.5, 0, size[:2] - 1)
            x1, y1 = np.clip(high[:2] - 0.5, (x0, y0), size[:2] - 1)
            box = tuple(map(float, (x0, y0, x1, y1)))
            indices = range(max(0, first), min(int(size[2]) - 1, last) + 1)
            boxes += [GivenBox(label, index, box, where) for index in indices]
        return boxes


def _roi_of(path: Path, roi: dict, number: int) -> tuple[str, np.ndarray, str]:
    """Label, corners (8, 3) in LPS, mm, and where it stands.

    Raises:
        UserError: of another unit, or without a size.
        ValueError, LookupError, TypeError: not as 3D Slicer writes it.
    """
    label = str(roi.get("name") or path.name.removesuffix(".json").removesuffix(".mrk"))
    where = f"{path}, ROI {number}"
    _check_label(label, where)
    units = roi.get("coordinateUnits", "mm")
    if "mm" not in (units, *units[:1]):
        raise UserError(f"{where}: its unit is {units}; save it in mm")
    # Files written by hand have the centre as a control point alone, and 3D Slicer reads them.
    centre = roi["center"] if "center" in roi else roi["controlPoints"][0]["position"]
    centre, size = np.array(centre, np.float64), np.array(roi["size"], np.float64)
    axes = np.reshape(np.array(roi.get("orientation", np.eye(3)), np.float64), (3, 3))
    if centre.shape != (3,) or size.shape != (3,) or not np.isfinite([*centre, *size]).all():
        raise ValueError("center or size")
    if not (size > 0).all():
        raise UserError(f"{where}: has no size; draw it again")
    signs = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    corners = centre + (signs * size) @ axes.T
    system = roi.get("coordinateSystem", "LPS")
    if system not in ("LPS", "RAS"):
        raise ValueError(f"coordinateSystem {system}")
    return label, corners * ([-1, -1, 1] if system == "RAS" else 1), where


# --- What all of them share ----------------------------------------------------------------------
def _check_label(label: str, where: str) -> None:
    number = label.isascii() and label.isdigit()
    if not is_name(label) or (number and not 1 <= int(label) <= 255):
        raise UserError(f"{where}: label is {label!r}; expected an id, 1 to 255, or a name")


def _box_within(ends: np.ndarray, label: str, geometry: Geometry, where: str) -> GivenBox:
    """The box between two corners (2, 3) x, y, z in LPS, which must lie in the volume."""
    low, high = ends.min(axis=0), ends.max(axis=0)
    if (low < 0).any() or (high > np.array(geometry.shape[::-1]) - 1).any():
        raise _outside(where, geometry)
    return GivenBox(label, int(low[2]), (*low[:2].tolist(), *high[:2].tolist()), where)


def _outside(where: str, geometry: Geometry) -> UserError:
    z, y, x = geometry.shape
    return UserError(f"{where}: lies outside the scan of {x} x {y} pixels and {z} slices")


def boxes_by_case(
    files: Sequence[BoxFile], cases: Collection[str], geometry_of: Callable[[str], Geometry]
) -> dict[str, list[GivenBox]]:
    """The boxes of every case that has some, in the order of the cases.

    Args:
        files: of boxes.
        cases: names of the volumes.
        geometry_of: gives the grid of a case's volume.

    Raises:
        UserError: a case that there is not, a file that does not say whose boxes it holds where
            there are several cases, or as `BoxFile.of`.
    """
    for file in files:
        if file.cases is None and len(cases) > 1:
            raise UserError(
                f"{file.path}: does not say which of {len(cases)} cases its boxes are of; give a "
                ".csv with the column case"
            )
        unknown = sorted((file.cases or set()) - set(cases))
        if unknown:
            some = ", ".join(list(cases)[:3]) + (", ..." if len(cases) > 3 else "")
            raise UserError(f"{file.path}: there is no case {unknown[0]!r}; there are {some}")
    boxes = {}
    for case in cases:
        of_case = [file for file in files if file.cases is None or case in file.cases]
        if of_case:
            geometry = geometry_of(case)
            boxes[case] = [box for file in of_case for box in file.of(case, geometry)]
    return boxes


def label_ids(labels: Sequence[str], names: dict[int, str] | None = None) -> dict[str, int]:
    """An id for every label: the number itself, that of a name in `names`, or the next free one.

    Raises:
        UserError: more than 255 labels.
    """
    known = {name: label for label, name in (names or {}).items()}
    ids = {label: int(label) for label in labels if label.isdigit()}
    ids |= {label: known[label] for label in labels if label in known}
    free = (number for number in range(1, 256) if number not in ids.values())
    for label in labels:
        if label not in ids:
            if (number := next(free, None)) is None:
                raise UserError("more than 255 labels; a label volume cannot hold them")
            ids[label] = number
    return ids
