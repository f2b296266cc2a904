"""Statistics against SciPy, on made-up data whose answers are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tests.evaluation.helpers import made_up
from utils.evaluation.statistics import (
    RESAMPLES,
    Estimate,
    average,
    count_instances,
    count_patients,
    estimate_mean,
    holm,
    min_p,
    patients_needed,
    wilcoxon,
)


def frame_of(values, patients) -> pd.DataFrame:
    """Scores of patients of one data set, each of an instance of its own."""
    columns = {"dataset": "a", "patient": patients, "case": patients, "slice": range(len(values))}
    return pd.DataFrame(columns | {"label": "liver", "part": 1, "dsc": values})


def mean_of(values, patients) -> Estimate:
    return estimate_mean(frame_of(values, patients), "dsc")


def many(patients: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 7, patients)
    which = np.repeat([f"p{n}" for n in range(patients)], counts)
    level = np.repeat(rng.normal(0.8, 0.1, patients), counts)
    return level + rng.normal(0, 0.02, len(which)), which


def test_mean_is_over_instances():
    one = mean_of([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"])
    assert (one.value, one.patients, one.instances) == (0.25, 2, 4)
    # Two of two patients are drawn: a twice, b twice, or each once.
    resampled = one.values[1:].round(6)
    share = [(resampled == value).mean() for value in (0.0, 0.25, 1.0)]
    assert share == pytest.approx([0.25, 0.5, 0.25], abs=0.02) and sum(share) == 1


def test_draws_are_not_instances_and_names_count_within_their_data_set():
    scores = made_up(4, draws=3)
    assert (count_patients(scores), count_instances(scores)) == (4, 8)
    both = pd.concat([scores, scores.assign(dataset="other")], ignore_index=True)
    mean = estimate_mean(both, "dsc")
    assert (mean.patients, mean.instances, count_patients(both)) == (8, 16, 8)
    assert count_instances(scores.drop(columns="slice")) == 8  # as of volumes.csv


def test_interval_is_scipys_bootstrap_over_patients():
    values, which = many(25)
    one = mean_of(values, which)
    by_patient = [values[which == name] for name in np.unique(which)]
    expected = stats.bootstrap(
        ([part.sum() for part in by_patient], [len(part) for part in by_patient]),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=1,
    ).confidence_interval
    width = expected.high - expected.low
    assert one.interval == pytest.approx((expected.low, expected.high), abs=0.03 * width)


def test_differences_and_averages_are_paired():
    values, which = many(20)
    first, second = mean_of(values + 0.03, which), mean_of(values, which)
    difference = first - second
    assert (difference.value, *difference.interval) == pytest.approx((0.03, 0.03, 0.03))
    assert average([first, second]).value == pytest.approx(values.mean() + 0.015)
    interval = average([first, second]).interval
    assert np.subtract(interval, second.interval) == pytest.approx([0.015, 0.015])


def test_too_few_patients_have_no_interval():
    """Five: even from the least to the greatest they hold the median in 1 - 2 / 2^5 < 95 %."""
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert np.isnan(mean_of(values[:5], list("abcde")).interval).all()
    assert not np.isnan(mean_of(values, list("abcdef")).interval).any()
    few = Estimate(np.full(9, 0.123), 5, 5)
    assert few.percent() == "12.30"
    assert Estimate(few.values, 6, 6).percent(1, sign="+") == "+12.3 [+12.3, +12.3]"


def test_wilcoxon_is_scipys_with_known_answers():
    values = many(15)[0][:15] - 0.78
    assert wilcoxon(values) == stats.wilcoxon(values).pvalue
    assert wilcoxon(np.arange(1, 9)) == 2 / 2**8  # all the same way: exact
    assert wilcoxon(np.zeros(8)) == 1
    # Ranks 1-8, the smallest against: P(W <= 1) = 2 of 256, two-sided.
    assert wilcoxon([-1, 2, 3, 4, 5, 6, 7, 8]) == pytest.approx(4 / 2**8)
    assert wilcoxon([0.1] * 8) == 2 / 2**8  # ties: not below what the exact test can give


def test_holm_by_hand():
    # The textbook's: 0.01 x 4, 0.02 x 3, then never less than the one before.
    assert holm([0.02, 0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.06, 0.04, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04] and holm([]) == []


@pytest.mark.parametrize(("patients", "comparisons"), [(7, 5), (8, 5), (6, 1), (5, 1), (9, 6)])
def test_min_p_is_what_the_test_gives_at_best(patients, comparisons):
    """All patients better in all comparisons: nothing can be clearer."""
    p = stats.wilcoxon(np.arange(1, patients + 1)).pvalue
    assert min(holm([p] * comparisons)) == pytest.approx(min_p(patients, comparisons))
    assert (min_p(patients, comparisons) < 0.05) == (patients >= patients_needed(comparisons))
