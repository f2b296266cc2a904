"""The project's pictures. Colours tell apart for the colour-blind (Okabe and Ito's palette)."""

from __future__ import annotations

import textwrap
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


def new_figure(width: float, height: float) -> Figure:
    """A figure of width x height inches that needs no screen and no pyplot state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG atomically."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


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


def draw_examples(
    image: np.ndarray,
    target: np.ndarray,
    cells: dict[str, dict[str, tuple[np.ndarray, np.ndarray, float]]],
    title: str,
    caption: str,
    path: str | Path,
) -> None:
    """One target under each kind of box, a column per model (the paper's Fig. 4).

    Args:
        image: (h, w) grey levels, any resolution; it covers the native slice.
        target: (H, W) bool, native pixels.
        cells: by kind of box, then by model: box (4,) XYXY in native pixels, prediction (H, W)
            bool, and its DSC.
        title, caption: what is written above; a long caption is wrapped.
        path: of the PNG.
    """
    kinds, models = list(cells), list(next(iter(cells.values())))
    figure = new_figure(max(4.5, 2.9 * len(models)), 2.9 * len(kinds) + 0.9)
    grid = figure.subplots(len(kinds), len(models), squeeze=False)
    boxes = np.array([box for by_model in cells.values() for box, _, _ in by_model.values()])
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    half, centre = 0.5 * (high - low).max() * 1.3 + 3, (low + high) / 2
    height, width = target.shape
    for axes_row, kind in zip(grid, kinds, strict=True):
        for axes, model in zip(axes_row, models, strict=True):
            box, prediction, score = cells[kind][model]
            axes.imshow(
                image, cmap="gray", vmin=0, vmax=255, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
            )
            axes.set_facecolor("black")  # beyond the image
            for mask, colour in ((target, GREEN), (prediction, ORANGE)):
                if mask.any():
                    axes.contour(mask, levels=[0.5], colors=colour, linewidths=1.6)
            draw_box(axes, box, edgecolor=SKY, linewidth=1.4, linestyle="--")
            _look_at(axes, centre, half)
            axes.set_xlabel(f"DSC {100 * score:.1f} %", fontsize=9)
        axes_row[0].set_ylabel(kind, fontsize=11)
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(model, fontsize=11)
    lines = textwrap.wrap(caption, int(12 * figure.get_figwidth()))
    figure.suptitle("\n".join([title, *lines]), fontsize=9)
    _legend(figure, (("box", SKY, "--"), ("target", GREEN, "-"), ("prediction", ORANGE, "-")))
    save_figure(figure, path)


def _legend(figure: Figure, styles: tuple[tuple[str, str, str], ...]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, linestyle=s, label=name) for name, c, s in styles]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
