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
from perturb import Shift
from tests.evaluation.helpers import known
from tests.helpers import SPACING, call, edit_json, preprocess, write_cases
from utils.data.slices import open_dataset, read_instances, read_label_map
from utils.evaluation.prompts import Prompt
from utils.evaluation.scoring import dsc, nsd, targets_of
from utils.evaluation.volume_scores import VolumeScores, save_predictions
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
        words = ("--data", fresh_slices, "--models", "lite_medsam", "--volume")
        return fails(evaluation, *words, "--out", tmp_path / "out")

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


def test_script_scores_and_saves_volumes(toy_slices, tmp_path):
    out = tmp_path / "out"
    words = ["--data", str(toy_slices), "--models", "lite_medsam", "--out", str(out)]
    words += ["--device", "cpu", "--shift", "15%", "--no-sweep", "--no-figures"]
    call(evaluation, *words, "--volume", "--save-predictions")
    rows = pd.read_csv(out / "volumes.csv")
    assert [*zip(rows["box"], rows["label"], strict=True)] == [
        *product(("standard", "expansion", "shrink"), ("large", "small"))
    ]
    line = rf"\| all +\| lite_medsam +\| +1 \| +2 \| +{100 * rows['dsc'][:2].mean():.1f} "
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
