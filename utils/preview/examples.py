"""A few targets whose training boxes are shown: drawn ones, or those of a slice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perturb import (
    IMAGE_SIZE,
    POLICIES,
    Perturbation,
    box_sides,
    offsets,
    theta_omega,
    tight_boxes,
    xi,
)
from utils.data.slices import read_label_map
from utils.system.errors import UserError

Target = tuple[str, np.ndarray]  # its name, and its mask (1024, 1024) bool


def drawn_targets() -> list[Target]:
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


def targets_of_slice(label_path: str | Path) -> list[Target]:
    """The largest, smallest and most elongated target of a slice on disk, without repetition.

    Raises:
        UserError: the file holds no label.
    """
    label_map = read_label_map(label_path)
    labels, boxes = tight_boxes(label_map)
    if not len(labels):
        raise UserError(f"{label_path}: no target in this slice; choose one with labels")
    area = np.array([(label_map == label).sum() for label in labels])
    indices = {
        "largest": area.argmax(),
        "smallest": area.argmin(),
        "most elongated": np.abs(np.log(xi(boxes))).argmax(),
    }
    names: dict[int, list[str]] = {}
    for name, index in indices.items():
        names.setdefault(int(labels[index]), []).append(name)
    return [
        (f"label {label} ({', '.join(of_label)})", label_map == label)
        for label, of_label in names.items()
    ]


def offset_range(
    boxes: np.ndarray, areas: np.ndarray, perturbation: Perturbation
) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest offset (K, 2) px of the x and the y edges, outward positive."""
    rng = np.random.default_rng(0)  # for a policy that draws what kind of box it makes
    many, bounds = np.repeat(boxes, 100, axis=0), offsets(boxes, areas, perturbation)
    bounds = np.repeat(bounds, 100, axis=0)
    ranges = POLICIES[perturbation.policy](box_sides(many), bounds[:, :2], bounds[:, 2:], rng)
    low, high = (bound.reshape(len(boxes), 100, 2) for bound in ranges)
    return low.min(axis=1), high.max(axis=1)


def describe(
    targets: Sequence[Target], policies: Sequence[str], factors: dict[str, float | str | None]
) -> str:
    """The size of each target and how far each policy moves its edges, as lines for the screen."""
    lines = []
    for name, mask in targets:
        boxes, areas = tight_boxes(mask)[1], np.array([mask.sum()])
        theta = theta_omega(boxes, areas, factors["reading"])[0]
        width, height = box_sides(boxes)[0]
        lines.append(
            f"{name}: {width:.0f} x {height:.0f} px, theta_omega {theta:.3f}, "
            f"xi {xi(boxes)[0]:.2f}; an edge moves outward by"
        )
        for policy in policies:
            bounds = offset_range(boxes, areas, Perturbation(policy, **factors))
            low, high = (bound[0] for bound in bounds)
            x, y = (f"{a:+.1f} ... {b:+.1f} px" for a, b in zip(low, high, strict=True))
            lines.append(f"  {policy:<14} x {x}, y {y}")
    return "\n".join(lines)
