"""Scores in 3D, and label volumes in the geometry of their source."""

import csv
import json
import re
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

import eval as evaluation
from perturb import Shift
from tests.helpers import SPACING, preprocess, write_cases
from utils.data.slices import open_dataset, read_label_map
from utils.data.volumes import write_volume
from utils.evaluation.metrics import dsc, nsd
from utils.evaluation.prompts import Prompt
from utils.evaluation.volume_scores import VolumeScores, save_predictions

SHIFT = Shift(0.15, "side")


@pytest.fixture
def dataset(toy_slices):
    return open_dataset(toy_slices)


def native_labels(entry) -> np.ndarray:
    return entry.frame.labels_to_native(read_label_map(entry.label_path))


def test_stacked_masks_are_scored_as_one_volume(dataset):
    """Masks moved by one pixel, added slice by slice, against the whole volume at once."""
    slices = dataset.split("all")
    scored = VolumeScores([dataset], slices, {"large": 2.0, "small": 3.0}, SHIFT)
    prompts = [
        Prompt("standard", Shift(0.0, "side")),
        Prompt("shrink", SHIFT),
        Prompt("shrink", SHIFT, draw=1),  # this and the next two are not scored in 3D
        Prompt("shrink", Shift(20, "px")),
        Prompt("sweep", SHIFT),
    ]
    for entry in slices:
        native = native_labels(entry)
        labels = sorted(entry.labels)
        masks = np.stack([np.roll(native == label, 1, axis=1) for label in labels])
        other = np.zeros((3, *masks.shape), bool)
        scored.add_masks("moved", prompts, labels, [masks, masks, *other], entry.index)
        scored.finish_slice(entry, native)
    rows = scored.finish()
    assert len(rows) == 4 * 2 * 2 and scored.finish() == []  # cases, labels, boxes
    for row in rows:
        of_case = [entry for entry in slices if entry.case == row["case"]]
        volume = np.stack([native_labels(entry) for entry in of_case])
        label, tolerance = {"large": (1, 2.0), "small": (2, 3.0)}[row["label"]]
        target = volume == label
        moved = np.roll(target, 1, axis=2)
        assert row["voxels"] == target.sum()
        assert row["dsc"] == dsc(moved, target)
        assert row["nsd"] == pytest.approx(nsd(moved, target, tolerance, SPACING))


def test_volumes_with_gaps_or_dropped_masks_are_refused_by_name(toy_slices, tmp_path, fails):
    shutil.copytree(toy_slices, tmp_path / "toy")
    path = tmp_path / "toy" / "dataset.json"
    meta = json.loads(path.read_text())
    case = next(name for name, entry in meta["cases"].items() if entry["split"] == "test")

    def message() -> str:
        path.write_text(json.dumps(meta | {"sha256": "edited"}))
        return fails(
            evaluation.main,
            *("--data", tmp_path / "toy", "--models", "lite_medsam", "--volume"),
            *("--out", tmp_path / "out", "--device", "cpu"),
        )

    meta["cases"][case]["dropped_masks"] = 1
    assert f"{case} (small masks were dropped)" in message()
    meta["cases"][case]["dropped_masks"] = 0
    meta["cases"][case]["shape"][0] = 10
    slices = meta["cases"][case]["slices"]
    slices["9"] = slices.pop("2")
    for folder in ("imgs", "gts"):
        files = tmp_path / "toy" / folder
        (files / f"{case}-002.npy").rename(files / f"{case}-009.npy")
    assert f"{case} (gaps between its slices)" in message()
    assert not (tmp_path / "out").exists()


def test_a_selection_of_slices_is_no_volume(dataset):
    from utils.system.errors import UserError

    with pytest.raises(UserError, match="only some of its slices"):
        VolumeScores([dataset], dataset.split("all")[:1], {"large": 2.0, "small": 2.0}, SHIFT)


