"""The slices and boxes of an evaluation: by kind, and the same for every model in any order."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

import eval as evaluation
from perturb import Shift, mask_areas, read_errors
from tests.evaluation.helpers import evaluate, protocol, stack
from tests.helpers import BOXES_HEADER as HEADER
from tests.helpers import call, copy_slices
from utils.data.slices import read_instances
from utils.evaluation.interpolation import find_tracks
from utils.evaluation.prompts import (
    GIVEN,
    Prompt,
    all_prompts,
    box_chunks,
    boxes_drawn,
    boxes_of,
    every_boxes,
    select_slices,
)

OUTWARD = np.array([-1, -1, 1, 1])


def test_slices_are_spread_over_each_patient(slices):
    class Dataset:
        def split(self, name):
            cases = (("a", 9, "p"), ("b", 2, "q"), ("c", 1, "q"))
            return [
                replace(slices[0], case=case, index=z, patient=patient)
                for case, n, patient in cases
                for z in range(n)
            ]

    def chosen(count):
        return [f"{s.case}{s.index}" for s in select_slices(Dataset(), "test", count)]

    assert chosen(3) == ["a1", "a4", "a7", "b0", "b1", "c0"] and chosen(1) == ["a4", "b1"]
    assert len(chosen(None)) == 12


def boxes(sample, kind: str, shift: str, draw: int = 0, seed: int = 0) -> np.ndarray:
    return boxes_of(sample, *masks_of(sample), Prompt(kind, Shift.parse(shift), draw), seed)


def masks_of(sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, tight boxes and areas."""
    label_map, labels, tight = read_instances(sample)
    return labels, tight, mask_areas(label_map, labels)


def sides_of(tight: np.ndarray) -> np.ndarray:
    return np.tile(tight[:, 2:] - tight[:, :2] + 1, 2)


def test_boxes_are_the_same_for_every_model_and_in_any_order(slices):
    _, models = evaluate(slices, a=lambda target: target, b=torch.zeros_like)
    _, reverse = evaluate(slices[::-1], a=lambda target: target)
    orders = [[boxes.tobytes() for boxes in each["a"].boxes] for each in (models, reverse)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    for first, other in zip(models["a"].boxes, models["b"].boxes, strict=True):
        assert (first == other).all()


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
    swept = (boxes(sample, "sweep", "-10%") - tight) * OUTWARD
    assert swept == pytest.approx(-0.1 * sides, abs=1e-3)


def test_boxes_like_those_in_every_fifth_slice_err_as_these_did(slices):
    sample = slices[0]
    tight, erring = boxes(sample, "standard", "0%"), boxes(sample, "like every 5", "0%")
    shares = ((erring - tight) * OUTWARD / sides_of(tight)).round(3)
    rows = read_errors(protocol="every 5")[:, 1:].round(3).tolist()
    assert all(share in rows for share in shares.tolist()) and (shares != 0).any()
    assert (boxes(sample, "like every 10", "0%") != erring).any()
    assert "like every 5" not in [p.box for p in all_prompts(protocol(given={"every 5": {}}))]


def test_every_instance_and_draw_has_boxes_of_its_own(slices):
    shares = []
    for sample, draw in product(slices[:4], (0, 1)):
        tight = boxes(sample, "standard", "0%")
        shares.append(abs(boxes(sample, "expansion", "15%", draw) - tight) / sides_of(tight))
    drawn = np.concatenate(shares).round(5)
    assert len(np.unique(drawn)) == drawn.size
    first, second = (boxes(slices[0], "shrink", "15%", seed=seed) for seed in (0, 1))
    assert (first != second).all()


def test_chunks_are_small_and_hold_every_prompt_and_given_box(slices):
    sample = slices[0]
    masks = masks_of(sample)
    a, b, c = np.eye(4, dtype=np.float32)[:3]
    given = {(sample.key, 2): [a, b], (sample.key, 1): [c], ("other", 1): [a]}
    sweep = tuple(Shift.parse(f"{share}%") for share in range(-20, 21) if share)
    many = protocol(sweep=sweep, draws=2, given={GIVEN: given})
    *chunks, first, second = box_chunks(sample, *masks, many, max_boxes=32)
    prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
    assert prompts == all_prompts(many) and len(prompts) == 1 + 2 * 2 * 2 + 2 + 4 + 40
    for chunk in chunks:
        assert chunk.positions == [0, 1] and len(chunk.boxes) <= 32
        expected = [boxes(sample, p.box, str(p.shift), p.draw) for p in chunk.prompts]
        assert (chunk.boxes == np.concatenate(expected)).all()
    assert first.positions == [0, 1] and first.boxes.tolist() == [[*c], [*a]]
    assert second.positions == [1] and second.boxes.tolist() == [[*b]]
    assert [chunk.prompts[0].draw for chunk in (first, second)] == [0, 1]
    assert len(box_chunks(sample, *masks, many, max_boxes=1)) == len(prompts) + 2


def test_boxes_of_every_nth_slice_are_in_the_frame_and_counted(tmp_path):
    slices = stack(tmp_path).split("all")
    tracks = find_tracks(slices)
    given = every_boxes(tracks, (2, 3))
    assert [*given] == ["every 2", "every 3"]
    of_z = {sample.index: sample for sample in slices}
    (found,) = given["every 3"][of_z[5].key, 2]
    assert (found == of_z[5].frame.boxes_to_frame(np.array([[40, 10, 59, 29]]))[0]).all()
    for z, label in ((1, 1), (4, 1), (1, 2), (4, 2), (7, 2)):  # key slices
        _, labels, tight = read_instances(of_z[z])
        (box,) = given["every 3"][of_z[z].key, label]
        assert (box == tight[labels.tolist().index(label)]).all()
    made = protocol(sweep=(), given=given, every=(2, 3), tracks={("stack", "s0"): tracks})
    masks = masks_of(of_z[5])
    *_, second, third = box_chunks(of_z[5], *masks, made, max_boxes=32)
    assert [chunk.prompts[0].box for chunk in (second, third)] == ["every 2", "every 3"]
    assert masks[0].tolist() == [2] and third.boxes.tolist() == [found.tolist()]
    assert {place[2:]: number for place, number in boxes_drawn(made).items()} == {
        **{("spot", "standard"): 6, ("bar", "standard"): 7},
        **{("spot", "every 2"): 3 + 2, ("bar", "every 2"): 4},
        **{("spot", "every 3"): 2 + 2, ("bar", "every 3"): 3},
        **{("spot", "propagated"): 2, ("bar", "propagated"): 1},
    }


def options(data, out, *boxes) -> list:
    words = ["--data", data, "--out", out, "--models", "lite_medsam", "--split", "all"]
    return [*words, "--shift", "15%", "--no-sweep", "--no-figures", "--boxes", *boxes]


def test_given_boxes_are_scored_like_the_others(toy_slices, slices, tmp_path, capsys):
    """The tight box of a target has the tight box's scores; a second reader's box is a draw."""
    rows = []
    for sample in slices:
        if label := {"toy_0": 1, "toy_2": 2}.get(sample.case):
            native = sample.frame.labels_to_native(read_instances(sample)[0])
            y, x = np.nonzero(native == label)
            place = f"{sample.case},{label},{sample.index}"
            rows.append(f"{place},{x.min()},{y.min()},{x.max()},{y.max()}\n")
    rows += ["toy_0,large,1,0,0,95,79\n", "toy_0,9,1,1,1,2,2\n", "toy_0,1,0,1,1,2,2\n"]
    (tmp_path / "boxes.csv").write_text(HEADER + "".join(rows))
    words = options(toy_slices, tmp_path / "out", tmp_path / "boxes.csv")
    call(evaluation, *words, "--device", "cpu")
    scores = pd.read_csv(tmp_path / "out" / "instances.csv")
    keys = ["case", "slice", "label"]
    given = scores[scores["box"] == "given"].set_index(keys)
    standard = scores[scores["box"] == "standard"].set_index(keys)
    first, second = (given[given["draw"] == draw]["dsc"] for draw in (0, 1))
    assert len(first) == 4 and (first == standard.loc[first.index, "dsc"]).all()
    assert second.index.tolist() == [("toy_0", 1, "large")]
    assert (second < standard.loc[second.index, "dsc"]).all()
    note = "2 of the given boxes left out: no matching instance in this evaluation."
    assert note in capsys.readouterr().out and note in (tmp_path / "out/report.md").read_text()
    assert (tmp_path / "out" / "given.csv").is_file()


def test_boxes_that_cannot_be_scored(toy_slices, tmp_path, fails):
    boxes = tmp_path / "boxes.csv"

    def message(*data) -> str:
        return fails(evaluation, *options(data[0], tmp_path / "out", boxes), "--data", *data)

    boxes.write_text(HEADER + "toy_9,1,1,1,1,2,2\n")
    assert "there is no case 'toy_9'" in message(toy_slices)
    boxes.write_text(HEADER + "toy_0,livver,1,1,1,2,2\n")
    assert "toy_0 has no label 'livver'; choose from large, small" in message(toy_slices)
    boxes.write_text(HEADER + "toy_0,9,1,1,1,2,2\n")
    assert "no box matches a label in any of the" in message(toy_slices)
    copy = copy_slices(toy_slices, tmp_path / "copy", lambda meta: meta.update(name="copy"))
    assert "two data sets have a case 'toy_0'" in message(toy_slices, copy)
    assert not (tmp_path / "out").exists()
