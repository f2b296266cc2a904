"""The masks of a data set, and how training boxes or other boxes differ from their tight boxes.

A mask is one label in one slice. Boxes are XYXY pixels of the 1024 frame, maxima inclusive.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import perturb
from perturb import IMAGE_SIZE, Perturbation, box_sides
from utils.data.frame import Frame
from utils.data.labels import FLARE22_LABELS, are_flare22, label_name
from utils.data.slices import DATASET_FILE, Slice, open_dataset, read_instances, read_label_map
from utils.data.volumes import read_label_map as read_label_volume
from utils.data.volumes import volumes_by_case
from utils.evaluation.prompts import Given
from utils.system import UserError, plural

KEYS = ["case", "slice", "label"]
BOX = ["x0", "y0", "x1", "y1"]
GIVEN = [f"given_{edge}" for edge in BOX]
ALL = 256  # stands for all labels together; label ids end at 255
COVERED = 0.95  # of the edges of people's boxes lie between the suggested constants
# Quantiles, by the ends of their columns' names: of training boxes, and of people's boxes
SPREAD = {"median": 0.5, "p05": 0.05, "p95": 0.95}
GIVEN_SPREAD = {"median": 0.5, "low": (1 - COVERED) / 2, "high": (1 + COVERED) / 2}


# --- Masks ---------------------------------------------------------------------------------------
def read_masks(folder: str | Path, label_names: dict[int, str] | None = None) -> pd.DataFrame:
    """All masks of a folder of preprocess_ct.py (all splits), or of one of NIfTI label volumes.

    One row per mask, in order of case, slice and label: `case`, `slice` (z of the LPS volume),
    `label` (id), `pixels` at native resolution, `share` of the native slice, `area` in the 1024
    frame, the tight box `x0` ... `y1`, `patient`, and `name` of the label, by default as in FLARE22
    for files with names of FLARE22's. UserError: names for a folder that has its own, or no label.
    """
    folder = Path(folder)
    if (folder / DATASET_FILE).is_file():
        if label_names is not None:
            raise UserError(f"--label-names: {folder / DATASET_FILE} already has names")
        slices = open_dataset(folder).split("all")
        label_names, label_maps = slices[0].label_names, label_maps_of_slices(slices)
        patients = {sample.case: sample.patient for sample in slices}
    else:
        volumes = volumes_by_case(folder, "--data")
        label_names = label_names or (FLARE22_LABELS if are_flare22(volumes) else {})
        label_maps = label_maps_of_volumes(volumes)
        patients = {case: case for case in volumes}
    rows = []
    for case, index, framed, pixels, native_size, label_of in label_maps:
        labels, boxes = perturb.tight_boxes(framed)
        areas = perturb.mask_areas(framed, labels)
        for label, area, box in zip(labels.tolist(), areas, boxes, strict=True):
            share = pixels[label] / native_size
            rows.append((case, index, label_of(label), pixels[label], share, area, *box))
    if not rows:
        raise UserError(f"{folder}: no volume has a label; are these label maps?")
    masks = pd.DataFrame(rows, columns=[*KEYS, "pixels", "share", "area", *BOX])
    names = [label_name(label_names, label) for label in masks.label]
    return masks.assign(name=names, patient=masks.case.map(patients))


def label_maps_of_slices(slices: Sequence[Slice]) -> Iterator[tuple]:
    """Yield case, z, label map (1024, 1024) and native pixels by instance of each slice.

    And the number of native pixels of the slice, and the function from an instance to its label id.
    """
    for sample in tqdm(slices, unit="slice", disable=None):
        framed = read_label_map(sample.label_path, sample.label_sha256)
        native_size, label_of = np.prod(sample.frame.native), sample.label_of
        yield sample.case, sample.index, framed, sample.labels, native_size, label_of


def label_maps_of_volumes(volumes: Mapping[str, Path]) -> Iterator[tuple]:
    """Yield the same of every slice with a label of label volumes."""
    for case, path in tqdm(sorted(volumes.items()), unit="volume", disable=None):
        volume = read_label_volume(path)
        frame = Frame.fit(volume.array.shape[1:], volume.spacing_mm[1:])
        for index in np.flatnonzero(volume.array.any(axis=(1, 2))).tolist():
            framed, native, _ = frame.labels_there_and_back(volume.array[index])
            pixels = np.bincount(native.ravel(), minlength=256)
            yield case, index, framed, pixels, native.size, int


def beside_tight_boxes(samples: Sequence[Slice], given: Given) -> tuple[pd.DataFrame, list[str]]:
    """Boxes that people drew, beside the tight boxes of their labels, and those that miss them.

    Returns patient, label, name, area of the mask, BOX (the tight one) and GIVEN of each, and a
    line for each box without a pixel in common with its tight one. UserError if all are.
    """
    rows, missed = [], []
    for sample in samples:
        label_map, instances, tight = read_instances(sample)
        areas = perturb.mask_areas(label_map, instances)
        for instance, area, box in zip(instances.tolist(), areas, tight, strict=True):
            label, name = sample.label_of(instance), sample.name_of(instance)
            for drawn in given.get((sample.key, instance), ()):
                if (drawn[:2] > box[2:]).any() or (drawn[2:] < box[:2]).any():
                    missed.append(f"{sample.case}, z {sample.index}: {name}")
                else:
                    rows.append((sample.patient, label, name, area, *box, *drawn))
    if not rows:
        raise UserError(f"--boxes: every box misses its target ({missed[0]}); are x and y right?")
    columns = ["patient", "label", "name", "area", *BOX, *GIVEN]
    return pd.DataFrame(rows, columns=columns), missed


# --- Statistics ----------------------------------------------------------------------------------
def by_label(table: pd.DataFrame):
    """`table` grouped by label id and name, and all of it once more as the label ALL, "all"."""
    return pd.concat([table, table.assign(label=ALL, name="all")]).groupby(["label", "name"])


def spread(table: pd.DataFrame, ends: Mapping[str, float]) -> pd.DataFrame:
    """Quantiles by label of the other columns; `ends` are those of the new columns' names."""
    groups, columns = by_label(table), table.columns.drop(["label", "name"])
    quantiles = {f"{c}_{end}": groups[c].quantile(q) for c in columns for end, q in ends.items()}
    return pd.DataFrame(quantiles)


