"""Slices on disk: what a person may edit in dataset.json, and what is damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import TOY_NAMES, edit_json
from utils.data.slices import open_dataset, open_datasets, read_image, read_label_map
from utils.system.errors import UserError


@pytest.fixture
def folder(toy_slices, tmp_path) -> Path:
    """A copy of the toy slices, to be changed."""
    shutil.copytree(toy_slices, tmp_path / "copy")
    return tmp_path / "copy"


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "dataset.json", change)


# --- What a person may do ------------------------------------------------------------------------
def test_label_names_and_numbers_of_a_slice(toy_slices):
    entry = open_dataset(toy_slices).split("all")[0]
    assert entry.label_names == TOY_NAMES and entry.name == f"{entry.case}-001"
    assert entry.key == f"toy/{entry.name}" and entry.spacing_mm == pytest.approx((2.0, 1.6))


def test_a_split_and_label_names_may_be_edited(folder):
    before = open_dataset(folder)
    case = before.split("train")[0].case

    def change(meta: dict) -> None:
        meta["cases"][case].update(split="test")
        meta["label_names"].update({"1": "liver", "9": "spare"})
        meta.update(note="moved by hand")

    edit(change)(folder)
    after = open_dataset(folder)
    assert case in {entry.case for entry in after.split("test")}
    assert case not in {entry.case for entry in after.split("train")}
    assert after.split("all")[0].label_names == {1: "liver", 2: "small", 9: "spare"}
    assert [s.name for s in after.split("all")] == [s.name for s in before.split("all")]
    assert after.sha256 != before.sha256


@pytest.mark.parametrize("checksum", ["edited", "0" * 64])
def test_files_of_earlier_versions_hold_a_checksum_that_is_ignored(folder, checksum):
    edit(lambda meta: meta.update(sha256=checksum))(folder)
    assert len(open_dataset(folder).split("all")) == 8


def test_spacing_corrected_by_hand_leaves_the_frame(folder):
    """The slices were scaled when they were written."""
    frame = open_dataset(folder).split("all")[0].frame
    edit(lambda meta: [c.update(spacing_mm=[1, 2, 3]) for c in meta["cases"].values()])(folder)
    entry = open_dataset(folder).split("all")[0]
    assert entry.spacing_mm == (2.0, 3.0) and entry.frame == frame


def test_medsam_float_images_are_read(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (1024, 1024)).astype(np.uint8)
    image = np.repeat(grey[..., None] / 255.0, 3, axis=2)
    image[..., 1:] -= image[..., 1:] * 1e-13  # as resizing the channels apart leaves it
    np.save(tmp_path / "image.npy", image)
    assert (read_image(tmp_path / "image.npy") == grey).all()
    image[..., 2] = 0
    np.save(tmp_path / "colour.npy", image)
    with pytest.raises(UserError, match="colour.npy: its three channels differ"):
        read_image(tmp_path / "colour.npy")


# --- What is refused -----------------------------------------------------------------------------
def case_edited(**values: object) -> Callable[[Path], None]:
    return edit(lambda meta: meta["cases"]["toy_1"].update(values))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "holds no dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), "not of format"),
        (lambda folder: next((folder / "gts").iterdir()).unlink(), "listed in dataset.json"),
        (edit(lambda meta: meta.update(format="old")), "not of format"),
        (edit(lambda meta: meta["cases"]["toy_1"].pop("spacing_mm")), "KeyError: 'spacing_mm'"),
        (edit(lambda meta: meta["cases"].clear()), "no slice"),
        (edit(lambda meta: meta["cases"].update({"../x": {}})), "case name '../x'"),
        (edit(lambda meta: meta["label_names"].update({"1": "a\nb"})), "label names"),
        (edit(lambda meta: meta["label_names"].update(liver="1")), "ValueError"),
        (case_edited(split="Test"), "split of toy_1 is 'Test', not one of"),
        (case_edited(patient=7), "patient of toy_1 is 7"),
        (case_edited(origin_mm=None), "TypeError"),
        (case_edited(spacing_mm=[1, 2]), "are not 3 finite numbers"),
        (case_edited(spacing_mm=["wide", 2, 3]), "ValueError"),
        (case_edited(shape=[0, 80, 96]), "are not sizes"),
        (case_edited(frame={"native": [80, 96], "content": [1024, 4096]}), "frame of toy_1"),
        (case_edited(slices=3), "AttributeError"),
    ],
)
def test_damaged_data_set_is_named(folder, change, expected):
    change(folder)
    with pytest.raises(UserError) as error:
        open_dataset(folder)
    assert expected in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("digest", ["", "0" * 64, None])
def test_slice_without_its_hash_is_refused(folder, digest):
    def change(meta: dict) -> None:
        for item in meta["cases"]["toy_1"]["slices"].values():
            item["image_sha256"] = digest

    edit(change)(folder)
    entry = next(s for s in open_dataset(folder).split("all") if s.case == "toy_1")
    with pytest.raises(UserError, match="changed or damaged"):
        read_image(entry.image_path, entry.image_sha256)


@pytest.mark.parametrize(
    ("array", "cut", "expected"),
    [
        (np.zeros((1024, 1024), np.uint8), 10, "damaged or not a NumPy array"),
        (np.zeros((512, 512), np.uint8), 0, r"found uint8 \(512, 512\)"),
        (np.array([{}], object), 0, "damaged or not a NumPy array"),
    ],
)
def test_damaged_slice_is_named(tmp_path, array, cut, expected):
    path = tmp_path / "a.npy"
    np.save(path, array, allow_pickle=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    with pytest.raises(UserError, match=f"a.npy: .*{expected}"):
        read_label_map(path)


def test_patient_is_the_case_unless_dataset_json_says_otherwise(folder):
    assert all(entry.patient == entry.case for entry in open_dataset(folder).split("all"))
    case_edited(patient="Ann")(folder)
    patients = {entry.case: entry.patient for entry in open_dataset(folder).split("all")}
    assert patients == {**{case: case for case in patients}, "toy_1": "Ann"}


def test_a_patient_in_two_splits_of_a_data_set(folder):
    one, other = (open_dataset(folder).split(part)[0].case for part in ("train", "test"))

    def change(meta: dict) -> None:
        for case in (one, other):
            meta["cases"][case]["patient"] = "Ann"

    edit(change)(folder)
    with pytest.raises(
        UserError, match=rf"{one} \(train\) and {other} \(test\) are of patient Ann"
    ):
        open_dataset(folder)
    edit(lambda meta: meta["cases"][other].update(split="train"))(folder)
    assert not open_dataset(folder).split("test")


def test_data_sets_of_one_name_are_not_mixed(toy_slices, tmp_path):
    shutil.copytree(toy_slices, tmp_path / toy_slices.name)
    with pytest.raises(UserError, match="are both named"):
        open_datasets([toy_slices, tmp_path / toy_slices.name])


def test_case_without_slices_is_ignored(toy_slices, folder):
    case_edited(slices={}, split="test")(folder)
    assert "toy_1" not in {s.case for s in open_datasets([folder, toy_slices])[0].split("all")}


def test_a_patient_in_two_splits_of_two_data_sets(toy_slices, folder):
    case = open_dataset(folder).split("train")[0].case
    assert len(open_datasets([toy_slices, folder])) == 2
    edit(lambda meta: meta["cases"][case].update(split="test"))(folder)
    with pytest.raises(UserError, match=rf"{case} \(test\) is the same image .*in two splits"):
        open_datasets([toy_slices, folder])
