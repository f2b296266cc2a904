"""Examples, chosen by rule: the paper's Figures 4-6, and the panel of report.html.

In the panel a slider moves the box and every model's mask follows. Everything is in the file:
slices as JPEG, contours as SVG paths, and the script of panel.html.
"""

import base64
import io
import itertools
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from perturb import BOX_KINDS, Shift, mask_areas
from utils.data.slices import Slice, read_image, read_instances
from utils.evaluation.models import Predictor
from utils.evaluation.prompts import Prompt, ReportContext, boxes_of
from utils.evaluation.scoring import dsc
from utils.evaluation.statistics import by_instance, populations, rows_for
from utils.evaluation.tables import SMALL_TEXT, picture
from utils.system import plotting, plural

MAX_MODELS = 6  # side by side; of more models the first, the baseline and the proposed are shown
RULES = ("median", "largest", "smallest")
ROW_NAME = 22  # characters beside a row of examples, at most
PANEL_SHIFTS = tuple(range(-25, 30, 5))  # of all edges, % of the side
CONTOUR_ERROR = 0.3  # px by which a contour of the panel may be off, to have fewer points
WEBP_QUALITY = 85

Instance = tuple[str, str, int, str, int]  # data set, case, slice, label, part
Render = Callable[[Instance, Prompt, Sequence[str]], "Example"]


@dataclass(frozen=True)
class Example:
    """One target with the boxes and masks of several models: a row of `draw_examples`."""

    name: str  # written beside the row
    image: np.ndarray  # (h, w) grey levels, any resolution; it covers the native slice
    target: np.ndarray  # (H, W) bool, native pixels
    # By model: box (4,) XYXY in native pixels, prediction (H, W) bool, and its DSC.
    cells: dict[str, tuple[np.ndarray, np.ndarray, float]]

    def view(self) -> tuple[np.ndarray, float]:
        """Centre (x, y) and half side of a square with the target and all boxes in it."""
        rows, columns = np.nonzero(self.target)
        corners = [box for box, _, _ in self.cells.values()]
        corners.append(np.array([columns.min(), rows.min(), columns.max(), rows.max()], float))
        low, high = np.min(corners, axis=0)[:2], np.max(corners, axis=0)[2:]
        return (low + high) / 2, 0.65 * (high - low).max() + 3


@dataclass(frozen=True)
class ExampleRenderer:
    """Predicts one instance again, under one prompt, with the named models."""

    models: Mapping[str, Predictor]
    slices: Sequence[Slice]
    seed: int  # of the boxes

    def __call__(self, instance: Instance, prompt: Prompt, names: Sequence[str]) -> Example:
        """The example of an instance, named after the prompt."""
        *key, label, part = instance
        sample = next(s for s in self.slices if [s.dataset, s.case, s.index] == key)
        label_map, labels, tight = read_instances(sample)
        places = [(sample.name_of(n), sample.part_of(n)) for n in labels.tolist()]
        n = places.index((label, part))
        label = labels[n : n + 1]
        masks = (label, tight[n : n + 1], mask_areas(label_map, label))
        boxes = boxes_of(sample, *masks, prompt, self.seed)
        target = sample.frame.labels_to_native(label_map) == labels[n]
        (box,) = sample.frame.boxes_to_native(boxes)
        cells = {}
        for name in names:
            mask = (self.models[name].predict(sample, boxes)[0] > 0).cpu().numpy()
            cells[name] = (box, mask, dsc(mask, target))
        height, width = sample.frame.content
        image = read_image(sample.image_path, sample.image_sha256)[:height, :width]
        return Example(prompt.box, image, target, cells)


# --- Choice --------------------------------------------------------------------------------------
def gains(scores: pd.DataFrame, context: ReportContext, kinds: Sequence[str]) -> pd.Series:
    """The proposed model's gain in DSC, or with one model alone its DSC, by instance.

    The mean over kinds of box, of draw 0, whose box the picture shows.
    """
    first = scores[scores["draw"] == 0]
    total = 0.0
    for kind in kinds:
        models = by_instance(rows_for(first, kind, context.protocol.shift), "dsc")
        total = total + models[context.proposed] / len(kinds)
        if context.baseline != context.proposed:
            total = total - models[context.baseline] / len(kinds)
    return total.droplevel("patient")


