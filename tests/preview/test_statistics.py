"""Statistics of a data set's boxes: numbers by hand, both kinds of folder, what is printed."""

import csv
import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import perturb as p
import preprocess_ct
from tests.helpers import TOY_NAMES, toy_case, write_volume
from utils.data.frame import Frame
from utils.data.slices import open_dataset
from utils.preview.figures import draw_overlap
from utils.preview.statistics import Masks, as_text, box_statistics, read_masks

FACTORS = (102.4, -102.4)  # 10 % of the side both ways


def masks_of(*boxes: tuple[int, int, int, int], labels: tuple[int, ...] | None = None) -> Masks:
    """One mask a slice, all of one case; only the boxes matter."""
    count = len(boxes)
    return Masks(
        case=np.array(["a"] * count),
        index=np.arange(count),
        label=np.array(labels or [1] * count),
        pixels=np.full(count, 100),
        share=np.full(count, 0.01),
        boxes=np.array(boxes, np.float32),
        names={1: "one", 2: "two"},
    )


def row_of(masks: Masks, policy: str, draws: int = 4000, factors=FACTORS) -> dict:
    """The row of all labels."""
    return box_statistics(masks, [policy], draws, 0, factors)[0][-1]


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
    assert masks.index.tolist() == [1, 1, 2, 2] and masks.label.tolist() == [5, 5, 5, 200]
    assert masks.pixels.tolist() == [30, 30, 1, 4]
    assert masks.share == pytest.approx(np.array([30, 30, 1, 4]) / 128 / 64)
    first = [32, 80, 55, 159]
    assert masks.boxes.tolist() == [first, first, [0, 0, 7, 7], [480, 1016, 511, 1023]]
    (five, other, every), _ = box_statistics(masks, ["none"], 1, 0, FACTORS)
    assert [row["label"] for row in (five, other, every)] == ["five", "label 200", "all"]
    counts = [[row[n] for n in ("cases", "slices", "masks")] for row in (five, other, every)]
    assert counts == [[2, 3, 3], [1, 1, 1], [2, 3, 4]]
    assert five["width_px_median"] == 24 and five["height_px_median"] == 80
    assert five["theta_omega_median"] == 24 / 1024 and five["xi_median"] == pytest.approx(0.3)
    assert five["mask_native_pixels_median"] == 30
    assert other["xi_p05"] == other["xi_p95"] == 4
    assert other["mask_percent_of_slice_median"] == pytest.approx(400 / 128 / 64)


def test_slices_and_their_label_volumes_give_the_same(toy_slices):
    from_slices = read_masks(toy_slices)
    from_volumes = read_masks(toy_slices.parent / "ct" / "labels", TOY_NAMES)
    assert len(from_slices.label) == 16  # 4 cases of all splits, 2 slices, 2 labels
    for field in dataclasses.fields(Masks):
        found, expected = (getattr(m, field.name) for m in (from_volumes, from_slices))
        assert np.array_equal(found, expected), field.name
    rows, _ = box_statistics(from_slices, p.POLICIES, 3, 0, FACTORS)
    assert rows == box_statistics(from_volumes, p.POLICIES, 3, 0, FACTORS)[0]


def test_masks_that_the_frame_loses_are_in_neither(tmp_path):
    every_row = np.repeat(np.arange(1200, dtype=np.int32)[:, None], 1200, axis=1)
    missed = np.setdiff1d(every_row, Frame.of((1200, 1200)).labels_to_frame(every_row))[20]
    labels = np.zeros((2, 1200, 1200), np.uint8)
    labels[0, missed, 300:500] = 2
    labels[:, 101:900, 333:777] = 1
    labels[1, missed + 1, 300:500] = 3  # comes back as two rows
    write_volume(tmp_path / "labels" / "a.nii.gz", labels, (5.0, 0.5, 0.5))
    hu = labels.astype(np.int16)
    write_volume(tmp_path / "images" / "a_0000.nii.gz", hu, (5.0, 0.5, 0.5))
    folders = (tmp_path / "images", tmp_path / "labels", tmp_path / "out")
    preprocess_ct.preprocess(*folders, workers=1)
    masks = [read_masks(tmp_path / name) for name in ("labels", "out")]
    assert open_dataset(tmp_path / "out").dropped_masks == {"a": 1}  # else this tests nothing
    for each in masks:
        assert each.label.tolist() == [1, 1, 3] and each.pixels[2] > 300
    assert (masks[0].pixels == masks[1].pixels).all()
    assert (masks[0].boxes == masks[1].boxes).all() and (masks[0].share == masks[1].share).all()


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
    assert row["area_more_than_doubled_percent"] == pytest.approx(expected, abs=1)


