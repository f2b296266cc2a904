"""Boxes that people drew: the same from every kind of file and orientation, or one line."""

import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from perturb import tight_boxes
from tests.helpers import BOXES_HEADER as HEADER
from tests.helpers import SHAPE, SPACING, toy_case, write_volume
from utils.data.given_boxes import GivenBox, boxes_by_case, read_boxes
from utils.data.volumes import read_geometry
from utils.system import UserError


@pytest.fixture
def labels(tmp_path):
    """A toy label map on the disk, stored in LPS; slice 0 is empty."""
    write_volume(tmp_path / "labels.nii.gz", toy_case(0)[1])
    return tmp_path / "labels.nii.gz"


TIGHT = [  # of every mask of the toy case, in order of z and label
    GivenBox(str(label), z, tuple(box))
    for z, plane in enumerate(toy_case(0)[1])
    for label, box in zip(*(part.tolist() for part in tight_boxes(plane)), strict=True)
]


def boxes_in(path, geometry) -> list[GivenBox]:
    (file,) = read_boxes([path])
    return file.boxes("toy_0", geometry)


# --- Tables --------------------------------------------------------------------------------------
@pytest.mark.parametrize("orientation", ["LPS", "RAI", "ALI", "PRS"])
def test_a_table_counts_voxels_of_the_stored_file(tmp_path, orientation):
    write_volume(tmp_path / "stored.nii.gz", toy_case(0)[1], orientation=orientation)
    geometry = read_geometry(tmp_path / "stored.nii.gz")
    assert geometry.stored_orientation == orientation
    stored = np.asanyarray(nibabel.load(tmp_path / "stored.nii.gz").dataobj)  # (i, j, k)
    rows = []
    for k in range(stored.shape[2]):
        for label in np.unique(stored[:, :, k])[1:]:
            i, j = np.nonzero(stored[:, :, k] == label)
            rows.append(f"toy_0,{label},{k},{i.min()},{j.min()},{i.max()},{j.max()}\n")
    (tmp_path / "boxes.csv").write_text(HEADER + "".join(rows))
    found = boxes_in(tmp_path / "boxes.csv", geometry)
    assert sorted(found, key=lambda box: (box.index, box.label)) == TIGHT
    sagittal = replace(geometry, stored_orientation="SPL")
    with pytest.raises(UserError, match="toy_0: its slices are not axial"):
        boxes_in(tmp_path / "boxes.csv", sagittal)


@pytest.mark.parametrize("orientation", ["LPS", "RAI", "PRS"])
def test_rows_without_a_box_keep_interpolation_out(tmp_path, orientation):
    write_volume(tmp_path / "stored.nii.gz", toy_case(0)[1], orientation=orientation)
    geometry = read_geometry(tmp_path / "stored.nii.gz")
    (tmp_path / "boxes.csv").write_text(HEADER + "toy_0,liver,1,2,3,4,5\ntoy_0,liver,0,,,,\n")
    (file,) = read_boxes([tmp_path / "boxes.csv"])
    drawn, without = file.boxes("toy_0", geometry)
    assert drawn.box
    z = SHAPE[0] - 1 if orientation == "RAI" else 0
    assert without == GivenBox("liver", z, None)
    corner = np.array([[2.0, 3.0, 1.0], [4.0, 5.0, 0.0]])
    assert (geometry.from_stored(geometry.from_stored(corner), back=True) == corner).all()
    (tmp_path / "none.csv").write_text(HEADER + "toy_0,liver,0,,,,\n")
    with pytest.raises(UserError, match="no row has a box"):
        read_boxes([tmp_path / "none.csv"])


