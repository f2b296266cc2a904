"""The range of training boxes of a few targets, printed and drawn (the paper's Fig. 2 and 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perturb import (
    IMAGE_SIZE,
    box_rng,
    box_sides,
    move_edges,
    offset_range,
    perturb,
    theta_omega,
    tight_boxes,
    xi,
)
from utils.data.slices import read_label_map
from utils.preview.figures import draw_perturbation
from utils.system.errors import UserError

Target = tuple[str, np.ndarray]  # its name, and its mask (1024, 1024) bool


def made_up_targets() -> list[Target]:
    """A large, a small and an elongated target."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    shapes = (
        ("large", (380, 480), (260, 210), 0.3),
        ("small", (640, 420), (16, 20), 0.5),
        ("elongated", (540, 560), (190, 24), 0.08),
    )
    targets = []
    for name, (cx, cy), (a, b), angle in shapes:
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        bump = 1 + 0.1 * np.sin(3 * np.arctan2(v / b, u / a))  # an organ is no ellipse
        targets.append((name, (u / a) ** 2 + (v / b) ** 2 < bump))
    return targets


def targets_of(label_path: str | Path) -> list[Target]:
    """The largest, smallest and most elongated target of a slice on disk, without repetition.

    Raises:
        UserError: the file cannot be used, or holds no label.
    """
    label_map = read_label_map(label_path)
    labels, boxes = tight_boxes(label_map)
    if not len(labels):
        raise UserError(f"{label_path}: no target in this slice; choose one with labels")
    area = np.array([(label_map == label).sum() for label in labels])
    elongation = np.abs(np.log(xi(boxes)))
    chosen: dict[int, str] = {}
    for name, index in (
        ("largest", area.argmax()),
        ("smallest", area.argmin()),
        ("most elongated", elongation.argmax()),
    ):
        label = int(labels[index])
        chosen[label] = f"{chosen[label]}, {name}" if label in chosen else name
    return [(f"label {label} ({name})", label_map == label) for label, name in chosen.items()]


def show_examples(
    targets: Sequence[Target],
    image: np.ndarray | None,
    policies: Sequence[str],
    draws: int,
    seed: int,
    factors: tuple[float, float],
    path: str | Path,
) -> None:
    """Print and draw between which boxes each policy draws.

    Args:
        targets: a row each.
        image: uint8 (1024, 1024) grey levels behind them, or None.
        policies: a column each.
        draws: boxes drawn for each target and policy.
        seed: of these boxes.
        factors: delta_expand and epsilon_shrink, px of the 1024 frame.
        path: of the PNG.
    """
    rows = []
    for name, mask in targets:
        boxes = tight_boxes(mask)[1]
        width, height = box_sides(boxes)[0]
        print(
            f"{name}: {width:.0f} x {height:.0f} px, theta_omega {theta_omega(boxes)[0]:.3f}, "
            f"xi {xi(boxes)[0]:.2f}; an edge moves outward by"
        )
        cells = []
        for policy in policies:
            bounds = offset_range(boxes, policy, IMAGE_SIZE, *factors)
            (x_low, y_low), (x_high, y_high) = (bound[0] for bound in bounds)
            print(
                f"  {policy:<14} x {x_low:+.1f} ... {x_high:+.1f} px, "
                f"y {y_low:+.1f} ... {y_high:+.1f} px"
            )
            smallest, largest = (
                move_edges(boxes, bound[:, None], IMAGE_SIZE, outward=True)[0] for bound in bounds
            )
            repeated = np.repeat(boxes, draws, axis=0)
            drawn = perturb(repeated, policy, box_rng(seed, name), IMAGE_SIZE, *factors)
            cells.append((policy, smallest, largest, drawn))
        rows.append((name, mask, boxes[0], cells))
    draw_perturbation(rows, image, path)
