"""Boxes that people drew, from a table, a rough label map, or 3D Slicer's ROI markups.

    boxes.csv       case,label,z,x0,y0,x1,y1: one row per box, in voxel indices of the stored file,
                    maxima inclusive; fractions are allowed in x and y, and `case` may be left out
    rough.nii.gz    a label map on the scan's grid: the box of each label in each axial slice
    box.mrk.json    ROIs, LPS or RAS as the file says: a box in every slice whose middle they span

A label is an id, 1 to 255, or a name.
"""

import io
import itertools
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perturb import tight_boxes
from utils.data.labels import is_name
from utils.data.slices import Geometry
from utils.data.volumes import SUFFIXES, compare_grids, read_label_map, volume_suffix
from utils.system import UserError
from utils.system.files import read_bytes

NUMBERS = ["z", "x0", "y0", "x1", "y1"]
COLUMNS = ["case", "label", *NUMBERS]
SUPPORTED = f"a .csv, a label map ({' or '.join(SUFFIXES)}), or 3D Slicer's .mrk.json"


@dataclass(frozen=True)
class GivenBox:
    """A box around one label in an axial slice of a volume in LPS."""

    label: str  # its id as text, or its name
    index: int  # z of the slice
    box: tuple[float, float, float, float]  # XYXY in native pixels, maxima inclusive


class BoxFile:
    """The boxes of one file."""

    path: Path
    cases: set[str] | None = None  # whose boxes it holds; None if it does not say

    def boxes(self, case: str, geometry: Geometry) -> list[GivenBox]:
        """The boxes of a case on the grid of its image; UserError if one lies outside."""
        raise NotImplementedError


def read_boxes(path: str | Path) -> BoxFile:
    """Open a file of boxes and check, with UserErrors, what can be checked without a scan."""
    path = Path(path)
    name = path.name.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file; give {SUPPORTED} to --boxes")
    if name.endswith(".csv"):
        return _Table(path)
    if volume_suffix(path):
        return _RoughLabels(path)
    if name.endswith(".json"):
        return _Markups(path)
    raise UserError(f"{path}: not a file of boxes; give {SUPPORTED}")


class _Table(BoxFile):
    """boxes.csv."""

    def __init__(self, path: Path) -> None:
        self.path, self._rows = path, _read_table(path)
        if (self._rows.case != "").all():
            self.cases = set(self._rows.case)

    def boxes(self, case: str, geometry: Geometry) -> list[GivenBox]:
        if geometry.stored_orientation[2] not in "SI":
            raise UserError(
                f"{self.path}: its z counts slices that are not axial, as the scan of {case} is "
                f"stored as {geometry.stored_orientation}; store it with its third axis from foot "
                "to head, or give a label map"
            )
        boxes = []
        for row in self._rows[self._rows.case.isin(["", case])].itertuples():
            corners = np.array([[row.x0, row.y0, row.z], [row.x1, row.y1, row.z]])
            ends = geometry.from_stored(corners)
            low, high = ends.min(axis=0).tolist(), ends.max(axis=0)
            if min(low) < 0 or (high > np.array(geometry.shape[::-1]) - 1).any():
                raise _outside(f"{self.path}, row {row.Index}", geometry)
            boxes.append(GivenBox(row.label, int(low[2]), (*low[:2], *high[:2].tolist())))
        return boxes


def _read_table(path: Path) -> pd.DataFrame:
    """The COLUMNS of a table by the number of the row; `case` is "" where the file does not say."""
    try:
        table = pd.read_csv(
            io.BytesIO(read_bytes(path)),
            usecols=lambda name: name.strip() in COLUMNS,  # a row may have more fields than others
            index_col=False,
            dtype=str,
            na_filter=False,
            skipinitialspace=True,
            encoding="utf-8-sig",
        )
    except ValueError as error:
        raise UserError(f"{path}: not a table in UTF-8 ({error}); save it as CSV") from error
    table.columns = table.columns.str.strip()
    missing = [name for name in COLUMNS[1:] if name not in table]
    if missing or table.empty:
        problem = f"no column {', '.join(missing)}" if missing else "holds no box"
        expected = f"the columns {','.join(COLUMNS)} (case is optional) and a row for each box"
        raise UserError(f"{path}: {problem}; expected {expected}")
    table = table.fillna("").reindex(columns=COLUMNS, fill_value="")
    table = table.apply(lambda column: column.str.strip())
    table.index += 2
    numbers = table[NUMBERS].apply(pd.to_numeric, errors="coerce").astype(float)
    for row, z, x0, y0, x1, y1 in numbers.itertuples():
        texts = table.loc[row]
        problem = _label_problem(texts.label)
        if bad := [name for name in NUMBERS if not math.isfinite(numbers.at[row, name])]:
            problem = f"{bad[0]} is {texts[bad[0]]!r}, not a number"
        elif z % 1:
            problem = f"z is {z:g}; slices are counted in whole numbers from 0"
        elif x1 < x0 or y1 < y0:
            problem = f"inverted, x {x0:g} to {x1:g} and y {y0:g} to {y1:g}; x0, y0 are the minima"
        if problem:
            raise UserError(f"{path}, row {row}: {problem}")
    return table.assign(**numbers)


