"""The project's pictures. Colours tell apart for the colour-blind (Okabe and Ito's palette)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
COLUMN = 3.5  # inches: the width of a journal's column
ROW_NAME = 22  # characters beside a row of examples, at most
_COLOURS = (BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE)  # of lines: yellow is too pale
_POLICIES = {  # colour, line and width; some nearly agree, and the narrower is drawn on the wider
    "none": (PURPLE, "-", 1.6),
    "medsam": (BLACK, "-", 1.6),
    "bidirectional": (ORANGE, "-", 1.6),
    "scaled": (SKY, "-", 3.6),
    "adaptive": (VERMILION, "-", 2.0),
    "sam2": (BLUE, (0, (4, 2)), 1.4),
}


def new_figure(width: float, height: float) -> Figure:
    """A figure of width x height inches that needs no screen and no pyplot state."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # names of models and cases may hold a $

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Write a PNG atomically."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def draw_box(axes: Axes, box: np.ndarray, **style: object) -> None:
    """Draw the outer edges of a box (4,) XYXY with inclusive maxima, in pixels of the axes."""
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    corner, width, height = (x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1
    axes.add_patch(Rectangle(corner, width, height, fill=False, **style))


def _look_at(axes: Axes, centre: np.ndarray, half: float) -> None:
    """Show the square of side 2 * half around `centre` (x, y), y downward, without ticks."""
    axes.set_xlim(centre[0] - half, centre[0] + half)
    axes.set_ylim(centre[1] + half, centre[1] - half)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_perturbation(
    rows: list[tuple[str, np.ndarray, np.ndarray, list[tuple]]],
    image: np.ndarray | None,
    path: str | Path,
) -> None:
    """The range of training boxes: a row a target, a column a policy (the paper's Fig. 2, 3).

    Args:
        rows: (name, mask (1024, 1024) bool, tight box (4,), cells), and a cell is (policy, smallest
            box (4,), largest box (4,), drawn boxes (N, 4)).
        image: uint8 (1024, 1024) behind the targets, or None.
        path: of the PNG.
    """
    figure = new_figure(3.4 * len(rows[0][3]), 3.5 * len(rows))
    grid = figure.subplots(len(rows), len(rows[0][3]), squeeze=False)
    for axes_row, (name, mask, tight, cells) in zip(grid, rows, strict=True):
        # One extent a row, so that the policies compare.
        reach = np.array([largest for _, _, largest, _ in cells])
        low, high = reach[:, :2].min(axis=0), reach[:, 2:].max(axis=0)
        half = 0.6 * (high - low).max() + 4
        centre = (low + high) / 2
        for axes, (policy, smallest, largest, drawn) in zip(axes_row, cells, strict=True):
            if image is not None:
                axes.imshow(image, cmap="gray", vmin=0, vmax=255)
                axes.set_facecolor("black")  # beyond the image
                axes.contour(mask, levels=[0.5], colors=GREEN, linewidths=1.2)
            else:
                axes.imshow(np.where(mask, 0.75, 1.0), cmap="gray", vmin=0, vmax=1)
            for box in drawn:
                draw_box(axes, box, edgecolor=SKY, linewidth=0.7)
            draw_box(axes, largest, edgecolor=BLUE, linewidth=2)
            draw_box(axes, smallest, edgecolor=VERMILION, linewidth=2)
            draw_box(axes, tight, edgecolor=ORANGE, linewidth=1.5, linestyle="--")
            _look_at(axes, centre, half)
            axes.set_title(f"{policy}", fontsize=11)
        width, height = tight[2:] - tight[:2] + 1
        axes_row[0].set_ylabel(f"{name}\n{width:.0f} x {height:.0f} px", fontsize=10)
    styles = (
        ("tight", ORANGE, "--"),
        ("smallest", VERMILION, "-"),
        ("largest", BLUE, "-"),
        ("drawn", SKY, "-"),
    )
    _legend(figure, styles if image is None else (*styles, ("target", GREEN, "-")))
    save_figure(figure, path)


def draw_curves(history: list[dict], path: str | Path) -> None:
    """Loss and validation DSC against the epoch; `history` holds the rows of log.csv."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 3.4)
    loss, score = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    loss.plot(epochs, [row["train_loss"] for row in history], "o-", color=BLUE, label="training")
    loss.plot(epochs, [row["val_loss"] for row in history], "s-", color=ORANGE, label="validation")
    loss.set_ylabel("loss (BCE + Dice)")
    styles = (("standard", "o-", BLACK), ("expansion", "s-", BLUE), ("shrink", "^-", VERMILION))
    for kind, marker, colour in styles:
        values = [100 * row[f"dsc_{kind}"] for row in history]
        score.plot(epochs, values, marker, color=colour, label=kind)
    score.set_ylabel("validation DSC, %")
    for axes in (loss, score):
        axes.set_xlabel("epoch (0: before training)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_figure(figure, path)


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
            _look_at(axes, centre, half)
            axes.set_xlabel(f"DSC {100 * score:.1f} %", fontsize=7, labelpad=2)
        name = (textwrap.fill(line, ROW_NAME) for line in example.name.splitlines())
        axes_row[0].set_ylabel("\n".join(name), fontsize=7)
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(model, fontsize=8, pad=3)
    lines = textwrap.wrap(caption, int(19 * figure.get_figwidth()))
    figure.suptitle("\n".join(lines), fontsize=6.5)
    styles = (("box", SKY, "--"), ("target", GREEN, "-"), ("prediction", ORANGE, "-"))
    _legend(figure, styles, fontsize=7)
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


def draw_overlap(panels: dict[str, dict[str, np.ndarray]], path: str | Path) -> None:
    """The distribution of the IoU of perturbed boxes with the tight ones: a line a policy.

    Args:
        panels: by title, by policy: the IoU of each box, any shape; there may be none. `none`,
            whose boxes are the tight ones, is left out where there are others.
        path: of the PNG.
    """
    figure = new_figure(2 * COLUMN, 3.2)
    figure.get_layout_engine().set(wspace=0.06)
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    policies = list(next(iter(panels.values())))
    policies = [policy for policy in policies if policy != "none"] or policies
    at = np.linspace(0, 1, 1001)
    for axes, (title, overlap) in zip(grid, panels.items(), strict=True):
        axes.set_title(title, fontsize=9)
        for policy in policies:
            if overlap[policy].size:
                below = np.searchsorted(np.sort(overlap[policy], axis=None), at, side="right")
                share = 100 * below / overlap[policy].size
                colour, line, width = _POLICIES[policy]
                axes.plot(at, share, color=colour, linestyle=line, linewidth=width)
        axes.set_xlabel("IoU with the tight box", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 100)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("boxes with at most this IoU, %", fontsize=9)
    _legend(figure, [(policy, *_POLICIES[policy][:2]) for policy in policies], fontsize=9)
    save_figure(figure, path, dpi=200)


def _legend(figure: Figure, styles: Sequence[tuple[str, str, str]], fontsize: float = 10) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, linestyle=s, label=name) for name, c, s in styles]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=fontsize,
    )
