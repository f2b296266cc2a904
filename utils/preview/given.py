"""How far the boxes that people drew lie from the tight ones, and which constants cover that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from perturb import DELTA_EXPAND_MAX, EPSILON_SHRINK_MIN, IMAGE_SIZE, box_sides
from utils.data.frame import Frame
from utils.data.given_boxes import BoxFile, boxes_by_case
from utils.data.slices import DATASET_FILE, Geometry, open_dataset
from utils.data.volumes import read_geometry, volumes_by_case
from utils.preview.statistics import BOX, by_label, iou, names_by_label, table_text
from utils.system.errors import UserError
from utils.system.wording import plural

COVERED = 0.95  # of the edges lie between the two constants that are suggested
TAILS = ((1 - COVERED) / 2, (1 + COVERED) / 2)
KEYS = ["case", "slice", "label"]


def read_given(
    folder: str | Path, files: Sequence[BoxFile], masks: pd.DataFrame
) -> tuple[pd.DataFrame, int]:
    """The boxes of some files, each beside the tight box of its mask.

    Args:
        folder: of preprocess_ct.py, or of label volumes.
        files: of boxes.
        masks: of the folder, as `utils.preview.statistics.read_masks` gives them.

    Returns:
        A row per box: `case`, `slice`, `label` and `name` of its mask, the tight box `x0` ... `y1`
        and the given box `given_x0` ... `given_y1`, both in the 1024 frame; and how many boxes are
        left out because their slice has no such label.

    Raises:
        UserError: no box is of a mask of the folder, or as `boxes_by_case`.
    """
    folder = Path(folder)
    geometry: dict[str, Geometry] = {}
    if (folder / DATASET_FILE).is_file():
        geometry = open_dataset(folder).geometry
        if not geometry:
            raise UserError(f"{folder}: MedSAM's slices, whose place in a volume is not known")
    else:
        volumes = volumes_by_case(folder, "--data")
        geometry = {case: read_geometry(path) for case, path in volumes.items()}
    ids = {name: label for name, label in zip(masks.name, masks.label, strict=True)}
    rows = []
    for case, boxes in boxes_by_case(files, geometry, geometry.__getitem__).items():
        grid = geometry[case]
        frame = Frame.fit(grid.shape[1:], grid.spacing_mm[1:])
        framed = frame.boxes_to_frame(np.array([box.box for box in boxes]).reshape(-1, 4))
        for box, edges in zip(boxes, framed.tolist(), strict=True):
            label = int(box.label) if box.label.isdigit() else ids.get(box.label, -1)
            rows.append((case, box.index, label, *edges))
    given = pd.DataFrame(rows, columns=[*KEYS, *(f"given_{edge}" for edge in BOX)])
    both = given.merge(masks[[*KEYS, "name", *BOX]], on=KEYS)
    if both.empty:
        paths = ", ".join(str(file.path) for file in files)
        raise UserError(f"{paths}: no box is of a label in a slice of {folder}")
    return both, len(given) - len(both)


def given_statistics(boxes: pd.DataFrame) -> pd.DataFrame:
    """How far edges of given boxes lie from those of the tight box, per label and over all.

    Args:
        boxes: as `read_given` returns them.

    Returns:
        One row per label, all together last: `label`, `boxes`, `cut_percent` (boxes with an edge
        inside the target), `iou_median`, and for `offset_px` (of the 1024 frame) and
        `offset_percent_of_side` of single edges, outward positive, `_median`, `_low` and `_high`,
        between which COVERED of them lie.
    """
    tight = boxes[BOX].to_numpy(np.float64)
    given = boxes[[f"given_{edge}" for edge in BOX]].to_numpy(np.float64)
    offset = (given - tight) * [-1, -1, 1, 1]
    percent = 100 * offset / np.tile(box_sides(tight), 2)
    edges = pd.DataFrame({"offset_px": offset.ravel(), "offset_percent_of_side": percent.ravel()})
    of_edges = by_label(edges.assign(label=np.repeat(boxes.label.to_numpy(), 4)))
    of_boxes = by_label(
        pd.DataFrame(
            {"label": boxes.label, "cut": (offset < 0).any(axis=1), "iou": iou(given, tight)}
        )
    )
    table = pd.DataFrame(
        {
            "boxes": of_boxes.size(),
            "cut_percent": 100 * of_boxes.cut.mean(),
            "iou_median": of_boxes.iou.median(),
        }
    )
    for column in edges:
        for end, quantile in {"median": 0.5, "low": TAILS[0], "high": TAILS[1]}.items():
            table[f"{column}_{end}"] = of_edges[column].quantile(quantile)
    table.insert(0, "label", [names_by_label(boxes)[label] for label in table.index])
    return table.reset_index(drop=True)


def suggested_factors(table: pd.DataFrame) -> tuple[float, float]:
    """DELTA_EXPAND and EPSILON_SHRINK, px, between which COVERED of all edges lie.

    Of the reading "width", with which they are IMAGE_SIZE times a share of the side.
    """
    every = table.iloc[-1]
    share_of_image = IMAGE_SIZE / 100
    delta = max(0.0, every.offset_percent_of_side_high * share_of_image)
    epsilon = min(0.0, every.offset_percent_of_side_low * share_of_image)
    return delta, epsilon


def as_text(table: pd.DataFrame, left_out: int) -> str:
    """The statistics for the screen, and the constants that they suggest."""
    every = table.iloc[-1]

    def spread(column: str, form: str) -> pd.Series:
        ends = (table[f"{column}_{end}"].map(form.format) for end in ("median", "low", "high"))
        return next(ends) + " " + next(ends) + " ... " + next(ends)

    shown = table[["label", "boxes"]].assign(
        **{
            "edge, px": spread("offset_px", "{:+.1f}"),
            "edge, % of side": spread("offset_percent_of_side", "{:+.1f}"),
            "cut into the target, %": table.cut_percent.map("{:.1f}".format),
            "median IoU": table.iou_median.map("{:.2f}".format),
        }
    )
    delta, epsilon = suggested_factors(table)
    lines = [
        f"{plural(every.boxes, 'box', 'boxes')} beside the tight ones: how far single edges lie "
        f"outside, median and {100 * COVERED:g} % range, px of the 1024 frame",
        table_text(shown),
        f"DELTA_EXPAND = {delta:.1f} and EPSILON_SHRINK = {epsilon:.1f} cover {100 * COVERED:g} % "
        "of these edges (perturb.py, reading width)",
    ]
    if left_out:
        lines.insert(1, f"left out: {left_out}, whose slice has no such label")
    if delta > DELTA_EXPAND_MAX or epsilon < EPSILON_SHRINK_MIN:
        bounds = f"{DELTA_EXPAND_MAX:g} and {EPSILON_SHRINK_MIN:g} px"
        lines.append(f"they exceed the bounds of {bounds}, to which they would be clamped")
    return "\n\n".join(lines)
