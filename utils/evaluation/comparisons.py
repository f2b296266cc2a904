"""How models compare: pairwise, over families of boxes, and against the shift; the conclusions.

A family is a kind of box with its shift, see `perturb.box_families`. The regret of a training in a
family is how far its mean DSC, over all its seeds, lies below that of the best training in that
family; its worst regret is the largest over the families.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from perturb import BOX_KINDS, LIKE, Shift, box_families
from utils.evaluation.prompts import EVERY, ReportContext
from utils.evaluation.statistics import (
    ALPHA,
    PATIENT,
    TIGHT,
    Estimate,
    by_instance,
    by_model,
    count_patients,
    estimate_mean,
    holm,
    min_p,
    patients_needed,
    populations,
    rows_for,
    wilcoxon,
)
from utils.evaluation.tables import Table, caption, picture, table_row
from utils.system import plotting, plural

TOO_FEW = "too few patients"
MAX_SHADE = 10.0  # points of DSC that have the darkest shade, and all above
COLOURS = (plotting.BLACK, plotting.ORANGE, plotting.SKY, plotting.GREEN, plotting.BLUE)
COLOURS += (plotting.VERMILION, plotting.PURPLE)  # yellow is too pale for a line
MARKERS = "os^Dv<>P"
XLABELS = {"side": "shift of every edge, % of side", "px": "shift of every edge, px of 1024"}


# --- The proposed model against each other one, paired by instance ------------------------------
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
            keys = {"size": population, "box": kind, "shift": text, "score": score.upper()}
            compared = _compare(rows_for(part, kind, shift), score, context.proposed)
            rows += [keys | row for row in compared]
    return Table(
        f"{context.proposed} minus every other model, in points.",
        f"{caption(scores, context)} Differences of means over the same instances, with 95 % "
        "bootstrap intervals over patients in brackets; p by paired Wilcoxon over patient means, "
        "Holm-corrected over the other models. “better” or “worse”: corrected p < 0.05, the "
        "interval excludes 0, and most patients agree.",
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
    """In words. The mean is over instances, the test over patients: both must agree."""
    if min_p(difference.patients, comparisons) >= ALPHA:
        return TOO_FEW
    low, high = difference.interval
    majority_ahead = ahead > difference.patients / 2
    if p_holm < ALPHA and (low > 0 if majority_ahead else high < 0):
        return "better" if majority_ahead else "worse"
    return "not distinguishable"


def main_rows(comparisons: Table, context: ReportContext) -> Table:
    """The rows on DSC of all and of small instances, under the first shift of each unit."""
    frame = comparisons.frame
    if len(frame):
        shifts = ["", *map(str, context.protocol.shifts_of_both_units)]
        frame = frame[(frame["score"] == "DSC") & frame["shift"].isin(shifts)]
        frame = frame[frame["size"] != "large"]
    return replace(comparisons, frame=frame)


# --- In plain language ---------------------------------------------------------------------------
def conclusions(
    comparisons: pd.DataFrame, scores: pd.DataFrame, context: ReportContext
) -> list[str]:
    """The conclusions that `scores` and the frame of `main_rows` support, one line each."""
    if too_few(comparisons):
        needed = patients_needed(comparisons["against"].nunique())
        found = plural(count_patients(scores), "patient")
        return [f"{found} cannot support a conclusion: {needed} are needed for any p under 0.05."]
    lines = []
    for _, row in comparisons.iterrows():
        asked = row["size"] == "all"
        asked |= (row["size"], row["box"]) == ("small", "standard")
        if asked and row["against"] == context.baseline:
            lines.append(_sentence(row, context, comparisons["against"].nunique()))
    shift, of_proposed = context.protocol.shift, by_model(scores)[context.proposed]
    tight, shrunk = (
        estimate_mean(rows_for(of_proposed, kind, shift), "dsc") for kind in ("standard", "shrink")
    )
    return [
        *lines,
        f"From tight boxes to boxes too small by up to {shift} the DSC of {context.proposed} "
        f"changes by {(shrunk - tight).percent(1, sign='+')} points.",
    ]


def too_few(comparisons: pd.DataFrame) -> bool:
    """Whether no row of the frame of `comparison_table` can have a verdict."""
    return len(comparisons) > 0 and (comparisons["verdict"] == TOO_FEW).all()


def savings(every: pd.DataFrame, context: ReportContext) -> list[str]:
    """A line for each n of the frame of `tables.every_table`: what such boxes save and cost."""
    rows = every[(every["label"] == "all") & (every["model"] == context.proposed)].set_index("box")
    lines = []
    for n in context.protocol.every:
        row = rows.loc[EVERY.format(n)]
        drawn, all_drawn = (100 * rows["boxes drawn"][box].value for box in (row.name, "standard"))
        lines.append(
            f"Boxes {n} slices apart: {drawn:.1f} are drawn per organ instead of "
            f"{all_drawn:.1f}, and the 3D DSC of {context.proposed} changes by "
            f"{row['DSC minus standard'].percent(1, sign='+')} points."
        )
    return lines


def _sentence(row: pd.Series, context: ReportContext, tests: int) -> str:
    """A row of `main_rows` in words; its p is corrected for so many `tests`."""
    boxes = {
        "standard": "tight boxes",
        "expansion": f"boxes too large by up to {row['shift']}",
        "shrink": f"boxes too small by up to {row['shift']}",
    }[row["box"]]
    subject = f"small instances, {boxes}" if row["size"] == "small" else boxes
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


# --- Families and regret -------------------------------------------------------------------------
def family_table(scores: pd.DataFrame, context: ReportContext) -> Table:
    """families.csv: a row per population and training, best first; empty with one training."""
    shift = context.protocol.shift
    families, drawn = {}, set(scores["box"].unique())
    for kind, size in box_families(context.protocol.shifts_of_both_units):
        name = {"standard": "tight", **LIKE}.get(kind, f"{kind} {size}")
        families[name] = (name if name in drawn else kind, size)
    by_share = [name for name, (_, size) in families.items() if size.unit == "side"]
    rows = []
    for population, part in populations(scores, "all", "small").items():
        trainings = by_model(part, context.training_of)
        if len(trainings) < 2:
            continue
        means = {
            training: {f: estimate_mean(rows_for(rows, *box), "dsc") for f, box in families.items()}
            for training, rows in trainings.items()
        }
        best = {f: _largest([dsc[f] for dsc in means.values()]) for f in families}
        regrets = {
            f: best[f].value - rows_for(part, *box).groupby("model", observed=True)["dsc"].mean()
            for f, box in families.items()
        }
        seeds = pd.DataFrame(regrets).max(axis=1).groupby(context.training_of)
        ranked = []
        for training, dsc in means.items():
            worst = _largest([best[f] - dsc[f] for f in families])
            row = table_row({"size": population, "training": training}, dsc)
            number, low, high = seeds.get_group(training).agg(["size", "min", "max"])
            row |= {"seeds": f"{number:.0f}", "worst regret": worst}
            row["without px"] = _largest([best[f] - dsc[f] for f in by_share])
            row |= {"regret of seeds": f"{100 * low:.1f} … {100 * high:.1f}" if low < high else ""}
            ranked.append(row)
        rows += sorted(ranked, key=lambda row: row["worst regret"].value)
    columns = ["size", "training", "patients", "instances", "seeds", *families]
    return Table(
        f"DSC over {len(families)} families of boxes, %, and worst regret, points.",
        f"{caption(scores, context, shift)} Loose: each edge by U(-{shift}, {shift}). The regret "
        "in a family is how far a mean lies below that of the best training here in that family; "
        "the worst regret is the largest in a row, and “without px” omits families in pixels. As "
        "a maximum, it and its interval tend to be too high. Every 5, every 10: boxes drawn in "
        "every n-th slice and interpolated in between, or with the errors of such boxes on other "
        "patients. For several seeds of a training: means over them.",
        pd.DataFrame(rows, columns=[*columns, "without px", "worst regret", "regret of seeds"]),
        digits=1,
    )


def _largest(estimates: Sequence[Estimate]) -> Estimate:
    """The largest of several means of the same patients, in every resample as well."""
    return replace(estimates[0], values=np.max([one.values for one in estimates], axis=0))


def headline(families: pd.DataFrame, context: ReportContext) -> str:
    """The smallest worst regret in the frame of `family_table` and that of the proposed model."""
    regret = families[families["size"] == "all"].set_index("training")["worst regret"]
    text = f"Smallest worst regret over the families of boxes: {regret.index[0]}, "
    text += f"{regret.iloc[0].percent(1)} points of DSC"
    proposed = context.training_of(context.proposed)
    if proposed != regret.index[0]:
        text += f"; {proposed} has {regret[proposed].percent(1)}"
    return f"{text}."


def draw_families(families: pd.DataFrame, path: Path) -> str:
    """Draw the frame of `family_table` as a map, a panel per population; returns its Markdown."""
    panels = dict(iter(families.groupby("size", sort=False)))
    figure = plotting.new_figure(
        2 * plotting.COLUMN, sum(0.19 * len(panel) + 0.85 for panel in panels.values())
    )
    ratios = [len(panel) + 3 for panel in panels.values()]
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    columns = families.loc[:, "tight":"worst regret"].columns.tolist()
    for axes, (population, panel) in zip(grid, panels.items(), strict=True):
        shown = 100 * np.array([[one.value for one in row] for row in panel[columns].to_numpy()])
        regret = np.hstack([shown[:, :-2].max(axis=0) - shown[:, :-2], shown[:, -2:]])
        shades = axes.imshow(regret, cmap="Oranges", vmin=0, vmax=MAX_SHADE, aspect="auto")
        for (row, column), number in np.ndenumerate(shown):
            colour = "white" if regret[row, column] > 0.6 * MAX_SHADE else "black"
            style = {"ha": "center", "va": "center", "fontsize": 6, "color": colour}
            axes.text(column, row, f"{number:.1f}", **style)
        names = [column.replace(" ", "\n") for column in columns]
        axes.set_xticks(range(len(columns)), names, fontsize=6)
        axes.set_yticks(range(len(panel)), panel["training"], fontsize=6)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.axvline(len(columns) - 2.5, color="white", linewidth=3)
        first = panel["worst regret"].iloc[0]
        name = "instances" if population == "all" else f"{population} instances"
        title = f"{first.instances} {name} of {plural(first.patients, 'patient')}"
        axes.set_title(title, fontsize=7, loc="left")
    bar = figure.colorbar(shades, ax=list(grid), shrink=0.6, extend="max")
    bar.set_label("regret, points of DSC", fontsize=6)
    bar.ax.tick_params(labelsize=6)
    plotting.save_figure(figure, path, dpi=300)
    return picture(
        path.name,
        "DSC in % over the families of boxes, and the worst regret in points. The darker a cell, "
        "the farther its training lies behind the best one in that family.",
    )


# --- The curve against the shift -----------------------------------------------------------------
def robustness_table(scores: pd.DataFrame, context: ReportContext) -> Table:
    """robustness.csv: every model's mean scores against one signed shift of all edges."""
    rows = []
    parts = populations(scores[scores["box"].isin(["standard", "sweep"])], "all", "small").items()
    for unit, (population, part) in itertools.product(XLABELS, parts):
        sweep = [shift for shift in context.protocol.sweep if shift.unit == unit]
        shifts = sorted([*sweep, Shift(0.0, unit)], key=lambda shift: shift.size) if sweep else []
        models = by_model(part)
        for score, model, shift in itertools.product(("dsc", "nsd"), models, shifts):
            keys = {"size": population, "unit": unit, "shift": str(shift)}
            keys |= {"model": model, "score": score.upper()}
            at_shift = models[model]["shift"] == (str(shift) if shift.size else TIGHT)
            rows.append(table_row(keys, {"mean": estimate_mean(models[model][at_shift], score)}))
    return Table("Scores against the shift of every edge, %.", "", pd.DataFrame(rows))


