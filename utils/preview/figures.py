"""Pictures of training boxes: their range, and how far they are from the tight box."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perturb import (
    POLICIES,
    Perturbation,
    box_rng,
    box_sides,
    move_edges,
    perturb,
    tight_boxes,
)
from utils.preview.examples import offset_range
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

# Colour, line and width of a policy, by its place in POLICIES, and again from the start after the
# last. Where two policies nearly agree, the narrower line is drawn on the wider.
STYLES = (
    (PURPLE, "-", 1.6),
    (BLACK, "-", 1.6),
    (ORANGE, "-", 1.6),
    (SKY, "-", 3.6),
    (VERMILION, "-", 2.0),
    (BLUE, (0, (4, 2)), 1.4),
    (GREEN, "-", 1.6),
)


def draw_perturbation(
    targets: Sequence[tuple[str, np.ndarray]],
    image: np.ndarray | None,
    policies: Sequence[str],
    draws: int,
    seed: int,
    factors: dict[str, float | str | None],
    path: str | Path,
) -> None:
    """The range of training boxes, one row per target, one column per policy (the paper's Fig. 3).

    Args:
        targets: name, and mask (1024, 1024) bool, of each.
        image: uint8 (1024, 1024) grey levels behind the targets, or None.
        policies: of `perturb.POLICIES`.
        draws: boxes drawn for each target and policy.
        seed: of these boxes.
        factors: delta_expand and epsilon_shrink, px of the 1024 frame, and reading of theta_omega.
        path: of the PNG.
    """
    figure = new_figure(3.4 * len(policies), 3.5 * len(targets))
    grid = figure.subplots(len(targets), len(policies), squeeze=False)
    for axes_row, (name, mask) in zip(grid, targets, strict=True):
        tight, areas = tight_boxes(mask)[1], np.array([mask.sum()])
        ranges = [
            offset_range(tight, areas, Perturbation(policy, **factors)) for policy in policies
        ]
        smallest, largest = (
            np.vstack([move_edges(tight, np.tile(bound, 2)) for bound in bounds])
            for bounds in zip(*ranges, strict=True)
        )
        low, high = largest[:, :2].min(axis=0), largest[:, 2:].max(axis=0)
        for column, (axes, policy) in enumerate(zip(axes_row, policies, strict=True)):
            if image is not None:
                axes.imshow(image, cmap="gray", vmin=0, vmax=255)
                axes.set_facecolor("black")  # beyond the image
                axes.contour(mask, levels=[0.5], colors=GREEN, linewidths=1.2)
            else:
                axes.imshow(np.where(mask, 0.75, 1.0), cmap="gray", vmin=0, vmax=1)
            rng = box_rng(seed, "preview", "", name, 0, 0, 0)
            many = np.repeat(tight, draws, axis=0), np.repeat(areas, draws)
            for box in perturb(*many, rng, Perturbation(policy, **factors)):
                draw_box(axes, box, edgecolor=SKY, linewidth=0.7)
            draw_box(axes, largest[column], edgecolor=BLUE, linewidth=2)
            draw_box(axes, smallest[column], edgecolor=VERMILION, linewidth=2)
            draw_box(axes, tight[0], edgecolor=ORANGE, linewidth=1.5, linestyle="--")
            # One view per row, so that policies can be compared.
            show_square(axes, (low + high) / 2, 0.6 * (high - low).max() + 4)
            axes.set_title(policy, fontsize=11)
        width, height = box_sides(tight)[0]
        axes_row[0].set_ylabel(f"{name}\n{width:.0f} x {height:.0f} px", fontsize=10)
    styles = [("tight", ORANGE, "--"), ("smallest", VERMILION, "-"), ("largest", BLUE, "-")]
    styles.append(("drawn", SKY, "-"))
    add_legend(figure, styles if image is None else [*styles, ("target", GREEN, "-")])
    save_figure(figure, path)


def draw_overlap(panels: dict[str, dict[str, np.ndarray]], path: str | Path) -> None:
    """The distribution of the IoU of training boxes with the tight ones, one line per policy.

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
    styles = dict(zip(POLICIES, STYLES * len(POLICIES), strict=False))
    thresholds = np.linspace(0, 1, 1001)
    for axes, (title, overlap) in zip(grid, panels.items(), strict=True):
        axes.set_title(title, fontsize=9)
        for policy in policies:
            if overlap[policy].size:
                ordered = np.sort(overlap[policy], axis=None)
                share = np.searchsorted(ordered, thresholds, side="right") / ordered.size
                colour, line, width = styles[policy]
                axes.plot(thresholds, 100 * share, color=colour, linestyle=line, linewidth=width)
        axes.set_xlabel("IoU with the tight box", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 100)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("boxes with at most this IoU, %", fontsize=9)
    add_legend(figure, [(policy, *styles[policy][:2]) for policy in policies], fontsize=9)
    save_figure(figure, path, dpi=200)
