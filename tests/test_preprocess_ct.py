"""Volumes to slices: orientation, window, split, and what bad input gets."""

import os

import numpy as np
import pytest

import preprocess_ct
from tests.helpers import (
    SHAPE,
    SPACING,
    call,
    preprocess,
    preprocessing,
    refused,
    toy_case,
    write_cases,
    write_volume,
)
from utils.data.frame import Frame
from utils.data.slices import open_dataset, read_image, read_label_map
from utils.system.files import read_json


def test_slices_and_geometry_of_a_case(toy_volumes, tmp_path, capsys):
    out = tmp_path / "out"
    call(preprocess_ct, *preprocessing(toy_volumes, out))
    meta = read_json(out / "dataset.json")
    assert sorted(path.name for path in out.iterdir()) == ["dataset.json", "gts", "imgs"]
    names = {path.stem for path in (out / "imgs").iterdir()}
    assert names == {path.stem for path in (out / "gts").iterdir()}
    assert names == {f"toy_{case}-{z:03d}" for case in range(4) for z in (1, 2)}  # 0 has no label
    assert meta["name"] == "out" and meta["window"] == [-360, 440] and meta["label_names"] == {}
    case = meta["cases"]["toy_0"]
    assert case["shape"] == list(SHAPE) and case["spacing_mm"] == pytest.approx(SPACING)
    assert case["origin_mm"] == [-96, -80, 10]
    assert case["frame"] == {"native": [80, 96], "content": [1024, 983]}
    labels = toy_case(0)[1][1]
    assert case["slices"]["1"]["labels"] == {str(i): int((labels == i).sum()) for i in (1, 2)}
    shown = capsys.readouterr().out
    assert "window of -360 to 440 HU (flare22); MedSAM's and LiteMedSAM's weights were" in shown
    assert "train 2 cases, 4 slices; val 1 case, 2 slices; test 1 case, 2 slices" in shown
    assert "\n  1 label 1 " in shown and "name them with --label-names flare22 or" in shown
    assert "next: python train_adaptive.py" in shown


def test_grey_level_is_the_same_hu_in_every_slice(tmp_path):
    hu = np.full(SHAPE, -1000, np.int16)
    hu[1, :40], hu[1, 40:] = 40, 2000  # the middle of the window, and above it
    hu[2, :40] = -360 + 80  # a tenth of the window
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:, 30:50, 30:50] = 1
    write_volume(tmp_path / "images" / "a_0000.nii.gz", hu)
    write_volume(tmp_path / "labels" / "a.nii.gz", labels)
    preprocess(tmp_path, tmp_path / "out")
    first, second = (read_image(tmp_path / "out" / "imgs" / f"a-00{z}.npy") for z in (1, 2))
    assert first.dtype == np.uint8
    assert first[200, 500] == 128 and first[700, 500] == 255
    assert abs(int(second[200, 500]) - 25.5) <= 0.5 and second[700, 500] == 0


@pytest.mark.parametrize("orientation", ["LPS", "RAS", "PSL"])
def test_labels_lie_on_the_organs_and_come_back(tmp_path, orientation):
    write_cases(tmp_path / "ct", 1, orientation)
    meta = preprocess(tmp_path / "ct", tmp_path / "out", "--split", "0,0,1")
    assert meta["cases"]["toy_0"]["stored_orientation"] == orientation
    _, labels = toy_case(0)
    for sample in open_dataset(tmp_path / "out").split("test"):
        label_map, image = read_label_map(sample.label_path), read_image(sample.image_path)
        assert (sample.frame.labels_to_native(label_map) == labels[sample.index]).all()
        grey = (110 + 360) / 800 * 255
        assert image[label_map == 1].mean() == pytest.approx(grey, abs=4)
        assert sample.labels == {i: int((labels[sample.index] == i).sum()) for i in (1, 2)}


def test_window_preset_and_numbers_that_look_like_an_option(toy_volumes, tmp_path, capsys):
    assert preprocess(toy_volumes, tmp_path / "a", "--window", "-160,240")["window"] == (-160, 240)
    assert "window of -160 to 240 HU (medsam)\n" in capsys.readouterr().out
    names = ("--label-names", "1=left, 2=t")
    lung = preprocess(toy_volumes, tmp_path / "b", "--window", "lung", *names)
    assert lung["window"] == (-1000, 400) and lung["label_names"] == {"1": "left", "2": "t"}
    assert "trained on soft tissue with -160 to 240 HU (--window medsam)" in capsys.readouterr().out


def test_min_pixels_drops_small_masks_and_says_so(toy_volumes, tmp_path, capsys):
    small = max((toy_case(i)[1][1] == 2).sum() for i in range(4))
    meta = preprocess(toy_volumes, tmp_path / "out", "--min-pixels", str(small + 1))
    shown = capsys.readouterr().out
    assert f"dropped 8 masks of fewer than {small + 1} pixels" in shown and "downscal" not in shown
    for sample in open_dataset(tmp_path / "out").split("all"):
        in_map = np.unique(read_label_map(sample.label_path))
        assert list(sample.labels) == in_map[1:].tolist() == [1]
    assert meta["min_pixels"] == small + 1


