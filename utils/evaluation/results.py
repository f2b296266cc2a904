"""What an evaluation leaves behind: CSV files, the paper's tables, figures, and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perturb import BOX_KINDS, Shift
from utils.evaluation import comparisons, figures, paper_tables, report
from utils.evaluation.comparisons import Curve, Protocol, rows_of
from utils.evaluation.scores import Scores
from utils.evaluation.tables import Table
from utils.system.files import atomic_write

if TYPE_CHECKING:
    from utils.evaluation.volume_scores import VolumeScores

INSTANCE = tuple[str, int, str]  # case, slice, label
Illustrate = Callable[[INSTANCE, str, Shift, Sequence[str]], figures.Example]
CAVEAT = (
    "Each trained model is one training run: the intervals tell how patients vary, not how another "
    "run would, and with fewer than about twenty patients they are too narrow. p is corrected for "
    "the number of models, not for the number of questions. Shifts in shares of the side are what "
    "`scaled` and `adaptive` are trained on, shifts in pixels are MedSAM's kind. Boxes that people "
    "draw, other scanners and other organs were not tested."
)
# What this module and eval.py write; what an earlier evaluation left of it is removed.
FILES = (
    *("report.md", "report.html", "instances.csv", "labels.csv", "comparisons.csv"),
    *(f"table{n}.{suffix}" for n in (1, 2, 3) for suffix in ("md", "csv", "tex")),
    *("robustness.csv", "robustness_side.png", "robustness_px.png", "volumes.csv"),
    *("fig4.png", "fig5.png", "fig6.png"),
)


def write_results(
    scores: Scores,
    protocol: Protocol,
    how_made: list[report.Block],
    out: Path,
    illustrate: Illustrate | None,
    volumes: VolumeScores | None = None,
) -> str:
    """Write all files of an evaluation but its predictions.

    Args:
        scores: of every model, instance and box.
        protocol: how they were measured.
        how_made: the report's last section.
        out: the folder.
        illustrate: draws one instance under one kind of box with some of the models; without it
            the figures of examples are left out.
        volumes: scores in 3D, complete.

    Returns:
        Table I and the conclusions, for the screen.
    """
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    scores.write(out / "instances.csv")  # first: it took the time, and all else follows from it
    several = len(scores.distinct("model")) > 1
    one = {shift: paper_tables.table_one(scores, protocol, shift) for shift in protocol.shifts}
    two, three = (
        paper_tables.table_two(scores, protocol),
        paper_tables.table_three(scores, protocol),
    )
    labels = [paper_tables.label_table(scores, protocol, score) for score in ("dsc", "nsd")]
    compared = comparisons.compare(scores, protocol)
    said = comparisons.conclusions(scores, compared, protocol)
    curves = comparisons.curves(scores, protocol)

    for name, tables in (("table1", [*one.values()]), ("table2", [two]), ("table3", [three])):
        _write(out / f"{name}.md", "\n\n".join(map(report.as_markdown, tables)) + "\n")
        _write(out / f"{name}.tex", "\n".join(table.latex() for table in tables))
        _write(out / f"{name}.csv", _one_csv(tables))
    _write(out / "labels.csv", _one_csv(labels))
    if several:
        _write(out / "comparisons.csv", comparisons.comparison_table(compared, protocol).csv())
    if volumes:
        volumes.write(out / "volumes.csv")

    shown = comparisons.both_units(protocol)
    blocks: list[report.Block] = [
        report.Heading(1, "Segmentation under boxes that are tight, too large and too small"),
        report.Heading(2, "What can be concluded"),
        report.Items(said),
        report.Text(CAVEAT),
        report.Heading(2, "The paper's tables"),
        *(one[shift] for shift in shown),
        *(
            [paper_tables.shift_table(scores, protocol)]
            if len(protocol.shifts) > len(shown)
            else []
        ),
        two,
        three,
    ]
    if several:
        few = [c for c in compared if c.score == "dsc" and c.shift in shown]
        blocks += [
            report.Heading(2, f"{protocol.proposed} against each other model"),
            comparisons.comparison_table(few, protocol),
            report.Text("For NSD and the other shifts see `comparisons.csv`."),
        ]
    if curves:
        _write(out / "robustness.csv", comparisons.robustness_table(curves).csv())
        blocks += [report.Heading(2, "Robustness"), comparisons.area_table(curves, protocol)]
        blocks += _robustness_figures(curves, out)
    if protocol.draws > 1:
        blocks.append(comparisons.spread_table(scores, protocol))
    if illustrate:
        blocks += [report.Heading(2, "Examples"), *_examples(scores, protocol, illustrate, out)]
    blocks += [report.Heading(2, "Per label"), *labels]
    if volumes:
        blocks += [report.Heading(2, "In 3D"), volumes.table(protocol)]
    report.write_report([*blocks, report.Heading(2, "How this was made"), *how_made], out)
    first = one[protocol.shifts[0]]
    printed = (f"{first.title} {first.how}", first.plain(), report.as_markdown(report.Items(said)))
    return "\n\n".join(printed)


def _robustness_figures(curves: Sequence[Curve], out: Path) -> list[report.Block]:
    """robustness_side.png and robustness_px.png."""
    blocks: list[report.Block] = []
    for unit, scale, xlabel in (
        ("side", 100, "shift of every edge, % of side"),
        ("px", 1, "shift of every edge, px of 1024"),
    ):
        panels: dict[tuple[str, str], dict] = {}
        for curve in curves:
            if curve.unit == unit:
                patients = comparisons.number(curve.means[0].patients, "patient")
                n = f"{curve.means[0].instances} of {patients}"
                key = (f"{curve.score.upper()}, %", f"{curve.population} instances: {n}")
                low, high = zip(*(mean.interval for mean in curve.means), strict=True)
                panels.setdefault(key, {})[curve.model] = (
                    [scale * shift.size for shift in curve.shifts],
                    [100 * mean.value for mean in curve.means],
                    [100 * value for value in low],
                    [100 * value for value in high],
                )
        if panels:
            path = out / f"robustness_{unit}.png"
            figures.draw_robustness(panels, xlabel, path)
            caption = f"Scores against the {xlabel}; outward is positive. Bands: 95 % intervals by "
            caption += "bootstrap over patients, where there are patients enough."
            blocks.append(report.Figure(path, caption))
    return blocks


# --- Examples ------------------------------------------------------------------------------------
def _examples(
    scores: Scores, protocol: Protocol, illustrate: Illustrate, out: Path
) -> list[report.Block]:
    """fig4.png, fig5.png and fig6.png: the paper's figures, with cases chosen by rule."""
    shift = protocol.shifts[0]
    baseline, proposed = protocol.baseline, protocol.proposed
    models = list(dict.fromkeys((scores.distinct("model")[0], baseline, proposed)))
    gain = f"gain in DSC from {baseline} to {proposed}" if baseline != proposed else "DSC"
    blocks: list[report.Block] = []

    def draw(name: str, examples: list[figures.Example], caption: str, same_view: bool) -> None:
        path = out / f"{name}.png"
        figures.draw_examples(examples, caption, path, same_view)
        blocks.append(report.Figure(path, caption))

    gains = _gains(scores, protocol, BOX_KINDS)
    key = _by_rule(gains)["median"]
    draw(
        "fig4",
        [
            figures.Example(kind, example.image, example.target, example.cells)
            for kind in BOX_KINDS
            for example in [illustrate(key, kind, shift, models)]
        ],
        f"One target under three boxes: {_name(key)}. Chosen by rule: median {gain}, mean of the "
        f"three boxes, among {comparisons.number(len(gains), 'instance')}.",
        same_view=True,
    )
    for name, population, kind, what in (
        ("fig5", "small", "standard", f"Small instances ({protocol.small}) under tight boxes"),
        ("fig6", "all", "shrink", f"Shrink boxes (up to {shift})"),
    ):
        gains = _gains(scores.where(population), protocol, (kind,))
        if not gains:
            continue
        examples = []
        for rule, key in _by_rule(gains).items():
            drawn = illustrate(key, kind, shift, models)
            row = f"{rule}\n{key[2]}\n{key[0]}, {key[1]}"
            examples.append(figures.Example(row, drawn.image, drawn.target, drawn.cells))
        draw(
            name,
            examples,
            f"{what}. Chosen by rule: largest, median and smallest {gain} among "
            f"{comparisons.number(len(gains), 'instance')}.",
            same_view=False,
        )
    return blocks


