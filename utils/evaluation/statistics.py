"""instances.csv as a DataFrame, its means with bootstrap intervals, and paired tests.

The DataFrame has the columns of `scoring.Row`, text as categories. Patients are resampled and
counted, as instances of one patient are correlated: twenty slices are not twenty observations.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from perturb import LOOSE, Shift

if TYPE_CHECKING:
    from utils.evaluation.scoring import Row

PATIENT = ["dataset", "patient"]
INSTANCE = ["dataset", "case", "slice", "label", "part"]
TEXT = ["model", *PATIENT, "case", "label", "box", "shift"]
TIGHT = "0%"  # the shift of standard boxes

RESAMPLES = 10_000
SEED = 0  # the same resamples for every mean, so that differences are of the same patients
ALPHA = 0.05


# --- Rows ----------------------------------------------------------------------------------------
def to_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a DataFrame."""
    return pd.DataFrame(rows).astype(dict.fromkeys(TEXT, "category"))


def rows_for(scores: pd.DataFrame, kind: str, shift: Shift) -> pd.DataFrame:
    """The rows of one kind of box, and where it has a shift, of this one."""
    text = str(shift) if kind in ("expansion", "shrink", LOOSE) else TIGHT
    return scores[(scores["box"] == kind) & (scores["shift"] == text)]


def by_model(
    scores: pd.DataFrame, name: Callable[[str], str] | None = None
) -> dict[str, pd.DataFrame]:
    """The rows of each model, in order of appearance; or of those with the same `name` together."""
    models = scores["model"].map(name) if name else "model"
    return dict(iter(scores.groupby(models, observed=True, sort=False)))


def by_label(scores: pd.DataFrame) -> list[tuple[dict[str, str], pd.DataFrame]]:
    """The rows of each label of each data set, with the columns of a table that name it."""
    groups = scores.groupby(["dataset", "label"], observed=True)
    return [({"dataset": dataset, "label": label}, rows) for (dataset, label), rows in groups]


def populations(scores: pd.DataFrame, *names: str) -> dict[str, pd.DataFrame]:
    """The rows of "all", "small" and "large" instances; small and large only if there are both."""
    parts = {"all": scores, "small": scores[scores["small"]], "large": scores[~scores["small"]]}
    return {n: parts[n] for n in names if n == "all" or 0 < len(parts[n]) < len(scores)}


def count_patients(scores: pd.DataFrame) -> int:
    """How many patients there are."""
    return len(scores[PATIENT].drop_duplicates())


def count_instances(scores: pd.DataFrame) -> int:
    """How many instances there are: labels in slices, or in cases where there is no slice."""
    return len(scores[scores.columns.intersection(INSTANCE)].drop_duplicates())


def by_instance(scores: pd.DataFrame, score: str) -> pd.DataFrame:
    """The mean of a score over draws: one row per instance, one column per model."""
    index = [*PATIENT, *INSTANCE[1:]]
    return scores.pivot_table(score, index, "model", aggfunc="mean", observed=True, sort=False)


# --- Means ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Estimate:
    """A mean over instances; those of the same patients may be subtracted and averaged."""

    values: np.ndarray  # (1 + RESAMPLES,) the mean, then the same mean in each resample
    patients: int  # how many it rests on
    instances: int

    @property
    def value(self) -> float:
        """The mean."""
        return float(self.values[0])

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % percentile interval; NaN with fewer patients than `patients_needed(1)`."""
        if self.patients < patients_needed(1):
            return math.nan, math.nan
        return tuple(np.percentile(self.values[1:], [2.5, 97.5]).tolist())

    def percent(self, digits: int = 2, separator: str = " ", sign: str = "") -> str:
        """In %, with the interval if there is one: "85.40 [80.1, 90.2]"."""
        low, high = self.interval
        text = f"{100 * self.value:{sign}.{digits}f}"
        if math.isnan(low):
            return text
        return f"{text}{separator}[{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference of means of the same patients."""
        return replace(self, values=self.values - other.values)


def estimate_mean(scores: pd.DataFrame, score: str) -> Estimate:
    """The mean of a score over the rows; resamples draw patients, each with all its rows."""
    patients = scores.groupby(PATIENT, observed=True)[score].agg(["sum", "count"])
    drawn = _times_drawn(len(patients))
    resampled = (drawn @ patients["sum"].to_numpy()) / (drawn @ patients["count"].to_numpy())
    values = np.append(scores[score].mean(), resampled)
    return Estimate(values, len(patients), count_instances(scores))


@functools.lru_cache(maxsize=16)
def _times_drawn(patients: int) -> np.ndarray:
    """How often each of `patients` is drawn in each resample: (RESAMPLES, patients)."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(patients, np.full(patients, 1 / patients), RESAMPLES).astype(float)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The average of means of the same patients."""
    return replace(estimates[0], values=np.mean([one.values for one in estimates], axis=0))


# --- Tests ---------------------------------------------------------------------------------------
def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, at least `min_p`; 1 if no patient differs."""
    if not np.any(differences):
        return 1.0
    return max(float(stats.wilcoxon(differences).pvalue), min_p(len(differences), 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of the p of several comparisons, in the order given."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    stepped = np.minimum(1, (len(p) - np.arange(len(p))) * p[order])
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted.tolist()


def min_p(patients: int, comparisons: int) -> float:
    """The smallest Holm-corrected p that the test can give: all patients differ the same way."""
    return min(1.0, comparisons * 2.0 ** (1 - patients))


def patients_needed(comparisons: int) -> int:
    """The fewest patients with whom one of `comparisons` can reach p < 0.05 at all."""
    return next(n for n in itertools.count(1) if min_p(n, comparisons) < ALPHA)