def test_a_table_may_be_of_one_case_or_of_several(tmp_path, labels):
    geometry = read_geometry(labels)
    (tmp_path / "several.csv").write_text(
        HEADER + "b,liver,1,2.5,3,10,11.25\na, spleen ,2,0,0,95,79\na,7,0,5,5,5,5\n"
    )
    (file,) = read_boxes([tmp_path / "several.csv"])
    assert file.cases == {"a", "b"}
    assert file.boxes("a", geometry) == [
        GivenBox("spleen", 2, (0, 0, 95, 79)),
        GivenBox("7", 0, (5, 5, 5, 5)),
    ]
    assert [box.box for box in file.boxes("b", geometry)] == [(2.5, 3, 10, 11.25)]
    # As Excel saves it: other order, a mark at the start, a column more.
    text = "\ufefflabel,x0,x1,y0,y1,z,reader\r\nliver,1,2,3,4,0,AB\r\n"
    (tmp_path / "one.csv").write_bytes(text.encode())
    (file,) = read_boxes([tmp_path / "one.csv"])
    assert file.cases is None and file.boxes("any", geometry)[0].box == (1, 3, 2, 4)
    # Numbers of a spreadsheet that knows only such, with commas for points.
    (tmp_path / "one.csv").write_text("LABEL;Z;X0;Y0;X1;Y1\n2,0;1,0;2,5;3;10;11,25\n")
    (file,) = read_boxes([tmp_path / "one.csv"])
    assert file.boxes("any", geometry) == [GivenBox("2", 1, (2.5, 3, 10, 11.25))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no column label, z"),
        (HEADER + "a,1,0,1,1,2,two\n", "row 2: y1 is 'two', not a number"),
        (HEADER + "a,1,0,1,1,2\n", "row 2: y1 is '', not a number"),
        (HEADER + "a,1,0,1,1,2,2\na,1,0.5,1,1,2,2\n", "row 3: z is 0.5"),
        (HEADER + "a,1,0,5,1,2,2\n", "row 2: inverted, x 5 to 2"),
        *(
            (f"{HEADER}a,{label},0,1,1,2,2\n", f"row 2: label is '{label}'; expected an id")
            for label in ("0", "256", "1.5", "-1", "", "nan", "²", "?")
        ),
        (HEADER + "a,1,0,1,1,2,2\n,1,0,1,1,2,2\n", "some rows name a case and others do not"),
        (HEADER + "a,1,0,1,5,1,2,2\n", "row 2: has 8 values, the header 7"),
    ],
)
def test_bad_tables(tmp_path, text, expected):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(UserError) as error:
        read_boxes([tmp_path / "boxes.csv"])
    assert str(error.value).startswith(f"{tmp_path}/boxes.csv") and expected in str(error.value)


@pytest.mark.parametrize("row", ["3,1,1,2,2", "-1,1,1,2,2", "0,90,1,96,2", "0,-1,1,2,2"])
def test_boxes_outside_the_scan(tmp_path, labels, row):
    (tmp_path / "boxes.csv").write_text(f"{HEADER}a,1,{row}\n")
    with pytest.raises(UserError, match="row 2: lies outside the scan of 96 x 80 pixels and 3 sl"):
        read_boxes([tmp_path / "boxes.csv"])[0].boxes("a", read_geometry(labels))


# --- Label maps ----------------------------------------------------------------------------------
@pytest.mark.parametrize("orientation", ["LPS", "RAI", "SPL"])
def test_a_label_map_gives_the_box_of_each_label_in_each_slice(tmp_path, labels, orientation):
    write_volume(tmp_path / "rough.nii.gz", toy_case(0)[1], orientation=orientation)
    assert boxes_in(tmp_path / "rough.nii.gz", read_geometry(labels)) == TIGHT


