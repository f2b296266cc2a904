"""Everything that an evaluation writes but its predictions: CSV files, tables, figures, report."""

import html
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import markdown
import pandas as pd

from utils.evaluation import comparisons, examples, tables
from utils.evaluation.prompts import GIVEN, ReportContext
from utils.evaluation.tables import Table

RESULT_FILES = (
    *("report.md", "report.html", "instances.csv", "labels.csv", "comparisons.csv"),
    *("families.csv", "families.png", "small.csv", "given.csv"),
    *(f"table{n}.{suffix}" for n in (1, 2, 3) for suffix in ("md", "csv", "tex")),
    *("robustness.csv", "robustness_side.png", "robustness_px.png", "volumes.csv"),
    *("every.md", "every.csv", "every.tex", "every.png"),
    *("fig4.png", "fig5.png", "fig6.png"),
)
TITLE = "Segmentation under boxes that are tight, too large and too small"
CAVEAT = (
    "Each trained model is one training run: the intervals show how patients vary, not how another "
    "run would, and with fewer than about twenty patients they are too narrow. Seeds of one "
    "training are averaged in the families of boxes and in the errors on small instances alone. p "
    "is corrected for the number of models, not for the number of questions. Shifts in shares of "
    "the side are what `scaled` and `adaptive` are trained on, shifts in pixels are MedSAM's kind. "
    "Other scanners and other organs were not tested."
)
PANEL_PLACE = "Open report.html to move the box of an example and see what every model makes of it."


def write_results(
    scores: pd.DataFrame,
    context: ReportContext,
    provenance: str,
    folder: Path,
    render: examples.Render | None = None,
    volume_scores: pd.DataFrame | None = None,
) -> str:
    """Write all files of an evaluation but its predictions; returns what to print.

    `provenance` is the last section, Markdown. Without an `ExampleRenderer` there are no examples.
    """
    rows = scores.astype({"small": int})
    rows.to_csv(folder / "instances.csv", index=False, lineterminator="\n")
    one = [tables.table_one(scores, context, shift) for shift in context.protocol.shifts]
    regret = comparisons.family_table(scores, context)
    compared = comparisons.comparison_table(scores, context)
    shown = comparisons.main_rows(compared, context)
    conclusions = comparisons.conclusions(shown.frame, scores, context)
    if len(regret.frame):
        conclusions.insert(0, comparisons.headline(regret.frame, context))
    if context.protocol.every:
        every = tables.every_table(volume_scores, context)
        conclusions += comparisons.savings(every.frame, context)
    bullets = "\n".join(f"- {line}" for line in conclusions)

    parts = [f"# {TITLE}"]
    parts += [f"**Note: {tables.escape_markdown(note)}**" for note in context.notes]
    parts += ["## Conclusions", bullets, CAVEAT]
    if len(regret.frame):
        tables.write_csv(folder / "families.csv", regret)
        picture = comparisons.draw_families(regret.frame, folder / "families.png")
        parts += ["## Families of boxes", regret, picture]
    parts += _paper_tables(one, scores, context, folder)
    if len(compared.frame):
        tables.write_csv(folder / "comparisons.csv", compared)
        parts += [f"## {context.proposed} against each other model", shown]
        parts.append("For NSD and the other shifts see `comparisons.csv`.")
    if (scores["box"] == GIVEN).any():
        given = tables.given_table(scores, context)
        tables.write_csv(folder / "given.csv", given)
        parts += ["## Boxes that people drew", given]
    parts += _robustness(scores, context, folder)
    panel = ""
    if render:
        panel = examples.panel_html(scores, context, render)
        pictures = examples.draw_cases(scores, context, render, folder)
        parts += ["## Examples", PANEL_PLACE, *pictures]
    labels = [tables.label_table(scores, context, score) for score in ("dsc", "nsd")]
    tables.write_csv(folder / "labels.csv", *labels)
    parts += ["## Per label", *labels]
    if volume_scores is not None:
        volume_scores.to_csv(folder / "volumes.csv", index=False, lineterminator="\n")
        parts += ["## In 3D", tables.volume_table(volume_scores, context)]
    if context.protocol.every:
        tables.write_csv(folder / "every.csv", every)
        of_all = every.frame[every.frame["label"] == "all"].drop(columns=["dataset", "label"])
        every = replace(every, frame=of_all)
        _write_texts(folder, "every", [every])
        picture = comparisons.draw_every(of_all, folder / "every.png")
        parts += ["## Boxes in every n-th slice", every, picture, "By label: see `every.csv`."]
    write_report([*parts, "## How this was made", provenance], folder, panel)
    notes = [f"note: {note}" for note in context.notes]
    printed = [tables.plain(one[0]), tables.plain(tables.PUBLISHED_TABLE)]
    return "\n\n".join([*notes, *printed, bullets])


