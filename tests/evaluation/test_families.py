"""Families of boxes and regret, and the curve against the shift: by hand and over seeds."""

import numpy as np
import pandas as pd
import pytest

from perturb import Shift
from tests.evaluation.helpers import context, made_up, mean, protocol, where
from utils.evaluation.families import (
    area_table,
    family_table,
    headline,
    robustness_table,
    spread_table,
)
from utils.evaluation.statistics import Estimate

SIX = ["tight", "expansion 15%", "shrink 15%", "expansion 20px", "shrink 20px", "loose 15%"]


def families(scores: pd.DataFrame, population: str = "all", **changes) -> pd.DataFrame:
    frame = family_table(scores, context(**changes)).frame
    return where(frame, **{"instances are": population}).set_index("training")


def dsc_of(frame: pd.DataFrame, name: str = "value") -> pd.DataFrame:
    return frame[SIX].map(lambda estimate: getattr(estimate, name))


def test_regret_is_the_distance_from_the_best_training_in_each_family():
    scores = made_up(8)
    frame = families(scores)
    boxes = [("standard", "0%")] + [tuple(name.split()) for name in SIX[1:]]
    for model in scores["model"].unique():
        expected = [mean(scores, "dsc", model=model, box=box, shift=shift) for box, shift in boxes]
        assert dsc_of(frame).loc[model].tolist() == pytest.approx(expected)
    dsc = dsc_of(frame)
    worst = frame["worst regret"].map(lambda estimate: estimate.value)
    assert worst.to_dict() == pytest.approx((dsc.max() - dsc).max(axis=1).to_dict())
    assert worst.is_monotonic_increasing and frame.index[0] == "adaptive"
    assert set(frame["seeds"]) == {"1"} and set(frame["of the seeds"]) == {""}
    small = where(scores, small=True)
    expected = mean(small, "dsc", model="medsam", box="standard")
    assert families(scores, "small").loc["medsam", "tight"].value == pytest.approx(expected)


def test_in_each_resample_the_best_training_may_be_another_one():
    scores = made_up(8)
    # Equal on average, but not in every patient: neither is best in all resamples.
    odd = 0.02 * (scores["patient"].cat.codes % 2) - 0.01
    scores["dsc"] = 0.5 + odd.where(scores["model"] == "medsam", -odd)
    frame = families(scores[scores["model"] != "untouched"])
    one, other = (estimate.values[1:] for estimate in frame["worst regret"])
    assert [e.value for e in frame["worst regret"]] == pytest.approx([0, 0])
    assert (np.minimum(one, other) == 0).all() and one.max() > 0 and other.max() > 0


def test_seeds_of_a_training_are_averaged():
    scores = made_up(8)
    pair = families(scores, trainings={"medsam": "first", "adaptive": "first"})
    alone = dsc_of(families(scores))
    assert set(pair.index) == {"untouched", "first"}
    expected = (alone.loc["medsam"] + alone.loc["adaptive"]) / 2
    assert dsc_of(pair).loc["first"].tolist() == pytest.approx(expected.tolist())
    assert set(pair["instances"]) == {"16"} and pair.loc["first", "seeds"] == "2"
    # A seed is held against the best means too: one that is above them has no regret.
    assert pair.loc["first", "worst regret"].value == pytest.approx(0)
    low, high = (100 * (expected - alone.loc[m]).max() for m in ("adaptive", "medsam"))
    assert pair.loc["first", "of the seeds"] == f"{low:.1f} … {high:.1f}"


def test_headline_starts_with_the_smallest_worst_regret_and_adds_the_proposed_model():
    scores = made_up(8)
    table = family_table(scores, context(protocol=protocol(shifts=(Shift(0.15, "side"),)))).frame
    assert table.columns[5:-2].tolist() == ["tight", "expansion 15%", "shrink 15%", "loose 15%"]
    table = family_table(scores, context()).frame
    line, other = (headline(table, context(proposed=name)) for name in ("adaptive", "medsam"))
    assert line.startswith("Smallest worst regret over the families of boxes: adaptive, 0.0 [")
    worst = families(scores).loc["medsam", "worst regret"]
    assert " has " not in line and other.endswith(f"; medsam has {worst.percent(1)}.")


def test_one_model_alone_has_nothing_to_regret():
    assert not len(families(where(made_up(8), model="medsam")))


def test_curves_hold_the_sweep_and_the_tight_box():
    scores = made_up(8)
    frame = robustness_table(scores, context()).frame
    assert set(frame["unit"]) == {"side"} and len(frame) == 2 * 2 * 3 * 3  # the sweep has no pixels
    curve = where(frame, model="medsam", score="DSC", **{"instances are": "all"})
    assert curve["shift"].tolist() == ["-20%", "0%", "20%"] and set(curve["patients"]) == {"8"}
    expected = [
        mean(scores, "dsc", model="medsam", box=box, shift=shift)
        for box, shift in (("sweep", "-20%"), ("standard", "0%"), ("sweep", "20%"))
    ]
    assert [point.value for point in curve["mean"]] == pytest.approx(expected)
    small = where(scores, small=True)
    assert set(robustness_table(small, context()).frame["instances are"]) == {"all"}
    assert not len(robustness_table(scores, context(protocol=protocol(sweep=()))).frame)


def test_area_and_worst_point_by_hand():
    keys = {"unit": "side", "instances are": "all", "model": "m"}
    points = [("-20%", 0.2), ("0%", 0.8), ("10%", 0.6)]
    curves = pd.DataFrame(
        keys | {"score": score, "shift": shift, "mean": Estimate(np.array([mean]), 1, 1)}
        for score, scale in (("DSC", 1), ("NSD", 0.5))
        for shift, mean in [(shift, scale * mean) for shift, mean in points]
    )
    (row,) = area_table(curves, context()).frame.to_dict("records")
    # Trapezoids: 0.2 wide at 0.5, 0.1 wide at 0.7.
    assert row["DSC area"].value == pytest.approx((0.2 * 0.5 + 0.1 * 0.7) / 0.3)
    assert row["NSD area"].value == pytest.approx(row["DSC area"].value / 2)
    assert (row["DSC worst"], row["shifts"]) == ("20.0 at -20%", "-20% … 10%")


def test_spread_over_draws():
    """Draws differ by 0.02 each."""
    frame = spread_table(made_up(6, draws=3), context(protocol=protocol(draws=3))).frame
    assert frame["standard deviation"][0].value == pytest.approx(0.02, abs=1e-5)
    assert frame["instances"][0] == "12"
