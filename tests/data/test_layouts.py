"""Data sets as other programs lay them out."""

import json

import numpy as np
import pytest

import preprocess_ct
from tests.helpers import toy_case, write_cases, write_volume
from utils.data.flare22 import FLARE22_LABELS
from utils.data.layouts import recognise
from utils.data.slices import open_dataset, read_image, read_label_map
from utils.system.errors import UserError

V2 = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "large": 1, "small": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}


def write_nnunet(folder, meta=V2, suffix="_0000"):
    """Three toy cases as nnU-Net's raw data."""
    for number in range(3):
        hu, labels = toy_case(number)
        write_volume(folder / "imagesTr" / f"toy_{number}{suffix}.nii.gz", hu)
        write_volume(folder / "labelsTr" / f"toy_{number}.nii.gz", labels)
    (folder / "dataset.json").write_text(json.dumps(meta))
    return folder


def slices_of(folder):
    dataset = open_dataset(folder)
    return {
        entry.name: (read_image(entry.image_path), read_label_map(entry.label_path))
        for entry in dataset.split("all")
    }


@pytest.mark.parametrize("version", [1, 2])
def test_nnunet_gives_the_slices_of_flare22(tmp_path, capsys, version):
    meta, suffix = V2, "_0000"
    if version == 1:  # as the Medical Segmentation Decathlon has it
        meta = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "large", "2": "small"}}
        suffix = ""
    raw = write_nnunet(tmp_path / "raw", meta, suffix)
    write_cases(tmp_path / "flare22", 3)
    for name in ("raw", "flare22"):
        options = ["--input", tmp_path / name, "--out", tmp_path / "out" / name, "--workers", 1]
        preprocess_ct.main(list(map(str, options)))
    shown = capsys.readouterr().out
    assert f"{raw}: nnU-Net's layout, label names of dataset.json" in shown
    assert f"{tmp_path / 'flare22'}: FLARE22's layout" in shown
    one, other = slices_of(tmp_path / "out" / "raw"), slices_of(tmp_path / "out" / "flare22")
    assert one.keys() == other.keys() and len(one) == 6
    assert all(np.array_equal(one[name], other[name]) for name in one)
    entry = open_dataset(tmp_path / "out" / "raw").split("all")[0]
    assert entry.label_names == {1: "large", 2: "small"}


def test_nnunet_accepts_what_is_read_here(tmp_path):
    """By nnU-Net's own check of a data set, where it is installed."""
    verify = pytest.importorskip(
        "nnunetv2.experiment_planning.verify_dataset_integrity", reason="nnU-Net is not installed"
    )
    raw = write_nnunet(tmp_path / "Dataset001_Toy")
    verify.verify_dataset_integrity(str(raw), num_processes=1)
    assert recognise(raw).label_names == {1: "large", 2: "small"}


def test_ct_is_taken_of_several_channels(tmp_path, fails):
    meta = {**V2, "channel_names": {"0": "PET", "1": "CT"}}
    raw = write_nnunet(tmp_path / "raw", meta, "_0001")
    for number in range(3):
        write_volume(raw / "imagesTr" / f"toy_{number}_0000.nii.gz", np.full((3, 80, 96), 7.0))
    out = tmp_path / "out"
    preprocess_ct.main(["--input", str(raw), "--out", str(out), "--workers", "1"])
    read = json.loads((out / "dataset.json").read_text())["cases"]["toy_0"]
    assert read["image"] == "toy_0_0001.nii.gz"
    (raw / "imagesTr" / "toy_1_0001.nii.gz").unlink()
    again = ["--input", raw, "--out", tmp_path / "again"]
    assert "toy_1_0001.nii.gz" in fails(preprocess_ct.main, *again)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"channel_names": {"0": "MRI"}}, "expected one CT channel, found MRI"),
        ({"file_ending": ".mha"}, "its files end in .mha"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "regions are not supported"),
        ({"labels": {"background": 0, "ignore": 2}}, "ignored is not supported"),
        ({"labels": {"background": 0, "much": 700}}, "'much' is 700"),
        ({"labels": {"background": 0, "": 1}}, "label name ''"),
        ({"labels": 5}, "not nnU-Net's"),
        ({"channel_names": ["CT"]}, "not nnU-Net's"),
        (b"\xff{", "not nnU-Net's"),
    ],
)
def test_nnunet_that_cannot_be_read_here(tmp_path, fails, change, expected):
    raw = write_nnunet(tmp_path / "raw", V2 if isinstance(change, bytes) else {**V2, **change})
    if isinstance(change, bytes):
        (raw / "dataset.json").write_bytes(change)
    message = fails(preprocess_ct.main, "--input", raw, "--out", tmp_path / "out")
    assert expected in message and "dataset.json" in message
    assert not (tmp_path / "out").exists()


def test_layout_is_recognised_or_forced(tmp_path):
    raw = write_nnunet(tmp_path / "raw")
    with pytest.raises(UserError, match="not of layout flare22: no images, no labels"):
        recognise(raw, "flare22")
    write_cases(raw, 1)
    with pytest.raises(UserError, match="could be flare22 or nnunet; choose with --layout"):
        recognise(raw)
    assert recognise(raw, "nnunet").images == raw / "imagesTr"
    assert recognise(raw, "flare22").images == raw / "images"
    with pytest.raises(UserError, match="not a known layout .*imagesTr"):
        recognise(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        recognise(tmp_path / "typo")


def test_input_and_images_exclude_each_other(tmp_path, fails):
    out = ("--out", tmp_path / "out")
    start = preprocess_ct.main
    assert "exclude each other" in fails(start, "--input", "x", "--labels", "y", *out)
    assert "or --images DIR and --labels DIR" in fails(start, "--images", "x", *out)
    assert "goes with --input" in fails(
        start, "--images", "x", "--labels", "y", "--layout", "nnunet", *out
    )


def test_names_that_are_given_go_before_those_of_the_data_set(tmp_path):
    raw = write_nnunet(tmp_path / "raw")
    options = ["--input", raw, "--out", tmp_path / "out", "--label-names", "1=liver"]
    preprocess_ct.main(list(map(str, options)))
    assert open_dataset(tmp_path / "out").split("all")[0].label_names == {1: "liver"}


def test_flare22s_names_are_for_flare22(tmp_path, capsys):
    """Folders laid out like FLARE22's may hold lungs."""
    write_cases(tmp_path / "ct", 1)
    folders = [tmp_path / "ct" / part for part in ("images", "labels")]
    assert recognise(tmp_path / "ct").label_names == {}
    assert recognise(tmp_path / "ct", "flare22").label_names == FLARE22_LABELS
    for folder, suffix in zip(folders, ("_0000.nii.gz", ".nii.gz"), strict=True):
        path = folder / f"toy_0{suffix}"
        path.with_name(f"FLARE22_Tr_0001{suffix}").write_bytes(path.read_bytes())
    assert recognise(tmp_path / "ct").label_names == {}  # one of two
    for folder, suffix in zip(folders, ("_0000.nii.gz", ".nii.gz"), strict=True):
        (folder / f"toy_0{suffix}").unlink()
    options = ["--input", tmp_path / "ct", "--out", tmp_path / "out", "--workers", 1]
    preprocess_ct.main(list(map(str, options)))
    assert "FLARE22's layout and its label names" in capsys.readouterr().out
    assert open_dataset(tmp_path / "out").split("all")[0].label_names == FLARE22_LABELS
