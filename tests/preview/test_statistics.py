"""Statistics of a data set's boxes: numbers by hand, both kinds of folder, boxes keyed by content.

The numbers by hand hold for the constants set here, so that editing perturb.py breaks no test.
"""

import numpy as np
import pandas as pd
import pytest

import perturb as p
from tests.helpers import TOY_NAMES, preprocess, write_volume
from utils.data.frame import Frame
from utils.data.slices import open_dataset
from utils.preview.statistics import BOX, as_text, box_statistics, read_masks

FACTORS = {"delta_expand": 102.4, "epsilon_shrink": -102.4, "reading": "width"}  # 10 % both ways


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    for name in ("MEDSAM_SHIFT", "SAM2_SHIFT_MAX"):
        monkeypatch.setattr(p, name, 20.0)
    monkeypatch.setattr(p, "SAM2_SHARE", 0.1)
    monkeypatch.setattr(p, "DELTA_EXPAND_MAX", 256.0)
    monkeypatch.setattr(p, "EPSILON_SHRINK_MIN", -256.0)


def masks_of(*boxes: tuple[int, int, int, int], labels: tuple[int, ...] = ()) -> pd.DataFrame:
    """One mask per slice, all of one case; only the boxes matter."""
    masks = pd.DataFrame(boxes, columns=BOX)
    masks["area"] = (masks.x1 - masks.x0 + 1) * (masks.y1 - masks.y0 + 1)
    labels = labels or (1,) * len(boxes)
    names = [{1: "one", 2: "two"}[label] for label in labels]
    return masks.assign(
        case="a", slice=range(len(boxes)), label=labels, name=names, pixels=100, share=0.01
    )


def row_of(
    masks: pd.DataFrame, policy: str, draws: int = 1000, factors: dict = FACTORS
) -> pd.Series:
    """The row of all labels."""
    return box_statistics(masks, [policy], draws, 0, factors)[0].iloc[-1]


def side(pixels: int) -> tuple[int, int, int, int]:
    """A square box far from the border."""
    return (400, 300, 399 + pixels, 299 + pixels)


# --- Reading -------------------------------------------------------------------------------------
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
    rows, _ = box_statistics(masks, ["none"], 1, 0, FACTORS)
    assert rows.label.tolist() == ["five", "label 200", "all"]
    assert rows[["cases", "slices", "masks"]].values.tolist() == [[2, 3, 3], [1, 1, 1], [2, 3, 4]]
    five, other = rows.iloc[0], rows.iloc[1]
    assert five.width_px_median == 24 and five.height_px_median == 80
    assert five.theta_omega_median == 24 / 1024 and five.xi_median == pytest.approx(0.3)
    assert five.mask_native_pixels_median == 30
    assert other.xi_p05 == other.xi_p95 == 4
    assert other.mask_percent_of_slice_median == pytest.approx(400 / 128 / 64)


def test_slices_and_their_label_volumes_give_the_same(toy_slices):
    from_slices = read_masks(toy_slices)
    from_volumes = read_masks(toy_slices.parent / "ct" / "labels", TOY_NAMES)
    assert len(from_slices) == 16  # 4 cases of all splits, 2 slices, 2 labels
    pd.testing.assert_frame_equal(from_volumes, from_slices)


def test_masks_that_the_frame_loses_are_in_neither(tmp_path):
    every_row = np.repeat(np.arange(1200, dtype=np.int32)[:, None], 1200, axis=1)
    missed = np.setdiff1d(every_row, Frame.fit((1200, 1200)).labels_to_frame(every_row))[20]
    labels = np.zeros((2, 1200, 1200), np.uint8)
    labels[0, missed, 300:500] = 2
    labels[:, 101:900, 333:777] = 1
    labels[1, missed + 1, 300:500] = 3  # comes back as two rows
    write_volume(tmp_path / "labels" / "a.nii.gz", labels, (5.0, 0.5, 0.5))
    hu = labels.astype(np.int16)
    write_volume(tmp_path / "images" / "a_0000.nii.gz", hu, (5.0, 0.5, 0.5))
    preprocess(tmp_path, tmp_path / "out")
    assert open_dataset(tmp_path / "out").dropped_masks == {"a": 1}  # else this tests nothing
    from_volumes, from_slices = (read_masks(tmp_path / name) for name in ("labels", "out"))
    assert from_volumes.label.tolist() == [1, 1, 3] and from_volumes.pixels[2] > 300
    columns = ["label", "pixels", "share", *BOX]
    pd.testing.assert_frame_equal(from_volumes[columns], from_slices[columns])


