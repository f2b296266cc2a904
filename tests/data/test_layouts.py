"""Data sets as other programs lay them out, and a layout of another file format."""

import json

import numpy as np
import pytest

import preprocess_ct
from tests.helpers import (
    assert_same_slices,
    preprocess,
    refused,
    toy_case,
    write_cases,
    write_volume,
)
from utils.data.labels import FLARE22_LABELS
from utils.data.layouts import LAYOUTS, Case, Layout, recognise
from utils.data.slices import open_dataset, read_image
from utils.data.volumes import grey_levels
from utils.system import UserError
from utils.system.files import sha256

V2 = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "large": 1, "small": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
# As the Medical Segmentation Decathlon has it.
V1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "large", "2": "small"}}


def write_nnunet(folder, meta=V2, suffix="_0000"):
    for number in range(3):
        hu, labels = toy_case(number)
        write_volume(folder / "imagesTr" / f"toy_{number}{suffix}.nii.gz", hu)
        write_volume(folder / "labelsTr" / f"toy_{number}.nii.gz", labels)
    (folder / "dataset.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(("meta", "suffix"), [(V1, ""), (V2, "_0000")])
def test_nnunet_gives_the_slices_of_flare22(tmp_path, capsys, meta, suffix):
    raw = write_nnunet(tmp_path / "raw", meta, suffix)
    write_cases(tmp_path / "flare22", 3)
    made = preprocess(raw, tmp_path / "out" / "raw")
    assert f"{raw}: nnU-Net's layout, label names of dataset.json" in capsys.readouterr().out
    preprocess(tmp_path / "flare22", tmp_path / "out" / "flare22")
    assert_same_slices(tmp_path / "out" / "raw", tmp_path / "out" / "flare22")
    assert made["label_names"] == {"1": "large", "2": "small"} and made["name"] == "raw"


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
    assert "channel 1 of 2" in recognise(raw).description
    made = preprocess(raw, tmp_path / "out", "--label-names", "1=liver")
    assert made["cases"]["toy_0"]["image"] == "toy_0_0001.nii.gz"
    assert made["label_names"] == {"1": "liver"}  # those that are given go first
    (raw / "imagesTr" / "toy_1_0001.nii.gz").unlink()
    assert "toy_1_0001.nii.gz" in refused(fails, raw, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"channel_names": {"0": "MRI"}}, "expected one CT channel, found MRI"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "'whole' is [1, 2]; no regions"),
        ({"labels": {"background": 0, "ignore": 2}}, "no regions or ignore labels are read"),
        ({"labels": {"background": 0, "much": 700}}, "'much' is 700"),
        ({"channel_names": ["CT"]}, "not nnU-Net's"),
        (b"\xff{", "not nnU-Net's"),
    ],
)
def test_nnunet_that_cannot_be_read_here(tmp_path, fails, change, expected):
    raw = write_nnunet(tmp_path / "raw", V2 if isinstance(change, bytes) else {**V2, **change})
    if isinstance(change, bytes):
        (raw / "dataset.json").write_bytes(change)
    message = refused(fails, raw, tmp_path / "out")
    assert expected in message and "dataset.json" in message


def test_layout_is_recognised_or_forced(tmp_path):
    raw = write_nnunet(tmp_path / "raw")
    both = tmp_path / "both"
    write_cases(write_nnunet(both), 1)
    assert recognise(both, "nnunet").images == both / "imagesTr"
    assert recognise(both, "flare22").images == both / "images"
    for folder, layout, message in (
        (raw, "flare22", "not laid out as flare22: images, labels; use"),
        (both, "auto", "could be flare22 or nnunet; choose with --layout"),
        (tmp_path, "auto", "not laid out as .*imagesTr"),
        (tmp_path / "typo", "auto", "no such folder"),
        (raw, "flair22", "--layout: expected auto, flare22, nnunet, totalsegmentator, medsam, cvp"),
    ):
        with pytest.raises(UserError, match=message):
            recognise(folder, layout)


def test_input_and_images_exclude_each_other(tmp_path, fails):
    for words, expected in (
        ("--input x --images y", "not allowed with argument --input"),
        ("--input x --labels y", "--labels DIR go together"),
        ("--images x", "--labels DIR go together"),
        ("--images x --labels y --layout nnunet", "requires --input"),
        ("", "one of the arguments --input --download --images is required"),
    ):
        assert expected in fails(preprocess_ct, "--out", tmp_path / "out", *words.split())


