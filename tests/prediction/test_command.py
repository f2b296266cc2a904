"""eval.py --predict with LiteMedSAM's own weights on toy scans."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

import eval as evaluation
from perturb import tight_boxes
from tests.helpers import edit_json, options_for, toy_case, write_volume
from train_adaptive import train
from utils.data.volumes import read_label_map
from utils.system.files import read_json


def write_tight(path: Path, labels: np.ndarray, case: str = "") -> None:
    """The tight boxes of a label map (z, y, x) whose file is stored in LPS."""
    rows = [
        f"{case},{label},{z},{','.join(f'{edge:.0f}' for edge in box)}\n"
        for z, plane in enumerate(labels)
        for label, box in zip(*tight_boxes(plane), strict=True)
    ]
    path.write_text("case,label,z,x0,y0,x1,y1\n" + "".join(rows))


@pytest.fixture
def scan(tmp_path) -> Path:
    """A toy scan, with its tight boxes in boxes.csv beside it."""
    hu, labels = toy_case(0)
    write_volume(tmp_path / "toy_0_0000.nii.gz", hu)
    write_tight(tmp_path / "boxes.csv", labels)
    return tmp_path / "toy_0_0000.nii.gz"


MODEL = ("--models", "lite_medsam", "--window", "flare22", "--device", "cpu")


def predict(scan: Path, boxes: Path, out: Path, *more: object, model: tuple = MODEL) -> dict:
    words = ["--predict", scan, "--boxes", boxes, "--out", out, *model, *more]
    evaluation.main([str(word) for word in words])
    return read_json(out / "predictions.json")


def voxels_of(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_tight_boxes_give_the_masks_of_save_predictions_bit_for_bit(toy_slices, scan, tmp_path):
    """Of a whole evaluation, with its cache of embeddings, from the same volumes."""
    out = tmp_path / "evaluated"
    options = ("--shift", "15%", "--no-sweep", "--no-figures", "--split", "all", "--device", "cpu")
    words = ("--data", str(toy_slices), "--models", "lite_medsam", "--save-predictions")
    evaluation.main([*words, *options, "--out", str(out)])
    predict(scan, tmp_path / "boxes.csv", tmp_path / "out")
    expected = voxels_of(out / "predictions" / "lite_medsam" / "toy_0.nii.gz")
    found = voxels_of(tmp_path / "out" / "toy_0.nii.gz")
    assert (found == expected).all() and set(np.unique(found)) == {0, 1, 2}


@pytest.mark.parametrize("orientation", ["LPS", "RAI"])
def test_a_label_volume_lies_in_place_on_the_scan(scan, tmp_path, orientation):
    hu, labels = toy_case(0)
    write_volume(tmp_path / "turned.nii.gz", hu, orientation=orientation)
    write_volume(tmp_path / "rough.nii.gz", labels)
    record = predict(tmp_path / "turned.nii.gz", tmp_path / "rough.nii.gz", tmp_path / "out")
    source, made = (
        nibabel.load(path) for path in (tmp_path / "turned.nii.gz", tmp_path / "out/turned.nii.gz")
    )
    assert made.shape == source.shape and np.allclose(made.affine, source.affine, atol=1e-4)
    assert made.header["qform_code"] == source.header["qform_code"]
    volume = read_label_map(tmp_path / "out" / "turned.nii.gz").array
    for label in (1, 2):
        both = 2 * np.sum((volume == label) & (labels == label))
        assert both / (np.sum(volume == label) + np.sum(labels == label)) > 0.8
    entry = record["scans"]["turned"]
    assert entry["labels"] == {"1": "1", "2": "2"} and entry["seconds"] > 0
    assert entry["voxels"] == {"1": int((volume == 1).sum()), "2": int((volume == 2).sum())}
    names = {"turned.nii.gz", "turned-1.png", "turned-2.png", "predictions.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    boxes = [(box["label"], box["z"], tuple(box["box"])) for box in entry["boxes"]]
    expected = [
        (str(label), z, tuple(box))
        for z, plane in enumerate(labels)
        for label, box in zip(*(part.tolist() for part in tight_boxes(plane)), strict=True)
    ]
    assert boxes == expected and all(box["given"] for box in entry["boxes"])


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


def test_propagation_makes_a_volume_of_one_box(scan, tmp_path):
    labels = toy_case(0)[1]
    (tmp_path / "boxes.csv").write_text("label,z,x0,y0,x1,y1\n1,1,20,22,48,58\n")
    record = predict(scan, tmp_path / "boxes.csv", tmp_path / "out", "--propagate")
    boxes = record["scans"]["toy_0"]["boxes"]
    assert [(box["z"], box["given"]) for box in boxes if box["z"]] == [(1, True), (2, False)]
    volume = voxels_of(tmp_path / "out" / "toy_0.nii.gz")
    both = 2 * np.sum((volume[1:] == 1) & (labels[1:] == 1))
    assert both / (np.sum(volume[1:] == 1) + np.sum(labels[1:] == 1)) > 0.9


@pytest.fixture(scope="module")
def run(toy_slices, tmp_path_factory) -> Path:
    """The folder of a run of one epoch."""
    work = tmp_path_factory.mktemp("work")
    train(options_for(toy_slices, epochs=1), work / "run")
    return work / "run"


def test_a_folder_of_scans_and_a_run(run, tmp_path, capsys):
    """The window is that of the run's data; a scan without boxes is left out."""
    scans = tmp_path / "scans"
    for number in range(3):
        write_volume(scans / f"toy_{number}_0000.nii.gz", toy_case(number)[0])
    lines = ["case,label,z,x0,y0,x1,y1\n"]
    for number in (2, 0):
        write_tight(tmp_path / "one.csv", toy_case(number)[1], f"toy_{number}")
        lines += (tmp_path / "one.csv").read_text().splitlines(keepends=True)[1:]
    (tmp_path / "boxes.csv").write_text("".join(lines))
    model = ("--runs", run, "--device", "cpu")
    record = predict(scans, tmp_path / "boxes.csv", tmp_path / "out", model=model)
    assert record["window_hu"] == [-360.0, 440.0] and list(record["scans"]) == ["toy_0", "toy_2"]
    assert record["run"] == str(run) and len(record["weights_sha256"]) == 64
    assert "toy_1: has no box and is left out" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.nii.gz")} == {
        *("toy_0.nii.gz", "toy_2.nii.gz")
    }