def test_medsam_never_doubles_a_large_box():
    assert row_of(masks_of(side(100)), "medsam")["area_more_than_doubled_percent"] == 0


def test_adaptive_at_ten_percent_never_exceeds_1_44_times():
    masks = masks_of(side(6), side(40), side(300), (100, 500, 899, 519))
    rows, overlap = box_statistics(masks, ["adaptive", "scaled"], 3000, 0, FACTORS)
    assert {row["area_more_than_doubled_percent"] for row in rows} == {0.0}
    assert 0.64 - 1e-4 <= overlap["adaptive"].min() < 0.70  # 0.8 * 0.8, below 1 / 1.44 = 0.694
    assert 1 / 1.44 - 1e-4 <= overlap["scaled"].min() < 0.73
    widest = row_of(masks_of(side(40)), "adaptive", factors=(256.0, -256.0))
    assert 0 < widest["area_more_than_doubled_percent"] < 2  # at most 1.5 * 1.5


@pytest.mark.parametrize(
    ("policy", "pixels", "low", "high"),  # the 5th and 95th percentile of an edge, px
    [
        ("none", 100, 0, 0),
        ("medsam", 100, 1, 19),
        ("bidirectional", 100, -18, 18),
        ("scaled", 100, 0.5, 9.5),
        ("adaptive", 100, -9, 9),
        ("sam2", 100, -9, 9),
        ("sam2", 400, -18, 18),  # 10 % would be 40 px: the cap holds
    ],
)
def test_offsets_in_pixels_and_in_percent_of_the_side(policy, pixels, low, high):
    row = row_of(masks_of(side(pixels)), policy)
    found = [row[f"offset_px_{end}"] for end in ("p05", "median", "p95")]
    assert found == pytest.approx([low, (low + high) / 2, high], abs=0.05 * (high - low) + 1e-6)
    found = [row[f"offset_percent_of_side_{end}"] for end in ("p05", "median", "p95")]
    expected = np.array([low, (low + high) / 2, high]) * 100 / pixels
    assert found == pytest.approx(expected, abs=5 * (high - low) / pixels + 1e-6)


def test_percent_is_of_the_side_that_an_edge_moves_along():
    """40 x 400 px: 20 px are 50 % of the width and 5 % of the height."""
    row = row_of(masks_of((400, 300, 439, 699)), "medsam")
    assert row["offset_percent_of_side_p95"] == pytest.approx(45, abs=1)  # of the x edges, 90 %
    row = row_of(masks_of((400, 300, 439, 699)), "adaptive")
    assert row["offset_percent_of_side_p95"] == pytest.approx(9, abs=0.3)
    assert row["offset_px_p95"] == pytest.approx(32, abs=1)  # of the y edges


def test_offsets_are_those_that_the_border_leaves():
    row = row_of(masks_of((0, 0, 1023, 1023)), "medsam")
    assert row["offset_px_p95"] == 0 and row["iou_median"] == 1


def test_box_that_misses_its_target_overlaps_it_by_nothing():
    """A pixel under -20 ... 20 px: what closes past itself may end beside it."""
    overlap = box_statistics(masks_of(side(1)), ["bidirectional"], 2000, 0, FACTORS)[1]
    assert overlap["bidirectional"].min() == 0 and overlap["bidirectional"].max() <= 1


@pytest.mark.parametrize("policy", p.POLICIES)
def test_boxes_are_those_of_perturb(policy):
    """Drawn one mask at a time from its own key; IoU counts pixels where edges fall on pixels."""
    masks = masks_of(side(20), (100, 500, 899, 519), side(7), labels=(1, 2, 1))
    _, overlap = box_statistics(masks, [policy], 5, 3, FACTORS)
    for n, box in enumerate(masks.boxes):
        rng = p.box_rng(3, "a", n, int(masks.label[n]))
        drawn = p.perturb(np.repeat(box[None], 5, axis=0), policy, rng, 1024, *FACTORS)
        for other, iou in zip(drawn.astype(float), overlap[policy][n], strict=True):
            low, high = np.maximum(other[:2], box[:2]), np.minimum(other[2:], box[2:])
            common = max(0, high[0] - low[0] + 1) * max(0, high[1] - low[1] + 1)
            areas = [np.prod(b[2:] - b[:2] + 1) for b in (other, box)]
            assert iou == pytest.approx(common / (sum(areas) - common), rel=1e-6)


