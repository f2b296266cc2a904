"""The paper's tables from our scores, with its published numbers beside them."""

from __future__ import annotations

import pandas as pd

from perturb import BOX_KINDS, Shift
from utils.evaluation.instances import (
    by_model,
    count_instances,
    count_patients,
    counts,
    mean,
    under,
)
from utils.evaluation.prompts import Protocol
from utils.evaluation.statistics import combine, patients_needed
from utils.evaluation.tables import Table
from utils.system.wording import plural

# The rows of Tables II and III: with (theta_omega, xi), with (delta_expand, epsilon_shrink).
PAPER_ROWS = {
    "medsam": ("–", "–"),
    "bidirectional": ("–", "✓"),
    "scaled": ("✓", "–"),
    "adaptive": ("✓", "✓"),
}
# What the paper (arXiv:2503.19700) publishes, in %. Table I: DSC and NSD by model and box.
PUBLISHED_ONE = {
    "SAM": {
        "standard": ("93.92", "95.12"),
        "expansion": ("91.66", "93.04"),
        "shrink": ("85.42", "87.29"),
        "average": ("90.33", "91.82"),
    },
    "LiteMedSAM": {
        "standard": ("94.06", "95.76"),
        "expansion": ("92.11", "93.89"),
        "shrink": ("78.17", "80.39"),
        "average": ("88.11", "90.01"),
    },
    "Optimized MedSAM": {
        "standard": ("95.67", "96.78"),
        "expansion": ("94.71", "96.13"),
        "shrink": ("91.24", "93.58"),
        "average": ("93.87", "95.50"),
    },
}
# Table II: the error rate. Table III: DSC and NSD under shrink boxes. By the policy of the row.
PUBLISHED_TWO = {"medsam": "18", "bidirectional": "16", "scaled": "6", "adaptive": "2"}
PUBLISHED_THREE = {
    "medsam": ("73.42", "75.27"),
    "scaled": ("74.35", "75.24"),
    "bidirectional": ("87.42", "89.73"),
    "adaptive": ("90.72", "92.86"),
}
UNPUBLISHED = "–"
PUBLISHED_NOTE = (
    "Measured by the paper's authors on FLARE22 and on lung CT of their own, with models and under "
    "a shift that the paper does not specify: read these numbers beside ours, not against them."
)
MARKS_NOTE = "Check marks follow from the models' names."
ABLATION_NOTE = (
    f"Columns marked “paper”: {PUBLISHED_NOTE[0].lower()}{PUBLISHED_NOTE[1:]} {MARKS_NOTE}"
)


def measured_how(scores: pd.DataFrame, protocol: Protocol, shift: Shift) -> str:
    """How the means of `scores` were measured: the header of every table."""
    if not len(scores):
        return f"No such instance in {protocol.data}."
    patients = count_patients(scores)
    least = patients_needed(1)
    intervals = f"without intervals, which need {least} patients"
    if patients >= least:
        intervals = "in brackets 95 % intervals by bootstrap over patients"
    frame = "box's side" if shift.unit == "side" else "1024 frame"
    return (
        f"{plural(patients, 'patient')}, {plural(count_instances(scores), 'instance')} (label in "
        f"slice) of {protocol.data}. 2D at each slice's native resolution, NSD at "
        f"{protocol.tolerance}; means over instances in %, {intervals}. Expansion and shrink: each "
        f"edge by U(0, {shift}) of the {frame}, {plural(protocol.draws, 'draw')}."
    )


def table_one(scores: pd.DataFrame, protocol: Protocol, shift: Shift) -> Table:
    """Table I: DSC and NSD of every model, one row per box kind and one for their average."""
    means = {
        kind: {
            f"{model} {score.upper()}": mean(rows, score)
            for model, rows in by_model(under(scores, kind, shift)).items()
            for score in ("dsc", "nsd")
        }
        for kind in BOX_KINDS
    }
    columns = means["standard"]
    means["average"] = {c: combine([means[kind][c] for kind in BOX_KINDS]) for c in columns}
    rows = []
    for kind, line in means.items():
        n = counts(next(iter(line.values())))
        rows.append({"shift": str(shift), "box": kind} | n | line)
    title = f"Table I. Boxes shifted by up to {shift}."
    return Table(title, measured_how(scores, protocol, shift), pd.DataFrame(rows))


def published_table() -> Table:
    """Table I as the paper has it."""
    rows = [
        {"box": box}
        | {
            f"{model} {score}": value
            for model, numbers in PUBLISHED_ONE.items()
            for score, value in zip(("DSC", "NSD"), numbers[box], strict=True)
        }
        for box in (*BOX_KINDS, "average")
    ]
    return Table("Table I as published, %.", PUBLISHED_NOTE, pd.DataFrame(rows))