def draw_curves(curves: pd.DataFrame, unit: str, path: Path) -> str:
    """Draw `robustness_table`'s curves over shifts of one unit; returns their Markdown."""
    curves = curves[curves["unit"] == unit]
    keys = ["score", "size", "model"]
    scores, columns, models = (curves[name].unique().tolist() for name in keys)
    figure = plotting.new_figure(plotting.COLUMN, 1.75 * len(scores) + 0.7)
    grid = figure.subplots(len(scores), len(columns), squeeze=False, sharex=True, sharey="row")
    for (score, population, model), points in curves.groupby(keys, sort=False):
        axes = grid[scores.index(score), columns.index(population)]
        number = models.index(model)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        x = [float(shift.rstrip("%px")) for shift in points["shift"]]
        mean, low, high = 100 * np.transpose([(m.value, *m.interval) for m in points["mean"]])
        axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
        axes.plot(x, mean, color=colour, marker=marker, markersize=2.2, linewidth=0.9, label=model)
    for axes in grid.flat:
        axes.tick_params(labelsize=6.5, length=2, pad=2)
        axes.axvline(0, color="0.6", linewidth=0.6)
        axes.grid(alpha=0.3, linewidth=0.5)
    for axes, score in zip(grid[:, 0], scores, strict=True):
        axes.set_ylabel(f"{score}, %", fontsize=7)
    for top, bottom, population in zip(grid[0], grid[-1], columns, strict=True):
        first = curves[curves["size"] == population].iloc[0]
        n = f"{first['instances']} of {plural(int(first['patients']), 'patient')}"
        top.set_title(f"{population} instances: {n}", fontsize=6.5)
        bottom.set_xlabel(XLABELS[unit], fontsize=6.5)
    handles, columns = grid[0, 0].get_legend_handles_labels(), min(4, len(models))
    style = {"loc": "outside lower center", "frameon": False, "fontsize": 6.5}
    figure.legend(*handles, ncols=columns, **style)
    plotting.save_figure(figure, path, dpi=300)
    return picture(
        path.name,
        f"Scores against the {XLABELS[unit]}; outward is positive. Bands: 95 % bootstrap "
        "intervals over patients, if there are enough patients.",
    )


