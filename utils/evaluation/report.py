"""Everything that an evaluation writes but its predictions: CSV files, tables, figures, report."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import markdown
import pandas as pd
from PIL import Image

from utils.evaluation import comparisons, families, figures, paper_tables, robustness, tables
from utils.evaluation.given import given_table
from utils.evaluation.instances import models_of, write_instances
from utils.evaluation.panel import panel_html
from utils.evaluation.prompts import GIVEN, Protocol
from utils.evaluation.small_tissue import small_table
from utils.evaluation.volume_scores import volume_table
from utils.system.files import atomic_write

TITLE = "Segmentation under boxes that are tight, too large and too small"
CAVEAT = (
    "Each trained model is one training run: the intervals show how patients vary, not how another "
    "run would, and with fewer than about twenty patients they are too narrow. Seeds of one "
    "training are averaged in the families of boxes and in the errors on small instances alone. p "
    "is corrected for the number of models, not for the number of questions. Shifts in shares of "
    "the side are what `scaled` and `adaptive` are trained on, shifts in pixels are MedSAM's kind. "
    "Boxes that people draw, other scanners and other organs were not tested."
)
JPEG_QUALITY, JPEG_SHARE = 85, 0.6  # of pictures in report.html, where they take at most that share
PANEL_PLACE = "Open report.html to move the box of an example and see what every model makes of it."
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; padding: 0 1rem;
       max-width: 96rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
p, li { max-width: 48rem; overflow-wrap: anywhere; }
h3 + p, .wide + p, p > em { color: #555; font-size: 0.85rem; font-style: normal; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top; white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; }
small { color: #555; }
img { max-width: min(100%, 36rem); margin-top: 1.5rem; display: block; }
pre { background: #f4f4f4; padding: 0.75rem; white-space: pre-wrap; overflow-wrap: anywhere;
      font-size: 0.82rem; }
#panel .views { display: flex; flex-wrap: wrap; gap: 1rem; }
#panel figure { margin: 0; flex: 1 1 14rem; max-width: 24rem; }
#panel figcaption { font-size: 0.85rem; }
#panel svg { width: 100%; background: #000; display: block; }
#panel path, #panel rect { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
#panel .target { stroke: #009e73; color: #009e73; }
#panel .mask { stroke: #e69f00; color: #b87f00; }
#panel .box { stroke: #56b4e9; color: #2b7fb8; stroke-dasharray: 5 3; }
#panel .key span { margin-right: 1rem; font-weight: 600; }
#panel input[type=range] { width: min(24rem, 60vw); vertical-align: middle; touch-action: pan-y; }
#panel select { max-width: 100%; font: inherit; }
@media (prefers-color-scheme: dark) {
  body { color: #e4e4e4; background: #161616; }
  h2, th, td { border-color: #444; }
  h3 + p, .wide + p, p > em, small { color: #aaa; }
  pre { background: #242424; }
  img { background: #fff; }
  a { color: #7fb8ff; }
}
@media print {
  body { color: #1a1a1a; background: none; }
  #panel input { display: none; }
  @page { size: A4 landscape; margin: 12mm; }
  body { margin: 0; max-width: none; font-size: 11pt; }
  .wide { overflow: visible; }
  table { font-size: 7pt; page-break-inside: auto; }
  th, td { padding: 0.1rem 0.3rem; }
  tr, img { page-break-inside: avoid; }
  img { max-height: 150mm; page-break-after: avoid; }
  p, li { page-break-inside: avoid; }
  p:has(> img), h2, h3, h3 + p { page-break-after: avoid; }
}
"""