def test_workers_do_not_change_a_byte(toy_volumes, tmp_path):
    one, two = tmp_path / "1" / "toy", tmp_path / "2" / "toy"
    preprocess(toy_volumes, one)
    preprocess(toy_volumes, two, "--workers", 2)
    files = [path.relative_to(one) for path in one.rglob("*.*")]
    assert len(files) == 17
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def exhausted(*_, **__):
    raise MemoryError


def killed(*_, **__):
    os._exit(9)


@pytest.mark.parametrize(("work", "workers"), [(exhausted, 1), (exhausted, 2), (killed, 2)])
def test_running_out_of_memory_is_one_line(
    fails, toy_volumes, tmp_path, monkeypatch, work, workers
):
    monkeypatch.setattr(preprocess_ct, "write_case", work)
    message = refused(fails, toy_volumes, tmp_path / "out", "--workers", workers)
    assert "try fewer --workers" in message


def test_masks_too_thin_for_the_frame_are_dropped_and_counted(tmp_path, capsys):
    """600 rows of 0.2 mm become 205 of the frame: most masks of one row lie between two of them."""
    every_row = np.repeat(np.arange(600, dtype=np.int32)[:, None], 600, axis=1)
    frame = Frame.fit((600, 600), (0.2, 1.0))
    missed = int(np.setdiff1d(np.arange(600), frame.labels_to_frame(every_row))[10])
    labels = np.zeros((2, 600, 600), np.uint8)
    labels[:, missed, 100:200] = 2
    labels[1, 200:400, 300:400] = 1  # slice 0 holds nothing else
    write_volume(tmp_path / "images" / "a_0000.nii.gz", labels * np.int16(99), (5.0, 0.2, 1.0))
    write_volume(tmp_path / "labels" / "a.nii.gz", labels, (5.0, 0.2, 1.0))
    meta = preprocess(tmp_path, tmp_path / "out", "--split", "0,0,1")
    (sample,) = open_dataset(tmp_path / "out").split("all")
    assert sample.index == 1 and list(sample.labels) == [1]
    label_map = read_label_map(sample.label_path)
    native = sample.frame.labels_to_native(label_map)
    assert set(np.unique(label_map)) == set(np.unique(native)) == {0, 1}
    assert sample.labels[1] == (native == 1).sum()
    assert meta["cases"]["a"]["dropped_masks"] == 2
    shown = capsys.readouterr().out
    assert "dropped 2 masks lost by downscaling to 1024 px" in shown


def test_folders_that_cannot_be_preprocessed(fails, toy_volumes, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "empty" / kind).mkdir(parents=True)
    hu, labels = toy_case(0)
    write_volume(tmp_path / "plain" / "images" / "a_0000.nii.gz", hu)
    write_volume(tmp_path / "plain" / "labels" / "a.nii.gz", labels * 0)
    for name, expected in (
        ("nowhere", "no such folder"),
        ("empty", "holds no .nii.gz"),
        ("plain", "no slice of any case has a label"),
    ):
        assert expected in refused(fails, tmp_path / name, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "already exists" in refused(fails, toy_volumes, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_only_flare22_has_a_window_of_its_own(fails, toy_volumes, tmp_path):
    words = ("--input", toy_volumes, "--out", tmp_path / "out")
    assert "--window: give the HU range to keep: medsam for" in fails(preprocess_ct, *words)
    assert not (tmp_path / "out").exists()
    call(preprocess_ct, *words, "--layout", "flare22")
    assert read_json(tmp_path / "out" / "dataset.json")["window"] == [-360, 440]
    for path in [*toy_volumes.rglob("*.nii.gz")]:
        path.rename(path.with_name(path.name.replace("toy_", "FLARE22_Tr_000")))
    call(preprocess_ct, *words[:2], "--out", tmp_path / "named")
    meta = read_json(tmp_path / "named" / "dataset.json")
    assert meta["window"] == [-360, 440] and meta["label_names"]["1"] == "liver"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--window", "400,-100", "expected LO,HI with LO < HI"),
        ("--window", "abdomen", "2 numbers joined by commas or flare22, lung, medsam"),
        ("--split", "0.9,0.2,0.1", "add up to 1"),
        ("--workers", "0", "expected a whole number, 1 or more"),
        ("--label-names", "liver", "expected ID=NAME"),
        ("--label-names", "1=left\u00a0lung", "expected ID=NAME"),
        ("--label-names", "1=a,2=a", "label or name occurs twice"),
    ],
)
def test_bad_options(fails, toy_volumes, tmp_path, option, value, expected):
    assert expected in refused(fails, toy_volumes, tmp_path / "out", option, value)