def test_script_scores_and_saves_volumes(toy_slices, tmp_path, capsys):
    out = tmp_path / "out"
    evaluation.main(
        [
            *("--data", str(toy_slices), "--models", "lite_medsam", "--out", str(out)),
            *("--device", "cpu", "--shift", "15%", "--no-sweep", "--no-figures"),
            *("--volume", "--save-predictions"),
        ]
    )
    with open(out / "volumes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["box"]) for row in rows] == [
        (label, box) for box in ("standard", "expansion", "shrink") for label in ("large", "small")
    ]
    report = (out / "report.md").read_text()
    mean = 50 * (float(rows[0]["dsc"]) + float(rows[1]["dsc"]))
    assert "In 3D" in report and re.search(
        rf"\| all +\| lite_medsam +\| +1 \| +2 \| +{mean:.1f} ", report
    )
    (saved,) = (out / "predictions" / "lite_medsam").iterdir()
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(saved)))
    dataset = open_dataset(toy_slices)
    (case,) = {entry.case for entry in dataset.split("test")}
    assert saved.name == f"{case}.nii.gz"
    target = np.zeros_like(predicted)
    for entry in dataset.split("test"):
        target[entry.index] = native_labels(entry)
    large = dsc(predicted == 1, target == 1)
    assert float(rows[0]["dsc"]) == pytest.approx(large, abs=0.01)  # but for overlaps
    assert large > 0.9


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SLP"])
def test_predictions_have_the_geometry_of_their_source(tmp_path, orientation):
    """Field by field, and voxel by voxel: a model that answers with the target."""
    import torch

    class Target:
        device = torch.device("cpu")

        def decode(self, embedding, boxes):
            labels = [label for label in embedding.unique() if label]
            return torch.stack([embedding == label for label in labels]).float() - 0.5

    write_cases(tmp_path, 3, orientation)
    preprocess(tmp_path, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    embeddings = {"target": lambda entry: torch.from_numpy(read_label_map(entry.label_path))}
    slices = dataset.split("all")
    save_predictions({"target": Target()}, embeddings, [dataset], slices, tmp_path / "saved")
    for case in dataset.geometry:
        saved = sitk.ReadImage(str(tmp_path / "saved" / "target" / f"{case}.nii.gz"))
        source = sitk.ReadImage(str(tmp_path / "images" / f"{case}_0000.nii.gz"))
        assert saved.GetSize() == source.GetSize()
        assert saved.GetSpacing() == pytest.approx(source.GetSpacing(), abs=1e-6)
        assert saved.GetOrigin() == pytest.approx(source.GetOrigin(), abs=1e-4)
        assert saved.GetDirection() == pytest.approx(source.GetDirection(), abs=1e-6)
        labels = sitk.ReadImage(str(tmp_path / "labels" / f"{case}.nii.gz"))
        found, expected = map(sitk.GetArrayFromImage, (saved, labels))
        assert (found == expected).mean() > 0.999  # the border, by interpolation
        assert dsc(found == 2, expected == 2) > 0.97
        # And as another program reads it, which goes by NIfTI's own fields.
        saved, source = (
            nibabel.load(path)
            for path in (
                tmp_path / "saved" / "target" / f"{case}.nii.gz",
                tmp_path / "images" / f"{case}_0000.nii.gz",
            )
        )
        for field in ("dim", "pixdim", "xyzt_units", "qform_code", "sform_code"):
            assert np.array_equal(saved.header[field], source.header[field]), field
        assert np.allclose(saved.get_qform(), source.get_qform(), atol=1e-4)
        assert np.allclose(saved.get_sform(), source.get_sform(), atol=1e-4)
        assert np.allclose(saved.affine, source.affine, atol=1e-4)
        assert nibabel.aff2axcodes(saved.affine) == nibabel.aff2axcodes(source.affine)
        assert saved.get_data_dtype() == np.uint8
        assert saved.header.get_slope_inter() in ((None, None), (1, 0))
        assert np.array_equal(np.asarray(saved.dataobj).transpose(2, 1, 0), found)


def test_oblique_volumes_keep_their_direction(tmp_path):
    """A volume turned by 10 degrees about z and stored as RAS."""
    from utils.data.slices import Geometry
    from utils.data.volumes import read_label_map

    angle = np.deg2rad(10)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]])
    turn = np.vstack([turn, [0, 0, 1]])
    source = sitk.GetImageFromArray(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    source.SetSpacing((1.5, 2.0, 5.0))
    source.SetOrigin((-30.0, 12.5, 7.0))
    source.SetDirection((turn @ np.diag([-1, -1, 1])).ravel())
    sitk.WriteImage(source, str(tmp_path / "source.nii.gz"))
    volume = read_label_map(tmp_path / "source.nii.gz")
    geometry = Geometry(
        volume.array.shape,
        volume.spacing_mm,
        volume.origin_mm,
        volume.direction,
        volume.stored_orientation,
    )
    write_volume(tmp_path / "copy.nii.gz", volume.array, geometry)
    copy, source = (sitk.ReadImage(str(tmp_path / f"{n}.nii.gz")) for n in ("copy", "source"))
    assert copy.GetOrigin() == pytest.approx(source.GetOrigin(), abs=1e-4)
    assert copy.GetDirection() == pytest.approx(source.GetDirection(), abs=1e-6)
    assert (sitk.GetArrayFromImage(copy) == sitk.GetArrayFromImage(source)).all()
