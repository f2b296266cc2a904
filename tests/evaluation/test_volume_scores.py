"""Scores in 3D, and label volumes in the geometry of their source."""

import re
import shutil
from itertools import product

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

import eval as evaluation
from perturb import BOX_KINDS, Shift
from tests.evaluation.helpers import RIGHT_EDGES, in_box, known, protocol, stack
from tests.helpers import SPACING, call, edit_json, preprocess, write_cases
from utils.data.slices import open_dataset, read_instances, read_label_map
from utils.evaluation.interpolation import find_tracks
from utils.evaluation.prompts import Prompt, every_boxes
from utils.evaluation.scoring import dsc, nsd, targets_of
from utils.evaluation.volume_scores import VolumeScores, follow, save_predictions
from utils.system import UserError

pytestmark = pytest.mark.usefixtures("small_lite_medsam")

SHIFT = Shift(0.15, "side")


def native_labels(sample) -> np.ndarray:
    return sample.frame.labels_to_native(read_label_map(sample.label_path))


def test_stacked_masks_are_scored_as_one_volume(dataset, slices):
    """Masks moved by one pixel, added slice by slice, against the whole volume at once."""
    scored = VolumeScores([dataset], slices, SHIFT)
    prompts = [
        Prompt("standard", Shift(0.0, "side")),
        Prompt("shrink", SHIFT),
        Prompt("shrink", SHIFT, draw=1),  # this and the next two are not scored in 3D
        Prompt("shrink", Shift(20, "px")),
        Prompt("sweep", SHIFT),
    ]
    for sample in slices:
        labels = read_instances(sample)[1]
        tolerances = {"large": 2.0, "small": 3.0}
        targets = targets_of(sample, labels, native_labels(sample), tolerances)
        masks = np.stack([np.roll(target.mask, 1, axis=1) for target in targets])
        other = np.zeros((3, *masks.shape), bool)
        scored.add("moved", prompts, targets, np.concatenate([[masks, masks], other]))
    rows = scored.finish()
    assert len(rows) == 4 * 2 * 2 and scored.finish() == []  # cases, labels, boxes
    for row in rows:
        of_case = [sample for sample in slices if sample.case == row["case"]]
        volume = np.stack([native_labels(sample) for sample in of_case])
        label, tolerance = {"large": (1, 2.0), "small": (2, 3.0)}[row["label"]]
        target = volume == label
        moved = np.roll(target, 1, axis=2)
        assert row["dataset"] == "toy" and row["voxels"] == target.sum()
        assert row["dsc"] == dsc(moved, target)
        assert row["nsd"] == pytest.approx(nsd(moved, target, tolerance, SPACING))


def test_volumes_with_gaps_or_dropped_masks_are_refused_by_name(fresh_slices, tmp_path, fails):
    case = open_dataset(fresh_slices).split("test")[0].case

    def message(change) -> str:
        edit_json(fresh_slices / "dataset.json", lambda meta: change(meta["cases"][case]))
        words = ("--data", fresh_slices, "--models", "lite_medsam", "--out", tmp_path / "out")
        message = fails(evaluation, *words, "--every", "3")
        assert message.startswith("error: --volume, --every: cannot be scored in 3D: ")
        assert message == fails(evaluation, *words, "--volume")
        return message

    def skip_to_slice_9(entry) -> None:
        entry.update(dropped_masks=0, shape=[10, *entry["shape"][1:]])
        entry["slices"]["9"] = entry["slices"].pop("2")

    for path in fresh_slices.glob(f"*/{case}-002.npy"):
        shutil.copy(path, path.with_name(f"{case}-009.npy"))
    dropped = message(lambda entry: entry.update(dropped_masks=1))
    assert f"{case} (small masks were dropped)" in dropped
    assert f"{case} (gaps between its slices)" in message(skip_to_slice_9)
    assert not (tmp_path / "out").exists()


def test_a_selection_of_slices_is_no_volume(dataset):
    with pytest.raises(UserError, match="only some of its slices"):
        VolumeScores([dataset], dataset.split("all")[:1], SHIFT)


def test_a_box_is_followed_from_the_slice_of_the_largest_area(tmp_path):
    """Whether the model finds it is the model's: here all that has a label within the box."""
    slices = stack(tmp_path).split("all")
    _, bar, _ = find_tracks(slices)
    models = in_box()
    masks = dict(follow(models["in box"], bar, slices))
    first = models["in box"].segmenter.boxes[0][0]
    assert (first == slices[4].frame.boxes_to_frame(np.array([[40, 10, 70, 29]]))[0]).all()
    # From z 5 down to 2 and up to 7: z 2 is wider than what the box of z 3 lets through.
    assert list(masks) == [5, 6, 7, 4, 3, 2, 1]
    assert all((np.flatnonzero(mask.any(axis=0))[0] == 40) for mask in masks.values())
    assert masks[5].sum() == 20 * 31 and masks[6].sum() == 20 * 19
    assert masks[2].sum() < 20 * 21


