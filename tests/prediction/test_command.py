"""eval.py --predict with LiteMedSAM's own weights on toy scans."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

import eval as evaluation
from tests.helpers import (
    BOXES_HEADER,
    call,
    tight_rows,
    toy_case,
    write_volume,
)
from utils.data.volumes import read_label_map
from utils.evaluation.scoring import dsc
from utils.system.files import read_json

LITE = ("--models", "lite_medsam")
MODEL = (*LITE, "--window", "flare22", "--device", "cpu")


def predict(scan: Path, boxes: Path, out: Path, *more: object, model: tuple = MODEL) -> dict:
    call(evaluation, "--predict", scan, "--boxes", boxes, "--out", out, *model, *more)
    return read_json(out / "predictions.json")


def voxels_of(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_label_volume_lies_in_place_on_the_scan(tmp_path):
    """A scan that is stored in another orientation than the rough label map."""
    hu, labels = toy_case(0)
    write_volume(tmp_path / "turned.nii.gz", hu, orientation="RAI")
    write_volume(tmp_path / "rough.nii.gz", labels)
    record = predict(tmp_path / "turned.nii.gz", tmp_path / "rough.nii.gz", tmp_path / "out")
    source, made = (nibabel.load(tmp_path / path / "turned.nii.gz") for path in (".", "out"))
    assert made.shape == source.shape and np.allclose(made.affine, source.affine, atol=1e-4)
    volume, found = read_label_map(tmp_path / "out/turned.nii.gz").array, record["scans"]["turned"]
    assert all(dsc(volume == label, labels == label) > 0.8 for label in (1, 2))
    assert found["labels"] == {"1": "1", "2": "2"} and found["seconds"] > 0
    assert found["voxels"] == {str(label): (volume == label).sum() for label in (1, 2)}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"turned-1", "turned-2"}
    boxes = found["boxes"]
    rows = [f",{b['label']},{b['z']},{','.join(f'{e:g}' for e in b['box'])}\n" for b in boxes]
    assert "".join(rows) == tight_rows(0) and {box["source"] for box in boxes} == {"given"}


def test_probabilities_and_overlaps(scan, tmp_path):
    """Two names for one target: the label of greater probability has each voxel."""
    (tmp_path / "boxes.csv").write_text(
        "label,z,x0,y0,x1,y1\nliver,1,18,20,50,60\nmuch more,1,5,5,90,75\n"
    )
    record = predict(scan, tmp_path / "boxes.csv", tmp_path / "out", "--probabilities")
    assert record["scans"]["toy_0"]["labels"] == {"1": "liver", "2": "much more"}
    names = ("toy_0-1-liver-probability", "toy_0-2-much_more-probability", "toy_0")
    first, second, labels = (voxels_of(tmp_path / "out" / f"{n}.nii.gz") for n in names)
    assert first.dtype == second.dtype == np.float32 and first.max() <= 1
    assert not first[0].any() and not first[2].any()  # slices without a box
    greatest = np.maximum(first, second)
    expected = np.where(greatest > 0.5, np.where(first >= second, 1, 2), 0)
    assert (labels == expected).mean() > 0.9999 and ((first > 0.5) & (second > 0.5)).any()


def test_results_are_replaced_with_overwrite_alone(scan, tmp_path, fails):
    """As a whole, and never what somebody else put there."""
    boxes, out = tmp_path / "boxes.csv", tmp_path / "out"
    predict(scan, boxes, out)
    boxes.write_text("label,z,x0,y0,x1,y1\nliver,1,20,22,48,58\n")
    words = ("--predict", scan, "--boxes", boxes, "--out", out, *MODEL)
    assert "already holds results; replace them with --overwrite" in fails(evaluation, *words)
    assert predict(scan, boxes, out, "--overwrite")["label_names"] == {"1": "liver"}
    assert {path.name for path in out.glob("*.png")} == {"toy_0-1-liver.png"}
    (out / "notes.txt").write_text("mine")
    assert "holds notes.txt" in fails(evaluation, *words, "--overwrite")


def test_propagation_makes_a_volume_of_one_box(scan, tmp_path, monkeypatch):
    """In the default folder, which is named after the scan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boxes.csv").write_text("label,z,x0,y0,x1,y1\n1,1,20,22,48,58\n")
    call(evaluation, "--predict", scan.name, "--boxes", "boxes.csv", *MODEL, "--propagate")
    out = tmp_path / "work_dir" / "predict" / "toy_0"
    boxes = read_json(out / "predictions.json")["scans"]["toy_0"]["boxes"]
    found = [(box["z"], box["source"]) for box in boxes if box["z"]]
    assert found == [(1, "given"), (2, "propagated")]
    volume = voxels_of(out / "toy_0.nii.gz")
    assert dsc(volume[1:] == 1, toy_case(0)[1][1:] == 1) > 0.9


WITH_BOXES = "--predict toy_0_0000.nii.gz --boxes boxes.csv"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--predict toy_0_0000.nii.gz", "--predict: give the boxes"),
        ("--data toy --propagate", "--propagate: requires --predict"),
        ("--data toy --interpolate", "--interpolate: requires --predict"),
        ("--data toy --label-names 1=a", "--label-names: requires --predict"),
        ("--predict none.nii.gz --boxes boxes.csv", "not a scan"),
        ("--predict empty --boxes boxes.csv", "holds no .nii.gz"),
        (WITH_BOXES, "--window: required with --models"),
        (f"{WITH_BOXES} --models lite_medsam b=lite_medsam", "takes one model"),
        (f"{WITH_BOXES} --volume", "--predict: cannot be used with --volume"),
        (f"{WITH_BOXES} --window 3000,4000", "lie outside the window"),
        (f"{WITH_BOXES} --window flare22 --out full", "full: already holds results"),
        ("--predict . --boxes boxes.csv", "does not say which of 2 cases"),
        ("--predict toy_0_0000.nii.gz --boxes other.csv", "no case 'other'; choose from toy_0"),
        ("--predict toy_0_0000.nii.gz --boxes outside.csv", "row 2: lies outside the scan"),
    ],
)
def test_predictions_that_cannot_be(scan, fails, monkeypatch, words, expected):
    monkeypatch.chdir(scan.parent)
    shutil.copy(scan, "second_0000.nii.gz")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/mine.txt").write_text("")
    Path("other.csv").write_text(BOXES_HEADER + "other,1,1,2,3,4,5\n")
    Path("outside.csv").write_text(BOXES_HEADER + "toy_0,1,7,2,3,4,5\n")
    before = set(Path().rglob("*"))
    assert expected in fails(evaluation, *LITE, "--device", "cpu", *words.split())
    assert set(Path().rglob("*")) == before
