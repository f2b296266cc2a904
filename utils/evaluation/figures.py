"""The project's pictures. Colours tell apart for the colour-blind (Okabe and Ito's palette)."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    new_figure,
    save_figure,
    show_square,
)

ROW_NAME = 22  # characters beside a row of examples, at most
_COLOURS = (BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE)  # of lines: yellow is too pale


@dataclass(frozen=True)
class Example:
    """One target under one box each for several models: a row of `draw_examples`.

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


def draw_examples(
    examples: list[Example], caption: str, path: str | Path, same_view: bool = False
) -> None:
    """Targets with boxes and contours: a row an example, a column a model (the paper's Fig. 4-6).

    Args:
        examples: all with the same models.
        caption: written below; long ones are wrapped.
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
                if mask.any():
                    axes.contour(mask, levels=[0.5], colors=colour, linewidths=0.9)
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


def draw_robustness(
    panels: dict[tuple[str, str], dict[str, tuple[list[float], list[float], list, list]]],
    xlabel: str,
    path: str | Path,
) -> None:
    """Score against shift: a line per model with its confidence band.

    Args:
        panels: by (name of the row's score, title of the column), by model: shifts, means, and
            the ends of their intervals, all in the units of the axes.
        xlabel: of the shifts.
        path: of the PNG.
    """
    rows, columns = (list(dict.fromkeys(key[axis] for key in panels)) for axis in (0, 1))
    figure = new_figure(COLUMN, 1.75 * len(rows) + 0.7)
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    styles = {
        model: (_COLOURS[n % len(_COLOURS)], "os^Dv<>P"[n % 8])
        for n, model in enumerate(next(iter(panels.values())))
    }
    for axes_row, score in zip(grid, rows, strict=True):
        for axes, title in zip(axes_row, columns, strict=True):
            axes.set_title(title if score == rows[0] else "", fontsize=6.5)
            axes.tick_params(labelsize=6.5, length=2, pad=2)
            for model, (x, y, low, high) in panels[score, title].items():
                colour, marker = styles[model]
                axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
                axes.plot(x, y, color=colour, marker=marker, markersize=2.2, linewidth=0.9)
            axes.axvline(0, color="0.6", linewidth=0.6)
            axes.grid(alpha=0.3, linewidth=0.5)
        axes_row[0].set_ylabel(score, fontsize=7)
    for axes in grid[-1]:
        axes.set_xlabel(xlabel, fontsize=6.5)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=3, linewidth=1, label=model)
        for model, (colour, marker) in styles.items()
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
