"""What is evaluated: slices, tolerances, units and the roles of the models."""

import shutil
from dataclasses import dataclass, replace
from itertools import permutations

import pytest

import eval as evaluation
from tests.evaluation.helpers import evaluate
from tests.helpers import edit_json
from utils.data.labels import FLARE22_LABELS, FLARE22_TOLERANCES_MM
from utils.data.slices import open_dataset
from utils.evaluation.inputs import (
    roles_of,
    select_slices,
    shard_patients,
    tolerance_text,
    tolerances_of,
)
from utils.system.errors import UserError


@pytest.mark.parametrize(
    ("models", "baseline", "proposed", "expected"),
    [
        (["untouched", "medsam", "adaptive", "sam2"], None, None, ("medsam", "adaptive")),
        (["untouched", "x"], None, None, ("untouched", "x")),
        (["adaptive", "plain"], None, None, ("plain", "adaptive")),
        (["x", "medsam"], None, None, ("x", "medsam")),
        (["x"], None, None, ("x", "x")),
        (["x", "adaptive"], "adaptive", None, ("adaptive", "x")),
        (["x", "adaptive"], None, "x", ("adaptive", "x")),
    ],
)
def test_two_different_models_are_compared(models, baseline, proposed, expected):
    assert roles_of(models, baseline, proposed) == expected


@pytest.mark.parametrize("models", [*permutations(["sam", "adaptive", "lite_medsam", "mixed"])])
def test_roles_do_not_depend_on_the_order_of_the_models(models):
    """`adaptive` is proposed; without `medsam`, the first that is not tuned is the baseline."""
    trained = {"adaptive", "mixed"}
    (first, _) = (name for name in models if name not in trained)
    assert roles_of(models, None, None, trained) == (first, "adaptive")
    assert roles_of(models, "sam", "mixed", trained) == ("sam", "mixed")
    (*_, last) = (name for name in models if name in trained and name != "adaptive")
    assert roles_of(models, "adaptive", None, trained) == ("adaptive", last)


def test_roles_of_several_seeds_are_those_of_the_first():
    models = ["untouched", "b-adaptive", "b-medsam", "a-medsam", "a-adaptive"]
    trainings = {name: name.partition("-")[2] for name in models[1:]}
    assert roles_of(models, None, None, trainings, trainings) == ("b-medsam", "b-adaptive")


def test_one_model_cannot_have_both_roles_beside_others():
    with pytest.raises(UserError, match="both 'x'"):
        roles_of(["x", "y"], "x", "x")


def test_slices_are_spread_over_each_patient_and_patients_over_processes(monkeypatch):
    @dataclass
    class Entry:
        case: str
        index: int
        patient: str
        dataset: str = "toy"

    class Dataset:
        def split(self, name):
            cases = (("a", 9, "p"), ("b", 2, "q"), ("c", 1, "q"))
            return [Entry(case, z, patient) for case, n, patient in cases for z in range(n)]

    chosen = [(entry.case, entry.index) for entry in select_slices(Dataset(), "test", 3)]
    assert chosen == [("a", 1), ("a", 4), ("a", 7), ("b", 0), ("b", 1), ("c", 0)]
    chosen = [(entry.case, entry.index) for entry in select_slices(Dataset(), "test", 1)]
    assert chosen == [("a", 4), ("b", 1)]
    monkeypatch.setattr("utils.system.distributed.world_size", lambda: 2)
    shards = []
    for rank in range(2):
        monkeypatch.setattr("utils.system.distributed.rank", lambda rank=rank: rank)
        shards.append({entry.case for entry in shard_patients(Dataset().split("test"))})
    assert shards == [{"a"}, {"b", "c"}]  # a patient's cases are never parted


def test_flare22_labels_and_tolerances():
    """The challenge's own: https://flare22.grand-challenge.org."""
    assert FLARE22_LABELS[2] == "right kidney" and FLARE22_LABELS[13] == "left kidney"
    assert FLARE22_LABELS[7] == "right adrenal gland" and FLARE22_LABELS[8] == "left adrenal gland"
    assert list(FLARE22_LABELS) == list(range(1, 14))
    in_order = [FLARE22_TOLERANCES_MM[name] for name in FLARE22_LABELS.values()]
    assert in_order == [5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3]


def test_flare22_tolerances_go_by_organ(toy_slices):
    slices = open_dataset(toy_slices).split("all")
    with pytest.raises(UserError, match="give a number"):
        tolerances_of("flare22", slices)
    slices[0].label_names.update({1: "liver", 2: "aorta"})  # the data set's, shared by its slices
    assert tolerances_of("flare22", slices) == {"liver": 5, "aorta": 2}
    assert tolerance_text("flare22", "mm") == "FLARE22's tolerances"
    assert tolerance_text(2.5, "mm") == "2.5 mm" and "2.5 pixels" in tolerance_text(2.5, "px")


def test_several_data_sets_are_kept_apart(toy_slices, tmp_path, fails):
    shutil.copytree(toy_slices, tmp_path / "other")
    datasets = [open_dataset(folder) for folder in (toy_slices, tmp_path / "other")]
    both = [entry for dataset in datasets for entry in dataset.split("all")]
    scores, _ = evaluate(both, target=lambda target: target)
    assert set(scores["label"]) == {
        f"{label} ({data})" for label in ("large", "small") for data in ("toy", "other")
    }
    assert {case.split("/")[0] for case in scores["case"]} == {"toy", "other"}
    assert scores["case"].nunique() == scores["patient"].nunique() == 8
    (entry,) = both[:1]
    scores, _ = evaluate([replace(entry, patient="twin")], target=lambda target: target)
    assert set(scores["case"]) == {entry.case} and set(scores["patient"]) == {"twin"}

    def all_for_training(meta: dict) -> None:
        for case in meta["cases"].values():
            case["split"] = "train"

    def other_patients(meta: dict) -> None:
        for number, case in enumerate(meta["cases"].values()):
            case["image_sha256"] = f"{number:064x}"

    arguments = ("--data", toy_slices, tmp_path / "other", "--models", "lite_medsam")
    arguments += ("--out", tmp_path / "out")
    edit_json(tmp_path / "other" / "dataset.json", all_for_training)
    assert "a patient in two splits" in fails(evaluation.main, *arguments)
    edit_json(tmp_path / "other" / "dataset.json", other_patients)
    assert "other: the test split is empty" in fails(evaluation.main, *arguments)
