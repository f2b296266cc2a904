"""Tables of results as Markdown, CSV and LaTeX, and those of the paper with its own numbers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from perturb import BOX_KINDS, SMALL_SHARE, Shift
from utils.evaluation.prompts import GIVEN, ReportContext, boxes_drawn
from utils.evaluation.scoring import ERROR_DSC, ERROR_LEAK
from utils.evaluation.statistics import (
    INSTANCE,
    Estimate,
    average,
    by_label,
    by_model,
    count_instances,
    count_patients,
    estimate_mean,
    patients_needed,
    rows_for,
)
from utils.system import plural

# Table I of the paper (arXiv:2503.19700), in %: DSC and NSD of each model.
PUBLISHED_ONE = pd.DataFrame(
    [
        ("standard", "93.92", "95.12", "94.06", "95.76", "95.67", "96.78"),
        ("expansion", "91.66", "93.04", "92.11", "93.89", "94.71", "96.13"),
        ("shrink", "85.42", "87.29", "78.17", "80.39", "91.24", "93.58"),
        ("average", "90.33", "91.82", "88.11", "90.01", "93.87", "95.50"),
    ],
    columns=[
        *("box", "SAM DSC", "SAM NSD", "LiteMedSAM DSC", "LiteMedSAM NSD"),
        *("Optimized MedSAM DSC", "Optimized MedSAM NSD"),
    ],
)
# Its Tables II and III, by the policy of the row.
MARKS = ["θ_ω, ξ", "δ_expand, ε_shrink"]
PUBLISHED_ABLATION = pd.DataFrame(
    {
        "medsam": ("–", "–", "18", "73.42", "75.27"),
        "bidirectional": ("–", "✓", "16", "87.42", "89.73"),
        "scaled": ("✓", "–", "6", "74.35", "75.24"),
        "adaptive": ("✓", "✓", "2", "90.72", "92.86"),
    },
    index=[*MARKS, "error rate (paper)", "DSC (paper)", "NSD (paper)"],
)
NOT_PUBLISHED = pd.Series(["", "", "–", "–", "–"], PUBLISHED_ABLATION.index)
ALL_LABELS = {"dataset": "all", "label": "all"}
# Columns that a table for readers has only where they differ between its rows.
SAME = ("patients", "instances", "size", "dataset", "shift", "score", "seeds")
PUBLISHED_NOTE = (
    "Measured by the paper's authors on FLARE22 and on their own lung CT, with models and a shift "
    "that the paper does not specify: these numbers are not directly comparable with ours."
)
ABLATION_NOTE = (
    f"Columns marked “paper”: {PUBLISHED_NOTE[0].lower()}{PUBLISHED_NOTE[1:]} Check marks follow "
    "from the models' names."
)
SMALL_TEXT = f"mask under {100 * SMALL_SHARE:g} % of the slice"
ERROR_TEXT = (
    f"Small: {SMALL_TEXT}. An error: a leak (more than {100 * ERROR_LEAK:g} % of the target's area "
    "predicted farther than the NSD tolerance outside the target) or a low DSC (under "
    f"{ERROR_DSC:g})."
)
# What LaTeX would not print as it is; longer symbols first.
LATEX = {"θ_ω": r"$\theta_\omega$", "ξ": r"$\xi$", "✓": r"$\surd$", "–": "--"}
LATEX |= {"δ_expand": r"$\delta_{expand}$", "ε_shrink": r"$\varepsilon_{shrink}$"}
LATEX |= {"<": "$<$", ">": "$>$", "\\": r"$\backslash$", "^": r"\^{}", "~": r"\~{}"}
LATEX |= {character: "\\" + character for character in "%_&#{}$"}


@dataclass(frozen=True)
class Table:
    """A DataFrame and what its reader must know."""

    title: str
    caption: str  # how it was measured, and on how many patients
    frame: pd.DataFrame  # its cells are text, or an `Estimate`, which is shown in %
    notes: str = ""
    digits: int = 2  # decimals of the estimates


PUBLISHED_TABLE = Table("Table I as published, %.", PUBLISHED_NOTE, PUBLISHED_ONE)


# --- Formats -------------------------------------------------------------------------------------
def markdown(table: Table, method: str = "") -> str:
    """The table under its title; intervals stand under their means.

    Columns that tell nothing are left out. `method` goes with a table that stands alone.
    """
    caption = escape_markdown(" ".join(filter(None, (table.caption, method))))
    parts = [f"### {escape_markdown(table.title)}", caption]
    if len(table.frame):
        frame = _telling(table.frame)
        text = frame.map(_markdown_cell, digits=table.digits)
        parts.append(_grid(frame, text, "pipe"))
    return "\n\n".join(part for part in (*parts, table.notes) if part)


def plain(table: Table) -> str:
    """The table for a terminal: without intervals and notes."""
    frame = _telling(table.frame)
    number = f"{{:.{table.digits}f}}"
    text = frame.map(lambda c: number.format(100 * c.value) if isinstance(c, Estimate) else c)
    return f"{table.title}\n{table.caption}\n\n{_grid(frame, text, 'simple')}"


def _telling(frame: pd.DataFrame) -> pd.DataFrame:
    """Without columns that are empty, and without counts and keys that are the same in all rows."""
    same = [n for n in SAME if n in frame and len(frame) > 1 and frame[n].nunique() == 1]
    empty = [name for name in frame if frame[name].map(lambda cell: cell in ("", "–")).all()]
    return frame.drop(columns=[*same, *empty])


def _grid(frame: pd.DataFrame, text: pd.DataFrame, tablefmt: str) -> str:
    """The text of a frame's cells, numbers to the right."""
    numbers = frame.map(lambda cell: isinstance(cell, Estimate) or cell.isdigit()).all()
    align = ["right" if right else "left" for right in numbers]
    return text.to_markdown(index=False, tablefmt=tablefmt, disable_numparse=True, colalign=align)


