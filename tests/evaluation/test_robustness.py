"""Robustness curves and the spread over draws."""

import pytest

from perturb import Shift
from tests.evaluation.helpers import made_up, protocol, where
from utils.evaluation import robustness
from utils.evaluation.robustness import Curve, curves
from utils.evaluation.statistics import estimate


def test_area_and_worst_point_by_hand():
    shifts = [Shift(size, "side") for size in (-0.2, 0.0, 0.1)]
    means = [estimate([value], ["a"], 1) for value in (0.2, 0.8, 0.6)]
    curve = Curve("all", "side", "dsc", "m", shifts, means)
    # Trapezoids: 0.2 wide at 0.5, 0.1 wide at 0.7.
    assert curve.area.value == pytest.approx((0.2 * 0.5 + 0.1 * 0.7) / 0.3)
    assert curve.worst == "20.0 at -20%"
    flat = Curve("all", "side", "dsc", "m", shifts, [estimate([0.7], ["a"], 1)] * 3)
    assert flat.area.value == pytest.approx(0.7)


def test_curves_hold_the_sweep_and_the_tight_box():
    scores = made_up(8)
    drawn = curves(scores, protocol())
    assert {(c.population, c.unit, c.score) for c in drawn} == {
        (population, "side", score) for population in ("all", "small") for score in ("dsc", "nsd")
    }  # the sweep has no pixels
    curve = next(c for c in drawn if (c.model, c.score, c.population) == ("medsam", "dsc", "all"))
    assert [str(shift) for shift in curve.shifts] == ["-20%", "0%", "20%"]
    expected = [
        where(scores, model="medsam", box=box, shift=shift)["dsc"].mean()
        for box, shift in (("sweep", "-20%"), ("standard", "0%"), ("sweep", "20%"))
    ]
    assert [mean.value for mean in curve.means] == pytest.approx(expected)
    frame = robustness.robustness_table(drawn).frame
    assert len(frame) == 3 * len(drawn) and set(frame["patients"]) == {"8"}
    areas = robustness.area_table(drawn, protocol()).frame
    assert len(areas) == len(drawn) / 2  # both scores in one row
    assert curves(scores, protocol(sweep=())) == []


def test_spread_over_draws():
    """Draws differ by 0.02 each."""
    frame = robustness.spread_table(made_up(6, draws=3), protocol(draws=3)).frame
    assert frame["standard deviation"][0].value == pytest.approx(0.02, abs=1e-5)
