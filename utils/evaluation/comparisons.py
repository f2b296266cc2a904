"""The proposed model against each other one, paired by instance, and the conclusions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pandas as pd

from perturb import BOX_KINDS
from utils.evaluation.prompts import ReportContext
from utils.evaluation.statistics import (
    ALPHA,
    PATIENT,
    Estimate,
    by_instance,
    by_model,
    estimate_mean,
    holm,
    min_p,
    patients_needed,
    populations,
    rows_for,
    wilcoxon,
)
from utils.evaluation.tables import Table, table_row
from utils.system import plural

TOO_FEW = "too few patients"


def comparison_table(scores: pd.DataFrame, context: ReportContext) -> Table:
    """comparisons.csv: one row per population, shift, box kind, score and other model."""
    rows = []
    parts = populations(scores, "all", "small", "large").items()
    shifts = context.protocol.shifts
    for (population, part), shift, kind in itertools.product(parts, shifts, BOX_KINDS):
        if kind == "standard" and shift != shifts[0]:
            continue
        for score in ("dsc", "nsd"):
            text = "" if kind == "standard" else str(shift)
            keys = {"instances are": population, "box": kind, "shift": text, "score": score.upper()}
            compared = _compare(rows_for(part, kind, shift), score, context.proposed)
            rows += [keys | row for row in compared]
    return Table(
        f"{context.proposed} minus each other model, in points.",
        "Differences of means over the same instances, in brackets 95 % intervals by bootstrap "
        "over patients; p by paired Wilcoxon over patients' means, Holm-corrected over the other "
        "models. “better” or “worse”: corrected p < 0.05, the interval excludes 0, and most "
        "patients agree.",
        pd.DataFrame(rows),
    )


def _compare(scores: pd.DataFrame, score: str, proposed: str) -> Iterator[dict]:
    """The proposed model against each other one under one kind of box, corrected together."""
    means = {model: estimate_mean(rows, score) for model, rows in by_model(scores).items()}
    instances = by_instance(scores, score)
    gains = instances.drop(columns=proposed).rsub(instances[proposed], axis=0)
    gains = gains.groupby(level=PATIENT, observed=True).mean()
    p_values = [wilcoxon(gains[other]) for other in gains]
    for other, p, p_holm in zip(gains, p_values, holm(p_values), strict=True):
        difference = means[proposed] - means[other]
        ahead = int((gains[other] > 0).sum())
        yield table_row({"against": other}, {"difference": difference}) | {
            "patients ahead": str(ahead),
            "p": f"{p:.2g}",
            "p (Holm)": f"{p_holm:.2g}",
            "verdict": _verdict(difference, ahead, p_holm, len(p_values)),
        }


def _verdict(difference: Estimate, ahead: int, p_holm: float, comparisons: int) -> str:
    """better, worse, not distinguishable, or too few patients.

    The mean is over instances, the test over patients: both must point the same way.
    """
    if min_p(difference.patients, comparisons) >= ALPHA:
        return TOO_FEW
    low, high = difference.interval
    majority_ahead = ahead > difference.patients / 2
    if p_holm < ALPHA and low > 0 and majority_ahead:
        return "better"
    if p_holm < ALPHA and high < 0 and not majority_ahead:
        return "worse"
    return "not distinguishable"


def main_rows(comparisons: Table, context: ReportContext) -> Table:
    """The rows on DSC, under the first shift of each unit."""
    frame = comparisons.frame
    shifts = ["", *map(str, context.protocol.shifts_of_both_units)]
    shown = (frame["score"] == "DSC") & frame["shift"].isin(shifts)
    return replace(comparisons, frame=frame[shown])


# --- In plain language ---------------------------------------------------------------------------
def conclusions(
    comparisons: pd.DataFrame, scores: pd.DataFrame, context: ReportContext
) -> list[str]:
    """The conclusions that `scores` and the frame of `comparison_table` support, one line each."""
    shifts = ["", *map(str, context.protocol.shifts_of_both_units)]
    lines = []
    for _, row in comparisons.iterrows():
        asked = row["instances are"] == "all" and row["shift"] in shifts
        asked |= (row["instances are"], row["box"]) == ("small", "standard")
        if asked and row["score"] == "DSC" and row["against"] == context.baseline:
            lines.append(_sentence(row, context, comparisons["against"].nunique()))
    shift, of_proposed = context.protocol.shift, by_model(scores)[context.proposed]
    tight, shrunk = (
        estimate_mean(rows_for(of_proposed, kind, shift), "dsc") for kind in ("standard", "shrink")
    )
    change = f"{(shrunk - tight).percent(1, sign='+')} points"
    of = f"the DSC of {context.proposed}"
    return [
        *lines,
        f"From tight boxes to boxes too small by up to {shift} {of} changes by {change}.",
    ]


def _sentence(row: pd.Series, context: ReportContext, tests: int) -> str:
    """A row of `comparison_table` in words; its p is corrected for so many `tests`."""
    boxes = {
        "standard": "tight boxes",
        "expansion": f"boxes too large by up to {row['shift']}",
        "shrink": f"boxes too small by up to {row['shift']}",
    }[row["box"]]
    subject = f"small instances, {boxes}" if row["instances are"] == "small" else boxes
    verdict = {
        "better": f"{context.proposed} is better",
        "worse": f"{context.proposed} is worse",
        "not distinguishable": "not distinguishable here",
        TOO_FEW: f"{TOO_FEW} to conclude, {patients_needed(tests)} are needed",
    }[row["verdict"]]
    difference = row["difference"]
    return (
        f"{subject.capitalize()}: {verdict}, {difference.percent(1, sign='+')} points of DSC "
        f"against {context.baseline} (ahead in {row['patients ahead']} of "
        f"{plural(difference.patients, 'patient')}, {plural(difference.instances, 'instance')}; "
        f"Holm-corrected p {row['p (Holm)']})."
    )