def shift_table(scores: pd.DataFrame, protocol: Protocol) -> Table:
    """The DSC of Table I for all shifts, one row per shift and box kind."""
    rows = []
    for shift in protocol.shifts:
        for kind in BOX_KINDS[1:]:
            models = by_model(under(scores, kind, shift))
            line = {model: mean(rows, "dsc") for model, rows in models.items()}
            n = counts(next(iter(line.values())))
            rows.append({"shift": str(shift), "box": kind} | n | line)
    how = measured_how(scores, protocol, protocol.shifts[0])
    return Table(
        "DSC of Table I by the size of the shift, %.",
        f"{how} The same for the other shifts.",
        pd.DataFrame(rows),
        digits=1,
    )


def table_two(scores: pd.DataFrame, protocol: Protocol) -> Table:
    """Table II: error rate on small instances, with and without each half of the method."""
    shift = protocol.shifts[0]
    small = scores[scores["small"]]
    means = {
        model: {kind: mean(under(rows, kind, shift), "error") for kind in BOX_KINDS}
        for model, rows in by_model(small).items()
    }
    return Table(
        "Table II. Error rate on small instances, %.",
        f"Small: {small_text(protocol)}. An error: more than {100 * protocol.error_leak:g} % of "
        "the target's area predicted farther than the NSD tolerance outside the target, or DSC "
        f"under {protocol.error_dsc:g}. {measured_how(small, protocol, shift)}",
        _ablation(means, {"error rate (paper)": PUBLISHED_TWO}, protocol),
        f"The paper does not define its error, nor its boxes. {ABLATION_NOTE}",
        digits=1,
    )


def small_text(protocol: Protocol) -> str:
    """What a small instance is."""
    return f"mask under {100 * protocol.small_share:g} % of the slice"


def table_three(scores: pd.DataFrame, protocol: Protocol) -> Table:
    """Table III: DSC and NSD under shrink boxes, with and without each half of the method."""
    shifts = protocol.shifts_of_both_units
    means = {
        model: {
            f"{shift} {score.upper()}": mean(under(rows, "shrink", shift), score)
            for shift in shifts
            for score in ("dsc", "nsd")
        }
        for model, rows in by_model(scores).items()
    }
    how = measured_how(scores, protocol, shifts[0])
    return Table(
        "Table III. DSC and NSD under shrink boxes, %.",
        how + "".join(f" The same for {shift}." for shift in shifts[1:]),
        _ablation(
            means,
            {
                f"{score} (paper)": {model: both[n] for model, both in PUBLISHED_THREE.items()}
                for n, score in enumerate(("DSC", "NSD"))
            },
            protocol,
        ),
        ABLATION_NOTE,
    )


def _ablation(
    means: dict[str, dict], published: dict[str, dict[str, str]], protocol: Protocol
) -> pd.DataFrame:
    """One row per model: the paper's four with their check marks first, then the others.

    Args:
        means: by model, by column.
        published: the paper's columns, by policy.
        protocol: knows which models are seeds of one training, and so of a policy.
    """
    policies = {model: protocol.trainings.get(model, model) for model in means}
    order = [m for row in PAPER_ROWS for m in means if policies[m] == row]
    order += [m for m in means if m not in order]
    rows = []
    for model in order:
        policy = policies[model]
        marks = PAPER_ROWS.get(policy, ("", ""))
        names = {"θ_ω, ξ": marks[0], "δ_expand, ε_shrink": marks[1], "model": model}
        of_paper = {name: of.get(policy, UNPUBLISHED) for name, of in published.items()}
        rows.append(names | counts(next(iter(means[model].values()))) | means[model] | of_paper)
    columns = ["θ_ω, ξ", "δ_expand, ε_shrink", "model", "patients", "instances"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def label_table(scores: pd.DataFrame, protocol: Protocol, score: str) -> Table:
    """One score of every model, one row per label and box kind."""
    shift = protocol.shifts[0]
    rows = []
    for label, of_label in scores.groupby("label", observed=True):
        for kind in BOX_KINDS:
            models = by_model(under(of_label, kind, shift))
            line = {model: mean(rows, score) for model, rows in models.items()}
            n = counts(next(iter(line.values())))
            rows.append({"label": label, "box": kind, "score": score.upper()} | n | line)
    title = f"{score.upper()} per label, %."
    how = measured_how(scores, protocol, shift)
    return Table(title, how, pd.DataFrame(rows), digits=1)
