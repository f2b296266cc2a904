"""Statistics of a data set's boxes: by hand, of both kinds of folder, boxes keyed by content."""

import numpy as np
import pandas as pd
import pytest

import perturb as p
from perturb import Perturbation
from tests.helpers import TOY_NAMES, write_volume
from utils.preview.statistics import (
    BOX,
    GIVEN,
    as_text,
    box_statistics,
    draw_boxes,
    given_statistics,
    read_masks,
    suggested_factors,
)

TEN_PERCENT = ("width", 102.4, -102.4)  # both ways, of any side


pytestmark = pytest.mark.usefixtures("fixed_constants")


def masks_of(*boxes: tuple[int, int, int, int], labels: tuple[int, ...] = ()) -> pd.DataFrame:
    """One mask per slice, all of one case; only the boxes matter."""
    masks = pd.DataFrame(boxes, columns=BOX)
    masks["area"] = (masks.x1 - masks.x0 + 1) * (masks.y1 - masks.y0 + 1)
    labels = labels or (1,) * len(boxes)
    names = [{1: "one", 2: "two"}[label] for label in labels]
    return masks.assign(
        case="a", slice=range(len(boxes)), label=labels, name=names, pixels=100, share=0.01
    )


def statistics_of(
    masks: pd.DataFrame, policies: str, draws: int = 1000, factors: tuple = TEN_PERCENT
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    perturbations = [Perturbation(policy, *factors) for policy in policies.split(",")]
    boxes = {each.policy: draw_boxes(masks, each, draws, 0) for each in perturbations}
    return box_statistics(masks, boxes, perturbations, draws, 0)


def row_of(masks: pd.DataFrame, policy: str, *args) -> pd.Series:
    return statistics_of(masks, policy, *args)[0].iloc[-1]


def side(pixels: int) -> tuple[int, int, int, int]:
    """A square box far from the border."""
    return (400, 300, 399 + pixels, 299 + pixels)


def test_masks_of_a_label_volume_by_hand(tmp_path):
    labels = np.zeros((3, 128, 64), np.uint8)  # pixels of 1 x 1 mm: 8 px of the frame each
    labels[1, 10:20, 4:7] = 5
    labels[2, 0, 0] = 5
    labels[2, 127, 60:64] = 200
    write_volume(tmp_path / "b.nii.gz", labels, (5.0, 1.0, 1.0))
    write_volume(tmp_path / "a.nii", labels[:2], (5.0, 1.0, 1.0))
    masks = read_masks(tmp_path, {5: "five"})
    assert masks.case.tolist() == ["a", "b", "b", "b"]
    assert masks.slice.tolist() == [1, 1, 2, 2] and masks.label.tolist() == [5, 5, 5, 200]
    assert masks.pixels.tolist() == [30, 30, 1, 4]
    assert masks.share.to_numpy() == pytest.approx(np.array([30, 30, 1, 4]) / 128 / 64)
    first = [32, 80, 55, 159]
    assert masks[BOX].values.tolist() == [first, first, [0, 0, 7, 7], [480, 1016, 511, 1023]]
    rows, _ = statistics_of(masks, "none", 1)
    assert rows.label.tolist() == ["five", "label 200", "all"]
    assert rows[["cases", "slices", "masks"]].values.tolist() == [[2, 3, 3], [1, 1, 1], [2, 3, 4]]
    five, other = rows.iloc[0], rows.iloc[1]
    assert five.width_px_median == 24 and five.height_px_median == 80
    assert five.theta_omega_median == 24 / 1024 and five.xi_median == pytest.approx(0.3)
    assert five.mask_native_pixels_median == 30 and other.xi_p05 == other.xi_p95 == 4


def test_slices_and_their_label_volumes_give_the_same(toy_slices):
    from_slices = read_masks(toy_slices)
    from_volumes = read_masks(toy_slices.parent / "ct" / "labels", TOY_NAMES)
    assert len(from_slices) == 16  # 4 cases of all splits, 2 slices, 2 labels
    pd.testing.assert_frame_equal(from_volumes, from_slices)


def test_the_reading_and_the_areas_reach_the_boxes():
    masks = masks_of(side(40), side(160)).assign(area=[400, 16 * 800])
    area = ("area", 1024.0, 0.0)
    rows, _ = statistics_of(masks, "scaled", 4000, area)
    assert rows.theta_omega_p95.iloc[-1] == pytest.approx(12800 / 1024**2, rel=0.1)
    assert (rows.reading == "area").all()
    for mask, largest in ((masks[:1], 400 / 1024), (masks[1:], 12800 / 1024)):  # delta_1, px
        row = row_of(mask, "scaled", 4000, area)
        assert row.offset_px_p95 == pytest.approx(0.95 * largest, rel=0.05)


@pytest.mark.parametrize(
    ("policy", "box", "px", "percent"),  # 95th percentile of edges
    [
        ("none", side(100), 0, 0),
        ("sam2", side(100), 9, 9),
        ("sam2", side(400), 18, 4.5),  # 10 % would be 40 px: the cap holds
        ("medsam", (400, 300, 439, 699), 19, 45),  # of the x edges, 90 %: 20 px are half of 40
        ("adaptive", (400, 300, 439, 699), 32, 9),  # of the y edges, 90 %: up to 40 px
    ],
)
def test_offsets_in_pixels_and_in_percent_of_the_side_that_the_edge_moves_along(
    policy, box, px, percent
):
    row = row_of(masks_of(box), policy, 4000)
    for column, expected in (("offset_px", px), ("offset_percent_of_side", percent)):
        assert row[f"{column}_p95"] == pytest.approx(expected, abs=0.05 * expected + 1e-6)
        outward = policy in ("none", "medsam")
        assert outward or row[f"{column}_p05"] == pytest.approx(-expected, abs=0.05 * expected)
        assert row[f"{column}_p05"] >= 0 or not outward


def test_neither_order_nor_other_masks_change_a_masks_boxes():
    masks = masks_of(side(20), side(33), (100, 500, 899, 519), side(7), labels=(1, 2, 2, 1))
    fewer = masks.iloc[[3, 1]]
    all_of_them, some = (statistics_of(m, "medsam", 4)[1]["medsam"] for m in (masks, fewer))
    assert (all_of_them[[3, 1]] == some).all()
    drawn = [draw_boxes(fewer, Perturbation("medsam"), 4, seed) for seed in (0, 1)]
    assert (drawn[0] != drawn[1]).any()


def given(*boxes: tuple) -> pd.DataFrame:
    """The statistics of rows of label id, tight box, given box."""
    labels, tight, drawn = zip(*boxes, strict=True)
    return given_statistics(
        masks_of(*tight, labels=labels).assign(**dict(zip(GIVEN, np.transpose(drawn), strict=True)))
    )


def test_given_boxes_by_hand():
    tight = (100, 200, 199, 249)  # 100 x 50 px
    table = given(
        (1, tight, (90, 195, 209, 254)),  # outward by 10 % of each side
        (1, tight, tight),
        (2, tight, (110, 205, 189, 244)),  # inward by 10 %
        (2, tight, (0, 250, 99, 349)),  # twice the area, beside the target
        (2, tight, (0, 150, 100, 249)),  # more than twice the area, cut
    ).set_index("label")
    assert table.index.tolist() == ["one", "two", "all"] and table.boxes.tolist() == [2, 3, 5]
    assert table.cut_percent.tolist() == pytest.approx([0, 100, 60])
    assert table.area_more_than_doubled_percent.tolist() == pytest.approx([0, 100 / 3, 20])
    assert table.loc["one", "offset_percent_of_side_median"] == pytest.approx(5)
    assert table.loc["one", "offset_px_median"] == pytest.approx(2.5)  # 0 four times, 10 and 5
    assert table.loc["two", "iou_median"] == pytest.approx(50 / 15050)  # of 0, 0.64 and this


def test_the_suggested_constants_cover_95_percent_of_the_edges():
    """And `adaptive` with them, under the reading width, draws edges of the same range."""
    rng = np.random.default_rng(0)
    low, sides = rng.uniform(300, 400, (500, 2)), rng.uniform(50, 300, (500, 2))
    tight, share = np.hstack((low, low + sides - 1)), rng.uniform(-0.12, 0.08, (500, 4))
    drawn = tight + share * np.tile(sides, 2) * [-1, -1, 1, 1]
    delta, epsilon = suggested_factors(given(*zip([1] * 500, tight, drawn, strict=True)))
    covered = (share >= epsilon / 1024) & (share <= delta / 1024)
    assert covered.mean() == pytest.approx(0.95, abs=0.002)
    offsets = p.offsets(tight, np.ones(500), Perturbation("adaptive", "width", delta, epsilon))
    ends = np.repeat([[epsilon, delta]], 2, axis=1) / 1024
    assert offsets / np.tile(sides, 2) == pytest.approx(np.tile(ends, (500, 1)), rel=1e-3)

    for box, factors in (
        ((80, 190, 219, 259), (204.8, 0.0)),  # these only expand, the others only shrink
        ((120, 210, 179, 239), (0.0, -204.8)),
    ):
        assert suggested_factors(given((1, (100, 200, 199, 249), box))) == pytest.approx(factors)


def test_text_has_the_numbers_of_the_table():
    masks = masks_of(side(20), (100, 500, 899, 519), labels=(1, 2))
    rows, _ = statistics_of(masks, "none,medsam", 5)
    text = as_text(rows)
    assert "Tight boxes of 2 masks in 2 slices of 1 case" in text
    assert "5 per mask, seed 0, theta_omega by width" in text
    rows_of = {line.split()[0]: line for line in text.splitlines() if line}
    numbers = {
        name: rows_of[name].replace(",", "").replace(" to", "").split()[1:]
        for name in ("two", "medsam")
    }
    spreads = ("800", "20", "0.781", "40.00")
    assert numbers["two"] == ["1", "1", *(text for text in spreads for _ in range(3))]
    row = rows[(rows.label == "all") & (rows.policy == "medsam")].iloc[0]
    spreads = ("offset_px", "offset_percent_of_side")
    names = [f"{column}_{end}" for column in spreads for end in ("median", "p05", "p95")]
    names += ["cut_percent", "area_more_than_doubled_percent", "iou_median", "boxes"]
    assert [float(n) for n in numbers["medsam"]] == pytest.approx(row[names].tolist(), abs=0.0501)