def draw_every(rows: pd.DataFrame, path: Path) -> str:
    """Draw DSC against the boxes drawn, of the rows of `every_table` that are of all labels.

    Returns the Markdown of the picture.
    """
    models, kinds = rows["model"].unique().tolist(), rows["box"].unique().tolist()
    figure = plotting.new_figure(plotting.COLUMN, 2.6)
    axes = figure.subplots()
    for number, model in enumerate(models):
        of_model = rows[rows["model"] == model]
        mean, low, high = 100 * np.transpose([(m.value, *m.interval) for m in of_model["DSC"]])
        style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 0.9, "markersize": 3}
        style["marker"] = MARKERS[number % len(MARKERS)]
        x = np.arange(len(kinds)) + 0.06 * (number - (len(models) - 1) / 2)
        axes.plot(x[:-1], mean[:-1], label=model, **style)
        axes.plot(x[-1:], mean[-1:], **style)  # propagated: no line leads there
        axes.vlines(x, low, high, color=style["color"], linewidth=0.6, alpha=0.6)
    drawn = rows["boxes drawn"][: len(kinds)]
    ticks = [f"{kind}\n{100 * one.value:.1f}" for kind, one in zip(kinds, drawn, strict=True)]
    axes.set_xticks(range(len(kinds)), ticks)
    axes.set_xlabel("boxes, and how many are drawn per organ on average", fontsize=6.5)
    axes.set_ylabel("DSC in 3D, %", fontsize=7)
    axes.tick_params(labelsize=6.5, length=2, pad=2)
    axes.grid(alpha=0.3, linewidth=0.5)
    figure.legend(
        loc="outside lower center", ncols=min(4, len(models)), frameon=False, fontsize=6.5
    )
    plotting.save_figure(figure, path, dpi=300)
    return picture(
        path.name,
        "DSC in 3D under tight boxes in every slice (standard) and in every n-th slice, and from "
        "one propagated box. Lines: 95 % bootstrap intervals over patients, if there are enough "
        "patients.",
    )
