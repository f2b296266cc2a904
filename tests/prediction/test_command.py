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
    edit_json,
    options_for,
    tight_rows,
    toy_case,
    write_cases,
    write_volume,
)
from train_adaptive import train
from utils.data.slices import open_dataset
from utils.data.volumes import read_label_map
from utils.evaluation.scoring import dsc
from utils.system.files import read_json

LITE = ("--models", "lite_medsam")
MODEL = (*LITE, "--window", "flare22", "--device", "cpu")


@pytest.fixture
def scan(tmp_path) -> Path:
    """A toy scan, with its tight boxes in boxes.csv beside it."""
    write_volume(tmp_path / "toy_0_0000.nii.gz", toy_case(0)[0])
    (tmp_path / "boxes.csv").write_text(BOXES_HEADER + tight_rows(0))
    return tmp_path / "toy_0_0000.nii.gz"


def predict(scan: Path, boxes: Path, out: Path, *more: object, model: tuple = MODEL) -> dict:
    call(evaluation, "--predict", scan, "--boxes", boxes, "--out", out, *model, *more)
    return read_json(out / "predictions.json")


def voxels_of(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_tight_boxes_give_the_masks_of_save_predictions_bit_for_bit(toy_slices, tmp_path):
    """Of a whole evaluation, with its cache of embeddings, from the same volumes."""
    case = open_dataset(toy_slices).split("test")[0].case
    number = int(case.removeprefix("toy_"))
    write_volume(tmp_path / f"{case}_0000.nii.gz", toy_case(number)[0])
    (tmp_path / "boxes.csv").write_text(BOXES_HEADER + tight_rows(number))
    options = ("--shift", "15%", "--no-sweep", "--no-figures", "--save-predictions")
    words = ("--data", str(toy_slices), "--models", "lite_medsam", "--device", "cpu")
    call(evaluation, *words, *options, "--out", tmp_path / "evaluated")
    predict(tmp_path / f"{case}_0000.nii.gz", tmp_path / "boxes.csv", tmp_path / "out")
    expected = voxels_of(tmp_path / "evaluated/predictions/lite_medsam/toy" / f"{case}.nii.gz")
    found = voxels_of(tmp_path / "out" / f"{case}.nii.gz")
    assert (found == expected).all() and set(np.unique(found)) == {0, 1, 2}


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
    assert "".join(rows) == tight_rows(0) and all(box["given"] for box in boxes)


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


def test_propagation_makes_a_volume_of_one_box(scan, tmp_path, monkeypatch):
    """In the default folder, which is named after the scan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boxes.csv").write_text("label,z,x0,y0,x1,y1\n1,1,20,22,48,58\n")
    call(evaluation, "--predict", scan.name, "--boxes", "boxes.csv", *MODEL, "--propagate")
    out = tmp_path / "work_dir" / "predict" / "toy_0"
    boxes = read_json(out / "predictions.json")["scans"]["toy_0"]["boxes"]
    assert [(box["z"], box["given"]) for box in boxes if box["z"]] == [(1, True), (2, False)]
    volume = voxels_of(out / "toy_0.nii.gz")
    assert dsc(volume[1:] == 1, toy_case(0)[1][1:] == 1) > 0.9


@pytest.fixture(scope="module")
def run(toy_slices, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("work")
    train(options_for(toy_slices, epochs=1), work / "run")
    return work / "run"


def test_a_folder_of_scans_and_a_run(run, tmp_path, capsys):
    """The window is that of the run's data; a scan without boxes is left out."""
    write_cases(tmp_path, 3)
    rows = tight_rows(2, "toy_2") + tight_rows(0, "toy_0")
    (tmp_path / "boxes.csv").write_text(BOXES_HEADER + rows)
    model = ("--runs", run, "--device", "cpu")
    record = predict(tmp_path / "images", tmp_path / "boxes.csv", tmp_path / "out", model=model)
    assert record["window_hu"] == [-360.0, 440.0] and list(record["scans"]) == ["toy_0", "toy_2"]
    assert record["run"] == str(run) and len(record["weights_sha256"]) == 64
    assert "toy_1: has no box and is left out" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert names == {"toy_0.nii.gz", "toy_2.nii.gz"}


WITH_BOXES = "--predict toy_0_0000.nii.gz --boxes boxes.csv"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--predict toy_0_0000.nii.gz", "--predict: give the boxes"),
        ("--data toy --propagate", "--propagate: goes with --predict"),
        ("--predict none.nii.gz --boxes boxes.csv", "not a scan"),
        ("--predict empty --boxes boxes.csv", "holds no .nii.gz"),
        (WITH_BOXES, "--window: with --models, say which"),
        (f"{WITH_BOXES} --models lite_medsam b=lite_medsam", "takes one model"),
        (f"{WITH_BOXES} --window 3000,4000", "lie outside the window"),
        (f"{WITH_BOXES} --window flare22 --out full", "full: already exists"),
        ("--predict . --boxes boxes.csv", "does not say which of 2 cases"),
        ("--predict toy_0_0000.nii.gz --boxes other.csv", "no case 'other'; there are toy_0"),
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


def test_windows_of_a_runs_data(run, scan, tmp_path, fails):
    """Two windows, or none that is recorded: the user must say."""
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    words = ("--predict", scan, "--boxes", tmp_path / "boxes.csv", "--runs", tmp_path / "run")
    words += ("--device", "cpu", "--out", tmp_path / "out")
    second = read_json(config)["data"]["toy"] | {"window": [-160.0, 240.0]}
    edit_json(config, lambda content: content["data"].update(second=second))
    assert "trained on data of 2 recorded windows; say which" in fails(evaluation, *words)
    edit_json(config, lambda content: content.update(data={"toy": "0" * 64}))
    assert "data of 0 recorded windows; say which" in fails(evaluation, *words)
