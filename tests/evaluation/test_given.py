"""eval.py --boxes: boxes that people drew, scored beside the others."""

import shutil

import numpy as np
import pandas as pd
import pytest

import eval as evaluation
from perturb import tight_boxes
from tests.evaluation.helpers import protocol
from tests.helpers import edit_json, toy_case
from utils.data.slices import open_dataset
from utils.evaluation.given import given_prompts, given_table
from utils.evaluation.instances import to_frame
from utils.evaluation.scoring import Row

HEADER = "case,label,z,x0,y0,x1,y1\n"


def tight_rows(number: int, label: int) -> list[str]:
    """The rows of the tight boxes of one label of a toy case."""
    rows = []
    for z, plane in enumerate(toy_case(number)[1]):
        for found, box in zip(*tight_boxes(plane), strict=True):
            if found == label:
                rows.append(f"toy_{number},{label},{z},{','.join(f'{e:.0f}' for e in box)}\n")
    return rows


def options(data, out, *boxes) -> list[str]:
    words = ["--data", data, "--out", out, "--models", "lite_medsam", "--split", "all"]
    words += ["--shift", "15%", "--no-sweep", "--no-figures", "--device", "cpu", "--boxes", *boxes]
    return [str(word) for word in words]


def test_given_boxes_are_scored_like_the_others(toy_slices, tmp_path, capsys):
    """The tight box of a target has the tight box's scores; a second reader's box is a draw."""
    rows = tight_rows(0, 1) + tight_rows(2, 2)
    rows += ["toy_0,large,1,0,0,95,79\n", "toy_0,9,1,1,1,2,2\n", "toy_0,1,0,1,1,2,2\n"]
    (tmp_path / "boxes.csv").write_text(HEADER + "".join(rows))
    evaluation.main(options(toy_slices, tmp_path / "out", tmp_path / "boxes.csv"))
    scores = pd.read_csv(tmp_path / "out" / "instances.csv")
    keys = ["case", "slice", "label"]
    given = scores[scores["box"] == "given"]
    assert len(given) == 5 and set(given["shift"]) == {"0%"}
    first = given[given["draw"] == 0].set_index(keys)
    standard = scores[scores["box"] == "standard"].set_index(keys)
    assert len(first) == 4 and len(standard) == 16
    for column in ("dsc", "nsd", "leak", "error"):
        assert (first[column] == standard.loc[first.index, column]).all()
    (second,) = given[given["draw"] == 1].to_dict("records")
    assert (second["case"], second["slice"], second["label"]) == ("toy_0", 1, "large")
    assert second["dsc"] < standard.loc[("toy_0", 1, "large"), "dsc"]
    table = pd.read_csv(tmp_path / "out" / "given.csv").set_index(["label", "box"])
    assert table.loc[("all", "given"), "lite_medsam DSC"] == pytest.approx(
        100 * given["dsc"].mean(), abs=1e-3
    )
    same = standard.loc[first.index, "dsc"]
    assert table.loc[("all", "tight"), "lite_medsam DSC"] == pytest.approx(
        100 * same.mean(), abs=1e-3
    )
    assert table.loc[("all", "given"), "instances"] == 4
    note = "2 of the given boxes are of no instance of this evaluation and left out."
    assert note in capsys.readouterr().out and note in (tmp_path / "out/report.md").read_text()
    assert "Boxes that people drew" in (tmp_path / "out" / "report.html").read_text()


def test_prompts_of_some_instances(toy_slices):
    entry = open_dataset(toy_slices).split("all")[0]
    a, b, c = np.eye(4, dtype=np.float32)[:3]
    given = {(entry.key, 2): [a, b], (entry.key, 1): [c], ("other", 1): [a]}
    (first, both, boxes), (second, one, more) = given_prompts(given, entry, np.array([1, 2]))
    assert (first.box, first.draw, both, boxes.tolist()) == ("given", 0, [0, 1], [[*c], [*a]])
    assert (second.draw, one, more.tolist()) == (1, [1], [[*b]])
    assert list(given_prompts({}, entry, np.array([1, 2]))) == []


def test_table_by_hand():
    """Tight boxes count for the instances that have a given box alone."""
    rows = []
    for label, box, draw, dsc in (
        *(("liver", "standard", 0, 0.9), ("liver", "given", 0, 0.8), ("liver", "given", 1, 0.4)),
        *(("aorta", "standard", 0, 0.5), ("aorta", "given", 0, 0.7)),
        ("spleen", "standard", 0, 0.1),
    ):
        rows.append(Row("m", "p", "p", 3, label, box, "0%", draw, 9, False, dsc, dsc, 0.0, 0.0))
    frame = given_table(to_frame(rows), protocol()).frame.set_index(["label", "box"])
    values = {key: estimate.value for key, estimate in frame["m DSC"].items()}
    assert values == pytest.approx(
        {
            ("all", "given"): (0.8 + 0.4 + 0.7) / 3,
            ("all", "tight"): (0.9 + 0.5) / 2,
            ("aorta", "given"): 0.7,
            ("aorta", "tight"): 0.5,
            ("liver", "given"): 0.6,
            ("liver", "tight"): 0.9,
        }
    )


def test_boxes_that_cannot_be_scored(toy_slices, tmp_path, fails):
    out, boxes = tmp_path / "out", tmp_path / "boxes.csv"
    boxes.write_text(HEADER + "toy_9,1,1,1,1,2,2\n")
    assert "there is no case 'toy_9'" in fails(evaluation.main, *options(toy_slices, out, boxes))
    boxes.write_text(HEADER + "toy_0,9,1,1,1,2,2\n")
    assert "no box is of a label in one of the" in fails(
        evaluation.main, *options(toy_slices, out, boxes)
    )
    shutil.copytree(toy_slices, tmp_path / "npy", ignore=shutil.ignore_patterns("embeddings"))

    def forget(meta: dict) -> None:
        meta["window"] = None
        for case in meta["cases"].values():
            case.update(
                dict.fromkeys(("spacing_mm", "origin_mm", "direction", "stored_orientation"), None)
            )

    edit_json(tmp_path / "npy" / "dataset.json", forget)
    message = fails(evaluation.main, *options(tmp_path / "npy", out, boxes))
    assert "the data are MedSAM's slices" in message and not out.exists()