def test_interpolated_boxes_are_scored_in_3d_as_by_hand(tmp_path):
    """Of the bar, which is what lies within its boxes; the spot has a gap, and two boxes of one."""
    dataset = stack(tmp_path)
    slices = dataset.split("all")
    tracks = {("stack", "s0"): find_tracks(slices)}
    made = protocol(
        sweep=(), given=every_boxes(tracks["stack", "s0"], (3,)), every=(3,), tracks=tracks
    )
    volumes = VolumeScores([dataset], slices, made.shift)
    tolerances = {"spot": 2.0, "bar": 2.0}
    ((_, scores),) = evaluation.evaluate(in_box(), slices, made, tolerances, volumes=volumes)
    dscs = {(row["label"], row["box"]): row["dsc"] for row in scores.volume_rows}
    assert {box for _, box in dscs} == {*BOX_KINDS, "every 3", "propagated"}
    widths = [edge - 39 for edge in RIGHT_EDGES.values()]
    within = np.minimum(widths, [box - 39 for box in (51, 53, 55, 57, 59, 61, 63)])
    assert dscs["bar", "standard"] == dscs["spot", "standard"] == dscs["spot", "every 3"] == 1
    by_hand = 2 * within.sum() / (within.sum() + sum(widths))
    assert 0.9 < by_hand < 0.95 and dscs["bar", "every 3"] == pytest.approx(by_hand, abs=1e-9)
    assert dscs["spot", "propagated"] > 0.9  # from both boxes: one reaches 0.8
    rows = [row for row in scores.rows if row.box == "every 3"]
    assert [(row.slice, row.label) for row in rows] == [
        (z, label) for z in range(1, 8) for label in ("spot", "bar") if (z, label) != (5, "spot")
    ]
    assert not [row for row in scores.rows if row.box == "propagated"]


def test_script_tells_how_good_boxes_in_every_nth_slice_are(tmp_path):
    stack(tmp_path, 3)
    words = ["--data", tmp_path / "stack", "--models", "lite_medsam", "b=lite_medsam"]
    words += ["--device", "cpu", "--shift", "15%", "--no-sweep", "--no-figures"]
    out = tmp_path / "out"
    call(evaluation, *words, "--every", "5", "3", "--out", out)
    table, volumes = (pd.read_csv(out / f"{name}.csv") for name in ("every", "volumes"))
    kinds = ["standard", "every 3", "every 5", "propagated"]
    assert table["label"].tolist() == [x for x in ("all", "bar", "spot") for _ in range(8)]
    assert table["box"].tolist() == kinds * 6
    assert (table["patients"] == 3).all() and (table["instances"] == [6] * 8 + [3] * 16).all()
    assert table["boxes drawn"].tolist() == (
        [6.5, 3.5, 3.5, 1.5] * 2 + [7, 3, 3, 1] * 2 + [6, 4, 4, 2] * 2
    )
    dsc = volumes[volumes["model"] == "b"].groupby("box")["dsc"].mean()
    assert table["DSC"][4:8].tolist() == pytest.approx(
        [100 * dsc[kind] for kind in kinds], abs=1e-3
    )
    against = table["DSC"] - table["DSC"][0]
    assert table["DSC minus standard"][:4].tolist() == pytest.approx(against[:4], abs=2e-4)
    text = (out / "every.md").read_text()
    report, page = ((out / f"report.{suffix}").read_text() for suffix in ("md", "html"))
    assert text.strip() in report and "(every.png)" in report and page.count("<img") == 2
    assert text.count("\n| b ") == 4 and "| dataset" not in text
    change = f"{table['DSC minus standard'][6]:+.1f}"
    line = "- Boxes 5 slices apart: 3.5 are drawn per organ instead of 6.5, and the 3D DSC of b"
    assert f"{line} changes by {change} points." in report
    assert r"\toprule" in (out / "every.tex").read_text()
    assert (out / "every.png").stat().st_size > 10_000


def test_script_scores_and_saves_volumes(toy_slices, tmp_path):
    out = tmp_path / "out"
    words = ["--data", str(toy_slices), "--models", "lite_medsam", "--out", str(out)]
    words += ["--device", "cpu", "--shift", "15%", "--no-sweep", "--no-figures"]
    call(evaluation, *words, "--volume", "--save-predictions")
    rows = pd.read_csv(out / "volumes.csv")
    assert [*zip(rows["box"], rows["label"], strict=True)] == [
        *product(("standard", "expansion", "shrink"), ("large", "small"))
    ]
    line = rf"\| all +\| lite_medsam +\| +2 \| +{100 * rows['dsc'][:2].mean():.1f} "
    assert re.search(line, (out / "report.md").read_text())
    case = open_dataset(toy_slices).split("test")[0].case
    assert (out / "predictions" / "lite_medsam" / "toy" / f"{case}.nii.gz").is_file()


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SLP"])
def test_predictions_lie_on_their_source_voxel_by_voxel(tmp_path, orientation):
    """A model that answers with the target, read by SimpleITK and by nibabel."""
    write_cases(tmp_path, 3, orientation)
    preprocess(tmp_path, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    models = known(target=lambda target: target)
    save_predictions(models, dataset.split("all"), [dataset], tmp_path / "saved")
    for case in dataset.geometry:
        path = tmp_path / "saved" / "target" / "out" / f"{case}.nii.gz"
        source = tmp_path / "images" / f"{case}_0000.nii.gz"
        saved, image = (nibabel.load(file) for file in (path, source))
        assert saved.shape == image.shape and np.allclose(saved.affine, image.affine, atol=1e-4)
        found, labels = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            for file in (path, tmp_path / "labels" / f"{case}.nii.gz")
        )
        assert found.dtype == np.uint8 and (found == labels).mean() > 0.999  # the border
        assert dsc(found == 2, labels == 2) > 0.97
