"""Paired comparisons and conclusions, on made-up scores."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturb import BOX_KINDS, Shift
from tests.evaluation.helpers import made_up, protocol, where
from utils.evaluation.comparisons import compare, comparison_table, conclusions
from utils.evaluation.instances import by_instance, to_frame
from utils.evaluation.paper_tables import table_one
from utils.evaluation.robustness import curves, spread_table
from utils.evaluation.scoring import Row
from utils.evaluation.statistics import holm


def test_comparison_is_scipys_wilcoxon_over_patients_with_holm():
    scores = made_up(12)
    shrink = {
        one.other: one
        for one in compare(scores, protocol())
        if (one.population, one.box, str(one.shift), one.score) == ("all", "shrink", "15%", "dsc")
    }
    p = []
    for other in ("untouched", "medsam"):
        means = []
        for name in ("adaptive", other):
            of_model = where(scores, model=name, box="shrink", shift="15%")
            means.append([where(of_model, case=f"p{n}")["dsc"].mean() for n in range(12)])
        p.append(stats.wilcoxon(np.subtract(*means)).pvalue)
        assert shrink[other].difference.value == pytest.approx(np.subtract(*means).mean())
        assert shrink[other].p == pytest.approx(p[-1])
    assert [shrink[o].p_holm for o in ("untouched", "medsam")] == pytest.approx(holm(p))
    assert {one.verdict for one in shrink.values()} == {"better"}


def test_verdicts():
    worse = compare(made_up(12), protocol(proposed="untouched"))
    assert {one.verdict for one in worse} == {"worse"}
    few = compare(made_up(5), protocol())
    assert {one.verdict for one in few} == {"too few patients"}
    one = where(made_up(12), model="medsam").astype({"model": str})
    twins = pd.concat([one, one.assign(model="adaptive")])
    verdicts = {one.verdict for one in compare(twins, protocol())}
    assert verdicts == {"not distinguishable"}


def test_two_cases_of_one_patient_are_one_observation():
    """Scans of one patient, such as two phases of contrast, resemble each other."""
    scores = made_up(16, draws=2)
    patients = scores["case"].map({f"p{n}": f"patient {n // 2}" for n in range(16)})
    scores["patient"] = patients.astype("category")
    (first, *_) = compared = compare(scores, protocol())
    assert first.difference.patients == 8 and first.difference.instances == 32
    assert max(one.ahead for one in compared) == 8 and min(one.p for one in compared) == 2 / 2**8
    assert len(by_instance(scores, "dsc")) == 32
    assert "8 patients, 32 instances" in table_one(scores, protocol(), protocol().shifts[0]).how
    assert set(spread_table(scores, protocol(draws=2)).frame["patients"]) == {"8"}


def test_better_on_average_is_not_better_if_most_patients_are_worse():
    """35 of 40 patients a little worse, 5 much better: the mean and the ranks disagree."""
    rows = []
    rng = np.random.default_rng(0)
    for number in range(40):
        gain = 0.5 if number < 5 else -0.001 - 0.009 * rng.random()
        for model, score in (("medsam", 0.4), ("adaptive", 0.4 + gain)):
            for box in BOX_KINDS:
                shift = "0%" if box == "standard" else "15%"
                patient = f"p{number:02d}"
                names = (model, patient, patient, 1, "liver", box, shift, 0, 90, False)
                rows.append(Row(*names, score, score, 0.0, 0.0))
    first = compare(to_frame(rows), protocol(shifts=(Shift(0.15, "side"),)))[0]
    assert first.difference.interval[0] > 0 and first.p_holm < 0.05 and first.ahead == 5
    assert first.verdict == "not distinguishable"


def test_populations_are_kept_apart():
    scores = made_up(9)
    compared = compare(scores, protocol())
    instances = {one.population: one.difference.instances for one in compared}
    assert instances == {"all": 18, "small": 9, "large": 9}
    for small in (True, False):
        alone = where(scores, small=small)
        assert {one.population for one in compare(alone, protocol())} == {"all"}
        assert {one.population for one in curves(alone, protocol())} == {"all"}
    table = comparison_table(compared, protocol()).frame
    assert len(table) == len(compared) == 3 * 5 * 2 * 2  # populations, boxes, scores, models


def test_conclusions_follow_the_numbers():
    scores = made_up(12)
    text = "\n".join(conclusions(scores, compare(scores, protocol()), protocol()))
    better = r"Boxes too small by up to 15%: adaptive is better, \+(19.9|20.0|20.1) \["
    assert re.search(better, text) and "ahead in 12 of 12; Holm-corrected p" in text
    assert "12 patients, 24 instances" in text and "too large by up to 20px" in text
    assert "too small by up to 15% the DSC of adaptive changes by -5.0 [-5.0, -5.0] points" in text
    few = made_up(5)
    text = "\n".join(conclusions(few, compare(few, protocol()), protocol()))
    assert "too few patients to conclude" in text and "is better" not in text
    assert "instances are of 5 patients: with 2 comparisons no p under 0.12 is possible" in text