def test_neither_order_nor_other_masks_change_a_masks_boxes():
    boxes = (side(20), side(33), (100, 500, 899, 519), side(7))
    masks = masks_of(*boxes, labels=(1, 2, 2, 1))
    chosen = np.array([3, 1])
    fields = ("case", "index", "label", "pixels", "share", "boxes")
    fewer = dataclasses.replace(masks, **{name: getattr(masks, name)[chosen] for name in fields})
    for policy in ("medsam", "adaptive"):
        one, other = (box_statistics(m, [policy], 4, 0, FACTORS)[1][policy] for m in (masks, fewer))
        assert (one[chosen] == other).all()
        assert (one[chosen] != box_statistics(fewer, [policy], 4, 1, FACTORS)[1][policy]).any()


def test_label_named_all_keeps_its_row():
    masks = dataclasses.replace(masks_of(side(20), side(33)), names={1: "all"})
    rows, _ = box_statistics(masks, ["none"], 1, 0, FACTORS)
    assert [row["label"] for row in rows] == ["all", "all"]


# --- The script ----------------------------------------------------------------------------------
def show(capsys, folder: Path, out: Path, *more: str) -> tuple[str, list[dict[str, str]]]:
    """What `perturb.py --data` prints, and the rows of its table."""
    p.main(["--data", str(folder), "--out", str(out), *more])
    with open(out.with_suffix(".csv"), encoding="utf-8") as file:
        return capsys.readouterr().out, list(csv.DictReader(file))


def test_table_has_what_is_printed(toy_slices, tmp_path, capsys):
    shown, rows = show(capsys, toy_slices, tmp_path / "boxes.png", "--draws", "5", "--seed", "2")
    assert max(len(line) for line in shown.splitlines() if not line.startswith("wrote")) <= 100
    assert "5 a mask, seed 2, delta_expand 102.4 px, epsilon_shrink -102.4 px" in shown
    assert "Tight boxes of 16 masks in 8 slices of 4 cases" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boxes.csv", "boxes.png"]
    assert [(row["policy"], row["label"]) for row in rows] == [
        (policy, label) for policy in p.POLICIES for label in ("large", "small", "all")
    ]
    tables = {}  # the lines of each table, by its first word
    for block in re.split(r"\n\n(?=\w+: how far)", shown):
        tables[block.split(":")[0].split()[0]] = block.splitlines()

    def numbers(table: str, label: str) -> list[float]:
        (line,) = [line for line in tables[table] if line.startswith(label + " ")]
        text = line.removeprefix(label).replace(" ... ", " ")
        return [float(number) for number in re.sub(r"(?<=\d)-", " ", text).split()]

    def listed(row: dict, *columns: str) -> list[float]:
        ends = ("median", "p05", "p95")
        return [float(row[f"{column}_{end}"]) for column in columns for end in ends]

    for row in rows:
        label, policy = row["label"], row["policy"]
        sizes = listed(row, "width_px", "height_px", "theta_omega", "xi")
        counts = [int(row["cases"]), int(row["masks"])]
        assert numbers("Tight", label)[:2] == counts
        found = np.array(numbers("Tight", label)[2:])
        assert (np.abs(found - sizes) <= np.repeat([0.5, 0.5, 5e-4, 5e-3], 3) + 1e-5).all()
        if policy == "none":
            assert "none: the tight boxes as they are" in shown
            assert not any(listed(row, "offset_px")) and row["iou_median"] == "1"
            continue
        found = numbers(policy, label)
        offsets = listed(row, "offset_px", "offset_percent_of_side")
        assert found[:6] == pytest.approx(offsets, abs=0.0501)
        assert found[6] == pytest.approx(float(row["area_more_than_doubled_percent"]), abs=0.0501)
        assert found[7] == pytest.approx(float(row["iou_median"]), abs=0.00501)
    assert "+-" not in shown and "-0.0 " not in shown


def test_options_reach_the_numbers(toy_slices, tmp_path, capsys):
    labels = toy_slices.parent / "ct" / "labels"
    some = ("--policies", "adaptive,medsam,adaptive", "--label-names", "1=big one")
    shown, rows = show(capsys, labels, tmp_path / "a.png", *some)
    assert [row["policy"] for row in rows] == ["adaptive"] * 3 + ["medsam"] * 3
    assert {row["label"] for row in rows} == {"big one", "label 2", "all"}
    factors = ("--delta-expand", "1000", "--epsilon-shrink", "0")
    shown, wider = show(capsys, labels, tmp_path / "b.png", *some, *factors)
    assert "clamped to delta_expand 256" in shown and wider[0]["delta_expand_px"] == "256"
    assert float(wider[0]["offset_percent_of_side_p95"]) > 20
    assert float(wider[0]["offset_percent_of_side_p05"]) > 0
    assert wider[3]["offset_px_p95"] == rows[3]["offset_px_p95"]  # medsam has none of them
    shown, rows = show(capsys, labels, tmp_path / "c.png", "--draws", "1")
    assert [row["label"] for row in rows[:3]] == ["liver", "right kidney", "all"]
    assert rows[0]["draws"] == "1"