def test_flare22s_names_are_for_flare22(tmp_path, capsys):
    """Folders laid out like FLARE22's may hold lungs."""
    write_cases(tmp_path / "ct", 1)
    assert preprocess(tmp_path / "ct", tmp_path / "a")["label_names"] == {}
    forced = preprocess(tmp_path / "ct", tmp_path / "b", "--layout", "flare22")
    assert forced["label_names"]["1"] == "liver"
    for path in list((tmp_path / "ct").glob("*/toy_0*")):
        path.rename(path.with_name(path.name.replace("toy_0", "FLARE22_Tr_0001")))
    names = preprocess(tmp_path / "ct", tmp_path / "c")["label_names"]
    assert names == {str(label): name for label, name in FLARE22_LABELS.items()}
    assert "FLARE22's layout and its label names" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("image", "label", "case"),
    [
        ("volume-{}.nii", "segmentation-{}.nii", "volume-{}"),  # LiTS
        ("img/img000{}.nii.gz", "label/label000{}.nii.gz", "img000{}"),  # BTCV
        ("case_0000{}/imaging.nii.gz", "case_0000{}/segmentation.nii.gz", "case_0000{}"),  # KiTS
    ],
)
def test_files_whose_places_tell_what_they_are(tmp_path, fails, image, label, case):
    raw = tmp_path / "raw"
    for number in range(3):
        hu, labels = toy_case(number)
        write_volume(raw / image.format(number), hu)
        write_volume(raw / label.format(number), labels)
    made = preprocess(raw, tmp_path / "a")
    assert list(made["cases"]) == [case.format(number) for number in range(3)]
    write_cases(tmp_path / "flare22", 3)
    expected = preprocess(tmp_path / "flare22", tmp_path / "b")["cases"]
    for number in range(3):
        assert made["cases"][case.format(number)]["slices"] == expected[f"toy_{number}"]["slices"]
    (raw / label.format(1)).unlink()
    message = refused(fails, raw, tmp_path / "c")
    assert f"{image.format(1)}: image without a label" in message
    second = raw / image.format(2).replace(".gz", "")
    if image.endswith(".gz"):
        write_volume(second, hu)
        assert "a second file beside" in refused(fails, raw, tmp_path / "c")


def test_folders_of_images_and_labels_with_the_same_numbers(tmp_path, fails):
    for number in (7, 12):
        hu, labels = toy_case(number)
        write_volume(tmp_path / "ct" / f"img{number:04d}.nii.gz", hu)
        write_volume(tmp_path / "seg" / f"label{number:04d}.nii.gz", labels)
    words = ["--images", tmp_path / "ct", "--labels", tmp_path / "seg", "--window", "lung", "--out"]
    made = preprocess_ct.preprocess(
        preprocess_ct.parse_options([*map(str, words), f"{tmp_path}/a"])
    )
    assert made["cases"]["img0012"]["label"] == "label0012.nii.gz" and len(made["cases"]) == 2
    # A number twice: nothing tells which of the two it is.
    write_volume(tmp_path / "seg" / "other_label0007.nii.gz", labels)
    assert "image without a label" in fails(preprocess_ct, *words, tmp_path / "out")
    words[3] = tmp_path / "ct" / "." / ".." / "ct"
    assert "--labels: is the same as --images" in fails(preprocess_ct, *words, tmp_path / "out")


def test_totalsegmentators_masks(tmp_path, fails, capfd):
    """By name, one file each, which a case may lack; the first of two that overlap has a voxel."""
    for number in range(2):
        hu, labels = toy_case(number)
        write_volume(tmp_path / "ts" / f"s{number}" / "ct.nii.gz", hu)
        for name, mask in (("spleen", labels == 1), ("aorta", labels == 2), ("liver", labels > 0)):
            if number or name != "liver":
                path = tmp_path / "ts" / f"s{number}" / "segmentations" / f"{name}.nii.gz"
                write_volume(path, mask.astype(np.uint8))
    made = preprocess(tmp_path / "ts", tmp_path / "a")
    assert made["label_names"] == {"1": "aorta", "2": "liver", "3": "spleen"}
    found = [[[*of["labels"]] for of in case["slices"].values()] for case in made["cases"].values()]
    assert found == [[["1", "3"]] * 2, [["1", "2"]] * 2]  # the liver covers the spleen
    assert f"s1: {np.count_nonzero(labels)} voxels are in two masks" in capfd.readouterr().out
    made = preprocess(tmp_path / "ts", tmp_path / "b", "--label-names", "6=spleen,2=aorta")
    assert made["label_names"] == {"6": "spleen", "2": "aorta"}
    write_cases(tmp_path / "flare22", 2)
    of_flare22 = preprocess(tmp_path / "flare22", tmp_path / "c")["cases"]["toy_1"]["slices"]["1"]
    large, small = of_flare22["labels"].values()
    assert made["cases"]["s1"]["slices"]["1"]["labels"] == {"2": small, "6": large}
    message = refused(fails, tmp_path / "ts", tmp_path / "d", "--label-names", "1=livver")
    assert "no file is named livver; choose from aorta, liver, spleen" in message


