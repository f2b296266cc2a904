"""Slices on disk: what a person may edit in dataset.json, and what is damage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import copy_slices, edit_json
from utils.data.slices import (
    open_dataset,
    open_datasets,
    read_image,
    read_instances,
    read_label_map,
)
from utils.system import UserError
from utils.system.files import sha256


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "dataset.json", change)


def edit_case(case: str = "toy_1", **values: object) -> Callable[[Path], None]:
    return edit(lambda meta: meta["cases"][case].update(values))


@pytest.fixture
def folder(toy_slices, tmp_path) -> Path:
    """A copy of the toy slices under another name, to be changed."""
    return copy_slices(toy_slices, tmp_path / "copy", lambda meta: meta.update(name="copy"))


def test_what_may_be_edited(folder):
    before = open_dataset(folder)
    case = before.split("train")[0].case
    edit_case(case, split="test", spacing_mm=[1, 2, 3], patient="Ann")(folder)
    edit(lambda meta: meta["label_names"].update({"1": "liver", "9": "spare"}))(folder)
    edit(lambda meta: meta.update(note="by hand", name="ours", sha256="of an old version"))(folder)
    after = open_dataset(folder)
    assert {s.dataset for s in after.split("all")} == {after.name} == {"ours"}
    assert case not in {s.case for s in after.split("train")}
    assert after.split("all")[0].label_names == {1: "liver", 2: "small", 9: "spare"}
    assert after.sha256 != before.sha256
    for old, new in zip(before.split("all"), after.split("all"), strict=True):
        # The slices were scaled when they were written.
        assert (new.name, new.frame) == (old.name, old.frame)
        assert new.patient == ("Ann" if new.case == case else new.case)
        assert new.spacing_mm == ((2, 3) if new.case == case else old.spacing_mm)


def test_files_of_earlier_versions_have_no_name(folder):
    edit(lambda meta: meta.pop("name"))(folder)
    edit(lambda meta: [case.pop("nifti_header") for case in meta["cases"].values()])(folder)
    (folder.parent / "moved").symlink_to(folder)
    assert open_dataset(folder.parent / "moved").name == "copy"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "holds no dataset.json"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), "not of format"),
        (lambda folder: next((folder / "gts").iterdir()).unlink(), "listed in dataset.json"),
        (edit(lambda meta: meta.update(name="a\nb")), "name 'a\\nb'"),
        (edit(lambda meta: meta["cases"]["toy_1"].pop("spacing_mm")), "KeyError: 'spacing_mm'"),
        (edit(lambda meta: meta["cases"].clear()), "no slice"),
        (edit(lambda meta: meta["label_names"].update({"1": "a\nb"})), "label names"),
        (edit_case(split="Test"), "split of toy_1 is 'Test', not one of"),
        (edit_case(patient=7), "patient of toy_1 is 7"),
        (edit_case(spacing_mm=[1, 2]), "are not 3 finite numbers"),
        (edit_case(shape=[0, 80, 96]), "are not sizes"),
        (edit_case(nifti_header={"pixdim": [1]}), "[1] are not 4 finite numbers"),
        (edit_case(frame={"native": [80, 96], "content": [1024, 4096]}), "frame of toy_1"),
        (edit_case(slices=3), "AttributeError"),
    ],
)
def test_damaged_data_set_is_named(folder, change, expected):
    change(folder)
    with pytest.raises(UserError) as error:
        open_dataset(folder)
    assert expected in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize("digest", ["", "0" * 64, None])
def test_slice_without_its_hash_is_refused(folder, digest):
    (item, *_) = open_dataset(folder).split("all")
    edit(lambda meta: meta["cases"][item.case]["slices"]["1"].update(image_sha256=digest))(folder)
    (sample, *_) = open_dataset(folder).split("all")
    with pytest.raises(UserError, match="changed or damaged"):
        read_image(sample.image_path, sample.image_sha256)


@pytest.mark.parametrize(("times", "found"), [(3, "[3, 6]"), (0, "[]")])
def test_labels_that_the_data_set_does_not_list_are_an_error(folder, times, found):
    (sample, *_) = open_dataset(folder).split("all")
    np.save(sample.label_path, read_label_map(sample.label_path) * np.uint8(times))
    sample = replace(sample, label_sha256=sha256(sample.label_path))
    with pytest.raises(UserError, match="preprocess again") as error:
        read_instances(sample)
    assert f"holds labels {found}" in str(error.value)


def test_slice_of_another_size_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((512, 512), np.uint8))
    with pytest.raises(UserError, match=r"a.npy: .*found uint8 \(512, 512\)"):
        read_label_map(tmp_path / "a.npy")


def test_a_patient_in_two_splits(toy_slices, folder):
    """Of one data set by name, of two by image; a case without slices is in no split."""
    one, other = (open_dataset(folder).split(part)[0].case for part in ("train", "test"))
    assert len(open_datasets([toy_slices, folder])) == 2
    for case in (one, other):
        edit_case(case, patient="Ann")(folder)
    message = rf"{one} \(train\) and {other} \(test\) are of patient Ann"
    with pytest.raises(UserError, match=message):
        open_dataset(folder)
    edit_case(other, split="train")(folder)
    assert not open_dataset(folder).split("test")
    with pytest.raises(UserError, match=rf"{other} \(train\) is the same image .*in two splits"):
        open_datasets([toy_slices, folder])
    edit_case(other, slices={})(folder)
    open_datasets([toy_slices, folder])


def test_data_sets_of_one_name_are_not_mixed(toy_slices, folder):
    edit(lambda meta: meta.update(name="toy"))(folder)
    with pytest.raises(UserError, match="are both named 'toy'"):
        open_datasets([toy_slices, folder])
