"""preprocess_ct.py --parts: connected parts of a label as instances, from slices to scores."""

import csv

import nibabel
import numpy as np
import pytest

import eval as evaluation
import preprocess_ct
from perturb import tight_boxes
from tests.evaluation.helpers import known
from tests.helpers import call, options_for, refused, write_volume
from train_adaptive import train
from utils.data.given_boxes import read_boxes
from utils.data.slices import open_dataset, read_instances
from utils.evaluation.prompts import read_given
from utils.evaluation.scoring import targets_of
from utils.evaluation.volume_scores import save_predictions
from utils.preview.statistics import beside_tight_boxes, read_masks
from utils.training.batches import TargetStore
from utils.training.runs import find_runs

NAMES = "1=kidneys,2=liver"
LEFT, RIGHT, SPECK = np.s_[10:20, 8:20], np.s_[12:20, 60:70], np.s_[40, 40:43]


@pytest.fixture
def volumes(tmp_path):
    """Two kidneys of 120 and 80 pixels in one label, a speck of 3, and a liver, in two slices."""
    labels = np.zeros((3, 64, 80), np.uint8)
    for part in (LEFT, RIGHT, SPECK):
        labels[1][part] = 1
    labels[2][LEFT] = 1
    labels[1:, 40:60, 10:30] = 2
    hu = np.where(labels, 100, -700).astype(np.int16)
    hu += np.random.default_rng(0).integers(-40, 40, hu.shape, dtype=np.int16)
    for case in ("a", "b", "c"):
        write_volume(tmp_path / "ct" / "images" / f"{case}_0000.nii.gz", hu + ord(case))
        write_volume(tmp_path / "ct" / "labels" / f"{case}.nii.gz", labels)
    return tmp_path / "ct"


def preprocess(volumes, out, *more):
    words = ("--input", volumes, "--out", out, "--workers", "1", "--label-names", NAMES)
    words += ("--window", "medsam", *more)
    return preprocess_ct.preprocess(preprocess_ct.parse_options(list(map(str, words))))


@pytest.fixture
def dataset(volumes, tmp_path, capsys):
    preprocess(volumes, tmp_path / "data", "--parts", "kidneys", "--min-pixels", "4")
    text = capsys.readouterr().out
    assert "dropped 3 masks of fewer than 4 pixels" in text and "--parts" not in text
    assert text.count("  2 liver") == 1 and "255" not in text
    return open_dataset(tmp_path / "data")


def test_every_part_has_its_box_and_its_target(dataset):
    first, second = [s for s in dataset.split("all") if s.case == "a"]
    assert first.labels == {1: 120, 2: 400, 255: 80} and first.parts == {255: (1, 2)}
    assert second.labels == {1: 120, 2: 400} and second.parts == {}
    _, instances, boxes = read_instances(first)
    whole = np.zeros(first.frame.native, np.uint8)
    whole[LEFT], whole[RIGHT] = 1, 3
    expected = tight_boxes(first.frame.labels_to_frame(whole))[1]
    assert instances.tolist() == [1, 2, 255] and (boxes[[0, 2]] == expected).all()
    targets = TargetStore(256).get(first)[2]
    assert len(targets) == 3 and not (targets[0] & targets[2]).any()
    masks = read_masks(dataset.folder)
    assert (masks.name == "kidneys").sum() == 9 and set(masks.label) == {1, 2}


def test_scores_name_label_and_part(dataset):
    sample = dataset.split("all")[0]
    label_map, instances, _ = read_instances(sample)
    native = sample.frame.labels_to_native(label_map)
    targets = targets_of(sample, instances, native, {"kidneys": 2.0, "liver": 2.0})
    assert [target.place[-2:] for target in targets] == [
        ("kidneys", 1),
        ("liver", 1),
        ("kidneys", 2),
    ]
    assert [target.mask.sum() for target in targets] == [120, 400, 80]


def test_evaluation_scores_parts_and_joins_them_in_3d(
    small_lite_medsam, volumes, dataset, tmp_path
):
    words = (
        "--data",
        dataset.folder,
        "--models",
        "lite_medsam",
        "--split",
        "all",
        "--shift",
        "15%",
    )
    preprocess(volumes, tmp_path / "all", "--parts", "all")  # no mask is dropped, as 3D needs
    words = ("--data", tmp_path / "all", *words[2:], "--no-sweep", "--out", tmp_path / "out")
    call(evaluation, *words, "--volume", "--device", "cpu")
    with open(tmp_path / "out" / "instances.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == "a" and row["slice"] == "1"]
    standard = [(r["label"], r["part"], r["pixels"]) for r in rows if r["box"] == "standard"]
    parts = [("kidneys", "1", "120"), ("liver", "1", "400"), ("kidneys", "3", "3")]
    assert standard == [*parts, ("kidneys", "2", "80")]
    with open(tmp_path / "out" / "volumes.csv") as file:
        kidneys = [row for row in csv.DictReader(file) if row["label"] == "kidneys"]
    assert {row["voxels"] for row in kidneys} == {str(120 + 80 + 3 + 120)}


def test_a_drawn_box_belongs_to_the_part_that_it_overlaps_most(dataset, tmp_path):
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("case,label,z,x0,y0,x1,y1\na,kidneys,1,58,10,71,22\na,kidneys,1,4,9,30,22\n")
    given, note = read_given(read_boxes([boxes]), [dataset], dataset.split("all"))
    assert not note and [instance for _, instance in given] == [255, 1]
    table, missed = beside_tight_boxes(dataset.split("all"), given)
    assert set(table.name) == {"kidneys"} and len(table) == 2 and not missed


def test_training_counts_parts_as_boxes(small_lite_medsam, dataset, tmp_path):
    train(options_for(dataset.folder, epochs=1, boxes_per_call=2), tmp_path / "run")
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(0 < float(row["val_loss"]) < 9 for row in rows)
    (run,) = find_runs([tmp_path / "run"])
    assert run.config["data"]["data"]["label_names"] == {"1": "kidneys", "2": "liver"}


def test_predictions_have_the_labels_own_ids(dataset, tmp_path):
    models = known(target=lambda target: target)
    save_predictions(models, dataset.split("all"), [dataset], tmp_path / "saved")
    volume = nibabel.load(tmp_path / "saved" / "target" / "data" / "a.nii.gz").get_fdata()
    assert [(volume == label).sum() for label in (1, 2, 255)] == [320, 800, 0]


def test_labels_of_several_parts_are_named_without_the_option(volumes, tmp_path, capsys):
    preprocess(volumes, tmp_path / "data")
    note = "labels with several parts in a slice, which share one box: kidneys (50% of the masks);"
    assert note in capsys.readouterr().out
    preprocess(volumes, tmp_path / "again", "--min-pixels", "90", "--parts", "1,liver")
    assert "share one box" not in capsys.readouterr().out
    assert {frozenset(s.labels) for s in open_dataset(tmp_path / "again").split("all")} == {
        frozenset({1, 2})
    }


@pytest.mark.parametrize("parts", ["spleen", "0", "kidneys,256"])
def test_an_unknown_label_is_refused(volumes, fails, tmp_path, parts):
    message = refused(fails, volumes, tmp_path / "out", "--parts", parts, "--label-names", NAMES)
    assert "no label" in message and "kidneys, liver" in message