def choose(gains: pd.Series) -> dict[str, Instance]:
    """The instances of the median, the largest and the smallest gain."""
    order = [instance for _, instance in sorted((gain, one) for one, gain in gains.items())]
    return dict(zip(RULES, (order[(len(order) - 1) // 2], order[-1], order[0]), strict=True))


def _label_and_place(instance: Instance, scores: pd.DataFrame) -> tuple[str, str]:
    dataset, case, index, label, _ = instance
    of_several = f"{dataset}, " if scores["dataset"].nunique() > 1 else ""
    return label, f"{of_several}{case}, slice {index}"


def _shown_models(scores: pd.DataFrame, context: ReportContext) -> list[str]:
    names = scores["model"].unique().tolist()
    if len(names) <= MAX_MODELS:
        return names
    return list(dict.fromkeys((names[0], context.baseline, context.proposed)))


# --- The paper's Figures 4-6 ---------------------------------------------------------------------
def draw_cases(
    scores: pd.DataFrame, context: ReportContext, render: Render, folder: Path
) -> list[str]:
    """Write fig4.png, fig5.png and fig6.png, their cases chosen by rule; returns their Markdown."""
    shift = context.protocol.shift
    models = _shown_models(scores, context)
    gain = "DSC"
    if context.baseline != context.proposed:
        gain = f"gain in DSC from {context.baseline} to {context.proposed}"
    small = scores[scores["small"]]
    pictures = []
    for name, rows, kinds, rules, what in (
        ("fig4.png", scores, BOX_KINDS, ["median"], "One target under three boxes"),
        ("fig5.png", small, ["standard"], RULES, f"Small instances ({SMALL_TEXT}), tight boxes"),
        ("fig6.png", scores, ["shrink"], RULES, f"Shrink boxes (up to {shift})"),
    ):
        if not len(rows):
            continue
        gained = gains(rows, context, kinds)
        chosen = choose(gained)
        examples = []
        for rule, kind in itertools.product(rules, kinds):
            example = render(chosen[rule], Prompt(kind, shift), models)
            label, place = _label_and_place(chosen[rule], scores)
            examples.append(replace(example, name=f"{rule}, {kind}\n{label}\n{place}"))
        caption = (
            f"{what}. Chosen by rule: {', '.join(rules)} {gain} under the boxes shown, among "
            f"{plural(len(gained), 'instance')}."
        )
        draw_examples(examples, folder / name, same_view=len(rules) == 1)
        pictures.append(picture(name, caption))
    return pictures


def draw_examples(examples: list[Example], path: str | Path, same_view: bool = False) -> None:
    """A PNG: a row per example, all of one part of the slice if `same_view`; a column per model."""
    models = list(examples[0].cells)
    across = max(plotting.COLUMN, plotting.COLUMN / 3 * len(models))
    figure = plotting.new_figure(across, (across / len(models) + 0.12) * len(examples) + 0.6)
    grid = figure.subplots(len(examples), len(models), squeeze=False)
    views = [example.view() for example in examples]
    if same_view:
        views = [max(views, key=lambda view: view[1])] * len(views)
    for axes_row, example, (centre, half) in zip(grid, examples, views, strict=True):
        height, width = example.target.shape
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        for axes, (box, prediction, score) in zip(axes_row, example.cells.values(), strict=True):
            axes.imshow(example.image, cmap="gray", vmin=0, vmax=255, extent=extent)
            axes.set_facecolor("black")  # beyond the image
            plotting.draw_contours(axes, example.target, color=plotting.GREEN, linewidth=0.9)
            plotting.draw_contours(axes, prediction, color=plotting.ORANGE, linewidth=0.9)
            plotting.draw_box(axes, box, edgecolor=plotting.SKY, linewidth=0.8, linestyle="--")
            plotting.show_square(axes, centre, half)
            axes.set_xlabel(f"DSC {100 * score:.1f} %", fontsize=7, labelpad=2)
        name = (textwrap.fill(line, ROW_NAME) for line in example.name.splitlines())
        axes_row[0].set_ylabel("\n".join(name), fontsize=7)
    for axes, model in zip(grid[0], models, strict=True):
        axes.set_title(model, fontsize=8, pad=3)
    styles = [("box", plotting.SKY, "--"), ("target", plotting.GREEN, "-")]
    plotting.add_legend(figure, [*styles, ("prediction", plotting.ORANGE, "-")], fontsize=7)
    plotting.save_figure(figure, path, dpi=300)


# --- The panel of report.html --------------------------------------------------------------------
def panel_html(scores: pd.DataFrame, context: ReportContext, render: Render) -> str:
    """panel.html with its data: targets chosen by rule among all and among small instances."""
    models = _shown_models(scores, context)
    chosen: dict[Instance, str] = {}
    what = "gain" if context.baseline != context.proposed else "DSC"
    for population, rows in populations(scores, "all", "small").items():
        of = "" if population == "all" else f" among {population} instances"
        for rule, instance in choose(gains(rows, context, BOX_KINDS)).items():
            label, place = _label_and_place(instance, scores)
            chosen.setdefault(instance, f"{rule} {what}{of}: {label}, {place}")
    prompts = [Prompt("sweep", Shift(shift / 100, "side")) for shift in PANEL_SHIFTS]
    examples = [
        {"name": name, **panel_data([render(instance, prompt, models) for prompt in prompts])}
        for instance, name in chosen.items()
    ]
    data = {"models": models, "shifts": PANEL_SHIFTS, "examples": examples}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no end of the script
    return Path(__file__).with_name("panel.html").read_text(encoding="utf-8").replace("DATA", text)


def panel_data(steps: Sequence[Example]) -> dict:
    """One target under all shifts, the largest last; pixel i covers i to i + 1, native pixels."""
    first = steps[0]
    (x, y), half = steps[-1].view()
    results = []
    for step in steps:
        boxes, masks, scores = zip(*step.cells.values(), strict=True)
        x0, y0, x1, y1 = boxes[0].tolist()
        box = [round(number, 1) for number in (x0, y0, x1 - x0 + 1, y1 - y0 + 1)]
        dsc = [round(100 * score, 2) for score in scores]
        results.append({"box": box, "masks": list(map(svg_path, masks)), "dsc": dsc})
    return {
        "image": data_uri(Image.fromarray(first.image)),
        "size": first.target.shape[::-1],
        "view": np.round([x + 0.5 - half, y + 0.5 - half, 2 * half, 2 * half], 1).tolist(),
        "target": svg_path(first.target),
        "steps": results,
    }


def svg_path(mask: np.ndarray) -> str:
    """The contours of a mask (H, W) bool as an SVG path; pixel i covers i to i + 1."""
    parts = []
    for contour in find_contours(np.pad(mask, 1).astype(float), 0.5):
        points = approximate_polygon(contour, CONTOUR_ERROR) - 0.5  # padding, pixels' centres
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for y, x in points[:-1]) + "Z")
    return "".join(parts)


def data_uri(image: Image.Image) -> str:
    """A picture within HTML, as WebP: a third of the bytes of a PNG."""
    content = io.BytesIO()
    image.save(content, "WEBP", quality=WEBP_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
