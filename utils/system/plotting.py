"""What all figures share; the colours are Okabe and Ito's, which are safe for the colour-blind."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from skimage.measure import find_contours

from utils.system.files import atomic_write

matplotlib.rcParams["text.parse_math"] = False  # names of models and cases may contain a $

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
COLUMN = 3.5  # inches, the width of a journal column


def new_figure(width: float, height: float) -> Figure:
    """A figure of width x height inches, without a screen or pyplot state."""
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Write a PNG atomically."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def draw_box(axes: Axes, box: np.ndarray, **style: object) -> None:
    """Draw the outer edges of a box (4,) XYXY with inclusive maxima, in pixels of the axes."""
    x0, y0, x1, y1 = box
    corner, width, height = (x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1
    axes.add_patch(Rectangle(corner, width, height, fill=False, **style))


def draw_contours(axes: Axes, mask: np.ndarray, **style: object) -> None:
    """Draw the contours of a mask (H, W) bool in pixels of the axes, closed at the image's edge."""
    for contour in find_contours(np.pad(mask, 1), 0.5):
        y, x = contour.T - 1
        axes.plot(x, y, **style)


def show_square(axes: Axes, centre: np.ndarray, half: float) -> None:
    """Limit axes to the square of side 2 * half around `centre` (x, y), y downward, no ticks."""
    x, y = centre
    limits = {"xlim": (x - half, x + half), "ylim": (y + half, y - half)}
    axes.set(**limits, xticks=[], yticks=[])


def add_legend(figure: Figure, styles: Sequence[tuple[str, str, str]], fontsize: int = 10) -> None:
    """Add a legend of lines (label, colour, line style) below the axes."""
    lines = [Line2D([], [], color=c, linestyle=s, label=name) for name, c, s in styles]
    place = {"loc": "outside lower center", "ncols": min(len(lines), 5), "frameon": False}
    figure.legend(handles=lines, fontsize=fontsize, **place)
