"""Comparisons, conclusions, families of boxes and curves, on made-up scores."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturb import BOX_KINDS, Shift
from tests.evaluation.helpers import context, made_up, mean, protocol, where
from utils.evaluation.comparisons import (
    comparison_table,
    conclusions,
    family_table,
    headline,
    main_rows,
    robustness_table,
)
from utils.evaluation.scoring import Row
from utils.evaluation.statistics import holm, to_frame
from utils.evaluation.tables import table_one

FIRST = {"size": "all", "box": "shrink", "shift": "15%", "score": "DSC"}
SHIFTED = ["expansion 15%", "shrink 15%", "expansion 20px", "shrink 20px", "loose 15%"]
FAMILIES = ["tight", *SHIFTED, "every 5", "every 10"]


def compare(scores: pd.DataFrame, **changes) -> pd.DataFrame:
    return comparison_table(scores, context(**changes)).frame


def test_comparison_is_scipys_wilcoxon_over_patients_with_holm():
    scores = made_up(12)
    frame = where(compare(scores), **FIRST).set_index("against")
    shrunk = where(scores, box="shrink", shift="15%").astype({"model": str, "case": str})
    means = shrunk.pivot_table("dsc", "case", "model")
    p_values = {}
    for other in ("untouched", "medsam"):
        gain = means["adaptive"] - means[other]
        p_values[other] = stats.wilcoxon(gain).pvalue
        assert frame.loc[other, "difference"].value == pytest.approx(gain.mean())
    assert frame["p"].to_dict() == {other: f"{p:.2g}" for other, p in p_values.items()}
    assert frame["p (Holm)"].tolist() == [f"{p:.2g}" for p in holm(list(p_values.values()))]
    assert set(frame["verdict"]) == {"better"}


def test_verdicts():
    assert set(compare(made_up(12), proposed="untouched")["verdict"]) == {"worse"}
    assert set(compare(made_up(5))["verdict"]) == {"too few patients"}
    one = where(made_up(12), model="medsam").astype({"model": str})
    twins = pd.concat([one, one.assign(model="adaptive")])
    assert set(compare(twins)["verdict"]) == {"not distinguishable"}
    assert not len(compare(where(made_up(12), model="adaptive")))  # nothing to compare with


def test_two_cases_of_one_patient_are_one_observation():
    scores = made_up(16, draws=2)
    patients = scores["case"].map({f"p{n}": f"patient {n // 2}" for n in range(16)})
    scores["patient"] = patients.astype("category")
    frame = compare(scores)
    assert (frame["patients"][0], frame["instances"][0]) == ("8", "32")
    assert max(frame["patients ahead"].astype(int)) == 8
    assert min(frame["p"].astype(float)) == pytest.approx(2 / 2**8, rel=0.02)
    shift = protocol().shift
    assert "8 patients, 32 instances" in table_one(scores, context(), shift).caption


def test_better_on_average_is_not_better_if_most_patients_are_worse():
    """35 of 40 patients a little worse, 5 much better: the mean and the ranks disagree."""
    rows = []
    rng = np.random.default_rng(0)
    for number in range(40):
        gain = 0.5 if number < 5 else -0.001 - 0.009 * rng.random()
        for model, score in (("medsam", 0.4), ("adaptive", 0.4 + gain)):
            for box in BOX_KINDS:
                shift = "0%" if box == "standard" else "15%"
                place = (model, "a", f"p{number:02d}", f"p{number:02d}", 1, "liver", 1)
                rows.append(Row(*place, box, shift, 0, 90, False, score, score, 0.0, 0.0))
    only = protocol(shifts=(Shift(0.15, "side"),))
    first = compare(to_frame(rows), protocol=only).iloc[0]
    assert first["difference"].interval[0] > 0 and float(first["p (Holm)"]) < 0.05
    assert (first["patients ahead"], first["verdict"]) == ("5", "not distinguishable")


def test_populations_are_kept_apart():
    scores = made_up(9)
    frame = compare(scores)
    instances = frame.groupby("size")["instances"].unique().map(list).to_dict()
    assert instances == {"all": ["18"], "small": ["9"], "large": ["9"]}
    assert len(frame) == 3 * 5 * 2 * 2  # populations, boxes, scores, models
    for small in (True, False):
        assert set(compare(where(scores, small=small))["size"]) == {"all"}


def test_conclusions_follow_the_numbers():
    enough, few = made_up(12), made_up(5)
    enough, few = (
        "\n".join(conclusions(main_rows(table, context()).frame, scores, context()))
        for scores, table in ((s, comparison_table(s, context())) for s in (enough, few))
    )
    for line in (
        r"Boxes too small by up to 15%: adaptive is better, \+(19.9|20.0|20.1) \[",
        r"ahead in 12 of 12 patients, 24 instances; Holm-corrected p 0.00",
        r"too large by up to 20px: adaptive is better",
        r"up to 15% the DSC of adaptive changes by -5.0 \[-5.0, -5.0\] points",
    ):
        assert re.search(line, enough), line
    assert few == "5 patients cannot support a conclusion: 7 are needed for any p under 0.05."


def families(scores: pd.DataFrame, population: str = "all", **changes) -> pd.DataFrame:
    frame = family_table(scores, context(**changes)).frame
    return where(frame, **{"size": population}).set_index("training")


def dsc_of(frame: pd.DataFrame, name: str = "value") -> pd.DataFrame:
    return frame[FAMILIES].map(lambda estimate: getattr(estimate, name))


def test_regret_is_the_distance_from_the_best_training_in_each_family():
    scores = made_up(8)
    frame = families(scores)
    boxes = [("standard", "0%"), *(tuple(name.split()) for name in SHIFTED)]
    boxes += [("like every 5", "0%"), ("like every 10", "0%")]
    for model in scores["model"].unique():
        expected = [mean(scores, "dsc", model=model, box=box, shift=shift) for box, shift in boxes]
        assert dsc_of(frame).loc[model].tolist() == pytest.approx(expected)
    dsc = dsc_of(frame)
    worst = frame["worst regret"].map(lambda estimate: estimate.value)
    assert worst.to_dict() == pytest.approx((dsc.max() - dsc).max(axis=1).to_dict())
    assert worst.is_monotonic_increasing and frame.index[0] == "adaptive"
    shares = dsc.drop(columns=["expansion 20px", "shrink 20px"])
    without = frame["without px"].map(lambda estimate: estimate.value)
    assert without.to_dict() == pytest.approx((shares.max() - shares).max(axis=1).to_dict())
    assert set(frame["seeds"]) == {"1"} and set(frame["regret of seeds"]) == {""}
    small = where(scores, small=True)
    expected = mean(small, "dsc", model="medsam", box="standard")
    assert families(scores, "small").loc["medsam", "tight"].value == pytest.approx(expected)
    assert not len(families(where(scores, model="medsam")))  # alone it has nothing to regret


def test_the_regret_without_pixels_leaves_their_families_out():
    scores = made_up(8)
    cut = (scores["box"] == "shrink") & (scores["shift"] == "20px")
    scores.loc[cut & (scores["model"] == "adaptive"), "dsc"] -= 0.5
    regret = families(scores).loc["adaptive"]
    assert regret["without px"].value == pytest.approx(0) and regret["worst regret"].value > 0.2


def test_real_boxes_in_every_nth_slice_stand_in_the_place_of_drawn_ones():
    scores = made_up(8).astype({"box": str})
    scores["box"] = scores["box"].replace({"like every 5": "every 5"})
    frame, like = families(scores), families(made_up(8))
    assert frame.columns.tolist() == like.columns.tolist()
    assert dsc_of(frame).equals(dsc_of(like))


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
    assert pair.loc["first", "regret of seeds"] == f"{low:.1f} … {high:.1f}"


def test_headline_starts_with_the_smallest_worst_regret_and_adds_the_proposed_model():
    scores = made_up(8)
    table = family_table(scores, context()).frame
    line, other = (headline(table, context(proposed=name)) for name in ("adaptive", "medsam"))
    assert line.startswith("Smallest worst regret over the families of boxes: adaptive, 0.0 [")
    worst = families(scores).loc["medsam", "worst regret"]
    assert " has " not in line and other.endswith(f"; medsam has {worst.percent(1)}.")


def test_curves_hold_the_sweep_and_the_tight_box():
    scores = made_up(8)
    frame = robustness_table(scores, context()).frame
    assert set(frame["unit"]) == {"side"} and len(frame) == 2 * 2 * 3 * 3  # the sweep has no pixels
    curve = where(frame, model="medsam", score="DSC", **{"size": "all"})
    assert curve["shift"].tolist() == ["-20%", "0%", "20%"] and set(curve["patients"]) == {"8"}
    expected = [
        mean(scores, "dsc", model="medsam", box=box, shift=shift)
        for box, shift in (("sweep", "-20%"), ("standard", "0%"), ("sweep", "20%"))
    ]
    assert [point.value for point in curve["mean"]] == pytest.approx(expected)
    small = where(scores, small=True)
    assert set(robustness_table(small, context()).frame["size"]) == {"all"}
    assert not len(robustness_table(scores, context(protocol=protocol(sweep=()))).frame)