def write_results(
    scores: pd.DataFrame,
    protocol: Protocol,
    how_made: str,
    out: Path,
    illustrate: Callable[..., figures.Example] | None,
    volume_scores: pd.DataFrame | None = None,
) -> str:
    """Write all files of an evaluation but its predictions.

    Args:
        scores: of every model, instance and box, with the columns of instances.csv.
        protocol: how they were measured.
        how_made: the report's last section, Markdown.
        out: the folder, without earlier results.
        illustrate: as `figures.illustrator` returns it; None leaves out the figures of examples.
        volume_scores: with the columns of volumes.csv.

    Returns:
        The protocol's notes, Table I and the conclusions, for the terminal.
    """
    write_instances(scores, out / "instances.csv")

    shown = protocol.shifts_of_both_units
    several = len(models_of(scores)) > 1
    ones = {shift: paper_tables.table_one(scores, protocol, shift) for shift in protocol.shifts}
    two, three = (
        make(scores, protocol) for make in (paper_tables.table_two, paper_tables.table_three)
    )
    labels = [paper_tables.label_table(scores, protocol, score) for score in ("dsc", "nsd")]
    compared = comparisons.compare(scores, protocol)
    concluded = comparisons.conclusions(scores, compared, protocol)
    curves = robustness.curves(scores, protocol)
    ranked = families.family_scores(scores, protocol)
    if ranked:
        concluded = [families.headline(ranked, protocol), *concluded]

    published = paper_tables.published_table()
    for name, group, beside in (
        ("table1", list(ones.values()), [published]),
        ("table2", [two], []),
        ("table3", [three], []),
    ):
        _write(out / f"{name}.md", "\n\n".join(map(tables.markdown, group + beside)) + "\n")
        _write(out / f"{name}.tex", "\n".join(map(tables.latex, group + beside)))
        _write(out / f"{name}.csv", tables.csv(group))
    _write(out / "labels.csv", tables.csv(labels))
    if volume_scores is not None:
        _write(out / "volumes.csv", volume_scores.to_csv(index=False, lineterminator="\n"))

    bullets = "\n".join(f"- {line}" for line in concluded)
    parts: list[str | tables.Table] = [f"# {TITLE}"]
    parts += [f"**Note: {tables.escape_markdown(note)}**" for note in protocol.notes]
    parts += ["## What can be concluded", bullets, CAVEAT]
    if ranked:
        table = families.family_table(ranked, protocol, scores)
        _write(out / "families.csv", tables.csv([table]))
        parts += ["## Families of boxes", table]
        parts.append(figures.draw_families(ranked, out / "families.png"))
    parts += ["## The paper's tables", *(ones[shift] for shift in shown), published]
    if len(protocol.shifts) > len(shown):
        parts.append(paper_tables.shift_table(scores, protocol))
    parts += [two, three]
    if scores["small"].any():
        small = small_table(scores, protocol)
        _write(out / "small.csv", tables.csv([small]))
        of_all = small.frame[small.frame["label"] == "all"].drop(columns="label")
        parts += [replace(small, frame=of_all), "By label: see `small.csv`."]
    if several:
        table = comparisons.comparison_table(compared, protocol)
        _write(out / "comparisons.csv", tables.csv([table]))
        few = [one for one in compared if one.score == "dsc" and one.shift in shown]
        parts += [
            f"## {protocol.proposed} against each other model",
            comparisons.comparison_table(few, protocol),
            "For NSD and the other shifts see `comparisons.csv`.",
        ]
    if (scores["box"] == GIVEN).any():
        table = given_table(scores, protocol)
        _write(out / "given.csv", tables.csv([table]))
        parts += ["## Boxes that people drew", table]
    if curves:
        _write(out / "robustness.csv", tables.csv([robustness.robustness_table(curves)]))
        parts += ["## Robustness", robustness.area_table(curves, protocol)]
        parts += figures.draw_curves(curves, out)
    if protocol.draws > 1:
        parts.append(robustness.spread_table(scores, protocol))
    interactive = ""
    if illustrate:
        interactive = panel_html(scores, protocol, illustrate)
        parts += ["## Examples", PANEL_PLACE]
        parts += figures.draw_cases(scores, protocol, illustrate, out)
    parts += ["## Per label", *labels]
    if volume_scores is not None:
        parts += ["## In 3D", volume_table(volume_scores, protocol)]
    parts += ["## How this was made", how_made]
    write_report(parts, out, interactive)
    notes = [f"note: {note}" for note in protocol.notes]
    shown = [tables.plain(ones[protocol.shifts[0]]), tables.plain(published)]
    return "\n\n".join([*notes, *shown, bullets])


def write_report(parts: Sequence[str | tables.Table], out: Path, interactive: str = "") -> None:
    """Write Markdown and tables as report.md, beside its pictures, and as one report.html.

    report.html holds its pictures, so that it can be sent and opened offline.

    Args:
        parts: in order.
        out: the folder.
        interactive: HTML that takes the place of PANEL_PLACE in report.html.
    """
    text = "\n\n".join(tables.markdown(p) if isinstance(p, tables.Table) else p for p in parts)
    _write(out / "report.md", text + "\n")
    body = markdown.markdown(text, extensions=["tables"])
    body = re.sub(r"<br ?/?>(\[[^<]*\])", r"<br><small>\1</small>", body)
    body = body.replace("<table>", '<div class="wide"><table>')
    body = body.replace("</table>", "</table></div>")
    body = re.sub(r'src="(\w+\.png)"', lambda match: f'src="{_data_uri(out / match[1])}"', body)
    body = body.replace(f"<p>{PANEL_PLACE}</p>", interactive)
    title = html.escape(text.partition("\n")[0].removeprefix("# "))
    _write(
        out / "report.html",
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n",
    )


def _data_uri(path: Path) -> str:
    """A PNG, or the same as JPEG where that is much smaller: slices of CT are, diagrams are not."""
    png, jpeg = path.read_bytes(), io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(jpeg, "JPEG", quality=JPEG_QUALITY)
    smaller = len(jpeg.getvalue()) < JPEG_SHARE * len(png)
    kind, content = ("jpeg", jpeg.getvalue()) if smaller else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _write(path: Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)
