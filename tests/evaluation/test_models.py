"""The models of an evaluation: which, their roles and memory, and what they were trained on."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.data.frame import Frame
from utils.evaluation import models as module
from utils.evaluation.models import (
    ModelSpec,
    choose_roles,
    label_notes,
    synthetic_notes,
    training_overlap,
    window_notes,
)
from utils.model.segmenter import save_decoder
from utils.system import UserError
from utils.training.runs import TrainedRun


def test_network_decodes_in_half_precision(lite_medsam):
    boxes = np.array([[100, 100, 300, 400]], np.float32)
    embedding = torch.rand(256, 64, 64, generator=torch.Generator().manual_seed(0))
    frame = Frame((100, 100), (1024, 1024))
    full, half = (
        module.predict(lite_medsam, embedding, boxes, frame, dtype)
        for dtype in (None, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and half.shape == (1, 100, 100)
    assert 0 < (half - full).norm() < 0.1 * full.norm()


def made_run(name: str, windows: tuple = (), **options: object) -> TrainedRun:
    options = {"policy": "adaptive", "model": "lite_medsam", "checkpoint": None} | options
    data = {f"data {n}": {"window": w and list(w)} for n, w in enumerate(windows)}
    config = {"options": options, "start_weights": "1" * 64, "data": data}
    return TrainedRun(name, Path(name), config, epochs=5)


def test_weights_that_the_runs_started_from_appear_once_under_the_name_that_they_are_given(
    monkeypatch,
):
    """And what can be downloaded is, and nothing else."""
    fetched = []
    monkeypatch.setattr(module, "fetch", lambda source, folder: fetched.append((source, folder)))
    runs = [made_run("adaptive")]
    alone = module.model_specs([], runs)
    assert [spec.name for spec in alone] == ["untouched", "adaptive"]
    assert alone[0] == ("untouched", "lite_medsam", None) and not fetched
    sam = ModelSpec("sam", "sam_vit_b", "download")
    specs = module.model_specs([sam, ModelSpec("lite", "lite_medsam", None)], runs)
    assert [spec.name for spec in specs] == ["sam", "lite", "adaptive"]
    assert Path(specs[0].checkpoint) == Path("work_dir").resolve() / "sam_vit_b_01ec64.pth"
    ((source, folder),) = fetched
    assert source.file == "sam_vit_b_01ec64.pth" and folder == Path("work_dir")
    runs = [made_run("a", model="medsam_vit_b", checkpoint="work_dir/medsam_vit_b.pth")]
    specs = module.model_specs([ModelSpec("weights", "medsam_vit_b", "download")], runs)
    assert [spec.name for spec in specs] == ["weights", "a"]  # the same file
    specs = module.model_specs([ModelSpec("other", "medsam_vit_b", "other.pth")], runs)
    assert [spec.name for spec in specs] == ["untouched", "other", "a"]
    with pytest.raises(UserError, match="lite_medsam"):
        module.model_specs([ModelSpec("lite", "lite_medsam", "download")], [])


@pytest.mark.parametrize(
    ("models", "baseline", "proposed", "expected"),
    [
        ("x", None, None, ("x", "x")),
        ("x y z", None, None, ("x", "z")),
        ("x y z", "y", None, ("y", "z")),
        ("x y z", "z", None, ("z", "y")),
        ("x y z", None, "x", ("y", "x")),
        ("x y z", "y", "x", ("y", "x")),
    ],
)
def test_first_and_last_model_are_compared_unless_others_are_named(
    models, baseline, proposed, expected
):
    assert choose_roles(models.split(), baseline, proposed) == expected
    with pytest.raises(UserError, match="both 'x'"):
        choose_roles(["x", "y"], "x", "x")


def test_report_names_the_epoch_of_a_runs_weights_and_says_if_it_never_got_better(
    monkeypatch, lite_medsam
):
    epochs = {Path("good"): 3, Path("collapsed"): 0}
    monkeypatch.setattr(TrainedRun, "best_epoch", property(lambda run: epochs[run.folder]))
    monkeypatch.setattr(module, "differences", lambda runs: [])
    runs = [made_run(str(folder)) for folder in epochs]
    specs = [ModelSpec(run.name, "lite_medsam", run.decoder) for run in runs]
    models = dict.fromkeys(["good", "collapsed"], module.Predictor(lite_medsam, None, "0" * 64))
    overlap = {"good": "0 of 7", "collapsed": "not recorded"}
    text = module.provenance("command", specs, models, runs, [], overlap)
    assert re.search("`good`.*, trained for 5 epochs, weights of epoch 3; .* seen: 0 of 7", text)
    assert re.search("`collapsed`.* 5 epochs, none better than its starting weights", text)


def test_overlap_of_training_and_evaluation_patients_is_found_by_their_images(
    dataset, slices, lite_medsam, tmp_path
):
    """By decoders that have seen two patients of four, none, or nothing that is recorded."""
    first, second, *_ = dataset.volumes.values()
    seen = {"two": {first: "train", second: "val"}, "none": {"0" * 64: "train"}, "old": None}
    for name, patients in seen.items():
        save_decoder(tmp_path / f"{name}.pth", lite_medsam, patients)
    torch.save({"image_encoder.x": torch.zeros(1)}, tmp_path / "full.pth")
    names = ("none", "two", "old", "full")
    specs = [ModelSpec(name, "lite_medsam", tmp_path / f"{name}.pth") for name in names]
    specs.append(ModelSpec("packaged", "lite_medsam", None))
    texts, note = training_overlap(specs, slices, [dataset], allowed=True)
    unknown = dict.fromkeys(("old", "full", "packaged"), "not recorded")
    assert texts == {"none": "0 of 4", "two": "2 of 4"} | unknown
    assert "(two 2 of 4)" in note
    first, *_ = dataset.volumes
    with pytest.raises(UserError, match=rf"toy: models .* \(two 2 of 4; {first} is .*--allow-seen"):
        training_overlap(specs, slices, [dataset], allowed=False)
    others = [spec for spec in specs if spec.name != "two"]
    assert training_overlap(others, slices, [dataset], allowed=False)[1] == ""
    one_patient = [replace(sample, patient="twin") for sample in slices]
    assert training_overlap(specs, one_patient, [dataset], True)[0]["two"] == "1 of 1"


def test_windows_that_differ_from_a_runs_are_told(dataset):
    own, other = dataset.window, (-1000, 400)
    same = [made_run("same", (own,)), made_run("both", (other, own)), made_run("x", (None,))]
    assert window_notes([dataset], same) == []
    different = [made_run("a", (other,)), made_run("b", (other, other))]
    (note,) = window_notes([dataset], [*same, *different])
    assert "data set toy is [-360, 440] HU, but a, b trained with another window" in note
    assert window_notes([replace(dataset, window=None)], different) == []


def test_labels_that_no_run_was_trained_on_are_told(dataset):
    slices = dataset.split("all")
    names = {slices[0].name_of(n) for n in slices[0].labels}
    same, other = (made_run(name, (None,)) for name in ("same", "other"))
    same.config["data"]["data 0"]["label_names"] = {"1": next(iter(names))}
    other.config["data"]["data 0"]["label_names"] = {"1": "sarcoma"}
    assert label_notes([dataset], slices, [same, other]) == []
    assert label_notes([dataset], slices, []) == []
    (note,) = label_notes([dataset], slices, [other])
    assert "No label of the data set toy (" in note and "was in the training data" in note


def test_data_of_the_demo_are_called_synthetic(tmp_path):
    dataset = SimpleNamespace(folder=tmp_path / "slices")
    assert synthetic_notes([dataset]) == []
    (tmp_path / "SYNTHETIC.txt").touch()
    (note,) = synthetic_notes([dataset])
    assert note.startswith("SYNTHETIC DATA")
