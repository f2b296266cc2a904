"""eval.py --predict with a run, and beside an evaluation, on a small network."""

import shutil
from pathlib import Path

import numpy as np
import pytest

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
from tests.prediction.test_command import predict, voxels_of
from train_adaptive import train
from utils.data.slices import open_dataset
from utils.system.files import read_json

pytestmark = pytest.mark.usefixtures("small_lite_medsam")


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
    assert (found == expected).all() and found.any()


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
    shown = capsys.readouterr().out
    assert "toy_1: has no box and is left out" in shown
    command = f"train_adaptive.py --work-dir {run.parent} --run {run.name} --export weights.pth"
    assert shown.endswith(f"next, to use these weights in other programs: python {command}\n")
    names = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert names == {"toy_0.nii.gz", "toy_2.nii.gz"}
    assert record["label_names"] == {"1": "large", "2": "small"}  # the run's, of ids in the boxes


BOTH = ("small,1,50,40,60,50\n", "large,1,20,22,48,58\n")


@pytest.mark.parametrize("rows", [BOTH, BOTH[::-1], BOTH[:1]])
def test_a_name_has_the_id_that_it_has_in_the_runs_data(run, scan, tmp_path, capfd, fails, rows):
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("label,z,x0,y0,x1,y1\n" + "".join(rows))
    model = ("--runs", run, "--device", "cpu")
    record = predict(scan, boxes, tmp_path / "out", model=model)
    expected = {"1": "large", "2": "small"} if len(rows) > 1 else {"2": "small"}
    assert record["label_names"] == record["scans"]["toy_0"]["labels"] == expected
    printed = ", ".join(f"{number} {name}" for number, name in expected.items())
    assert f"labels: {printed}\n" in capfd.readouterr().out
    found = voxels_of(tmp_path / "out" / "toy_0.nii.gz")
    assert found.any() and {*np.unique(found)} <= {0, *map(int, expected)}
    boxes.write_text("label,z,x0,y0,x1,y1\nlagre,1,20,22,48,58\n")
    words = ("--predict", scan, "--boxes", boxes, *model, "--out", tmp_path / "new")
    assert "there is no label 'lagre'; choose from large, small" in fails(evaluation, *words)


def test_without_a_run_names_are_numbered_once(scan, tmp_path, capsys):
    """By the alphabet, and as in the predictions of another scan if they are given."""
    boxes, kept = tmp_path / "boxes.csv", tmp_path / "first" / "predictions.json"
    boxes.write_text("label,z,x0,y0,x1,y1\n" + "".join(BOTH))
    assert predict(scan, boxes, tmp_path / "first")["label_names"] == {"1": "large", "2": "small"}
    shown = capsys.readouterr().out
    assert (
        f"labels: 1 large, 2 small; other scans get the same ids with --label-names {kept}" in shown
    )
    boxes.write_text("label,z,x0,y0,x1,y1\n" + BOTH[0])
    record = predict(scan, boxes, tmp_path / "second", "--label-names", kept)
    assert record["label_names"] == {"2": "small"}
    shutil.copy(boxes, tmp_path / "first" / "boxes.csv")  # beside predictions.json
    record = predict(scan, tmp_path / "first" / "boxes.csv", tmp_path / "third")
    assert record["label_names"] == {"2": "small"}


@pytest.mark.parametrize("second", [{"label_names": {"1": "small"}}, {}])
def test_a_run_that_does_not_tell_ids(run, scan, tmp_path, second):
    """Its data sets number labels in different ways, or it is of an earlier version."""
    shutil.copytree(run, tmp_path / "run")
    first = read_json(run / "config.json")["data"]["toy"]
    if not second:
        del first["label_names"]
    data = {"toy": first, "second": first | second}
    edit_json(tmp_path / "run" / "config.json", lambda config: config.update(data=data))
    (tmp_path / "boxes.csv").write_text("label,z,x0,y0,x1,y1\n" + BOTH[0])
    model = ("--runs", tmp_path / "run", "--device", "cpu")
    record = predict(scan, tmp_path / "boxes.csv", tmp_path / "out", model=model)
    assert record["label_names"] == {"1": "small"}


def test_windows_of_a_runs_data(run, scan, tmp_path, fails):
    """Two windows, or none that is recorded: the user must say."""
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    words = ("--predict", scan, "--boxes", tmp_path / "boxes.csv", "--runs", tmp_path / "run")
    words += ("--device", "cpu", "--out", tmp_path / "out")
    second = read_json(config)["data"]["toy"] | {"window": [-160.0, 240.0]}
    edit_json(config, lambda content: content["data"].update(second=second))
    assert "trained on data with 2 recorded windows; choose" in fails(evaluation, *words)
    edit_json(config, lambda content: content.update(data={"toy": "0" * 64}))
    assert "data with 0 recorded windows; choose" in fails(evaluation, *words)


def test_interpolated_boxes_give_the_volume_of_the_same_boxes_drawn(run, tmp_path):
    """Bit for bit; propagation goes on from the outermost ones alone."""
    hu, _ = toy_case(0)
    write_volume(tmp_path / "scan.nii.gz", np.concatenate([hu, hu + 1]))
    drawn = [(z, 20 + z, 22, 48 + z / 2, 58) for z in range(1, 5)]
    for name, rows in (("key", drawn[::3]), ("all", drawn)):
        text = "".join(f"large,{','.join(map(str, row))}\n" for row in rows)
        (tmp_path / f"{name}.csv").write_text("label,z,x0,y0,x1,y1\n" + text)
    model = ("--runs", run, "--device", "cpu", "--propagate")
    scan, found = tmp_path / "scan.nii.gz", {}
    for name, more in (("key", ["--interpolate"]), ("all", [])):
        out = tmp_path / name
        record = predict(scan, tmp_path / f"{name}.csv", out, *more, model=model)
        found[name] = voxels_of(out / "scan.nii.gz"), record["scans"]["scan"]["boxes"]
    (volume, boxes), (expected, _) = found["key"], found["all"]
    assert volume.any() and (volume == expected).all()
    sources = {box["z"]: box["source"] for box in boxes if 0 < box["z"] < 5}
    assert sources == {1: "given", 2: "interpolated", 3: "interpolated", 4: "given"}
    assert {box["source"] for box in boxes if box["z"] in (0, 5)} <= {"propagated"}
