"""Measured errors of boxes: every n-th slice and the neighbour's by hand, tables and pictures."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tests.evaluation.helpers import stack
from tests.helpers import BOXES_HEADER, call, tight_rows
from utils.evaluation.interpolation import find_tracks
from utils.preview.command import main
from utils.preview.measuring import (
    boxes_of_every,
    boxes_of_neighbours,
    error_rows,
    follow_targets,
    sizes_text,
    write_errors,
)
from utils.preview.options import parse_options
from utils.preview.statistics import BOX, offsets_of, read_masks
from utils.system import UserError
from utils.training.errors import COLUMNS, checked_errors

SCRIPT = SimpleNamespace(main=main, parse_options=parse_options)  # python perturb.py


def bar_of(*widths: int, z: int = 3) -> pd.DataFrame:
    """The masks of one target from slice z on: x from 100, 50 px high, filled by half."""
    masks = pd.DataFrame(
        [(100, 300, 99 + width, 349) for width in widths], columns=BOX, dtype=np.float32
    )
    return masks.assign(
        case="a", slice=range(z, z + len(widths)), label=1, name="bar", patient="p", share=0.1
    ).assign(area=[25 * width for width in widths])


def test_every_fourth_slice_from_each_start_by_hand():
    masks = follow_targets(bar_of(10, 20, 30, 30, 70, 10))
    right = boxes_of_every(masks, 4)[..., 2] - 99  # widths
    starts = [  # key slices 0, 4, 5; 0, 1, 5; 0, 2, 5; 0, 3, 5
        [10, 25, 40, 55, 70, 10],
        [10, 20, 17.5, 15, 12.5, 10],
        [10, 20, 30, 70 / 3, 50 / 3, 10],
        [10, 50 / 3, 70 / 3, 30, 20, 10],
    ]
    assert right.T == pytest.approx(np.array(starts))


def test_neighbours_and_the_shares_of_the_side_by_hand():
    masks = follow_targets(bar_of(10, 20, 40))
    boxes = boxes_of_neighbours(masks)
    assert np.isnan(boxes[[0, 2], [0, 1]]).all() and np.isfinite(boxes).sum() == 16
    errors = error_rows("neighbour", masks, offsets_of(masks, boxes)[1])
    assert errors.columns.symmetric_difference(COLUMNS).empty
    assert errors.right.tolist() == [1, -0.5, 1, -0.5]  # 20 for 10; 10 and 40 for 20; 20 for 40
    assert (errors[["left", "top", "bottom"]] == 0).all(axis=None)
    assert errors["size"].to_numpy() == pytest.approx(np.sqrt([250, 500, 500, 1000]))
    assert (errors.patient == 1).all() and (errors.protocol == "neighbour").all()


def test_boxes_that_miss_their_targets_are_not_trained_on(tmp_path):
    shares = np.zeros((3, 2, 4))
    shares[0, 0, 0], shares[1, 1, 3] = -1.2, -0.9999
    errors = error_rows("neighbour", follow_targets(bar_of(10, 20, 40)), shares)
    assert len(errors) == 6
    assert write_errors(tmp_path / "errors.csv", errors, "how they were made") == 4
    assert checked_errors(tmp_path / "errors.csv") == str(tmp_path / "errors.csv")


def test_a_target_ends_before_a_gap_and_a_lone_slice_is_left_out():
    lone = bar_of(9, z=20)
    masks = pd.concat([bar_of(10, 20), bar_of(30, 40, z=6), bar_of(7).assign(case="b"), lone])
    followed = follow_targets(masks)
    assert followed.slice.tolist() == [3, 4, 6, 7] and followed.target.nunique() == 2
    with pytest.raises(UserError, match="no label spans two neighbouring slices"):
        follow_targets(lone)
    parts = pd.concat([bar_of(10, 20, 30, 40), bar_of(5, z=5)])  # two in slice 5
    assert follow_targets(parts).slice.tolist() == [3, 4]


def test_boxes_are_those_that_evaluation_draws_in_every_nth_slice(tmp_path):
    """From the first start, in the 1024 frame: its pixels are 12.8 of the volume's."""
    dataset = stack(tmp_path)
    masks = follow_targets(read_masks(dataset.folder))
    for track in find_tracks(dataset.split("all")):
        rows = masks[
            (masks.name == track.organ[2]) & masks.slice.isin(s.index for s in track.slices)
        ]
        for every in (3, 4):
            framed = track.slices[0].frame.boxes_to_frame(np.array(track.boxes_of_every(every)))
            boxes = boxes_of_every(masks, every)[rows.index, 0]
            assert np.abs(boxes - framed).max() < 1.01  # it rounds