def _markdown_cell(cell: str | Estimate, digits: int) -> str:
    return cell.percent(digits, "<br>") if isinstance(cell, Estimate) else escape_markdown(cell)


def write_csv(path: Path, *tables: Table) -> None:
    """Tables of the same columns as one CSV; an estimate X takes X, X low and X high, in %."""
    frame = pd.concat([table.frame for table in tables], ignore_index=True)
    columns = {}
    for name, cells in frame.items():
        columns[name] = cells
        if len(cells) and isinstance(cells[0], Estimate):
            columns[name] = [100 * one.value for one in cells]
            columns[f"{name} low"] = [100 * one.interval[0] for one in cells]
            columns[f"{name} high"] = [100 * one.interval[1] for one in cells]
    pd.DataFrame(columns).to_csv(path, index=False, lineterminator="\n", float_format="%.4f")


def latex(table: Table, method: str = "") -> str:
    """A table environment, for the package booktabs; `method` as in `markdown`."""
    frame = table.frame.map(_latex_cell, digits=table.digits).rename(columns=escape_latex)
    columns = "l" + "r" * (frame.shape[1] - 1)
    tabular = frame.to_latex(index=False, escape=False, column_format=columns)
    caption = " ".join(filter(None, (table.title, table.caption, method, table.notes)))
    return (
        f"% {table.title} (needs \\usepackage{{booktabs}})\n\\begin{{table}}\n\\centering\n"
        f"\\caption{{{escape_latex(caption)}}}\n{tabular}\\end{{table}}\n"
    )


def _latex_cell(cell: str | Estimate, digits: int) -> str:
    if not isinstance(cell, Estimate):
        return escape_latex(cell)
    mean, _, interval = cell.percent(digits, "\n").partition("\n")
    return rf"\shortstack{{{mean}\\{{\scriptsize {interval}}}}}" if interval else mean


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it, the paper's symbols in math."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], text)


def escape_markdown(text: str) -> str:
    """Text in which nothing is Markdown or HTML: names of cases and labels may hold anything."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"([\\`*\[\]|])", r"\\\1", text))


def picture(name: str, caption: str) -> str:
    """A picture with its caption below, one paragraph of Markdown."""
    caption = escape_markdown(caption)
    return f"![{caption}]({name})\n*{caption}*"


# --- Parts of tables -----------------------------------------------------------------------------
def caption(scores: pd.DataFrame, context: ReportContext, shift: Shift | None = None) -> str:
    """On how many patients and instances the means of `scores` rest, and how boxes are shifted."""
    if not len(scores):
        return "No such instance."
    counts = plural(count_patients(scores), "patient"), plural(count_instances(scores), "instance")
    if shift is None:
        return f"{', '.join(counts)}."
    frame = "box's side" if shift.unit == "side" else "1024 frame"
    return f"{', '.join(counts)}. Expansion and shrink: each edge by U(0, {shift}) of the {frame}."


def method(context: ReportContext) -> str:
    """How everything in 2D was measured."""
    return (
        f"An instance is a label in a slice of {context.data}. Scored in 2D at each slice's native "
        f"resolution, NSD at {context.tolerance}; means over instances in %, with 95 % bootstrap "
        f"intervals over patients in brackets, given at least {patients_needed(1)} patients; "
        f"{plural(context.protocol.draws, 'draw')} of each random box."
    )


def table_row(keys: dict[str, str], means: dict[str, Estimate]) -> dict[str, str | Estimate]:
    """A row of a table: `keys`, how many patients and instances the means rest on, the means."""
    first = next(iter(means.values()))
    counts = {"patients": str(first.patients), "instances": str(first.instances)}
    return keys | counts | means


def model_means(scores: pd.DataFrame, *names: str) -> dict[str, Estimate]:
    """The mean of one or several scores for every model, by column: "model" or "model DSC"."""
    return {
        f"{model} {name.upper()}" if len(names) > 1 else model: estimate_mean(rows, name)
        for model, rows in by_model(scores).items()
        for name in names
    }


def glance_table(scores: pd.DataFrame, context: ReportContext) -> Table:
    """The DSC of every model under tight boxes and boxes that cut, and of small instances."""
    shift = context.protocol.shift
    rows = []
    for model, of_model in by_model(scores).items():
        tight = rows_for(of_model, "standard", shift)
        means = {
            "tight boxes": estimate_mean(tight, "dsc"),
            f"boxes too small by up to {shift}": estimate_mean(
                rows_for(of_model, "shrink", shift), "dsc"
            ),
        }
        keys = {"model": model, "run": context.run_names.get(model, "")}
        rows.append(table_row(keys, means))
        if scores["small"].any():
            small = estimate_mean(tight[tight["small"]], "dsc")
            rows[-1][f"small targets ({small.instances}), tight boxes"] = small
    note = escape_markdown(method(context))
    return Table("Dice (DSC), %", caption(scores, context), pd.DataFrame(rows), note, digits=1)


# --- The paper's tables --------------------------------------------------------------------------
def table_one(scores: pd.DataFrame, context: ReportContext, shift: Shift) -> Table:
    """Table I: DSC and NSD of every model, one row per box kind and one for their average."""
    means = {kind: model_means(rows_for(scores, kind, shift), "dsc", "nsd") for kind in BOX_KINDS}
    columns = means["standard"]
    means["average"] = {c: average([means[kind][c] for kind in BOX_KINDS]) for c in columns}
    rows = [table_row({"shift": str(shift), "box": kind}, line) for kind, line in means.items()]
    title = f"Table I. Boxes shifted by up to {shift}."
    return Table(title, caption(scores, context, shift), pd.DataFrame(rows))


def table_two(scores: pd.DataFrame, context: ReportContext) -> Table:
    """Table II: error rate on small instances, with and without each half of the method."""
    shift = context.protocol.shift
    small = scores[scores["small"]]
    means = {
        model: {kind: estimate_mean(rows_for(rows, kind, shift), "error") for kind in BOX_KINDS}
        for model, rows in by_model(small).items()
    }
    return Table(
        "Table II. Error rate on small instances, %.",
        f"{ERROR_TEXT} {caption(small, context, shift)}",
        _ablation(means, ["error rate (paper)"], context),
        f"The paper defines neither its error nor its boxes. {_ablation_note(means, context)}",
        digits=1,
    )


def table_three(scores: pd.DataFrame, context: ReportContext) -> Table:
    """Table III: DSC and NSD under shrink boxes, with and without each half of the method."""
    shifts = context.protocol.shifts_of_both_units
    means = {
        model: {
            f"{shift} {score.upper()}": estimate_mean(rows_for(rows, "shrink", shift), score)
            for shift in shifts
            for score in ("dsc", "nsd")
        }
        for model, rows in by_model(scores).items()
    }
    return Table(
        "Table III. DSC and NSD under shrink boxes, %.",
        caption(scores, context, shifts[0])
        + "".join(f" The same for {shift}." for shift in shifts[1:]),
        _ablation(means, ["DSC (paper)", "NSD (paper)"], context),
        _ablation_note(means, context),
    )


def _ablation(
    means: dict[str, dict[str, Estimate]], published: list[str], context: ReportContext
) -> pd.DataFrame:
    """One row per model, the paper's four first; its columns that are `published` come last."""
    policies = {model: context.training_of(model) for model in means}
    order = [model for policy in PUBLISHED_ABLATION for model in means if policies[model] == policy]
    order += [model for model in means if model not in order]
    rows = []
    for model in order:
        paper = PUBLISHED_ABLATION.get(policies[model], NOT_PUBLISHED)
        keys = {**paper[MARKS], "model": model}
        rows.append({**table_row(keys, means[model]), **paper[published]})
    return pd.DataFrame(rows, columns=None if rows else [*MARKS, "model", "patients", "instances"])


