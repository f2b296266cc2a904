"""Everything that an evaluation writes but its predictions: CSV files, tables, figures, report."""

import html
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import markdown
import pandas as pd
from markdown.extensions.toc import TocExtension
from PIL import Image

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
    "Each trained model is one training run: the intervals reflect variation between patients, not "
    "between runs, and with fewer than about twenty patients they are too narrow. Seeds of one "
    "training are averaged only in the families of boxes and in the errors on small instances. p "
    "is corrected for the number of models, not for the number of questions. `scaled` and "
    "`adaptive` are trained on shifts in shares of the side, MedSAM on shifts in pixels. "
    "Other scanners and other organs were not tested."
)
PANEL_PLACE = "Open report.html to move the box of an example and see how every mask responds."


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
    glance = tables.glance_table(scores, context)
    families = comparisons.family_table(scores, context)
    compared = comparisons.comparison_table(scores, context)
    shown = comparisons.main_rows(compared, context)
    conclusions = comparisons.conclusions(shown.frame, scores, context)
    too_few = comparisons.too_few(shown.frame)
    if (families.frame["size"] == "all").sum() > 2 and not too_few:  # beside the start
        conclusions.insert(0, comparisons.headline(families.frame, context))
    volumes = []
    if volume_scores is not None:
        volumes = _volumes(volume_scores, context, folder)
    if context.protocol.every:
        every = tables.every_table(volume_scores, context)
        conclusions += comparisons.savings(every.frame, context)
        volumes += _every(every, folder)

    parts = [f"# {TITLE}"]
    parts += [f"**Note: {tables.escape_markdown(note)}**" for note in context.notes]
    parts += ["## At a glance", glance]
    panel, pictures = "", []
    if render:
        panel = examples.panel_html(scores, context, render)
        pictures = examples.draw_cases(scores, context, render, folder)
        parts.append(PANEL_PLACE)
    parts += ["## Conclusions", "\n".join(f"- {line}" for line in conclusions)]
    parts += [] if too_few else [CAVEAT]
    parts += _robustness(scores, context, folder)
    if len(families.frame):
        tables.write_csv(folder / "families.csv", families)
        picture = comparisons.draw_families(families.frame, folder / "families.png")
        parts += ["## Families of boxes", picture, families]
    parts += volumes
    parts += ["## The paper's tables", *_paper_tables(scores, context, folder), *pictures]
    if (scores["box"] == GIVEN).any():
        given = tables.given_table(scores, context)
        tables.write_csv(folder / "given.csv", given)
        parts += ["## Boxes that people drew", given]
    if len(compared.frame):
        tables.write_csv(folder / "comparisons.csv", compared)
        if not too_few:
            parts += [f"## {context.proposed} against every other model", shown]
            parts.append("NSD, large instances and the other shifts are in `comparisons.csv`.")
    labels = [tables.label_table(scores, context, score) for score in ("dsc", "nsd")]
    tables.write_csv(folder / "labels.csv", *labels)
    parts += ["## Per label", labels[0], "NSD is in `labels.csv`."]
    write_report([*parts, "## How this was made", provenance], folder, panel)
    notes = [f"note: {note}" for note in context.notes]
    return "\n\n".join([*notes, tables.plain(glance), conclusions[0]])


def _volumes(scores: pd.DataFrame, context: ReportContext, folder: Path) -> list[str | Table]:
    """Write volumes.csv; returns the report's section."""
    scores.to_csv(folder / "volumes.csv", index=False, lineterminator="\n")
    return ["## In 3D", tables.volume_table(scores, context)]


def _every(every: Table, folder: Path) -> list[str | Table]:
    """Write the files of boxes in every n-th slice; returns the report's section."""
    tables.write_csv(folder / "every.csv", every)
    of_all = every.frame[every.frame["label"] == "all"].drop(columns=["dataset", "label"])
    every = replace(every, frame=of_all)
    _write_texts(folder, "every", [every])
    picture = comparisons.draw_every(of_all, folder / "every.png")
    return ["## Boxes in every n-th slice", every, picture, "By label: see `every.csv`."]


def _paper_tables(scores: pd.DataFrame, context: ReportContext, folder: Path) -> list[str | Table]:
    """Write Tables I to III and small.csv; returns what the report shows of them."""
    published, shifts = tables.PUBLISHED_TABLE, context.protocol.shifts
    one = [tables.table_one(scores, context, shift) for shift in shifts]
    two, three = tables.table_two(scores, context), tables.table_three(scores, context)
    files = {"table1": [*one, published], "table2": [two], "table3": [three]}
    for name, group in files.items():
        _write_texts(folder, name, group, tables.method(context))
        tables.write_csv(folder / f"{name}.csv", *(t for t in group if t is not published))
    shown = context.protocol.shifts_of_both_units
    parts = [table for table, shift in zip(one, shifts, strict=True) if shift in shown]
    parts.append(published)
    if len(shifts) > len(shown):
        parts.append("The other shifts are in `table1.csv`.")
    parts += [two, three]
    if scores["small"].any():
        small = tables.small_table(scores, context)
        tables.write_csv(folder / "small.csv", small)
        of_all = small.frame[small.frame["label"] == "all"].drop(columns=["dataset", "label"])
        parts += [replace(small, frame=of_all), "By label: see `small.csv`."]
    return parts


def _write_texts(folder: Path, name: str, group: Sequence[Table], method: str = "") -> None:
    """Write tables as <name>.md and <name>.tex; `method` is how those in 2D were measured."""
    for suffix, form in (("md", tables.markdown), ("tex", tables.latex)):
        texts = (form(t, "" if t is tables.PUBLISHED_TABLE else method) for t in group)
        text = "\n\n".join(each.rstrip("\n") for each in texts)
        (folder / f"{name}.{suffix}").write_text(f"{text}\n", encoding="utf-8")


def _robustness(scores: pd.DataFrame, context: ReportContext, folder: Path) -> list[str | Table]:
    """Write robustness.csv and its figures; returns the report's section."""
    parts = []
    if context.protocol.sweep:
        curves = comparisons.robustness_table(scores, context)
        tables.write_csv(folder / "robustness.csv", curves)
        parts = ["## Robustness to the shift"]
        for unit in curves.frame["unit"].unique():
            path = folder / f"robustness_{unit}.png"
            parts.append(comparisons.draw_curves(curves.frame, unit, path))
        parts.append("The numbers are in `robustness.csv`.")
    return parts


def write_report(parts: Sequence[str | Table], folder: Path, panel: str = "") -> None:
    """Write report.md, and report.html with its pictures and, at PANEL_PLACE, the panel."""
    text = "\n\n".join(tables.markdown(p) if isinstance(p, Table) else p for p in parts)
    (folder / "report.md").write_text(f"{text}\n", encoding="utf-8")
    converter = markdown.Markdown(extensions=["tables", TocExtension(toc_depth="2-2")])
    body = converter.convert(text)
    body = body.replace("</h1>", f"</h1>\n{converter.toc}", 1)
    body = re.sub(r"<br ?/?>(\[[^<]*\])", r" <small>\1</small>", body)
    body = body.replace("<table>", '<div class="wide glance"><table>', 1)  # of "At a glance"
    body = re.sub('(?<!glance">)<table>', '<div class="wide"><table>', body)
    body = body.replace("</table>", "</table></div>")
    for name in re.findall(r'src="(\w+\.png)"', body):
        uri = examples.data_uri(Image.open(folder / name))
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
