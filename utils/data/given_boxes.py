"""Boxes that people drew, from a table, a rough label map, or 3D Slicer's ROI markups.

    boxes.csv       case,label,z,x0,y0,x1,y1: one row per box, in voxel indices of the stored file,
                    maxima inclusive; fractions are allowed in x and y, and `case` may be left out.
                    A row without its four numbers prevents an interpolated box there
    rough.nii.gz    a label map on the scan's grid: the box of each label in each axial slice
    box.mrk.json    ROIs, LPS or RAS as the file says: a box in every slice whose middle they span

A label is an id, 1 to 255, or a name. A file that does not name its case belongs to the only one
or, in a folder, to the case that it is named after.
"""

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
from utils.data.tables import read_table
from utils.data.volumes import SUFFIXES, on_grid, read_label_map
from utils.system import UserError, plural
from utils.system.files import read_bytes

NUMBERS = ["z", "x0", "y0", "x1", "y1"]
COLUMNS = ["case", "label", *NUMBERS]
SUPPORTED = f"a .csv, a label map ({', '.join(SUFFIXES)}), 3D Slicer's .mrk.json, or a folder"


Box = tuple[float, float, float, float]  # XYXY in native pixels, maxima inclusive


@dataclass(frozen=True)
class GivenBox:
    """A box around one label in an axial slice of a volume in LPS."""

    label: str  # its id as text, or its name
    index: int  # z of the slice
    box: Box | None  # None: there is to be no interpolated box of the label here


class BoxFile:
    """The boxes of one file."""

    path: Path
    cases: set[str] | None = None  # whose boxes it holds; None if it does not say

    def holds(self, case: str) -> bool:
        """Whether boxes of a case may be here."""
        return self.cases is None or case in self.cases

    def boxes(self, case: str, geometry: Geometry) -> list[GivenBox]:
        """The boxes of a case on the grid of its image; UserError if one lies outside."""
        raise NotImplementedError


class _Table(BoxFile):
    """boxes.csv."""

    def __init__(self, path: Path) -> None:
        self.path, self._rows = path, []
        for number, row in read_table(path, COLUMNS[1:], COLUMNS[:1]):
            drawn = any(row[name] for name in NUMBERS[1:])
            row |= {} if drawn else dict.fromkeys(NUMBERS[1:], "0")
            of_row = _read_row(f"{path}, row {number}", row)
            self._rows.append((row.get("case", ""), drawn, *of_row))
        if not any(drawn for _, drawn, *_ in self._rows):
            raise UserError(f"{path}: no row has a box; draw some")
        cases = {case for case, *_ in self._rows}
        if "" in cases and len(cases) > 1:
            raise UserError(f"{path}: some rows name a case and others do not; complete them")
        self.cases = None if "" in cases else cases

    def boxes(self, case: str, geometry: Geometry) -> list[GivenBox]:
        check_axial(case, geometry)
        boxes, rows = [], (row for of, *row in self._rows if of in ("", case))
        for drawn, where, label, (z, x0, y0, x1, y1) in rows:
            ends = geometry.from_stored(np.array([[x0, y0, z], [x1, y1, z]]))
            low, high = ends.min(axis=0).tolist(), ends.max(axis=0)
            if min(low) < 0 or (high > np.array(geometry.shape[::-1]) - 1).any():
                raise _outside(where, geometry)
            box = (*low[:2], *high[:2].tolist()) if drawn else None
            boxes.append(GivenBox(label, int(low[2]), box))
        return boxes


def check_axial(case: str, geometry: Geometry) -> None:
    """Raise UserError if the stored slices, which the z of a table counts, are not axial."""
    if geometry.stored_orientation[2] not in "SI":
        raise UserError(
            f"{case}: its slices are not axial, as it is stored as {geometry.stored_orientation}; "
            "store it with its third axis from foot to head"
        )


def _read_row(where: str, row: dict[str, str]) -> tuple[str, str, list[float]]:
    """Where a row of a table stands, its label, and its NUMBERS."""
    label, numbers = parse_label(where, row["label"]), []
    for name in NUMBERS:
        try:
            numbers.append(float(row[name]))
        except ValueError:
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise UserError(f"{where}: {name} is {row[name]!r}, not a number")
    z, x0, y0, x1, y1 = numbers
    if z % 1:
        raise UserError(f"{where}: z is {z:g}; slices are counted in whole numbers from 0")
    if x1 < x0 or y1 < y0:
        raise UserError(
            f"{where}: inverted, x {x0:g} to {x1:g} and y {y0:g} to {y1:g}; give minima first"
        )
    return where, label, numbers