def test_sizes_text_by_hand():
    masks = follow_targets(bar_of(*[20] * 3, *[400] * 3))  # sqrt(area) 22 and 100 px
    tight = masks[BOX].to_numpy(float)[:, None]
    sides = np.tile([[20, 50]] * 3 + [[400, 50]] * 3, 2)[:, None]
    boxes = tight + [-1, -1, 1, 1] * sides * np.repeat([0.1, -0.05], 3)[:, None, None]
    lines = sizes_text(masks, {"drawn": boxes, "tight": tight}).splitlines()
    names = "under 40 px 80-160 px all DELTA_EXPAND EPSILON_SHRINK"
    assert lines[2].split() == names.split()
    numbers = "drawn +10.0 to +10.0 -5.0 to -5.0 -5.0 to +10.0 102.4 -51.2"
    assert lines[3].split() == numbers.split()
    assert lines[4].split()[1:] == [*["+0.0", "to", "+0.0"] * 3, "0.0", "0.0"]


def test_errors_are_printed_drawn_and_written(tmp_path, capsys):
    data, out, table = stack(tmp_path, 2).folder, tmp_path / "out.png", tmp_path / "errors.csv"
    words = ("--data", data, "--every", 3, "--neighbour", "--policy", "none,measured")
    call(SCRIPT, *words, "--draws", 2, "--out", out, "--errors", table)
    printed = capsys.readouterr().out
    assert "-95 % range, by the target's sqrt(area)" in printed and f"wrote {table}: " in printed
    assert "DELTA_EXPAND EPSILON_SHRINK\nevery 3 " in printed
    rows = pd.read_csv(out.with_suffix(".csv"))
    assert rows.policy.unique().tolist() == ["every 3", "neighbour", "none", "measured"]
    assert out.read_bytes().startswith(b"\x89PNG")
    errors = pd.read_csv(table, comment="#")
    assert errors.columns.tolist() == COLUMNS and set(errors.patient) == {1, 2}
    # Per patient a bar in seven slices, a spot in four and in two; three starts; two neighbours.
    assert errors.protocol.value_counts().to_dict() == {"every 3": 78, "neighbour": 40}
    assert table.read_text().startswith("# python perturb.py --data ")
    call(SCRIPT, *words, "--draws", 2, "--out", out, "--errors", table, "--rows", 40)
    thinned = pd.read_csv(table, comment="#")
    assert (thinned.groupby(["protocol", "patient"]).size() == 10).all()
    call(SCRIPT, "--policy", "measured", "--errors", table, "--out", out)  # draws from it
    measured = [line for line in capsys.readouterr().out.splitlines() if " measured " in line]
    assert len(measured) == 3  # targets; no box of the table errs in y
    assert all("+" in x and y == " y +0.0 ... +0.0 px" for x, y in (m.split(",") for m in measured))


def test_people_s_boxes_have_the_same_columns(toy_slices, tmp_path, capsys):
    boxes, table = tmp_path / "boxes.csv", tmp_path / "errors.csv"
    boxes.write_text(BOXES_HEADER + tight_rows(0, "toy_0", move=-1) + tight_rows(1, "toy_1"))
    words = ("--data", toy_slices, "--boxes", boxes, "--out", tmp_path / "out.png")
    call(SCRIPT, *words, "--errors", table)
    printed = capsys.readouterr().out
    assert "by the target's sqrt(area)" in printed and f"wrote {table}: 8 boxes" in printed
    errors = pd.read_csv(table, comment="#")
    assert errors.columns.tolist() == COLUMNS and (errors.protocol == "drawn").all()
    shares = errors[COLUMNS[3:]]
    assert (shares[errors.patient == 1] < 0).all(axis=None)
    assert (shares[errors.patient == 2] == 0).all(axis=None)
    masks = read_masks(toy_slices)
    expected = np.sqrt(masks.area[masks.case.isin(["toy_0", "toy_1"])])
    assert sorted(errors["size"]) == pytest.approx(sorted(expected), abs=0.06)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--every: expected a whole number, 2 or more", ("--data", "a", "--every", 1)),
        ("give the folder with the targets", ("--neighbour",)),
        ("cannot be used with --every", ("--data", "a", "--boxes", "b.csv", "--every", 3)),
        ("--rows: requires --errors", ("--data", "a", "--neighbour", "--rows", 3)),
        ("no.csv: cannot read", ("--policy", "measured", "--errors", "no.csv")),
    ],
)
def test_bad_options(fails, words, options):
    assert words in fails(SCRIPT, *options)