def test_predictions_that_cannot_be(scan, toy_slices, tmp_path, fails):
    out, boxes = tmp_path / "out", tmp_path / "boxes.csv"

    def message(*words: object, model: tuple = MODEL) -> str:
        result = fails(evaluation.main, *words, *model, "--out", out)
        assert not out.exists()
        return result

    both = ("--predict", scan, "--boxes", boxes)
    assert "--predict: give the boxes" in message("--predict", scan)
    assert "--shift: does not go with --predict" in message(*both, "--shift", "15%")
    assert "--propagate: goes with --predict" in message(
        *("--data", toy_slices, "--propagate"), model=("--models", "lite_medsam")
    )
    assert "no such file" in message("--predict", scan, "--boxes", tmp_path / "none.csv")
    assert "not a scan" in message("--predict", tmp_path / "none.nii.gz", "--boxes", boxes)
    assert "holds no .nii.gz" in message("--predict", toy_slices / "imgs", "--boxes", boxes)
    one = ("--models", "lite_medsam")
    assert "--window: with --models, say which" in message(*both, model=one)
    two = ("--models", "lite_medsam", "b=lite_medsam")
    assert "takes one model" in message(*both, model=two)
    assert "lie outside the window" in message(*both, "--window", "3000,4000", model=one)
    (tmp_path / "case.csv").write_text("case,label,z,x0,y0,x1,y1\nother,1,1,2,3,4,5\n")
    assert "there is no case 'other'; there are toy_0" in message(
        *("--predict", scan, "--boxes", tmp_path / "case.csv")
    )
    (tmp_path / "outside.csv").write_text("label,z,x0,y0,x1,y1\n1,7,2,3,4,5\n")
    assert "outside.csv, row 2: lies outside the scan" in message(
        *("--predict", scan, "--boxes", tmp_path / "outside.csv")
    )
    shutil.copy(scan, tmp_path / "second_0000.nii.gz")
    assert "does not say which of 2 cases" in message("--predict", tmp_path, "--boxes", boxes)
    out.mkdir()
    (out / "mine.txt").write_text("")
    assert "already exists" in fails(evaluation.main, *both, *MODEL, "--out", out)


def test_windows_of_a_runs_data(run, scan, tmp_path, fails):
    """Two windows, or none that is recorded: the user must say."""
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    words = ("--predict", scan, "--boxes", tmp_path / "boxes.csv", "--runs", tmp_path / "run")
    words += ("--device", "cpu", "--out", tmp_path / "out")
    second = read_json(config)["data"]["toy"] | {"window": [-160.0, 240.0]}
    edit_json(config, lambda content: content["data"].update(second=second))
    assert "trained on data of 2 recorded windows; say which" in fails(evaluation.main, *words)
    edit_json(config, lambda content: content.update(data={"toy": "0" * 64}))
    assert "data of 0 recorded windows; say which" in fails(evaluation.main, *words)


def test_the_default_folder_is_named_after_the_scan(scan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boxes.csv").write_text("label,z,x0,y0,x1,y1\n1,1,20,22,48,58\n")
    evaluation.main(["--predict", scan.name, "--boxes", "boxes.csv", *MODEL])
    assert (tmp_path / "work_dir" / "predict" / "toy_0" / "toy_0.nii.gz").is_file()