class _RoughLabels(BoxFile):
    """A label map on the grid of the scan."""

    def __init__(self, path: Path) -> None:
        self.path, self._volume = path, read_label_map(path)
        if not self._volume.array.any():
            raise UserError(f"{path}: holds no label, and so no box")

    def boxes(self, case: str, geometry: Geometry) -> list[GivenBox]:
        compare_grids(self._volume, self.path, geometry, case)
        return [
            GivenBox(str(label), index, tuple(box.tolist()))
            for index, plane in enumerate(self._volume.array)
            for label, box in zip(*tight_boxes(plane), strict=True)
        ]


class _Markups(BoxFile):
    """3D Slicer's ROIs; one that is turned against the volume gives the box around it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            markups = json.loads(read_bytes(path).decode("utf-8-sig"))["markups"]
            rois = [markup for markup in markups if markup["type"] == "ROI"]
            self._rois = [_read_roi(path, roi, number) for number, roi in enumerate(rois, start=1)]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: not 3D Slicer's markups ({type(error).__name__}: {error}); save the ROI "
                "as .mrk.json"
            ) from error
        if not self._rois:
            raise UserError(f"{path}: holds no ROI, but other markups or none; draw a ROI")

    def boxes(self, case: str, geometry: Geometry) -> list[GivenBox]:
        size = np.array(geometry.shape[::-1])
        boxes = []
        for label, corners, where in self._rois:
            ends = geometry.indices_of(corners)
            low, high = ends.min(axis=0), ends.max(axis=0)  # in indices of voxels' centres
            first, last = math.ceil(low[2] - 1e-6), math.floor(high[2] + 1e-6)
            if first > last:
                raise UserError(f"{where}: lies between two slices of {case}; make it thicker")
            if (low > size - 0.5).any() or (high < -0.5).any():
                raise _outside(where, geometry)
            # What lies beyond the volume is cut off: a ROI is easily drawn a little too far.
            x0, y0 = np.clip(low[:2] + 0.5, 0, size[:2] - 1).tolist()
            x1, y1 = np.clip(high[:2] - 0.5, (x0, y0), size[:2] - 1).tolist()
            slices = range(max(0, first), min(int(size[2]) - 1, last) + 1)
            boxes += [GivenBox(label, index, (x0, y0, x1, y1)) for index in slices]
        return boxes


def _read_roi(path: Path, roi: dict, number: int) -> tuple[str, np.ndarray, str]:
    """Label, corners (8, 3) in LPS, mm, and where it stands; ValueError and such if damaged."""
    label = str(roi.get("name") or path.name.removesuffix(".json").removesuffix(".mrk"))
    where = f"{path}, ROI {number}"
    if problem := _label_problem(label):
        raise UserError(f"{where}: {problem}")
    if "mm" not in (units := roi.get("coordinateUnits", "mm"), *units[:1]):  # or ["mm", "length"]
        raise UserError(f"{where}: its unit is {units}; save it in mm")
    # Files written by hand have the centre as a control point alone, and 3D Slicer reads them.
    centre = roi["center"] if "center" in roi else roi["controlPoints"][0]["position"]
    centre, size = (np.reshape(np.array(each, np.float64), 3) for each in (centre, roi["size"]))
    # Row by row a matrix whose columns are the axes of the ROI.
    axes = np.reshape(np.array(roi.get("orientation", np.eye(3)), np.float64), (3, 3))
    signs = {"LPS": [1, 1, 1], "RAS": [-1, -1, 1]}[roi.get("coordinateSystem", "LPS")]
    if not (size > 0).all():
        raise UserError(f"{where}: has no size; draw it again")
    halves = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    return label, (centre + (halves * size) @ axes.T) * signs, where


def _label_problem(label: str) -> str | None:
    number = label.isascii() and label.isdigit()
    if is_name(label) and not (number and not 1 <= int(label) <= 255):
        return None
    return f"label is {label!r}; expected an id, 1 to 255, or a name"


def _outside(where: str, geometry: Geometry) -> UserError:
    z, y, x = geometry.shape
    return UserError(f"{where}: lies outside the scan of {x} x {y} pixels and {z} slices")


def boxes_by_case(
    files: Sequence[BoxFile], cases: Collection[str], geometry_of: Callable[[str], Geometry]
) -> dict[str, list[GivenBox]]:
    """The boxes of every case that has some, in the order of the cases.

    `geometry_of` gives the grid of a case's volume.

    Raises UserError: an unknown case, a file that does not say whose boxes it holds where there are
    several cases, or as `BoxFile.boxes`.
    """
    for file in files:
        if file.cases is None and len(cases) > 1:
            raise UserError(
                f"{file.path}: does not say which of {len(cases)} cases its boxes are of; give a "
                ".csv with the column case"
            )
        if unknown := sorted((file.cases or set()) - set(cases)):
            some = ", ".join(list(cases)[:3]) + (", ..." if len(cases) > 3 else "")
            raise UserError(f"{file.path}: there is no case {unknown[0]!r}; there are {some}")
    boxes = {}
    for case in cases:
        if of_case := [file for file in files if file.cases is None or case in file.cases]:
            geometry = geometry_of(case)
            boxes[case] = [box for file in of_case for box in file.boxes(case, geometry)]
    return boxes


def label_ids(labels: Collection[str]) -> dict[str, int]:
    """An id for every label: the number that it is, or the next free one for a name, up to 255."""
    ids = {label: int(label) for label in labels if label.isdigit()}
    names = [label for label in labels if label not in ids]
    free = [number for number in range(1, 256) if number not in ids.values()]
    if len(names) > len(free):
        raise UserError("more than 255 labels; a label volume cannot hold them")
    return ids | dict(zip(names, free, strict=False))
