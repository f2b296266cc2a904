"""Statistics against SciPy, on made-up data whose answers are known."""

import numpy as np
import pytest
from scipy import stats

from utils.evaluation.statistics import (
    RESAMPLES,
    combine,
    estimate,
    holm,
    least_p,
    patients_needed,
    wilcoxon,
)


def made_up(patients: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of patients with 1 to 6 instances each, and whose they are."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 7, patients)
    which = np.repeat([f"p{n}" for n in range(patients)], counts)
    level = np.repeat(rng.normal(0.8, 0.1, patients), counts)
    return level + rng.normal(0, 0.02, len(which)), which


def test_mean_is_over_instances():
    one = estimate([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"], 4)
    assert (one.value, one.patients, one.instances) == (0.25, 2, 4)
    # Two of two patients are drawn: a twice, b twice, or each once.
    assert set(one.resampled.round(6)) == {0.0, 0.25, 1.0}
    share = [(one.resampled.round(6) == value).mean() for value in (0.0, 0.25, 1.0)]
    assert share == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_interval_is_scipys_bootstrap_over_patients():
    values, which = made_up(25)
    one = estimate(values, which, len(values))
    sums = [values[which == name].sum() for name in np.unique(which)]
    counts = [(which == name).sum() for name in np.unique(which)]
    expected = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=1,
    ).confidence_interval
    width = expected.high - expected.low
    assert one.interval == pytest.approx((expected.low, expected.high), abs=0.03 * width)


def test_interval_is_of_patients_not_of_instances():
    """A hundred slices of each of six patients say no more than one of each."""
    values, names = [0.5, 0.6, 0.7, 0.9, 0.4, 0.8], list("abcdef")
    few = estimate(values, names, 6)
    many = estimate(np.repeat(values, 100), np.repeat(names, 100), 600)
    assert many.interval == pytest.approx(few.interval)
    assert 0.4 < few.interval[0] < few.interval[1] < 0.9


def test_difference_is_paired():
    values, which = made_up(20)
    first, second = (estimate(v, which, len(v)) for v in (values + 0.03, values))
    difference = first - second
    assert difference.value == pytest.approx(0.03)
    assert difference.interval == pytest.approx((0.03, 0.03))
    assert combine([first, second]).value == pytest.approx(values.mean() + 0.015)
    others = estimate(values, [f"other {name}" for name in which], len(values))
    with pytest.raises(ValueError, match="different patients"):
        first - others


def test_too_few_patients_have_no_interval_and_none_no_mean():
    """Five: even from the least to the greatest they hold the median in 1 - 2 / 2^5 < 95 %."""
    assert np.isnan(estimate([0.5, 0.6], ["a", "a"], 2).interval).all()
    assert np.isnan(estimate([0.1, 0.2, 0.3, 0.4, 0.5], list("abcde"), 5).interval).all()
    assert not np.isnan(estimate([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], list("abcdef"), 6).interval).any()
    with pytest.raises(ValueError, match="no values"):
        estimate([], [], 0)


def test_wilcoxon_is_scipys_over_patients_means():
    values, which = made_up(15)
    differences = values - 0.78
    means = [differences[which == name].mean() for name in np.unique(which)]
    assert wilcoxon(differences, which) == stats.wilcoxon(means).pvalue
    # Repeating every instance changes nothing.
    assert wilcoxon(np.tile(differences, 3), np.tile(which, 3)) == pytest.approx(
        stats.wilcoxon(means).pvalue
    )


def test_wilcoxon_with_known_answers():
    names = [f"p{n}" for n in range(8)]
    assert wilcoxon(np.arange(1, 9), names) == 2 / 2**8  # all the same way: exact
    assert wilcoxon(np.zeros(8), names) == 1
    # Ranks 1-8, the smallest against: P(W <= 1) = 2 of 256, two-sided.
    assert wilcoxon([-1, 2, 3, 4, 5, 6, 7, 8], names) == pytest.approx(4 / 2**8)


def test_holm_by_hand():
    """The textbook's: 0.01 x 4, 0.02 x 3, then never less than the one before."""
    assert holm([0.02, 0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.06, 0.04, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


@pytest.mark.parametrize(("patients", "comparisons"), [(7, 5), (8, 5), (6, 1), (5, 1), (9, 6)])
def test_least_p_is_what_the_test_gives_at_best(patients, comparisons):
    """All patients better in all comparisons: nothing can be clearer."""
    p = stats.wilcoxon(np.arange(1, patients + 1)).pvalue
    assert min(holm([p] * comparisons)) == pytest.approx(least_p(patients, comparisons))


def test_patients_needed():
    assert patients_needed(5) == 8  # seven or fewer cannot reach p < 0.05
    assert patients_needed(1) == 6
    assert least_p(7, 5) > 0.05 > least_p(8, 5)
