"""Paired comparisons and conclusions, on made-up scores."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturb import BOX_KINDS, Shift
from tests.evaluation.helpers import context, made_up, mean, protocol, where
from utils.evaluation.comparisons import comparison_table, conclusions
from utils.evaluation.families import spread_table
from utils.evaluation.scoring import Row
from utils.evaluation.statistics import holm, to_frame
from utils.evaluation.tables import table_one

FIRST = {"instances are": "all", "box": "shrink", "shift": "15%", "score": "DSC"}


def compare(scores: pd.DataFrame, **changes) -> pd.DataFrame:
    return comparison_table(scores, context(**changes)).frame


def test_comparison_is_scipys_wilcoxon_over_patients_with_holm():
    scores = made_up(12)
    frame = where(compare(scores), **FIRST).set_index("against")
    p_values = {}
    for other in ("untouched", "medsam"):
        ours, theirs = (
            [
                mean(scores, "dsc", model=m, box="shrink", shift="15%", case=f"p{n}")
                for n in range(12)
            ]
            for m in ("adaptive", other)
        )
        p_values[other] = stats.wilcoxon(np.subtract(ours, theirs)).pvalue
        expected = np.mean(ours) - np.mean(theirs)
        assert frame.loc[other, "difference"].value == pytest.approx(expected)
    assert frame["p"].to_dict() == {other: f"{p:.2g}" for other, p in p_values.items()}
    corrected = [f"{p:.2g}" for p in holm(list(p_values.values()))]
    assert frame["p (Holm)"].tolist() == corrected
    assert set(frame["verdict"]) == {"better"}


def test_verdicts():
    assert set(compare(made_up(12), proposed="untouched")["verdict"]) == {"worse"}
    assert set(compare(made_up(5))["verdict"]) == {"too few patients"}
    one = where(made_up(12), model="medsam").astype({"model": str})
    twins = pd.concat([one, one.assign(model="adaptive")])
    assert set(compare(twins)["verdict"]) == {"not distinguishable"}
    assert not len(compare(where(made_up(12), model="adaptive")))  # nothing to compare with


def test_two_cases_of_one_patient_are_one_observation():
    """Scans of one patient, such as two phases of contrast, resemble each other."""
    scores = made_up(16, draws=2)
    patients = scores["case"].map({f"p{n}": f"patient {n // 2}" for n in range(16)})
    scores["patient"] = patients.astype("category")
    frame = compare(scores)
    assert (frame["patients"][0], frame["instances"][0]) == ("8", "32")
    assert max(frame["patients ahead"].astype(int)) == 8
    assert min(frame["p"].astype(float)) == pytest.approx(2 / 2**8, rel=0.02)
    shift = protocol().shift
    assert "8 patients, 32 instances" in table_one(scores, context(), shift).caption
    assert set(spread_table(scores, context(protocol=protocol(draws=2))).frame["patients"]) == {"8"}


def test_patients_of_the_same_name_in_two_data_sets_are_two():
    scores = made_up(6)
    both = pd.concat([scores, scores.assign(dataset="other")], ignore_index=True)
    frame = compare(both)
    assert (frame["patients"][0], frame["instances"][0]) == ("12", "24")
    assert max(frame["patients ahead"].astype(int)) == 12


def test_better_on_average_is_not_better_if_most_patients_are_worse():
    """35 of 40 patients a little worse, 5 much better: the mean and the ranks disagree."""
    rows = []
    rng = np.random.default_rng(0)
    for number in range(40):
        gain = 0.5 if number < 5 else -0.001 - 0.009 * rng.random()
        for model, score in (("medsam", 0.4), ("adaptive", 0.4 + gain)):
            for box in BOX_KINDS:
                shift = "0%" if box == "standard" else "15%"
                place = (model, "a", f"p{number:02d}", f"p{number:02d}", 1, "liver")
                rows.append(Row(*place, box, shift, 0, 90, False, score, score, 0.0, 0.0))
    only = protocol(shifts=(Shift(0.15, "side"),))
    first = compare(to_frame(rows), protocol=only).iloc[0]
    assert first["difference"].interval[0] > 0 and float(first["p (Holm)"]) < 0.05
    assert (first["patients ahead"], first["verdict"]) == ("5", "not distinguishable")


def test_populations_are_kept_apart():
    scores = made_up(9)
    frame = compare(scores)
    instances = frame.groupby("instances are")["instances"].unique().map(list).to_dict()
    assert instances == {"all": ["18"], "small": ["9"], "large": ["9"]}
    assert len(frame) == 3 * 5 * 2 * 2  # populations, boxes, scores, models
    for small in (True, False):
        assert set(compare(where(scores, small=small))["instances are"]) == {"all"}


@pytest.mark.parametrize(
    ("patients", "expected"),
    [
        (
            12,
            [
                r"Boxes too small by up to 15%: adaptive is better, \+(19.9|20.0|20.1) \[",
                r"ahead in 12 of 12 patients, 24 instances; Holm-corrected p 0.00",
                r"too large by up to 20px: adaptive is better",
                r"Small instances, tight boxes: .* 12 instances",
                r"up to 15% the DSC of adaptive changes by -5.0 \[-5.0, -5.0\] points",
            ],
        ),
        (5, [r"Tight boxes: too few patients to conclude, 7 are needed, \+\d\.\d points"]),
    ],
)
def test_conclusions_follow_the_numbers(patients, expected):
    scores = made_up(patients)
    text = "\n".join(conclusions(compare(scores), scores, context()))
    for line in expected:
        assert re.search(line, text), line
    assert ("is better" in text) == (patients == 12)
