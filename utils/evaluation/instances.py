"""instances.csv as a DataFrame: the single source of every table, figure and conclusion.

Its columns are those of `scoring.Row`; text columns are categorical, which keeps a million rows
small and quick to filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from perturb import Shift
from utils.evaluation.prompts import GIVEN
from utils.evaluation.scoring import Row
from utils.evaluation.statistics import Estimate, estimate
from utils.system.files import atomic_write

INSTANCE = ["patient", "case", "slice", "label"]
TIGHT = "0%"  # the shift of standard boxes
TEXT = ["model", "patient", "case", "label", "box", "shift"]


def to_frame(rows: Sequence[Row], case_order: Sequence[str] | None = None) -> pd.DataFrame:
    """Rows as a DataFrame; with `case_order` sorted by it, each case's rows as they are."""
    scores = pd.DataFrame(rows, columns=list(Row._fields))
    if case_order is not None:
        position = {case: number for number, case in enumerate(dict.fromkeys(case_order))}
        scores = scores.sort_values("case", key=lambda case: case.map(position), kind="stable")
    return scores.astype(dict.fromkeys(TEXT, "category")).reset_index(drop=True)


def write_instances(scores: pd.DataFrame, path: Path) -> None:
    """Write instances.csv."""
    with atomic_write(path, "w") as file:
        scores.astype({"small": int}).to_csv(file, index=False, lineterminator="\n")


def models_of(scores: pd.DataFrame) -> list[str]:
    """The models, in order of appearance."""
    return scores["model"].unique().tolist()


def under(scores: pd.DataFrame, kind: str, shift: Shift) -> pd.DataFrame:
    """The rows under one kind of box; standard and given boxes have no shift."""
    text = TIGHT if kind in ("standard", GIVEN) else str(shift)
    return scores[(scores["box"] == kind) & (scores["shift"] == text)]


def by_model(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each model, in order of appearance."""
    return dict(iter(scores.groupby("model", observed=True, sort=False)))


def populations(scores: pd.DataFrame, *names: str) -> dict[str, pd.DataFrame]:
    """The rows of "all", "small" or "large" instances, for each of `names`.

    A population that is empty, or is all instances under another name, is left out.
    """
    parts = {"all": scores, "small": scores[scores["small"]], "large": scores[~scores["small"]]}
    return {n: parts[n] for n in names if n == "all" or 0 < len(parts[n]) < len(scores)}


def count_patients(scores: pd.DataFrame) -> int:
    """How many patients there are."""
    return scores["patient"].nunique()


def count_instances(scores: pd.DataFrame) -> int:
    """How many instances there are: labels in slices."""
    return len(scores[INSTANCE].drop_duplicates())


def mean(scores: pd.DataFrame, score: str) -> Estimate:
    """The mean of a score over the rows, with its bootstrap over patients.

    Raises:
        ValueError: there is no row.
    """
    return estimate(scores[score], scores["patient"], count_instances(scores))


def by_instance(scores: pd.DataFrame, score: str) -> pd.DataFrame:
    """The mean of a score over draws: one row per INSTANCE, one column per model."""
    return scores.pivot_table(score, INSTANCE, "model", aggfunc="mean", observed=True, sort=False)


def counts(mean: Estimate) -> dict[str, str]:
    """The columns of a table that say what a mean rests on."""
    return {"patients": str(mean.patients), "instances": str(mean.instances)}