def test_the_archives_of_the_cvpr_2024_challenge(tmp_path, fails):
    """Their spacing is (x, y, z), beside arrays (z, y, x)."""
    grey, labels = grey_levels(toy_case(0)[0], (-160, 240)).astype(np.uint8), toy_case(0)[1]
    arrays = {"imgs": grey, "gts": labels, "spacing": np.array([1.6, 2.0, 5.0])}
    (tmp_path / "npz").mkdir()
    np.savez_compressed(tmp_path / "npz" / "CT_a.npz", **arrays, boxes=np.zeros((2, 6)))
    made = preprocess(tmp_path / "npz", tmp_path / "a")
    assert made["window"] is None and made["cases"]["CT_a"]["spacing_mm"] == (5.0, 2.0, 1.6)
    write_cases(tmp_path / "flare22", 1)
    preprocess(tmp_path / "flare22", tmp_path / "b", "--window", "medsam")
    ours, theirs = (open_dataset(tmp_path / name).split("all")[0] for name in "ab")
    assert ours.index == 1 and ours.spacing_mm == (2.0, 1.6)
    assert ours.label_sha256 == theirs.label_sha256
    images = [read_image(sample.image_path).astype(int) for sample in (ours, theirs)]
    assert np.abs(images[0] - images[1]).max() <= 2  # grey levels were cut
    for change, expected in (
        ({"imgs": np.zeros((9, 9, 3), np.uint8), "gts": labels[0]}, "found uint8 (9, 9, 3) and"),
        ({"gts": labels[1:]}, "expected imgs and gts (D, H, W) uint8 of CT"),
        ({"spacing": np.ones(2)}, "not enough values to unpack"),
    ):
        np.savez(tmp_path / "npz" / "CT_a.npz", **{**arrays, **change})
        assert expected in refused(fails, tmp_path / "npz", tmp_path / "c")
    np.savez(tmp_path / "npz" / "CT_a.npz", imgs=grey)
    assert "'gts is not a file in the archive'" in refused(fails, tmp_path / "npz", tmp_path / "c")


@pytest.mark.parametrize("place", ["a.png", "images/a.jpg", "imgs/A.PNG"])
def test_pictures_are_no_ct(tmp_path, fails, place):
    path = tmp_path / "raw" / place
    (path.parent / "labels").mkdir(parents=True)
    (path.parent.parent / "labels").mkdir(exist_ok=True)
    path.write_bytes(b"")
    message = refused(fails, tmp_path / "raw", tmp_path / "out")
    assert f"{path.name} is a picture, not a CT volume; 2D slices are read in MedSAM's" in message


class Archives(Layout):
    """<case>.npz in a folder scans/, with arrays `hu` and `labels` (z, y, x) in LPS."""

    parts = ("scans",)
    label_names = {1: "large", 2: "small"}
    description = "NumPy archives"

    def cases(self):
        paths = sorted((self.folder / "scans").glob("*.npz"))
        return [Case(path.stem, (path,), (path,)) for path in paths], {}

    def read(self, case, window):
        (path,) = case.images
        scan = np.load(path)
        entry = {
            **dict.fromkeys(("image", "label"), path.name),
            **dict.fromkeys(("image_sha256", "label_sha256"), sha256(path)),
            "shape": scan["hu"].shape,
            "spacing_mm": scan["spacing"].tolist(),
            "origin_mm": [0.0, 0.0, 0.0],
            "direction": np.eye(3).ravel().tolist(),
            "stored_orientation": "LPS",
        }
        hu, labels = grey_levels(scan["hu"].astype(np.float32), window), scan["labels"]
        return entry, ((z, hu[z], labels[z]) for z in range(len(hu)) if labels[z].any())


def test_a_layout_of_another_file_format_needs_one_class(tmp_path, monkeypatch):
    write_cases(tmp_path / "flare22", 3)
    (tmp_path / "new" / "scans").mkdir(parents=True)
    for number in range(3):
        hu, labels = toy_case(number)
        path = tmp_path / "new" / "scans" / f"toy_{number}.npz"
        np.savez(path, hu=hu, labels=labels, spacing=(5.0, 2.0, 1.6))
    monkeypatch.setitem(LAYOUTS, "archives", Archives)
    made = preprocess(tmp_path / "new", tmp_path / "a")
    assert made["label_names"] == {"1": "large", "2": "small"}
    preprocess(tmp_path / "flare22", tmp_path / "b")
    assert_same_slices(tmp_path / "a", tmp_path / "b")
    assert preprocess(tmp_path / "new", tmp_path / "c", "--layout", "archives")["name"] == "c"
