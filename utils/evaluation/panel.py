"""A part of report.html to play with: a slider moves the box, and every model's mask follows.

Everything is in the file: slices as JPEG, contours as SVG paths, and the script panel.js.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from perturb import BOX_KINDS, Shift
from utils.evaluation.figures import Example, Instance, choose, gains, models_side_by_side
from utils.evaluation.instances import populations
from utils.evaluation.prompts import Prompt, Protocol

SHIFTS = tuple(range(-25, 30, 5))  # of all edges, % of the side
SIMPLER = 0.3  # px by which a contour may be off, to have fewer points
AROUND = 0.5  # of the target's larger side: how much of the slice is shown on each side of it
JPEG_QUALITY = 80
SMALLEST_SIDE = 256  # px of a JPEG; smaller parts of a slice are enlarged
SCRIPT = Path(__file__).with_suffix(".js")
Illustrate = Callable[[Instance, Prompt, Sequence[str]], Example]


def panel_html(scores: pd.DataFrame, protocol: Protocol, illustrate: Illustrate) -> str:
    """The panel, HTML with its script and its data.

    Its targets are those of the largest, the median and the smallest gain from the baseline to the
    proposed model, mean of the three boxes, among all and among small instances.

    Args:
        scores: of every model, instance and box.
        protocol: names the baseline and the proposed model.
        illustrate: as `figures.illustrator` returns it.
    """
    names = models_side_by_side(scores, protocol)
    chosen: dict[Instance, str] = {}
    what = "gain" if protocol.baseline != protocol.proposed else "DSC"
    for population, rows in populations(scores, "all", "small").items():
        of = "" if population == "all" else f" among {population} instances"
        for rule, instance in choose(gains(rows, protocol, BOX_KINDS)).items():
            case, index, label = instance
            chosen.setdefault(instance, f"{rule} {what}{of}: {label}, {case}, slice {index}")
    examples = []
    for instance, name in chosen.items():
        steps = [
            illustrate(instance, Prompt("sweep", Shift(shift / 100, "side")), names)
            for shift in SHIFTS
        ]
        examples.append({"name": name, **example_data(steps, names)})
    data = json.dumps({"shifts": SHIFTS, "examples": examples}, separators=(",", ":"))
    views = "\n".join(
        f"<figure><figcaption>{html.escape(name)} <b></b></figcaption>"
        '<svg role="img" aria-label="slice with box and contours"><image></image>'
        '<path class="target"></path><path class="mask"></path><rect class="box"></rect></svg>'
        "</figure>"
        for name in names
    )
    safe = data.replace("<", "\\u003c")  # a label may not end the script
    return (
        '<div id="panel" hidden>\n<p><label>Target <select></select></label></p>\n'
        '<p><label>All edges of the box <input type="range" min="0" step="1"></label> '
        "<output></output></p>\n"
        f'<div class="views">\n{views}\n</div>\n'
        '<p class="key"><span class="box">box</span> <span class="target">target</span> '
        '<span class="mask">prediction</span></p>\n</div>\n'
        "<noscript><p>This part needs JavaScript; the examples below do not.</p></noscript>\n"
        f'<script type="application/json" id="panel-data">{safe}</script>\n'
        f"<script>\n{SCRIPT.read_text(encoding='utf-8')}</script>\n"
    )


def example_data(steps: Sequence[Example], names: Sequence[str]) -> dict:
    """One target under all shifts: image, contour of the target, and by shift box, masks and DSC.

    Coordinates are native pixels from the corner of the part of the slice that is shown.

    Args:
        steps: the example under each shift.
        names: of the models, in the order of the views.
    """
    target = steps[0].target
    (y0, x0), (height, width) = _part_around(target)
    image = steps[0].image
    scale = np.array(image.shape) / target.shape  # the image may have other pixels
    (top, left), (bottom, right) = (
        np.rint(np.array(corner) * scale).astype(int)
        for corner in ((y0, x0), (y0 + height, x0 + width))
    )

    def path(mask: np.ndarray) -> str:
        return svg_path(mask[y0 : y0 + height, x0 : x0 + width])

    results = []
    for step in steps:
        box = next(iter(step.cells.values()))[0]
        corner = box[:2] - (x0, y0)
        sides = box[2:] - box[:2] + 1
        results.append(
            {
                "box": np.round([*corner, *sides], 1).tolist(),
                "masks": [path(step.cells[name][1]) for name in names],
                "dsc": [round(100 * step.cells[name][2], 2) for name in names],
            }
        )
    return {
        "width": width,
        "height": height,
        "image": _jpeg(image[top:bottom, left:right]),
        "target": path(target),
        "steps": results,
    }


def _part_around(target: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corner (y, x) and size (height, width) of the part of a slice around a mask (H, W)."""
    spans = []
    rows, columns = (np.flatnonzero(target.any(axis=axis)) for axis in (1, 0))
    margin = AROUND * max(np.ptp(rows), np.ptp(columns)) + 8
    for span, size in zip((rows, columns), target.shape, strict=True):
        low = max(0, int(span[0] - margin))
        spans.append((low, min(size, int(span[-1] + margin) + 1) - low))
    (y0, height), (x0, width) = spans
    return (y0, x0), (height, width)


def svg_path(mask: np.ndarray) -> str:
    """The contours of a mask (H, W) bool as an SVG path; pixel i covers i to i + 1."""
    parts = []
    for contour in find_contours(np.pad(mask, 1).astype(float), 0.5):
        points = approximate_polygon(contour, SIMPLER) - 0.5  # the padding, and pixels' centres
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in points[:-1]) + "Z")
    return "".join(parts)


def _jpeg(image: np.ndarray) -> str:
    """A data URI of grey levels (h, w) uint8."""
    picture = Image.fromarray(image)
    enlarged = SMALLEST_SIDE / min(image.shape)
    if enlarged > 1:
        sides = [round(side * enlarged) for side in picture.size]
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
