"""Patients that a model has seen are recognised by their images; other windows are told."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as evaluation
from tests.helpers import edit_json
from utils.data.slices import open_dataset
from utils.evaluation.seen import check_seen, seen_by_models, window_notes
from utils.model.segmenter import save_decoder
from utils.system.errors import UserError
from utils.training.runs import TrainedRun


@pytest.fixture(scope="module")
def dataset(toy_slices):
    return open_dataset(toy_slices)


@pytest.fixture(scope="module")
def decoders(dataset, lite_medsam, tmp_path_factory):
    """Decoders that have seen: two patients of four, none of them, and none that is recorded."""
    folder = tmp_path_factory.mktemp("decoders")
    first, second, *_ = dataset.volumes.values()
    seen = {"two": {first: "train", second: "val"}, "none": {"0" * 64: "train"}, "old": None}
    for name, patients in seen.items():
        save_decoder(folder / f"{name}.pth", lite_medsam, patients)
    return folder


def test_seen_patients_are_counted_by_their_images(dataset, decoders):
    specs = [(name, "lite_medsam", decoders / f"{name}.pth") for name in ("two", "none", "old")]
    torch.save({"image_encoder.x": torch.zeros(1)}, decoders / "full.pth")
    specs += [("packaged", "lite_medsam", None), ("full", "lite_medsam", decoders / "full.pth")]
    slices = dataset.split("all")
    seen = seen_by_models(specs, slices, [dataset])
    first, second, *_ = dataset.volumes
    assert {entry.case for entry in seen["two"]} == {first, second}
    assert seen["none"] == [] and seen["old"] is seen["packaged"] is seen["full"] is None
    one_patient = [replace(entry, patient="twin") for entry in slices]
    assert len(seen_by_models(specs[:1], one_patient, [dataset])["two"]) == 1

    assert check_seen({"none": [], "old": None}, 4, allowed=False) == ""
    with pytest.raises(UserError, match=rf"toy: models .* \(two 2 of 4; {first} is .*--allow-seen"):
        check_seen(seen, 4, allowed=False)
    assert "two 2 of 4" in check_seen(seen, 4, allowed=True)


def test_leak_is_found_under_another_folder_and_split_and_before_the_work(
    toy_slices, decoders, tmp_path, fails, monkeypatch
):
    shutil.copytree(toy_slices, tmp_path / "renamed")

    def all_for_testing(meta: dict) -> None:
        for case in meta["cases"].values():
            case["split"] = "test"

    edit_json(tmp_path / "renamed" / "dataset.json", all_for_testing)
    monkeypatch.setattr("utils.evaluation.models.load_models", None)
    message = fails(
        evaluation.main,
        *("--data", tmp_path / "renamed", "--out", tmp_path / "out", "--models"),
        *(f"{name}=lite_medsam:{decoders / name}.pth" for name in ("none", "two")),
    )
    assert f"{tmp_path / 'renamed'}: models were trained" in message and "(two 2 of 4;" in message
    assert not (tmp_path / "out").exists()


def test_windows_that_differ_from_a_runs_are_told(dataset):
    def run(name: str, *windows: tuple | None) -> TrainedRun:
        data = {f"data {n}": {"window": w and list(w)} for n, w in enumerate(windows)}
        return TrainedRun(name, Path(name), {"data": data}, 1)

    own, other = dataset.window, (-1000, 400)
    older = TrainedRun("older", Path("older"), {"data": {"toy": "hash"}}, 1)
    same = [run("same", own), run("both", other, own), run("unknown", None), older]
    assert window_notes([dataset], same) == []
    (note,) = window_notes([dataset], [*same, run("a", other), run("b", other, None)])
    assert "data set toy is [-360, 440] HU" in note and "a, b trained on is [-1000, 400] HU" in note
    assert window_notes([replace(dataset, window=None)], [run("a", other)]) == []