def _paper_tables(
    one: list[Table], scores: pd.DataFrame, context: ReportContext, folder: Path
) -> list[str | Table]:
    """Write Tables I (`one` for each shift) to III, and small.csv; returns the report's section."""
    published = tables.PUBLISHED_TABLE
    two, three = tables.table_two(scores, context), tables.table_three(scores, context)
    files = {"table1": [*one, published], "table2": [two], "table3": [three]}
    for name, group in files.items():
        _write_texts(folder, name, group)
        tables.write_csv(folder / f"{name}.csv", *(t for t in group if t is not published))
    shifts, shown = context.protocol.shifts, context.protocol.shifts_of_both_units
    parts = [table for table, shift in zip(one, shifts, strict=True) if shift in shown]
    parts = ["## The paper's tables", *parts, published]
    if len(shifts) > len(shown):
        parts.append("For the other shifts see `table1.csv`.")
    parts += [two, three]
    if scores["small"].any():
        small = tables.small_table(scores, context)
        tables.write_csv(folder / "small.csv", small)
        of_all = small.frame[small.frame["label"] == "all"].drop(columns=["dataset", "label"])
        parts += [replace(small, frame=of_all), "By label: see `small.csv`."]
    return parts


def _write_texts(folder: Path, name: str, group: Sequence[Table]) -> None:
    """Write tables as <name>.md and <name>.tex."""
    markdown_text = "\n\n".join(map(tables.markdown, group))
    (folder / f"{name}.md").write_text(f"{markdown_text}\n", encoding="utf-8")
    latex = "\n".join(map(tables.latex, group))
    (folder / f"{name}.tex").write_text(latex, encoding="utf-8")


def _robustness(scores: pd.DataFrame, context: ReportContext, folder: Path) -> list[str | Table]:
    """Write robustness.csv and its figures; returns the report's section."""
    parts = []
    if context.protocol.sweep:
        curves = comparisons.robustness_table(scores, context)
        tables.write_csv(folder / "robustness.csv", curves)
        parts = ["## Robustness", "The numbers: see `robustness.csv`."]
        for unit in curves.frame["unit"].unique():
            path = folder / f"robustness_{unit}.png"
            parts.append(comparisons.draw_curves(curves.frame, unit, path))
    return parts


def write_report(parts: Sequence[str | Table], folder: Path, panel: str = "") -> None:
    """Write report.md, and report.html with its pictures and, at PANEL_PLACE, the panel."""
    text = "\n\n".join(tables.markdown(p) if isinstance(p, Table) else p for p in parts)
    (folder / "report.md").write_text(f"{text}\n", encoding="utf-8")
    body = markdown.markdown(text, extensions=["tables"])
    body = re.sub(r"<br ?/?>(\[[^<]*\])", r"<br><small>\1</small>", body)
    body = body.replace("<table>", '<div class="wide"><table>')
    body = body.replace("</table>", "</table></div>")
    for name in re.findall(r'src="(\w+\.png)"', body):
        uri = examples.data_uri("png", (folder / name).read_bytes())
        body = body.replace(f'src="{name}"', f'src="{uri}"')
    body = body.replace(f"<p>{PANEL_PLACE}</p>", panel)
    title = html.escape(text.partition("\n")[0].removeprefix("# "))
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    (folder / "report.html").write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>\n{style}</style></head>\n<body>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )
