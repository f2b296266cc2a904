"""The scoring loop on models with known answers."""

import os

import numpy as np
import pandas as pd
import pytest
import torch

from perturb import BOX_KINDS, LOOSE, Shift
from tests.evaluation.helpers import evaluate, mean, protocol, where
from utils.data.slices import open_dataset
from utils.evaluation.instances import count_instances, count_patients, to_frame
from utils.evaluation.paper_tables import table_two
from utils.evaluation.prompts import Prompt
from utils.evaluation.scoring import Row, Scorer, Target, targets_of
from utils.system.errors import UserError

STANDARD = Prompt("standard", Shift(0.0, "side"))


@pytest.fixture
def slices(toy_slices):
    return open_dataset(toy_slices).split("all")


def target(mask: np.ndarray) -> Target:
    return Target("p", "p", 0, "x", mask, 2.0, (1.0, 1.0), 0.002, error_leak=0.1, error_dsc=0.5)


def test_models_with_known_answers(slices):
    scores, _ = evaluate(
        slices,
        target=lambda target: target,
        nothing=torch.zeros_like,
        half=lambda target: target & (torch.arange(1024) < target.any(0).nonzero().median()),
        everything=torch.ones_like,
    )
    prompts = 1 + 2 * 2 * 2 + 2 + 4  # standard; kinds, shifts, draws; loose; the sweep
    assert len(scores) == 4 * len(slices) * 2 * prompts  # models, slices, labels
    assert set(scores["box"]) == {*BOX_KINDS, LOOSE, "sweep"}
    for box in (*BOX_KINDS, LOOSE, "sweep"):
        exact = where(scores, model="target", box=box)[["dsc", "nsd", "leak", "error"]]
        assert (exact == [1, 1, 0, 0]).all(axis=None)
        empty = where(scores, model="nothing", box=box)[["dsc", "nsd", "leak", "error"]]
        assert (empty == [0, 0, 0, 1]).all(axis=None)
        assert mean(scores, "dsc", model="half", box=box) == pytest.approx(2 / 3, abs=0.08)
        assert (where(scores, model="everything", box=box)["error"] == 1).all()


def test_worker_processes_give_the_same_rows_in_the_same_order(slices):
    answers = {"half": lambda target: target & (torch.rand(1024) < 0.5), "all": torch.ones_like}
    frames = []
    for workers in (0, 2):
        torch.manual_seed(0)
        frames.append(evaluate(slices, workers=workers, **answers)[0])
    pd.testing.assert_frame_equal(*frames)


def test_a_worker_that_dies_is_reported():
    one = target(np.zeros((8, 8), bool))
    with Scorer(1) as scorer, pytest.raises(UserError, match="try fewer --workers"):
        for _ in range(1000):
            scorer.submit("m", [STANDARD], [one], np.zeros((1, 1, 8, 8), bool))
            scorer.finish()
            for process in scorer._pool._processes.values():
                os.kill(process.pid, 9)


def test_rows_of_several_processes_are_put_in_the_order_of_the_cases(slices):
    whole = evaluate(slices, target=lambda target: target)[0]
    cases = [entry.case for entry in slices]
    halves = [[s for s in slices if s.case in part] for part in (cases[4:], cases[:4])]
    rows = [
        Row(*row)
        for half in halves
        for row in evaluate(half, target=lambda target: target)[0].itertuples(index=False)
    ]
    pd.testing.assert_frame_equal(to_frame(rows, cases), whole)


def test_error_rates_of_models_with_known_answers(slices):
    """The small organ counts as small where the slice is large enough."""
    scores, _ = evaluate(slices, a=torch.zeros_like, b=lambda target: target)
    table = table_two(scores.assign(small=scores["label"] == "small"), protocol())
    assert table.frame["model"].tolist() == ["a", "b"]
    for (_, row), expected in zip(table.frame.iterrows(), (1.0, 0.0), strict=True):
        assert [row[kind].value for kind in BOX_KINDS] == [expected] * 3
        assert (row["patients"], row["instances"]) == ("4", "8")


@pytest.mark.parametrize(("pixels", "small"), [(6, True), (8, False)])
def test_small_is_a_share_of_the_slice(slices, pixels, small):
    native = np.zeros((60, 60), np.uint8)  # 0.2 % of 3600 are 7.2
    native[0, :pixels] = 1
    (one,) = targets_of(slices[0], [1], native, {"large": 2.0}, protocol(small_share=0.002))
    row = one.score("m", STANDARD, native == 1)
    assert row.pixels == pixels and row.small == small


def test_an_error_is_a_leak_or_a_miss():
    """A target of 10 x 10 pixels of 1 mm."""
    mask = np.zeros((60, 60), bool)
    mask[20:30, 20:30] = True

    def error(rows: slice, columns: slice) -> float:
        prediction = np.zeros_like(mask)
        prediction[rows, columns] = True
        return target(mask).score("m", STANDARD, prediction).error

    assert error(slice(20, 30), slice(20, 30)) == 0
    assert error(slice(20, 30), slice(20, 32)) == 0  # two pixels over: within the tolerance
    assert error(slice(20, 30), slice(20, 33)) == 0  # 10 % beyond it, not more
    assert error(slice(20, 30), slice(20, 34)) == 1
    assert error(slice(20, 24), slice(20, 30)) == 0  # DSC 0.57
    assert error(slice(20, 23), slice(20, 30)) == 1  # DSC 0.46


def grown(height: int, width: int):
    """An answer that is the target grown by half of height and width, 1024-frame pixels."""
    padding = (height // 2, width // 2)
    return lambda target: (
        torch.nn.functional.max_pool2d(target[None].float(), (height, width), 1, padding)[0] > 0
    )


def test_spacing_and_tolerance_are_millimetres(slices):
    """A target grown by one native pixel, 2 mm, is off by just that."""
    inside, _ = evaluate(slices[:1], tolerance=3.0, grown=grown(21, 21))
    outside, _ = evaluate(slices[:1], tolerance=1.0, grown=grown(21, 21))
    assert mean(inside, "nsd") == 1 and mean(inside, "leak") == 0
    assert mean(outside, "nsd") < 0.4 and mean(outside, "leak") > 0.1


def test_spacing_is_in_the_order_of_the_axes(slices):
    """One native pixel is 2 mm along y and 1.6 mm along x."""
    scores, _ = evaluate(slices[:1], tolerance=1.7, x=grown(1, 21), y=grown(21, 1))
    assert mean(scores, "nsd", model="x") == 1 and mean(scores, "leak", model="x") == 0
    assert mean(scores, "nsd", model="y") < 0.9 and mean(scores, "leak", model="y") > 0


def test_instances_are_named_and_counted_in_native_pixels(slices):
    scores, _ = evaluate(slices, target=lambda target: target)
    entries = {(entry.case, entry.index): entry for entry in slices}
    for row in scores.itertuples():
        entry = entries[row.case, row.slice]
        assert row.pixels == entry.labels[{"large": 1, "small": 2}[row.label]]
    one = where(scores, label="large")
    assert (count_patients(one), count_instances(one)) == (4, 8)
