"""Evaluation: the boxes, the scores of models with known answers, and the tables."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

import eval as evaluation
from perturb import BOX_KINDS
from utils.cli import UserError
from utils.flare22 import FLARE22_LABELS, FLARE22_TOLERANCES_MM
from utils.slices import open_dataset, read_label_map
from utils.tables import COLUMNS, label_table, markdown, mean_score, shift_table


class KnownAnswer:
    """A model whose embedding is the label map and whose masks are what `answer` makes of it."""

    device = torch.device("cpu")

    def __init__(self, answer) -> None:
        self.answer, self.boxes = answer, []

    def decode(self, embedding, boxes):
        self.boxes.append(boxes)
        labels = [label for label in embedding.unique() if label]
        masks = torch.stack([self.answer(embedding == label) for label in labels])
        return (masks.float() - 0.5).repeat(len(boxes) // len(labels), 1, 1)


def label_map_of(entry) -> torch.Tensor:
    return torch.from_numpy(read_label_map(entry.label_path))


@pytest.fixture
def slices(toy_slices):
    return open_dataset(toy_slices).split("all")


def evaluate(slices, tolerance=2.0, **models):
    known = {name: KnownAnswer(answer) for name, answer in models.items()}
    tolerances = evaluation.tolerances_mm(tolerance, slices)
    embeddings = dict.fromkeys(known, label_map_of)
    return evaluation.evaluate(known, embeddings, slices, tolerances, 0.15, 0), known


# --- Scores --------------------------------------------------------------------------------------
def test_models_with_known_answers(slices):
    rows, _ = evaluate(
        slices,
        target=lambda target: target,
        nothing=torch.zeros_like,
        half=lambda target: target & (torch.arange(1024) < target.any(0).nonzero().median()),
    )
    assert len(rows) == 3 * len(slices) * 2 * 3  # models, slices, labels, boxes
    for box in BOX_KINDS:
        for score in ("dsc", "nsd"):
            assert mean_score(rows, score, model="target", box=box) == 1
            assert mean_score(rows, score, model="nothing", box=box) == 0
        assert mean_score(rows, "dsc", model="half", box=box) == pytest.approx(2 / 3, abs=0.08)


def test_spacing_and_tolerance_are_millimetres(slices):
    """A target grown by one native pixel, 2 mm, is off by just that."""

    def grown(target):
        return torch.nn.functional.max_pool2d(target[None].float(), 21, 1, 10)[0] > 0

    inside, _ = evaluate(slices[:1], tolerance=3.0, grown=grown)
    outside, _ = evaluate(slices[:1], tolerance=1.0, grown=grown)
    assert mean_score(inside, "nsd") == 1
    assert mean_score(outside, "nsd") < 0.4


def test_spacing_is_in_the_order_of_the_axes(slices):
    """One native pixel is 2 mm along y and 1.6 mm along x."""

    def grown(size):
        padding = (size[0] // 2, size[1] // 2)
        return lambda target: (
            torch.nn.functional.max_pool2d(target[None].float(), size, 1, padding)[0] > 0
        )

    rows, _ = evaluate(slices[:1], tolerance=1.7, x=grown((1, 21)), y=grown((21, 1)))
    assert mean_score(rows, "nsd", model="x") == 1
    assert mean_score(rows, "nsd", model="y") < 0.9


def test_several_data_sets_are_kept_apart(toy_slices, tmp_path, fails):
    shutil.copytree(toy_slices, tmp_path / "other")
    datasets = [open_dataset(folder) for folder in (toy_slices, tmp_path / "other")]
    both = [entry for dataset in datasets for entry in dataset.split("all")]
    rows, _ = evaluate(both, target=lambda target: target)
    assert {row["label"] for row in rows} == {
        f"{label} ({data})" for label in ("large", "small") for data in ("toy", "other")
    }
    assert {row["case"].split("/")[0] for row in rows} == {"toy", "other"}
    assert label_table(rows, "dsc")[1][1:3] == ["4", "8"]  # patients and instances of one of them

    meta = json.loads((tmp_path / "other" / "dataset.json").read_text())
    for case in meta["cases"].values():
        case["split"] = "train"
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(meta))
    message = fails(
        evaluation.main,
        *("--data", toy_slices, tmp_path / "other", "--models", "lite_medsam"),
        *("--out", tmp_path / "out"),
    )
    assert "other: the test split is empty" in message


def test_pixels_are_native(slices):
    rows, _ = evaluate(slices, target=lambda target: target)
    for row in rows:
        entry = next(s for s in slices if s.case == row["case"] and s.index == row["slice"])
        label = {"large": 1, "small": 2}[row["label"]]
        assert row["pixels"] == entry.labels[label]


# --- Boxes ---------------------------------------------------------------------------------------
def test_boxes_are_the_same_for_every_model_and_in_any_order(slices):
    _, known = evaluate(slices, a=lambda target: target, b=torch.zeros_like)
    _, reverse = evaluate(slices[::-1], a=lambda target: target)
    for first, other, backwards in zip(
        known["a"].boxes, known["b"].boxes, reverse["a"].boxes[::-1], strict=True
    ):
        assert (first == other).all() and (first == backwards).all()


def test_boxes_of_an_instance_by_kind(slices):
    labels, boxes, _ = evaluation.prompts(slices[0], 0.15, seed=0)
    assert labels == [1, 2] and list(boxes) == list(BOX_KINDS)
    outward = np.array([-1, -1, 1, 1])
    grown = (boxes["expansion"] - boxes["standard"]) * outward
    shrunk = (boxes["shrink"] - boxes["standard"]) * outward
    sides = np.tile(boxes["standard"][:, 2:] - boxes["standard"][:, :2] + 1, 2)
    assert (grown > 0).all() and (grown <= 0.15 * sides).all()
    assert shrunk == pytest.approx(-grown, abs=1e-3)
    # Each instance has draws of its own: another label, slice, case or seed, other shifts.
    shares = [
        (boxes["expansion"] - boxes["standard"]) / sides,
        *(
            (other["expansion"] - other["standard"])
            / np.tile(other["standard"][:, 2:] - other["standard"][:, :2] + 1, 2)
            for other in (evaluation.prompts(entry, 0.15, seed=0)[1] for entry in slices[1:4])
        ),
    ]
    drawn = np.abs(np.concatenate(shares)).ravel()
    assert len(np.unique(drawn.round(5))) == len(drawn)
    other = evaluation.prompts(slices[0], 0.15, seed=1)[1]
    assert (other["standard"] == boxes["standard"]).all()
    assert (other["shrink"] != boxes["shrink"]).all()


# --- Tables --------------------------------------------------------------------------------------
def made_up_rows() -> list[dict]:
    """Two instances of one label and one of another, with scores that are easy to average."""
    rows = []
    for model, gain in (("a", 0.0), ("b", 0.1)):
        for case, label, score in (("p", "liver", 0.5), ("q", "liver", 0.7), ("q", "aorta", 0.3)):
            for box, shift in (("standard", 0.0), ("expansion", -0.1), ("shrink", -0.2)):
                value = score + gain + shift
                values = (model, case, 4, label, box, 0, 9, value, value / 2)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def test_table_one_by_hand():
    assert shift_table(made_up_rows()) == [
        ["box", "a DSC", "a NSD", "b DSC", "b NSD"],
        ["standard", "50.00", "25.00", "60.00", "30.00"],
        ["expansion", "40.00", "20.00", "50.00", "25.00"],
        ["shrink", "30.00", "15.00", "40.00", "20.00"],
        ["average", "40.00", "20.00", "50.00", "25.00"],
    ]


def test_label_table_by_hand():
    assert label_table(made_up_rows(), "dsc") == [
        ["label", "patients", "instances", "a", "b"],
        ["aorta", "1", "1", "30.0 / 20.0 / 10.0", "40.0 / 30.0 / 20.0"],
        ["liver", "2", "2", "60.0 / 50.0 / 40.0", "70.0 / 60.0 / 50.0"],
    ]


def test_markdown_is_aligned():
    assert markdown([["a|b"], ["c"]]).splitlines()[0] == "| a\\|b |"
    assert markdown([["a", "bcd"], ["ef", "g"]]) == "| a  | bcd |\n|----|-----|\n| ef | g   |"


# --- The script ----------------------------------------------------------------------------------
def test_script_end_to_end(toy_slices, tmp_path, capsys, monkeypatch):
    prompts, seeds = evaluation.prompts, set()

    def recorded(entry, r, seed):
        seeds.add((r, seed))
        return prompts(entry, r, seed)

    monkeypatch.setattr(evaluation, "prompts", recorded)
    evaluation.main(
        [
            *("--data", str(toy_slices), "--models", "lite_medsam", "again=lite_medsam"),
            *("--out", str(tmp_path / "out"), "--device", "cpu", "--r", "0.1"),
            *("--seed", "7"),
        ]
    )
    assert seeds == {(0.1, 7)}
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"results.md", "instances.csv", "examples.png"}
    with open(out / "instances.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 2 * 2 * 2 * 3  # models, slices of the test split, labels, boxes
    text = (out / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert "1 patients, 4 instances" in text and "split test" in text and "2 mm" in text
    assert "U(0, 0.1) of the side" in text
    # The table's first number can be had from the CSV by anyone.
    standard = [r for r in rows if r["model"] == "lite_medsam" and r["box"] == "standard"]
    mean = 100 * np.mean([float(row["dsc"]) for row in standard])
    assert f"| standard  | {mean:.2f} " in text
    again = [r for r in rows if r["model"] == "again" and r["box"] == "standard"]
    assert [r["dsc"] for r in standard] == [r["dsc"] for r in again]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lite_medsam", ("lite_medsam", "lite_medsam", None)),
        ("ours=lite_medsam:a/b.pth", ("ours", "lite_medsam", "a/b.pth")),
        ("medsam_vit_b:x=1.pth", ("medsam_vit_b", "medsam_vit_b", "x=1.pth")),
        (r"w=medsam_vit_b:C:\w\m.pth", ("w", "medsam_vit_b", r"C:\w\m.pth")),
    ],
)
def test_model_argument(text, expected):
    assert evaluation.parse_model(text) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--models", "=lite_medsam"], "expected NAME=MODEL"),
        (["--models", "unet"], "unknown model 'unet'"),
        (["--models", "lite_medsam", "lite_medsam"], "two are named 'lite_medsam'"),
        (["--models", "lite_medsam:nowhere.pth"], "no such checkpoint"),
        (["--models", "lite_medsam", "--r", "0.5"], "--r: a share of the side"),
        (["--models", "lite_medsam", "--tolerance", "-1"], "--tolerance: expected mm"),
        (["--models", "lite_medsam", "--tolerance", "flare22"], "none for 'large'"),
        (["--models", "lite_medsam", "--split", "both"], "invalid choice: 'both'"),
    ],
)
def test_bad_options(fails, toy_slices, tmp_path, arguments, expected):
    message = fails(
        evaluation.main,
        "--data",
        toy_slices,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        *arguments,
    )
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_flare22_labels_and_tolerances():
    """The challenge's own: https://flare22.grand-challenge.org."""
    assert FLARE22_LABELS[2] == "right kidney" and FLARE22_LABELS[13] == "left kidney"
    assert FLARE22_LABELS[7] == "right adrenal gland" and FLARE22_LABELS[8] == "left adrenal gland"
    assert list(FLARE22_LABELS) == list(range(1, 14))
    in_order = [FLARE22_TOLERANCES_MM[name] for name in FLARE22_LABELS.values()]
    assert in_order == [5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3]


def test_labels_that_the_data_set_does_not_list_are_an_error(toy_slices, tmp_path):
    shutil.copytree(toy_slices, tmp_path / "copy")
    entry = open_dataset(tmp_path / "copy").split("all")[0]
    label_map = read_label_map(entry.label_path)
    for changed, expected in ((label_map * 3, "[3, 6]"), (label_map * 0, "[]")):
        np.save(entry.label_path, changed)
        with pytest.raises(UserError, match="preprocess again") as error:
            evaluation.prompts(entry, 0.15, 0)
        assert f"holds labels {expected}" in str(error.value)


def test_flare22_tolerances_go_by_organ(toy_slices):
    slices = open_dataset(toy_slices).split("all")
    with pytest.raises(UserError, match="give a number"):
        evaluation.tolerances_mm("flare22", slices)
    slices[0].label_names.update({1: "liver", 2: "aorta"})  # the data set's, shared by its slices
    assert evaluation.tolerances_mm("flare22", slices) == {"liver": 5, "aorta": 2}