def _ablation_note(models: Iterable[str], context: ReportContext) -> str:
    """What the paper's columns are, where a model has one of its rows."""
    has_row = any(context.training_of(model) in PUBLISHED_ABLATION for model in models)
    return ABLATION_NOTE if has_row else ""


# --- Labels, small instances, boxes that people drew, and volumes --------------------------------
def label_table(scores: pd.DataFrame, context: ReportContext, score: str) -> Table:
    """labels.csv: one score of every model, one row per label and box kind."""
    shift = context.protocol.shift
    rows = [
        table_row(
            label | {"box": kind, "score": score.upper()},
            model_means(rows_for(of_label, kind, shift), score),
        )
        for label, of_label in by_label(scores)
        for kind in BOX_KINDS
    ]
    title = f"{score.upper()} per label, %."
    return Table(title, caption(scores, context, shift), pd.DataFrame(rows), digits=1)


def small_table(scores: pd.DataFrame, context: ReportContext) -> Table:
    """small.csv: errors on small instances, one row per label and training, all labels first."""
    shift = context.protocol.shift
    small = scores[scores["small"]]
    small = small.assign(
        leaks=(small["leak"] > ERROR_LEAK).astype(float),
        low=(small["dsc"] < ERROR_DSC).astype(float),
    )
    columns = {"error": "error", "leak": "leaks", "low": "low", "DSC": "dsc", "leaked area": "leak"}
    rows = []
    for label, of_label in [(ALL_LABELS, small), *by_label(small)]:
        for training, of_training in by_model(of_label, context.training_of).items():
            tight = rows_for(of_training, "standard", shift)
            means = {name: estimate_mean(tight, score) for name, score in columns.items()}
            for kind in BOX_KINDS[1:]:
                shifted = rows_for(of_training, kind, shift)
                means[f"error, {kind}"] = estimate_mean(shifted, "error")
            rows.append(table_row(label | {"training": training}, means))
    return Table(
        "Small instances: errors under tight boxes, by criterion, and under shifted boxes, %.",
        f"{ERROR_TEXT} {caption(small, context, shift)}",
        pd.DataFrame(rows),
        digits=1,
    )


