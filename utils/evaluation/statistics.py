"""Means with bootstrap intervals over patients, and paired tests between models.

Instances of one patient resemble each other, so patients are what is drawn and what is counted:
twenty slices of one liver are not twenty observations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0  # the same resamples for every mean, so that differences are of the same patients
ALPHA = 0.05


@dataclass(frozen=True)
class Estimate:
    """A mean over instances with its bootstrap distribution over patients.

    Attributes:
        value: the mean.
        resampled: (RESAMPLES,) the same mean in each resample of the patients. Estimates of the
            same patients have the same resamples, and may be subtracted and averaged.
        names: the patients, sorted.
        instances: how many it rests on.
    """

    value: float
    resampled: np.ndarray
    names: tuple[str, ...]
    instances: int

    @property
    def patients(self) -> int:
        """How many patients it rests on."""
        return len(self.names)

    def percent(self, digits: int = 2, separator: str = " ", sign: str = "") -> str:
        """In %, with the interval if there is one: "85.40 [80.1, 90.2]"."""
        low, high = self.interval
        text = f"{100 * self.value:{sign}.{digits}f}"
        if math.isnan(low):
            return text
        return f"{text}{separator}[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % percentile interval; NaN with fewer patients than `patients_needed(1)`.

        With so few not even the range of all patients holds the truth 95 times of 100.
        """
        if self.patients < patients_needed(1):
            return math.nan, math.nan
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(self.resampled, [tail, 100 - tail])
        return float(low), float(high)

    def __sub__(self, other: Estimate) -> Estimate:
        return combine([self, other], [1.0, -1.0])


def estimate(values: Sequence[float], patients: Sequence[str], instances: int) -> Estimate:
    """The mean of `values` (N,), each of one patient (N,), and its bootstrap over patients.

    A resample draws as many patients as there are, with replacement, and takes all their values.

    Args:
        values: scores; an instance may have several (one per draw of its box).
        patients: whose they are, (N,); a categorical must have sorted categories.
        instances: how many instances the values are of.

    Raises:
        ValueError: there is no value.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no values to average")
    sums, counts, names = _sums(values, patients)
    times = _times_drawn(len(names))
    return Estimate(float(values.mean()), (times @ sums) / (times @ counts), names, instances)


def _sums(
    values: Sequence[float], patients: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Sum and number of each patient's values, (patients,) each, and the names, sorted."""
    names = pd.Categorical(patients).remove_unused_categories()
    counts = np.bincount(names.codes)
    return np.bincount(names.codes, values), counts, tuple(names.categories)


def combine(estimates: Sequence[Estimate], weights: Sequence[float] | None = None) -> Estimate:
    """A weighted sum of estimates of the same patients; without weights, their average.

    Raises:
        ValueError: the estimates are of different patients.
    """
    if len({one.names for one in estimates}) > 1:
        raise ValueError("estimates of different patients cannot be combined")
    if weights is None:
        weights = [1 / len(estimates)] * len(estimates)
    return Estimate(
        sum(w * one.value for w, one in zip(weights, estimates, strict=True)),
        sum(w * one.resampled for w, one in zip(weights, estimates, strict=True)),
        estimates[0].names,
        min(one.instances for one in estimates),
    )


@functools.lru_cache(maxsize=16)
def _times_drawn(patients: int) -> np.ndarray:
    """How often each of `patients` is drawn in each resample: (RESAMPLES, patients)."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(patients, np.full(patients, 1 / patients), RESAMPLES).astype(float)


def wilcoxon(differences: Sequence[float], patients: Sequence[str]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test over patients, each with its mean difference.

    SciPy's: exact where there are few patients and no ties, and never less than the exact test
    can give. 1 if no patient differs.
    """
    means = patient_means(differences, patients)
    if not means.any():
        return 1.0
    return max(float(stats.wilcoxon(means).pvalue), least_p(len(means), 1))


def patient_means(values: Sequence[float], patients: Sequence[str]) -> np.ndarray:
    """The mean of each patient's values, in order of the patients' names."""
    sums, counts, _ = _sums(values, patients)
    return sums / counts


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of the p of several comparisons, in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def least_p(patients: int, comparisons: int) -> float:
    """The smallest Holm-corrected p that the test can give: all patients differ the same way."""
    return min(1.0, comparisons * 2.0 ** (1 - patients))


def patients_needed(comparisons: int) -> int:
    """The fewest patients with whom one of `comparisons` can reach p < 0.05 at all."""
    patients = 1
    while least_p(patients, comparisons) >= ALPHA:
        patients += 1
    return patients
