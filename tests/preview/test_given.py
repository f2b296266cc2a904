"""python perturb.py --data --boxes: people's boxes beside the tight ones."""

import numpy as np
import pandas as pd
import pytest

import perturb as p
from perturb import tight_boxes
from tests.helpers import toy_case, write_volume
from utils.preview.command import main
from utils.preview.given import given_statistics, suggested_factors
from utils.preview.statistics import BOX

GIVEN = [f"given_{edge}" for edge in BOX]


def table_of(boxes: list[tuple]) -> pd.DataFrame:
    """Rows of label id, tight box, given box."""
    rows = [
        {"label": label, "name": f"organ {label}"}
        | dict(zip(BOX, tight, strict=True))
        | dict(zip(GIVEN, given, strict=True))
        for label, tight, given in boxes
    ]
    return pd.DataFrame(rows)


def test_statistics_by_hand():
    tight = (100, 200, 199, 249)  # 100 x 50 px
    table = given_statistics(
        table_of(
            [
                (1, tight, (90, 195, 209, 254)),  # outward by 10 % of each side
                (1, tight, (100, 200, 199, 249)),
                (2, tight, (110, 205, 189, 244)),  # inward by 10 %
            ]
        )
    ).set_index("label")
    assert table.index.tolist() == ["organ 1", "organ 2", "all"]
    assert table.boxes.tolist() == [2, 1, 3]
    assert table.cut_percent.tolist() == pytest.approx([0, 100, 100 / 3])
    assert table.loc["organ 1", "offset_percent_of_side_median"] == pytest.approx(5)
    assert table.loc["organ 2", "offset_percent_of_side_low"] == pytest.approx(-10)
    assert table.loc["organ 2", "offset_px_median"] == pytest.approx(-7.5)  # x by 10, y by 5
    assert table.loc["organ 2", "iou_median"] == pytest.approx(80 * 40 / 5000)
    assert table.loc["all", "offset_percent_of_side_high"] == pytest.approx(10)


def test_the_suggested_constants_cover_95_percent_of_the_edges():
    """And `adaptive` with them, under the reading width, draws edges of the same range."""
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(500):
        low, side = rng.uniform(300, 400, 2), rng.uniform(50, 300, 2)
        tight = np.array([*low, *(low + side - 1)])
        share = rng.uniform(-0.12, 0.08, 4)
        boxes.append((1, tight, tight + share * np.tile(side, 2) * [-1, -1, 1, 1]))
    table = table_of(boxes)
    delta, epsilon = suggested_factors(given_statistics(table))
    share = (table[GIVEN].to_numpy() - table[BOX].to_numpy()) * [-1, -1, 1, 1]
    share = share / np.tile(p.box_sides(table[BOX].to_numpy()), 2)
    covered = (share >= epsilon / 1024) & (share <= delta / 1024)
    assert covered.mean() == pytest.approx(0.95, abs=0.002)
    low, high = p.offset_range(table[BOX].to_numpy(np.float32), "adaptive", 1024, delta, epsilon)
    sides = p.box_sides(table[BOX].to_numpy())
    assert low / sides == pytest.approx(np.full(low.shape, epsilon / 1024), rel=1e-3)
    assert high / sides == pytest.approx(np.full(low.shape, delta / 1024), rel=1e-3)


def test_boxes_that_only_expand_or_only_shrink_suggest_0_for_the_other_factor():
    tight = (100, 200, 199, 249)
    larger = given_statistics(table_of([(1, tight, (80, 190, 219, 259))]))
    assert suggested_factors(larger) == pytest.approx((204.8, 0.0))
    smaller = given_statistics(table_of([(1, tight, (120, 210, 179, 239))]))
    assert suggested_factors(smaller) == pytest.approx((0.0, -204.8))


def write_boxes(path, cases, move: int = 0) -> int:
    rows = ["case,label,z,x0,y0,x1,y1"]
    for number in cases:
        for z, plane in enumerate(toy_case(number)[1]):
            for label, box in zip(*tight_boxes(plane), strict=True):
                x0, y0, x1, y1 = box.astype(int) + np.array([-1, -1, 1, 1]) * move
                name = "large" if label == 1 else label  # an id, or its name
                rows.append(f"toy_{number},{name},{z},{x0},{y0},{x1},{y1}")
    path.write_text("\n".join(rows) + "\n")
    return len(rows) - 1


@pytest.mark.parametrize("slices", [True, False])
def test_command_on_slices_and_on_label_volumes(toy_slices, tmp_path, capsys, slices):
    folder = toy_slices if slices else toy_slices.parent / "ct" / "labels"
    names = [] if slices else ["--label-names", "1=large,2=small"]
    count = write_boxes(tmp_path / "boxes.csv", range(3), move=-1)
    with open(tmp_path / "boxes.csv", "a") as file:
        file.write("toy_0,9,1,1,1,2,2\n")  # no such label
    out = tmp_path / "out.png"
    words = ["--data", str(folder), "--boxes", str(tmp_path / "boxes.csv"), "--out", str(out)]
    main([*words, *names])
    printed = capsys.readouterr().out
    assert f"{count} boxes beside the tight ones" in printed
    assert "left out: 1, whose slice has no such label" in printed
    assert "DELTA_EXPAND = 0.0 and EPSILON_SHRINK = -" in printed and not out.exists()
    table = pd.read_csv(tmp_path / "out.csv").set_index("label")
    assert table.index.tolist() == ["large", "small", "all"] and table.loc["all", "boxes"] == count
    assert (table.cut_percent == 100).all() and (table.offset_px_high < 0).all()


def test_bad_boxes_are_one_line(toy_slices, tmp_path, fails):
    write_boxes(tmp_path / "boxes.csv", [7])
    message = fails(main, "--data", toy_slices, "--boxes", tmp_path / "boxes.csv")
    assert "there is no case 'toy_7'; there are toy_0" in message
    (tmp_path / "boxes.csv").write_text("case,label,z,x0,y0,x1,y1\ntoy_0,9,1,1,1,2,2\n")
    message = fails(main, "--data", toy_slices, "--boxes", tmp_path / "boxes.csv")
    assert "no box is of a label in a slice of" in message
    assert "give the folder" in fails(main, "--boxes", tmp_path / "boxes.csv")
    before = (tmp_path / "boxes.csv").read_bytes()
    out = ("--out", tmp_path / "boxes.png")  # whose table would be boxes.csv
    message = fails(main, "--data", toy_slices, "--boxes", tmp_path / "boxes.csv", *out)
    assert "would replace the boxes" in message
    assert (tmp_path / "boxes.csv").read_bytes() == before


def test_a_box_of_a_volume_of_another_size_is_refused(tmp_path, fails):
    labels = toy_case(0)[1]
    write_volume(tmp_path / "labels" / "toy_0.nii.gz", labels)
    write_volume(tmp_path / "rough.nii.gz", labels[:, :-2])
    words = ("--data", tmp_path / "labels", "--boxes", tmp_path / "rough.nii.gz")
    assert "resample one onto the other" in fails(main, *words)
