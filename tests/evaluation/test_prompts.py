"""The slices and boxes of an evaluation: by kind, and the same for every model in any order."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import eval as evaluation
from perturb import Shift
from tests.evaluation.helpers import evaluate, protocol
from tests.helpers import call, edit_json
from utils.data.slices import open_dataset, read_instances
from utils.evaluation.prompts import Prompt, all_prompts, box_chunks, boxes_of, select_slices

OUTWARD = np.array([-1, -1, 1, 1])
HEADER = "case,label,z,x0,y0,x1,y1\n"


@pytest.fixture
def slices(toy_slices):
    return open_dataset(toy_slices).split("all")


def test_slices_are_spread_over_each_patient(slices):
    class Dataset:
        def split(self, name):
            cases = (("a", 9, "p"), ("b", 2, "q"), ("c", 1, "q"))
            return [
                replace(slices[0], case=case, index=z, patient=patient)
                for case, n, patient in cases
                for z in range(n)
            ]

    chosen = [(sample.case, sample.index) for sample in select_slices(Dataset(), "test", 3)]
    assert chosen == [("a", 1), ("a", 4), ("a", 7), ("b", 0), ("b", 1), ("c", 0)]
    chosen = [(sample.case, sample.index) for sample in select_slices(Dataset(), "test", 1)]
    assert chosen == [("a", 4), ("b", 1)]
    assert len(select_slices(Dataset(), "test", None)) == 12


# --- Boxes ---------------------------------------------------------------------------------------
def boxes(sample, kind: str, shift: str, draw: int = 0, seed: int = 0) -> np.ndarray:
    _, labels, tight = read_instances(sample)
    return boxes_of(sample, labels, tight, Prompt(kind, Shift.parse(shift), draw), seed)


def sides_of(tight: np.ndarray) -> np.ndarray:
    return np.tile(tight[:, 2:] - tight[:, :2] + 1, 2)


def test_boxes_are_the_same_for_every_model_and_in_any_order(slices):
    _, models = evaluate(slices, a=lambda target: target, b=torch.zeros_like)
    _, reverse = evaluate(slices[::-1], a=lambda target: target)
    calls = len(models["a"].boxes) // len(slices)  # decoder calls per slice
    backwards = {boxes.tobytes(): start // calls for start, boxes in enumerate(reverse["a"].boxes)}
    assert len(backwards) == len(models["a"].boxes)
    for first, other in zip(models["a"].boxes, models["b"].boxes, strict=True):
        assert (first == other).all() and first.tobytes() in backwards


def test_boxes_by_kind(slices):
    sample = slices[0]
    tight = boxes(sample, "standard", "0%")
    assert (tight == read_instances(sample)[2]).all()
    sides = sides_of(tight)
    expanded = (boxes(sample, "expansion", "15%") - tight) * OUTWARD
    shrunk = (boxes(sample, "shrink", "15%") - tight) * OUTWARD
    assert (expanded > 0).all() and (expanded <= 0.15 * sides).all()
    assert shrunk == pytest.approx(-expanded, abs=1e-3)
    half = (boxes(sample, "expansion", "7.5%") - tight) * OUTWARD
    assert half == pytest.approx(expanded / 2, abs=1e-3)
    pixels = (boxes(sample, "expansion", "20px") - tight) * OUTWARD
    assert pixels == pytest.approx(expanded / sides / 0.15 * 20, abs=1e-2)
    loose = (boxes(sample, "loose", "15%") - tight) * OUTWARD
    assert (loose < 0).any() and (loose > 0).any() and (abs(loose) <= 0.15 * sides).all()
    swept = (boxes(sample, "sweep", "-10%") - tight) * OUTWARD
    assert swept == pytest.approx(-0.1 * sides, abs=1e-3)


def test_every_instance_and_draw_has_boxes_of_its_own(slices):
    shares = []
    for sample in slices[:4]:
        tight = boxes(sample, "standard", "0%")
        for draw in (0, 1):
            shares.append((boxes(sample, "expansion", "15%", draw) - tight) / sides_of(tight))
    drawn = np.abs(np.concatenate(shares)).ravel()
    assert len(np.unique(drawn.round(5))) == len(drawn)
    first, second = (boxes(slices[0], "shrink", "15%", seed=seed) for seed in (0, 1))
    assert (first != second).all()


def test_chunks_are_small_and_hold_every_prompt_and_given_box(slices):
    sample = slices[0]
    _, labels, tight = read_instances(sample)
    a, b, c = np.eye(4, dtype=np.float32)[:3]
    given = {(sample.key, 2): [a, b], (sample.key, 1): [c], ("other", 1): [a]}
    sweep = tuple(Shift.parse(f"{share}%") for share in range(-20, 21) if share)
    many = protocol(sweep=sweep, draws=2, given=given)
    *chunks, first, second = box_chunks(sample, labels, tight, many, max_boxes=32)
    prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
    assert prompts == all_prompts(many) and len(prompts) == 1 + 2 * 2 * 2 + 2 + 40
    for chunk in chunks:
        assert chunk.positions == [0, 1] and len(chunk.boxes) <= 32
        expected = [boxes(sample, p.box, str(p.shift), p.draw) for p in chunk.prompts]
        assert (chunk.boxes == np.concatenate(expected)).all()
    assert first.positions == [0, 1] and first.boxes.tolist() == [[*c], [*a]]
    assert second.positions == [1] and second.boxes.tolist() == [[*b]]
    assert [chunk.prompts[0].draw for chunk in (first, second)] == [0, 1]
    assert len(box_chunks(sample, labels, tight, many, max_boxes=1)) == len(prompts) + 2


# --- Boxes that people drew ----------------------------------------------------------------------
def options(data, out, *boxes) -> list:
    words = ["--data", data, "--out", out, "--models", "lite_medsam", "--split", "all"]
    return [*words, "--shift", "15%", "--no-sweep", "--no-figures", "--boxes", *boxes]


def test_given_boxes_are_scored_like_the_others(toy_slices, tmp_path, capsys):
    """The tight box of a target has the tight box's scores; a second reader's box is a draw."""
    dataset = open_dataset(toy_slices)
    rows = []
    for case, label in (("toy_0", 1), ("toy_2", 2)):
        for sample in (s for s in dataset.split("all") if s.case == case):
            label_map, labels, _ = read_instances(sample)
            y, x = np.nonzero(sample.frame.labels_to_native(label_map) == label)
            rows.append(f"{case},{label},{sample.index},{x.min()},{y.min()},{x.max()},{y.max()}\n")
    rows += ["toy_0,large,1,0,0,95,79\n", "toy_0,9,1,1,1,2,2\n", "toy_0,1,0,1,1,2,2\n"]
    (tmp_path / "boxes.csv").write_text(HEADER + "".join(rows))
    words = options(toy_slices, tmp_path / "out", tmp_path / "boxes.csv")
    call(evaluation, *words, "--device", "cpu")
    scores = pd.read_csv(tmp_path / "out" / "instances.csv")
    keys = ["case", "slice", "label"]
    given = scores[scores["box"] == "given"]
    assert len(given) == 5 and set(given["shift"]) == {"0%"}
    first = given[given["draw"] == 0].set_index(keys)
    standard = scores[scores["box"] == "standard"].set_index(keys)
    assert len(first) == 4 and len(standard) == 16
    columns = ["dsc", "nsd", "leak", "error"]
    assert (first[columns] == standard.loc[first.index, columns]).all(axis=None)
    (second,) = given[given["draw"] == 1].to_dict("records")
    assert (second["case"], second["slice"], second["label"]) == ("toy_0", 1, "large")
    assert second["dsc"] < standard.loc[("toy_0", 1, "large"), "dsc"]
    note = "2 of the given boxes are of no instance of this evaluation and left out."
    assert note in capsys.readouterr().out and note in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out" / "given.csv").is_file()


def test_boxes_that_cannot_be_scored(toy_slices, tmp_path, fails):
    boxes = tmp_path / "boxes.csv"

    def message(*data) -> str:
        words = options(data[0], tmp_path / "out", boxes)
        return fails(evaluation, *words, "--data", *data)

    boxes.write_text(HEADER + "toy_9,1,1,1,1,2,2\n")
    assert "there is no case 'toy_9'" in message(toy_slices)
    boxes.write_text(HEADER + "toy_0,9,1,1,1,2,2\n")
    assert "no box is of a label in one of the" in message(toy_slices)
    copy = tmp_path / "copy"
    shutil.copytree(toy_slices, copy, ignore=shutil.ignore_patterns("embeddings"))
    edit_json(copy / "dataset.json", lambda meta: meta.update(name="copy"))
    assert "two data sets have a case 'toy_0'" in message(toy_slices, copy)
    assert not (tmp_path / "out").exists()
