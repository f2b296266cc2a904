"""The figures of an evaluation: the paper's examples, chosen by rule, and the robustness curves."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.lines import Line2D

from perturb import BOX_KINDS
from utils.data.slices import Slice, read_image, read_instances
from utils.evaluation.families import FamilyScores
from utils.evaluation.instances import by_instance, models_of, under
from utils.evaluation.metrics import dsc
from utils.evaluation.models import predict
from utils.evaluation.paper_tables import small_text
from utils.evaluation.prompts import Prompt, Protocol, boxes_of
from utils.evaluation.robustness import Curve
from utils.evaluation.tables import escape_markdown
from utils.model.segmenter import Segmenter
from utils.system.plotting import (
    BLACK,
    BLUE,
    COLUMN,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    add_legend,
    draw_box,
    draw_contours,
    new_figure,
    save_figure,
    show_square,
)
from utils.system.wording import plural

ROW_NAME = 22  # characters beside a row of examples, at most
MODELS_ACROSS = 6  # columns of examples at most; of more models the first and the roles are shown
COLOURS = (BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE)  # of lines: yellow is too pale
WORST_SHADE = 10.0  # points of DSC that have the darkest shade, and all above
Instance = tuple[str, int, str]  # case, slice, label


@dataclass(frozen=True)
class Example:
    """One target with the boxes and masks of several models: a row of `draw_examples`.

    Attributes:
        name: written beside the row.
        image: (h, w) grey levels, any resolution; it covers the native slice.
        target: (H, W) bool, native pixels.
        cells: by model: box (4,) XYXY in native pixels, prediction (H, W) bool, and its DSC.
    """

    name: str
    image: np.ndarray
    target: np.ndarray
    cells: dict[str, tuple[np.ndarray, np.ndarray, float]]


def illustrator(
    models: dict[str, Segmenter],
    embeddings: dict[str, Callable[[Slice], torch.Tensor]],
    instances: dict[Instance, tuple[Slice, int]],
    seed: int,
    amp: torch.dtype | None = None,
) -> Callable[[Instance, Prompt, Sequence[str]], Example]:
    """A function that predicts one instance again, under one prompt with the models of some names.

    Args:
        models, embeddings: by name, as in eval.py's `evaluate`.
        instances: slice and label id of each instance.
        seed: of the boxes.
        amp: the dtype of half precision, or None.
    """

    def illustrate(instance: Instance, prompt: Prompt, names: Sequence[str]) -> Example:
        entry, label = instances[instance]
        label_map, labels, tight = read_instances(entry)
        boxes = boxes_of(entry, labels.tolist(), tight, prompt, seed)
        target = entry.frame.labels_to_native(label_map) == label
        position = labels.tolist().index(label)
        boxes = boxes[position : position + 1]  # the others take time and are not shown
        (box,) = entry.frame.boxes_to_native(boxes)
        cells = {}
        for name in names:
            logits = predict(models[name], embeddings[name](entry), boxes, entry.frame, amp)
            mask = (logits[0] > 0).cpu().numpy()
            cells[name] = (box, mask, dsc(mask, target))
        height, width = entry.frame.content
        image = read_image(entry.image_path, entry.image_sha256)[:height, :width]
        return Example(prompt.box, image, target, cells)

    return illustrate


# --- Examples: the paper's Figures 4-6 -----------------------------------------------------------
def draw_cases(
    scores: pd.DataFrame, protocol: Protocol, illustrate: Callable[..., Example], out: Path
) -> list[str]:
    """Write fig4.png, fig5.png and fig6.png, their cases chosen by rule; returns their Markdown."""
    shift = protocol.shifts[0]
    baseline, proposed = protocol.baseline, protocol.proposed
    names = models_side_by_side(scores, protocol)
    gain = f"gain in DSC from {baseline} to {proposed}" if baseline != proposed else "DSC"

    instance_gains = gains(scores, protocol, BOX_KINDS)
    case, index, label = median = choose(instance_gains)["median"]
    caption = (
        f"One target under three boxes: {label}, {case}, slice {index}. Chosen by rule: median "
        f"{gain}, mean of the three boxes, among {plural(len(instance_gains), 'instance')}."
    )
    examples = [illustrate(median, Prompt(kind, shift), names) for kind in BOX_KINDS]
    draw_examples(examples, caption, out / "fig4.png", same_view=True)
    figures = [picture("fig4.png", caption)]

    for name, population, kind, what in (
        ("fig5.png", "small", "standard", f"Small instances ({small_text(protocol)}), tight boxes"),
        ("fig6.png", "all", "shrink", f"Shrink boxes (up to {shift})"),
    ):
        rows = scores[scores["small"]] if population == "small" else scores
        if not len(rows):
            continue
        instance_gains = gains(rows, protocol, (kind,))
        examples = []
        for rule, instance in choose(instance_gains).items():
            case, index, label = instance
            example = illustrate(instance, Prompt(kind, shift), names)
            examples.append(replace(example, name=f"{rule}\n{label}\n{case}, {index}"))
        caption = (
            f"{what}. Chosen by rule: largest, median and smallest {gain} among "
            f"{plural(len(instance_gains), 'instance')}."
        )
        draw_examples(examples, caption, out / name)
        figures.append(picture(name, caption))
    return figures


def models_side_by_side(scores: pd.DataFrame, protocol: Protocol) -> list[str]:
    """The models of an example: all; of many the first, the baseline and the proposed one."""
    names = models_of(scores)
    if len(names) <= MODELS_ACROSS:
        return names
    return list(dict.fromkeys((names[0], protocol.baseline, protocol.proposed)))


def picture(name: str, caption: str) -> str:
    """A picture with its caption, Markdown."""
    caption = escape_markdown(caption)
    return f"![{caption}]({name})\n\n*{caption}*"


def gains(scores: pd.DataFrame, protocol: Protocol, kinds: Sequence[str]) -> dict[Instance, float]:
    """How much more DSC the proposed model has than the baseline, mean over kinds of box.

    Of draw 0, whose box the picture shows. With one model alone it is that model's DSC.
    """
    first = scores[scores["draw"] == 0]
    total = 0.0
    for kind in kinds:
        dsc = by_instance(under(first, kind, protocol.shifts[0]), "dsc")
        total = total + dsc[protocol.proposed] / len(kinds)
        if protocol.baseline != protocol.proposed:
            total = total - dsc[protocol.baseline] / len(kinds)
    return total.droplevel("patient").to_dict()


def choose(gains: dict[Instance, float]) -> dict[str, Instance]:
    """The instances of the largest, the median and the smallest gain."""
    order = sorted(gains, key=lambda instance: (gains[instance], instance))
    return {
        "largest": order[-1],
        "median": order[(len(order) - 1) // 2],
        "smallest": order[0],
    }


def draw_examples(
    examples: list[Example], caption: str, path: str | Path, same_view: bool = False
) -> None:
    """Targets with boxes and contours, one row per example and one column per model.

    Args:
        examples: all with the same models.
        caption: written above; long ones are wrapped.
        path: of the PNG.
        same_view: show the same part of the slice in every row.
    """
    models = list(examples[0].cells)
    across = max(COLUMN, COLUMN / 3 * len(models))
    figure = new_figure(across, (across / len(models) + 0.12) * len(examples) + 0.6)
    grid = figure.subplots(len(examples), len(models), squeeze=False)
    views = [_view_of(example) for example in examples]
    if same_view:
        views = [max(views, key=lambda view: view[1])] * len(views)
    for axes_row, example, (centre, half) in zip(grid, examples, views, strict=True):
        height, width = example.target.shape
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        for axes, model in zip(axes_row, models, strict=True):
            box, prediction, score = example.cells[model]
            axes.imshow(example.image, cmap="gray", vmin=0, vmax=255, extent=extent)
            axes.set_facecolor("black")  # beyond the image
            for mask, colour in ((example.target, GREEN), (prediction, ORANGE)):
                draw_contours(axes, mask, color=colour, linewidth=0.9)
            draw_box(axes, box, edgecolor=SKY, linewidth=0.8, linestyle="--")
            show_square(axes, centre, half)
            axes.set_xlabel(f"DSC {100 * score:.1f} %", fontsize=7, labelpad=2)
        name = (textwrap.fill(line, ROW_NAME) for line in example.name.splitlines())
        axes_row[0].set_ylabel("\n".join(name), fontsize=7)
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(model, fontsize=8, pad=3)
    lines = textwrap.wrap(caption, int(19 * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), fontsize=6.5)
    styles = (("box", SKY, "--"), ("target", GREEN, "-"), ("prediction", ORANGE, "-"))
    add_legend(figure, styles, fontsize=7)
    save_figure(figure, path, dpi=300)


def _view_of(example: Example) -> tuple[np.ndarray, float]:
    """Centre (x, y) and half side of a square with the target and all boxes in it."""
    rows, columns = np.nonzero(example.target)
    corners = [box for box, _, _ in example.cells.values()]
    corners.append(np.array([columns.min(), rows.min(), columns.max(), rows.max()], float))
    low, high = np.min(corners, axis=0)[:2], np.max(corners, axis=0)[2:]
    return (low + high) / 2, 0.65 * (high - low).max() + 3


# --- Families of boxes ---------------------------------------------------------------------------
def draw_families(ranked: Sequence[FamilyScores], path: Path) -> str:
    """The regret of every training in every family of boxes, as a map; returns its Markdown.

    One panel per population, one row per training, one column per family; a cell is as dark as the
    regret is large, and its number is the mean DSC.
    """
    panels: dict[str, list[FamilyScores]] = {}
    for one in ranked:
        panels.setdefault(one.population, []).append(one)
    figure = new_figure(2 * COLUMN, sum(0.19 * len(part) + 0.75 for part in panels.values()))
    ratios = [len(part) + 3 for part in panels.values()]
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (population, part) in zip(grid, panels.items(), strict=True):
        families = list(part[0].dsc)
        regret = np.array(
            [[*(one.regret[f].value for f in families), one.worst.value] for one in part]
        )
        shades = axes.imshow(100 * regret, cmap="Oranges", vmin=0, vmax=WORST_SHADE, aspect="auto")
        for row, one in enumerate(part):
            texts = [*(f"{100 * one.dsc[f].value:.1f}" for f in families)]
            texts.append(f"{100 * one.worst.value:.1f}")
            for column, text in enumerate(texts):
                dark = 100 * regret[row, column] > 0.6 * WORST_SHADE
                colour = "white" if dark else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
        axes.set_xticks(range(len(families) + 1), [*families, "worst regret"], fontsize=6)
        axes.set_yticks(range(len(part)), [one.training for one in part], fontsize=6)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.axvline(len(families) - 0.5, color="white", linewidth=3)
        count, patients = part[0].worst.instances, plural(part[0].worst.patients, "patient")
        name = "instances" if population == "all" else f"{population} instances"
        axes.set_title(f"{count} {name} of {patients}", fontsize=7, loc="left")
    bar = figure.colorbar(shades, ax=list(grid), shrink=0.6, extend="max")
    bar.set_label("regret, points of DSC", fontsize=6)
    bar.ax.tick_params(labelsize=6)
    save_figure(figure, path, dpi=300)
    caption = (
        "DSC in % over the families of boxes, and the worst regret in points. The darker a cell, "
        "the farther its training lies behind the best one in that family."
    )
    return picture(path.name, caption)


# --- Robustness ----------------------------------------------------------------------------------
def draw_curves(curves: Sequence[Curve], out: Path) -> list[str]:
    """Write robustness_side.png and robustness_px.png, if swept; returns their Markdown."""
    pictures = []
    for unit, scale, xlabel in (
        ("side", 100, "shift of every edge, % of side"),
        ("px", 1, "shift of every edge, px of 1024"),
    ):
        of_unit = [curve for curve in curves if curve.unit == unit]
        if of_unit:
            name = f"robustness_{unit}.png"
            _draw_curves(of_unit, scale, xlabel, out / name)
            caption = f"Scores against the {xlabel}; outward is positive. Bands: 95 % intervals by "
            caption += "bootstrap over patients, where there are enough patients."
            pictures.append(picture(name, caption))
    return pictures


def _draw_curves(curves: Sequence[Curve], scale: float, xlabel: str, path: Path) -> None:
    """One row per score, one column per population, one line per model with its band."""
    scores, columns, models = (
        list(dict.fromkeys(getattr(curve, name) for curve in curves))
        for name in ("score", "population", "model")
    )
    styles = {
        model: {"color": COLOURS[n % len(COLOURS)], "marker": "os^Dv<>P"[n % 8]}
        for n, model in enumerate(models)
    }
    figure = new_figure(COLUMN, 1.75 * len(scores) + 0.7)
    grid = figure.subplots(len(scores), len(columns), squeeze=False, sharex=True, sharey="row")
    for curve in curves:
        axes = grid[scores.index(curve.score), columns.index(curve.population)]
        x = [scale * shift.size for shift in curve.shifts]
        low, high = np.transpose([mean.interval for mean in curve.means])
        style = styles[curve.model]
        axes.fill_between(x, 100 * low, 100 * high, color=style["color"], alpha=0.1, linewidth=0)
        axes.plot(x, [100 * m.value for m in curve.means], **style, markersize=2.2, linewidth=0.9)
        if curve.score == scores[0]:
            n = f"{curve.means[0].instances} of {plural(curve.means[0].patients, 'patient')}"
            axes.set_title(f"{curve.population} instances: {n}", fontsize=6.5)
    for axes in grid.flat:
        axes.tick_params(labelsize=6.5, length=2, pad=2)
        axes.axvline(0, color="0.6", linewidth=0.6)
        axes.grid(alpha=0.3, linewidth=0.5)
    for axes, score in zip(grid[:, 0], scores, strict=True):
        axes.set_ylabel(f"{score.upper()}, %", fontsize=7)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel, fontsize=6.5)
    handles = [
        Line2D([], [], **style, markersize=3, linewidth=1, label=model)
        for model, style in styles.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
        fontsize=6.5,
        columnspacing=1.2,
    )
    save_figure(figure, path, dpi=300)