def offsets_of(masks: pd.DataFrame, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the edges of boxes (N, draws, 4) lie outside the tight ones of N masks.

    Two arrays of the same shape: px, and as a share of the side that the edge moves along.
    """
    tight = masks[BOX].to_numpy(np.float64)
    offset = (boxes - tight[:, None]) * [-1, -1, 1, 1]
    return offset, offset / np.tile(box_sides(tight), 2)[:, None]


def compare_boxes(
    masks: pd.DataFrame, boxes: np.ndarray, ends: Mapping[str, float]
) -> tuple[pd.DataFrame, np.ndarray]:
    """How boxes (N, draws, 4) differ from the tight boxes of N masks; NaN where there is no box.

    Returns:
        By label: the number of `boxes`, `cut_percent` of them with an edge inside the target,
        `area_more_than_doubled_percent`, `iou_median`, and the quantiles `ends` of `offset_px` and
        `offset_percent_of_side` of single edges, x and y together, outward positive, in % of the
        side that the edge moves along. And the IoU (N, draws) with the tight box.
    """
    tight = masks[BOX].to_numpy(np.float64)[:, None]
    offset, share = offsets_of(masks, boxes)
    areas, tight_areas = ((b[..., 2:] - b[..., :2] + 1).prod(axis=-1) for b in (boxes, tight))
    low = np.maximum(boxes[..., :2], tight[..., :2])
    high = np.minimum(boxes[..., 2:], tight[..., 2:])
    common = np.maximum(high - low + 1, 0).prod(axis=-1)
    overlap = common / (areas + tight_areas - common)
    names, draws = masks[["label", "name"]].reset_index(drop=True), boxes.shape[1]
    edges = names.loc[names.index.repeat(4 * draws)].assign(
        offset_px=offset.ravel(), offset_percent_of_side=100 * share.ravel()
    )
    groups = by_label(
        names.loc[names.index.repeat(draws)]
        .assign(
            cut=(offset < 0).any(axis=-1).ravel(),
            doubled=(areas > 2 * tight_areas).ravel(),
            iou=overlap.ravel(),
        )
        .dropna()
    )
    columns = {
        "boxes": groups.size(),
        "cut_percent": 100 * groups.cut.mean(),
        "area_more_than_doubled_percent": 100 * groups.doubled.mean(),
        "iou_median": groups.iou.median(),
    }
    return pd.DataFrame(columns).join(spread(edges, ends)), overlap


def draw_boxes(
    masks: pd.DataFrame, perturbation: Perturbation, draws: int, seed: int
) -> np.ndarray:
    """Training boxes (N, draws, 4) float64 of N masks."""
    drawn = []
    for *key, area, x0, y0, x1, y1 in masks[[*KEYS, "area", *BOX]].itertuples(index=False):
        rng = perturb.box_rng(seed, "preview", "", *key, 0)
        tight = np.tile(np.float32([x0, y0, x1, y1]), (draws, 1))
        drawn.append(perturb.perturb(tight, np.full(draws, area), rng, perturbation))
    return np.array(drawn, np.float64)


def box_statistics(
    masks: pd.DataFrame,
    boxes_of: Mapping[str, np.ndarray],
    perturbations: Sequence[Perturbation],
    draws: int,
    seed: int,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """How boxes (N, M, 4) of N masks lie, by policy, or by the protocol by which they are drawn.

    Returns:
        The CSV: a row per policy and label, all labels together last, with the sizes of the masks
        and what `compare_boxes` says of the boxes. And by policy the IoU (N, M).
    """
    reading, boxes = perturbations[0].reading, masks[BOX].to_numpy(np.float64)
    sizes = masks[["label", "name"]].assign(
        mask_native_pixels=masks.pixels,
        mask_percent_of_slice=100 * masks.share,
        width_px=box_sides(boxes)[:, 0],
        height_px=box_sides(boxes)[:, 1],
        theta_omega=perturb.theta_omega(boxes, masks.area, reading),
        xi=perturb.xi(boxes),
    )
    groups = by_label(masks.assign(slice_id=masks.groupby(["case", "slice"]).ngroup()))
    counts = {"cases": groups.case.nunique(), "slices": groups.slice_id.nunique()}
    of_masks = pd.DataFrame(counts | {"masks": groups.size()}).join(spread(sizes, SPREAD))
    tables, overlap = {}, {}
    factors = {each.policy: (each.delta_expand, each.epsilon_shrink) for each in perturbations}
    for name, drawn in boxes_of.items():
        of_boxes, overlap[name] = compare_boxes(masks, drawn, SPREAD)
        of_boxes[["delta_expand_px", "epsilon_shrink_px"]] = factors.get(name, (np.nan, np.nan))
        tables[name] = of_masks.join(of_boxes)
    rows = pd.concat(tables).droplevel("label").rename_axis(["policy", "label"])
    return rows.reset_index().assign(draws=draws, seed=seed, reading=reading), overlap


def given_statistics(boxes: pd.DataFrame) -> pd.DataFrame:
    """The CSV: how boxes differ from the tight ones beside them, see `compare_boxes`."""
    table, _ = compare_boxes(boxes, boxes[GIVEN].to_numpy(np.float64)[:, None], GIVEN_SPREAD)
    return table.droplevel("label").rename_axis("label").reset_index()


def suggested_factors(table: pd.DataFrame, low: str = "low", high: str = "high") -> tuple:
    """DELTA_EXPAND and EPSILON_SHRINK, px, of the reading "width", between two quantiles of edges.

    `low` and `high` are the ends of their columns' names; the last row holds all labels.
    """
    ends = table[[f"offset_percent_of_side_{end}" for end in (low, high)]].iloc[-1]
    epsilon, delta = ends * IMAGE_SIZE / 100
    return max(0.0, delta), min(0.0, epsilon)


# --- Text ----------------------------------------------------------------------------------------
def spread_text(table: pd.DataFrame, column: str, decimals: int, sign: str = "") -> pd.Series:
    """Median and range of a column; with `sign` "+" every number has one."""
    ends = table[[name for name in table if name.startswith(f"{column}_")]]
    rounded = ends.round(decimals) + 0.0  # no -0
    median, low, high = rounded.map(f"{{:{sign}.{decimals}f}}".format).to_numpy().T
    return pd.Series(median + ", " + low + " to " + high, table.index)


def offsets_text(table: pd.DataFrame) -> str:
    """How far edges lie from those of the tight boxes."""
    percents = table[["cut_percent", "area_more_than_doubled_percent"]].map("{:.1f}".format)
    columns = {
        "offset, px": spread_text(table, "offset_px", 1, "+"),
        "offset, % of side": spread_text(table, "offset_percent_of_side", 1, "+"),
        "cut, %": percents.cut_percent,
        "area > 2x, %": percents.area_more_than_doubled_percent,
        "median IoU": table.iou_median.map("{:.2f}".format),
        "boxes": table.boxes,
    }
    return pd.DataFrame(columns).set_index(table.label.rename(None)).to_string()


HOW = """\
Offsets are of single edges, x and y together, outward positive; % of side is of the width for x,
of the height for y. A box cuts where an edge lies inside the target; area > 2x is the share of
boxes with more than twice the tight box's area."""


def as_text(rows: pd.DataFrame) -> str:
    """`box_statistics` for the screen: the masks by label, and their boxes by policy."""
    every, masks = rows.iloc[-1], rows[rows.policy == rows.policy[0]]
    sizes = {
        "cases": masks.cases,
        "masks": masks.masks,
        "width, px": spread_text(masks, "width_px", 0),
        "height, px": spread_text(masks, "height_px", 0),
        "theta_omega": spread_text(masks, "theta_omega", 3),
        "xi": spread_text(masks, "xi", 2),
    }
    moved = rows.groupby("policy", sort=False).tail(1)  # all labels together
    blocks = [
        f"Tight boxes of {plural(every.masks, 'mask')} in {plural(every.slices, 'slice')} of "
        f"{plural(every.cases, 'case')}, px of the 1024 frame: median and 5-95 % range",
        pd.DataFrame(sizes).set_index(masks.label.rename(None)).to_string(),
        f"Perturbed boxes of all labels: {every.draws} per mask, seed {every.seed}, theta_omega by "
        f"{every.reading}; median and 5-95 % range.\n{HOW}",
        offsets_text(moved.assign(label=moved.policy)),
    ]
    return "\n\n".join(blocks)


def given_as_text(table: pd.DataFrame) -> str:
    """`given_statistics` for the screen, and the constants that they suggest."""
    delta, epsilon = suggested_factors(table)
    blocks = [
        f"{plural(table.boxes.iloc[-1], 'box', 'boxes')} beside the tight ones: median and "
        f"{100 * COVERED:g} % range.\n{HOW}",
        offsets_text(table),
        f"DELTA_EXPAND = {delta:.1f} and EPSILON_SHRINK = {epsilon:.1f} cover {100 * COVERED:g} % "
        "of these edges (perturb.py, reading width)",
    ]
    bounds = perturb.DELTA_EXPAND_MAX, perturb.EPSILON_SHRINK_MIN
    if delta > bounds[0] or epsilon < bounds[1]:
        blocks.append(f"they exceed the bounds of {bounds[0]:g} and {bounds[1]:g} px")
    return "\n\n".join(blocks)