def test_a_label_map_must_lie_on_the_scan(tmp_path, labels):
    geometry = read_geometry(labels)
    write_volume(tmp_path / "moved.nii.gz", toy_case(0)[1], origin=(0, 0, 0))
    with pytest.raises(UserError, match="off the image's grid"):
        boxes_in(tmp_path / "moved.nii.gz", geometry)
    write_volume(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(UserError, match="empty.nii.gz: has no labels"):
        read_boxes([tmp_path / "empty.nii.gz"])


# --- 3D Slicer's ROIs ----------------------------------------------------------------------------
def write_roi(path, system="LPS", turn=None, **changes):
    """A ROI around voxels x 10-29, y 20-25 and z 1-2, whose faces lie between voxels."""
    first, last = np.array([10, 20, 1]), np.array([29, 25, 2])
    spacing, origin = np.array(SPACING[::-1]), np.array([-96.0, -80.0, 10.0])
    centre = origin + (first + last) / 2 * spacing
    size = (last - first + 1) * spacing
    axes = np.eye(3) if turn is None else turn
    if system == "RAS":
        centre, axes = centre * [-1, -1, 1], np.diag([-1, -1, 1]) @ axes
    roi = {
        "type": "ROI",
        "roiType": "Box",
        "coordinateSystem": system,
        "coordinateUnits": "mm",
        "center": centre.tolist(),
        "size": size.tolist(),
        "orientation": axes.ravel().tolist(),
    }
    path.write_text(json.dumps({"markups": [{"type": "Fiducial"}, roi | changes]}))


@pytest.mark.parametrize("system", ["LPS", "RAS"])
def test_a_roi_is_a_box_in_every_slice_that_it_spans(tmp_path, labels, system):
    for name in (None, "tumour"):
        write_roi(tmp_path / "liver.mrk.json", system, name=name)
        found = boxes_in(tmp_path / "liver.mrk.json", read_geometry(labels))
        assert [(box.label, box.index) for box in found] == [(name or "liver", z) for z in (1, 2)]
        assert all(box.box == pytest.approx((10, 20, 29, 25), abs=1e-4) for box in found)


TURNS = ((0, 90), (0, 30), (20, 35))


@pytest.mark.parametrize(
    "turn", [Rotation.from_euler("xz", angles, degrees=True).as_matrix() for angles in TURNS]
)
def test_a_turned_roi_gives_the_box_around_it(tmp_path, labels, turn):
    """The axes are the columns of a matrix: its transpose has another box around it."""
    write_roi(tmp_path / "r.mrk.json", turn=turn)
    x0, y0, x1, y1 = boxes_in(tmp_path / "r.mrk.json", read_geometry(labels))[0].box
    dz, dy, dx = SPACING
    width, height, _ = np.abs(turn) @ [20 * dx, 6 * dy, 2 * dz]  # of the box around it, mm
    assert x1 - x0 + 1 == pytest.approx(width / dx, abs=1e-4)
    assert y1 - y0 + 1 == pytest.approx(height / dy, abs=1e-4)


def test_a_roi_whose_centre_is_its_control_point_alone(tmp_path, labels):
    path = tmp_path / "r.mrk.json"
    write_roi(path, coordinateUnits=["mm", "length"])
    expected = boxes_in(path, read_geometry(labels))
    markups = json.loads(path.read_text())
    markups["markups"][1]["controlPoints"] = [{"position": markups["markups"][1].pop("center")}]
    path.write_text(json.dumps(markups))
    assert boxes_in(path, read_geometry(labels)) == expected


def test_a_roi_is_cut_at_the_border_of_the_scan(tmp_path, labels):
    write_roi(tmp_path / "r.mrk.json", size=[1000.0, 1000.0, 1000.0])
    found = boxes_in(tmp_path / "r.mrk.json", read_geometry(labels))
    assert found == [GivenBox("r", z, (0, 0, 95, 79)) for z in range(3)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"type": "Plane"}, "holds no ROI"),
        ({"center": [0.0, 0.0]}, "not 3D Slicer's markups"),
        ({"coordinateSystem": "XYZ"}, "not 3D Slicer's markups"),
        ({"coordinateUnits": "um"}, "ROI 1: its unit is um"),
        ({"size": [1.0, 0.0, 1.0]}, "ROI 1: has no size"),
        ({"center": [0.0, float("nan"), 0.0]}, "ROI 1: has no size"),
        ({"orientation": [0.0] * 9}, "its orientation is not a rotation"),
        ({"orientation": [2.0, 0, 0, 0, 1, 0, 0, 0, 1]}, "its orientation is not a rotation"),
        ({"size": [9.0, 9.0, 0.1], "center": [0.0, 0.0, 12.5]}, "ROI 1: lies between two slices"),
        ({"center": [900.0, 0.0, 12.5]}, "ROI 1: lies outside the scan"),
    ],
)
def test_bad_rois(tmp_path, labels, changes, expected):
    write_roi(tmp_path / "r.mrk.json", **changes)
    with pytest.raises(UserError, match=expected):
        read_boxes([tmp_path / "r.mrk.json"])[0].boxes("a", read_geometry(labels))


# --- Any file ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        *(("r.mrk.json", content, "not 3D Slicer's") for content in (b"", b"{}", b"[1]")),
        *(("r.json", content, "not 3D Slicer's") for content in (b'{"markups": 3}', b"\xff")),
        ("boxes.xlsx", b"", "not a box file"),
        ("boxes.csv", None, "no such file"),
    ],
)
def test_other_files(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {expected}"):
        read_boxes([tmp_path / name])


def test_a_folder_has_a_file_for_each_case(tmp_path, labels):
    geometry, folder = read_geometry(labels), tmp_path / "boxes"
    folder.mkdir()
    (folder / "a.b.csv").write_text("label,z,x0,y0,x1,y1\n1,1,1,2,3,4\n")
    write_roi(folder / "c.mrk.json")
    write_volume(folder / "d.nii.gz", toy_case(0)[1])
    files = read_boxes([folder])
    assert [file.cases for file in files] == [{"a.b"}, {"c"}, {"d"}]
    found = boxes_by_case(files, ["a.b", "c", "d", "e"], lambda case: geometry)
    assert {case: len(boxes) for case, boxes in found.items()} == {"a.b": 1, "c": 2, "d": 4}
    with pytest.raises(UserError, match="c.mrk.json: there is no case 'c'; choose from a.b, d"):
        boxes_by_case(files, ["a.b", "d"], lambda case: geometry)
    with pytest.raises(UserError, match="a.b.csv: does not say which of 2 cases"):
        boxes_by_case(read_boxes([folder / "a.b.csv"]), ["a.b", "d"], lambda case: geometry)
