"""Pictures of training boxes: their range, and how far they are from the tight box."""

from __future__ import annotations

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

_POLICIES = {  # colour, line and width; some nearly agree, and the narrower is drawn on the wider
    "none": (PURPLE, "-", 1.6),
    "medsam": (BLACK, "-", 1.6),
    "bidirectional": (ORANGE, "-", 1.6),
    "scaled": (SKY, "-", 3.6),
    "adaptive": (VERMILION, "-", 2.0),
    "sam2": (BLUE, (0, (4, 2)), 1.4),
}


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
            show_square(axes, centre, half)
            axes.set_title(f"{policy}", fontsize=11)
        width, height = tight[2:] - tight[:2] + 1
        axes_row[0].set_ylabel(f"{name}\n{width:.0f} x {height:.0f} px", fontsize=10)
    styles = (
        ("tight", ORANGE, "--"),
        ("smallest", VERMILION, "-"),
        ("largest", BLUE, "-"),
        ("drawn", SKY, "-"),
    )
    add_legend(figure, styles if image is None else (*styles, ("target", GREEN, "-")))
    save_figure(figure, path)


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
    add_legend(figure, [(policy, *_POLICIES[policy][:2]) for policy in policies], fontsize=9)
    save_figure(figure, path, dpi=200)