def test_figure_follows_the_data(tmp_path):
    def pixels(name: str, small: dict, large: dict) -> np.ndarray:
        draw_overlap({"small, N = 3": small, "large, N = 4": large}, tmp_path / name)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name)))

    none, low, high = np.empty((0, 2)), np.linspace(0.2, 0.6, 8), np.linspace(0.5, 0.9, 8)
    of_all = {policy: low.reshape(4, 2) for policy in p.POLICIES}
    one = pixels("a.png", of_all, of_all)
    assert (one == pixels("b.png", of_all, of_all)).all()
    changed = pixels("c.png", of_all, of_all | {"adaptive": high})
    differs = (one != changed).any(axis=(0, 2))  # columns of the picture
    middle = len(differs) // 2
    assert differs[middle:].any() and not differs[:middle].any()
    alone = dict.fromkeys(["none"], low)
    assert (pixels("d.png", alone, {"none": none}) != pixels("e.png", alone, alone)).any()


def test_statistics_need_no_torch(toy_slices, tmp_path):
    code = (
        "import sys, perturb; perturb.main(sys.argv[1:]); "
        "print([m for m in ('torch', 'SimpleITK') if m in sys.modules])"
    )
    options = ("--data", toy_slices, "--out", tmp_path / "a.png", "--policies", "medsam")
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, options)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(p.__file__).parent,
    )
    assert done.stdout.endswith("[]\n")


def test_bad_folders_and_options(fails, toy_slices, tmp_path):
    def refuses(*options: object) -> str:
        out = tmp_path / "none" / "a.png"
        message = fails(p.main, *options, "--out", out)
        assert not out.parent.exists()
        return message

    empty, cut, image, blank = (tmp_path / name for name in ("empty", "cut", "image", "blank"))
    empty.mkdir()
    hu, labels = toy_case(0)
    for folder, array in ((cut, labels), (image, hu), (blank, labels * 0)):
        write_volume(folder / "a.nii.gz", array)
    whole = (cut / "a.nii.gz").read_bytes()
    (cut / "a.nii.gz").write_bytes(whole[: len(whole) // 2])
    assert "no such folder" in refuses("--data", tmp_path / "nowhere")
    assert "holds neither dataset.json nor" in refuses("--data", empty)
    assert "a.nii.gz: damaged or cut short" in refuses("--data", cut)
    assert "label ids must be 0 to 255" in refuses("--data", image)
    assert "no volume has a label" in refuses("--data", blank)
    data = ("--data", toy_slices)
    assert "unknown policy 'best'" in refuses(*data, "--policies", "medsam,best")
    assert "must be 1 or more" in refuses(*data, "--draws", "0")
    assert "must be >= 0" in refuses(*data, "--delta-expand", "-1")
    assert "exclude each other" in refuses(*data, "--image", "a.npy", "--label", "b.npy")
    assert "go together" in refuses(*data, "--image", "a.npy")
    assert "has names" in refuses(*data, "--label-names", "flare22")
    assert "give their folder to --data" in refuses("--label-names", "flare22")
    assert "expected ID=NAME" in refuses("--data", blank, "--label-names", "liver")
    assert "names the picture" in fails(p.main, *data, "--out", tmp_path / "a.csv")


def test_damaged_slice_is_named(fails, toy_slices, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(toy_slices, copy)
    file = copy / "gts" / "toy_1-002.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    assert "toy_1-002.npy: changed or damaged" in fails(p.main, "--data", copy)


def test_text_of_one_policy_alone_and_of_next_to_nothing():
    rows, _ = box_statistics(masks_of(side(20)), ["none"], 1, 0, FACTORS)
    assert as_text(rows).endswith("none: the tight boxes as they are")
    rows, _ = box_statistics(masks_of(side(20)), ["medsam"], 1, 0, FACTORS)
    rows[-1]["offset_px_median"] = -0.04
    assert "+0.0" in as_text(rows) and " -0.0" not in as_text(rows)