def _gains(scores: Scores, protocol: Protocol, kinds: Sequence[str]) -> dict[INSTANCE, float]:
    """How much more DSC the proposed model has than the baseline, mean over `kinds` of box."""
    gains: dict[INSTANCE, float] = {}
    for kind in kinds:
        # Draw 0: the box that the picture shows.
        boxes = rows_of(scores.where(draw=0), kind, protocol.shifts[0]).group("model")
        for model, sign in ((protocol.proposed, 1), (protocol.baseline, -1)):
            if (model,) in boxes and (sign > 0 or protocol.baseline != protocol.proposed):
                for key, value in boxes[(model,)].by_instance("dsc").items():
                    gains[key] = gains.get(key, 0.0) + sign * value / len(kinds)
    return gains


def _by_rule(gains: dict[INSTANCE, float]) -> dict[str, INSTANCE]:
    """The instances of the largest, the median and the smallest gain."""
    order = sorted(gains, key=lambda key: (gains[key], key))
    rules = ("largest", order[-1]), ("median", order[(len(order) - 1) // 2]), ("smallest", order[0])
    return dict(rules)


def _name(key: INSTANCE) -> str:
    case, index, label = key
    return f"{label}, {case}, slice {index}"


# --- Files ---------------------------------------------------------------------------------------
def _one_csv(tables: Sequence[Table]) -> str:
    """Tables of the same columns as one CSV file."""
    first, *rest = [table.csv().splitlines(keepends=True) for table in tables]
    return "".join(first + [line for lines in rest for line in lines[1:]])


def _write(path: Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)