class _RoughLabels(BoxFile):
    """A label map on the grid of the scan."""

    def __init__(self, path: Path) -> None:
        self.path, self._volume = path, read_label_map(path)
        if not self._volume.array.any():
            raise UserError(f"{path}: has no labels, and so no boxes")

    def boxes(self, case: str, geometry: Geometry) -> list[GivenBox]:
        volume = on_grid(self._volume, self.path, geometry, case)
        return [
            GivenBox(str(label), index, tuple(box.tolist()))
            for index, plane in enumerate(volume.array)
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
            raise UserError(f"{path}: holds no ROI; draw one in 3D Slicer")

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
    where = f"{path}, ROI {number}"
    name = path.name.removesuffix(".json").removesuffix(".mrk")
    label = parse_label(where, str(roi.get("name") or name))
    if "mm" not in (units := roi.get("coordinateUnits", "mm"), *units[:1]):  # or ["mm", "length"]
        raise UserError(f"{where}: its unit is {units}; save it in mm")
    # Files written by hand have the centre as a control point alone, and 3D Slicer reads them.
    centre = roi["center"] if "center" in roi else roi["controlPoints"][0]["position"]
    centre, size = (np.reshape(np.array(each, np.float64), 3) for each in (centre, roi["size"]))
    # Row by row a matrix whose columns are the axes of the ROI.
    axes = np.reshape(np.array(roi.get("orientation", np.eye(3)), np.float64), (3, 3))
    signs = {"LPS": [1, 1, 1], "RAS": [-1, -1, 1]}[roi.get("coordinateSystem", "LPS")]
    if not ((size > 0) & np.isfinite(centre + size)).all():
        raise UserError(f"{where}: has no size; draw it again")
    if not np.allclose(axes @ axes.T, np.eye(3), atol=1e-3):
        raise UserError(f"{where}: its orientation is not a rotation; draw it again")
    halves = np.array(list(itertools.product((-0.5, 0.5), repeat=3)))
    return label, (centre + (halves * size) @ axes.T) * signs, where


def parse_label(where: str, text: str) -> str:
    """An id as whole number, "2" for "2.0" too, or a name, which has a letter; else UserError."""
    try:
        number = float(text)
    except ValueError:
        if is_name(text) and any(map(str.isalpha, text)):
            return text
        number = math.nan
    if number not in range(1, 256):
        raise UserError(f"{where}: label is {text!r}; expected an id, 1 to 255, or a name")
    return str(int(number))


def _outside(where: str, geometry: Geometry) -> UserError:
    z, y, x = geometry.shape
    return UserError(f"{where}: lies outside the scan of {x} x {y} pixels and {plural(z, 'slice')}")


KINDS = {  # by the end of a file's name
    ".csv": _Table,
    ".mrk.json": _Markups,
    ".json": _Markups,
    **dict.fromkeys(SUFFIXES, _RoughLabels),
}


def box_paths(paths: Sequence[str | Path]) -> list[Path]:
    """The files that --boxes names: those given, and all that are in folders given."""
    inside = {path: sorted(path.glob("[!.]*")) for path in map(Path, paths) if path.is_dir()}
    return [file for path in map(Path, paths) for file in inside.get(path, [path])]


def read_boxes(paths: Sequence[str | Path]) -> list[BoxFile]:
    """Open box files, and folders of them; UserError for what can be checked without a scan."""
    folders, files = set(map(Path, paths)), []
    for path in box_paths(paths):
        suffix = next((suffix for suffix in KINDS if path.name.lower().endswith(suffix)), None)
        if not path.is_file() or not suffix:
            problem = "not a box file" if path.is_file() else "no such file"
            raise UserError(f"{path}: {problem}; give {SUPPORTED} to --boxes")
        files.append(KINDS[suffix](path))
        if path.parent in folders and files[-1].cases is None:
            files[-1].cases = {path.name[: -len(suffix)]}
    return files


def boxes_by_case(
    files: Sequence[BoxFile], cases: Collection[str], geometry_of: Callable[[str], Geometry]
) -> dict[str, list[GivenBox]]:
    """The boxes of every case that has some, in the order of the cases; a box may be None.

    `geometry_of` gives the grid of a case's volume.

    Raises UserError: an unknown case, a file that does not name its case although there are
    several, or as `BoxFile.boxes`.
    """
    for file in files:
        if file.cases is None and len(cases) > 1:
            raise UserError(
                f"{file.path}: does not say which of {len(cases)} cases its boxes belong to; give "
                "a .csv with a column case, or a folder with one file per case, named after it"
            )
        if unknown := sorted((file.cases or set()) - set(cases)):
            some = ", ".join(list(cases)[:3]) + (", ..." if len(cases) > 3 else "")
            raise UserError(f"{file.path}: there is no case {unknown[0]!r}; choose from {some}")
    boxes = {}
    for case in cases:
        if of_case := [file for file in files if file.holds(case)]:
            geometry = geometry_of(case)
            found = [box for file in of_case for box in file.boxes(case, geometry)]
            boxes |= {case: found} if any(box.box for box in found) else {}
    return boxes