def given_table(scores: pd.DataFrame, context: ReportContext) -> Table:
    """given.csv: DSC and NSD under boxes that people drew, and under tight ones, by label."""
    shift = context.protocol.shift
    given, tight = (rows_for(scores, kind, shift) for kind in (GIVEN, "standard"))
    rows = []
    for label, of_label in [(ALL_LABELS, given), *by_label(given)]:
        same = tight.merge(of_label[INSTANCE].drop_duplicates(), on=INSTANCE)
        rows.append(table_row(label | {"box": GIVEN}, model_means(of_label, "dsc", "nsd")))
        rows.append(table_row(label | {"box": "tight"}, model_means(same, "dsc", "nsd")))
    boxes = plural(len(given) // given["model"].nunique(), "box", "boxes")
    instances = plural(count_instances(given), "instance")
    return Table(
        "Boxes that people drew, and the tight boxes of the same instances, %.",
        f"{boxes} of {instances}. {caption(given, context, shift)}",
        pd.DataFrame(rows),
    )


def volume_table(scores: pd.DataFrame, context: ReportContext) -> Table:
    """The means of volumes.csv per label and model, and over all labels."""
    rows = []
    for label in [*scores["label"].unique(), "all"]:
        of_label = scores if label == "all" else scores[scores["label"] == label]
        for model, organs in by_model(of_label).items():
            means = {
                f"{kind} {score.upper()}": estimate_mean(organs[organs["box"] == kind], score)
                for kind in BOX_KINDS
                for score in ("dsc", "nsd")
            }
            rows.append(table_row({"label": label, "model": model}, means))
    return Table(
        "DSC and NSD of whole organs in 3D, %.",
        f"{caption(scores, context)} Per-slice masks are stacked; {context.data}. Exactly the "
        "slices that hold the organ have a box, so its extent along z is given. NSD at "
        f"{context.tolerance}; means over organs of cases, with 95 % bootstrap intervals if there "
        f"are enough patients. Expansion and shrink: each edge by up to {context.protocol.shift}, "
        "one draw.",
        pd.DataFrame(rows),
        digits=1,
    )


def every_table(scores: pd.DataFrame, context: ReportContext) -> Table:
    """every.csv: 3D scores and boxes that people draw, a row per label, model and kind of box."""
    drawn = boxes_drawn(context.protocol)
    places = zip(*(scores[name] for name in ("dataset", "case", "label", "box")), strict=True)
    scores = scores.assign(drawn=[drawn[place] / 100 for place in places])  # shown in %
    kinds = dict.fromkeys(kind for *_, kind in drawn)
    rows = []
    for label, of_label in [(ALL_LABELS, scores), *by_label(scores)]:
        for model, organs in by_model(of_label).items():
            tight = estimate_mean(organs[organs["box"] == "standard"], "dsc")
            for kind in kinds:
                of_kind = organs[organs["box"] == kind]
                columns = {"boxes drawn": "drawn", "DSC": "dsc", "NSD": "nsd"}
                means = {column: estimate_mean(of_kind, name) for column, name in columns.items()}
                means["DSC minus standard"] = means["DSC"] - tight
                rows.append(table_row(label | {"model": model, "box": kind}, means))
    return Table(
        "Boxes in every n-th slice: DSC and NSD of whole organs in 3D, %.",
        f"{caption(scores, context)} Standard: a tight box in every slice with the target. Every "
        "n: tight boxes in the first slice, every n-th after it, and the last, as if somebody had "
        "drawn them, with linear interpolation between them. Propagated: one tight box, in the "
        "slice with the largest area; each mask gives the box of the next slice, as with eval.py "
        "--propagate, as far as there are labelled slices. Boxes drawn: per organ of a case. "
        f"{context.data}. NSD at {context.tolerance}; means over organs of cases, with 95 % "
        "bootstrap intervals over patients in brackets, if there are enough.",
        pd.DataFrame(rows),
        digits=1,
    )