# --- Numbers by hand -----------------------------------------------------------------------------
@pytest.mark.parametrize("pixels", [20, 44, 60])
def test_how_often_medsam_doubles_a_small_box(pixels):
    """(w + a + b) (w + c + d) > 2 w w, each of a ... d uniform on 0 ... 20, by integration."""
    s = np.linspace(0, 40, 4001)  # a + b, whose density is a triangle
    density = np.minimum(s, 40 - s) / 400
    least = np.clip(2 * pixels**2 / (pixels + s) - pixels, 0, 40)  # c + d must exceed it
    more = np.where(least < 20, 1 - least**2 / 800, (40 - least) ** 2 / 800)
    expected = 100 * np.sum(density * more) * 0.01
    row = row_of(masks_of(side(pixels)), "medsam", draws=20_000)
    assert row.area_more_than_doubled_percent == pytest.approx(expected, abs=1)


def test_medsam_never_doubles_a_large_box():
    assert row_of(masks_of(side(100)), "medsam").area_more_than_doubled_percent == 0


def test_adaptive_at_ten_percent_never_exceeds_1_44_times():
    masks = masks_of(side(6), side(40), side(300), (100, 500, 899, 519))
    rows, overlap = box_statistics(masks, ["adaptive", "scaled"], 3000, 0, FACTORS)
    assert (rows.area_more_than_doubled_percent == 0).all()
    assert 0.64 - 1e-4 <= overlap["adaptive"].min() < 0.70  # 0.8 * 0.8, below 1 / 1.44 = 0.694
    assert 1 / 1.44 - 1e-4 <= overlap["scaled"].min() < 0.73
    wide = FACTORS | {"delta_expand": 256.0, "epsilon_shrink": -256.0}
    widest = row_of(masks_of(side(40)), "adaptive", 4000, wide)
    assert 0 < widest.area_more_than_doubled_percent < 2  # at most 1.5 * 1.5


def test_a_policy_has_factors_of_its_own_unless_some_are_given():
    own = {"delta_expand": None, "epsilon_shrink": None, "reading": "width"}
    rows, _ = box_statistics(masks_of(side(40)), ["adaptive", "mixed"], 2, 0, own)
    delta = rows[rows.label == "all"].set_index("policy").delta_expand_px
    assert delta.adaptive == p.DELTA_EXPAND and delta.mixed == p.MIXED_SCALE * p.DELTA_EXPAND
    assert f"(mixed: {delta.mixed:g} and" in as_text(rows)
    given, _ = box_statistics(masks_of(side(40)), ["adaptive", "mixed"], 2, 0, FACTORS)
    assert set(given.delta_expand_px) == {102.4}


def test_the_reading_and_the_areas_reach_the_boxes():
    masks = masks_of(side(40), side(160)).assign(area=[400, 16 * 800])
    area = {"delta_expand": 1024.0, "epsilon_shrink": 0.0, "reading": "area"}
    rows, _ = box_statistics(masks, ["scaled"], 4000, 0, area)
    assert rows.theta_omega_p95.iloc[-1] == pytest.approx(12800 / 1024**2, rel=0.1)
    assert (rows.reading == "area").all()
    for mask, largest in ((masks[:1], 400 / 1024), (masks[1:], 12800 / 1024)):  # delta_1, px
        row = row_of(mask, "scaled", 4000, area)
        assert row.offset_px_p95 == pytest.approx(0.95 * largest, rel=0.05)


@pytest.mark.parametrize(
    ("policy", "pixels", "low", "high"),  # the 5th and 95th percentile of an edge, px
    [
        ("none", 100, 0, 0),
        ("medsam", 100, 1, 19),
        ("adaptive", 100, -9, 9),
        ("sam2", 100, -9, 9),
        ("sam2", 400, -18, 18),  # 10 % would be 40 px: the cap holds
    ],
)
def test_offsets_in_pixels_and_in_percent_of_the_side(policy, pixels, low, high):
    row = row_of(masks_of(side(pixels)), policy, draws=4000)
    expected = np.array([low, (low + high) / 2, high])
    for column, scale in (("offset_px", 1), ("offset_percent_of_side", 100 / pixels)):
        spread = [row[f"{column}_{end}"] for end in ("p05", "median", "p95")]
        room = 0.05 * (high - low) * scale + 1e-6
        assert spread == pytest.approx(expected * scale, abs=room)


def test_percent_is_of_the_side_that_an_edge_moves_along():
    """40 x 400 px: 20 px are 50 % of the width and 5 % of the height."""
    row = row_of(masks_of((400, 300, 439, 699)), "medsam", draws=4000)
    assert row.offset_percent_of_side_p95 == pytest.approx(45, abs=1)  # of the x edges, 90 %
    row = row_of(masks_of((400, 300, 439, 699)), "adaptive", draws=4000)
    assert row.offset_percent_of_side_p95 == pytest.approx(9, abs=0.3)
    assert row.offset_px_p95 == pytest.approx(32, abs=1)  # of the y edges


def test_offsets_are_those_that_the_border_leaves():
    row = row_of(masks_of((0, 0, 1023, 1023)), "medsam")
    assert row.offset_px_p95 == 0 and row.iou_median == 1


def test_box_that_misses_its_target_overlaps_it_by_nothing():
    """One pixel under -20 ... 20 px: edges that meet may do so beside it."""
    overlap = box_statistics(masks_of(side(1)), ["bidirectional"], 2000, 0, FACTORS)[1]
    assert overlap["bidirectional"].min() == 0 and overlap["bidirectional"].max() <= 1


@pytest.mark.parametrize("policy", p.POLICIES)
def test_iou_counts_pixels_of_boxes_keyed_by_seed_case_slice_and_label(policy):
    masks = masks_of(side(20), (100, 500, 899, 519), side(7), labels=(1, 2, 1))
    _, overlap = box_statistics(masks, [policy], 5, 3, FACTORS)
    for n, box in enumerate(masks[BOX].to_numpy(np.float32)):
        rng = p.box_rng(3, "a", n, masks.label[n])
        drawn = p.perturb(np.repeat(box[None], 5, axis=0), policy, rng, **FACTORS)
        for other, iou in zip(drawn.astype(float), overlap[policy][n], strict=True):
            low, high = np.maximum(other[:2], box[:2]), np.minimum(other[2:], box[2:])
            common = max(0, high[0] - low[0] + 1) * max(0, high[1] - low[1] + 1)
            areas = [np.prod(b[2:] - b[:2] + 1) for b in (other, box)]
            assert iou == pytest.approx(common / (sum(areas) - common), rel=1e-6)


def test_neither_order_nor_other_masks_change_a_masks_boxes():
    boxes = (side(20), side(33), (100, 500, 899, 519), side(7))
    masks = masks_of(*boxes, labels=(1, 2, 2, 1))
    fewer = masks.iloc[[3, 1]]
    all_of_them, some = (box_statistics(m, ["medsam"], 4, 0, FACTORS)[1] for m in (masks, fewer))
    assert (all_of_them["medsam"][[3, 1]] == some["medsam"]).all()
    other_seed = box_statistics(fewer, ["medsam"], 4, 1, FACTORS)[1]
    assert (other_seed["medsam"] != some["medsam"]).any()


def test_label_named_all_keeps_its_row():
    masks = masks_of(side(20), side(33)).assign(name="all")
    rows, _ = box_statistics(masks, ["none"], 1, 0, FACTORS)
    assert rows.label.tolist() == ["all", "all"]


# --- Text ----------------------------------------------------------------------------------------
def test_text_has_the_numbers_of_the_table():
    masks = masks_of(side(20), (100, 500, 899, 519), labels=(1, 2))
    rows, _ = box_statistics(masks, ["none", "medsam"], 5, 2, FACTORS)
    text = as_text(rows)
    assert max(map(len, text.splitlines())) <= 100
    assert "Tight boxes of 2 masks in 2 slices of 1 case" in text
    words = " ".join(text.split())
    assert (
        "seed 2, theta_omega by width, delta_expand and epsilon_shrink 102.4 and -102.4 px" in words
    )
    assert "none: the tight boxes as they are" in text
    sizes = next(line.split() for line in text.splitlines() if line.startswith("two"))
    assert sizes == "two 1 1 800 800-800 20 20-20 0.781 0.781-0.781 40.00 40.00-40.00".split()
    two = rows[(rows.label == "two") & (rows.policy == "medsam")].iloc[0]
    moved = next(line for line in text.splitlines() if line.startswith("two") and "..." in line)
    assert [float(word) for word in moved.replace("...", "").split()[1:]] == pytest.approx(
        [
            *(two[f"offset_px_{end}"] for end in ("median", "p05", "p95")),
            *(two[f"offset_percent_of_side_{end}"] for end in ("median", "p05", "p95")),
            two.area_more_than_doubled_percent,
            two.iou_median,
        ],
        abs=0.0501,
    )


def test_text_of_zero_has_no_minus():
    rows, _ = box_statistics(masks_of(side(20)), ["medsam"], 1, 0, FACTORS)
    rows["offset_px_median"] = -0.04
    assert " +0.0 " in as_text(rows) and " -0.0 " not in as_text(rows)
