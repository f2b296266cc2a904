"""Which boxes the masks of a data set get: their size and shape, and what each policy does to them.

A mask is one label in one slice. Boxes are XYXY pixels of the 1024 frame, maxima inclusive.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from perturb import (
    Perturbation,
    box_rng,
    box_sides,
    mask_areas,
    perturb,
    theta_omega,
    tight_boxes,
    xi,
)
from utils.data.frame import Frame
from utils.data.labels import FLARE22_LABELS, are_flare22, label_name
from utils.data.slices import DATASET_FILE, Slice, open_dataset, read_instances
from utils.data.volumes import nifti_suffix, read_label_map, volumes_by_case
from utils.system.errors import UserError
from utils.system.wording import plural

BOX = ["x0", "y0", "x1", "y1"]
ALL = 256  # stands for all labels together; label ids end at 255
SPREAD = {"median": 0.5, "p05": 0.05, "p95": 0.95}  # quantiles, by the ends of the columns' names
COLUMNS = 100  # of the terminal


# --- The masks -----------------------------------------------------------------------------------
def read_masks(folder: str | Path, label_names: dict[int, str] | None = None) -> pd.DataFrame:
    """All masks of a folder of preprocess_ct.py (all splits), or of one of NIfTI label volumes.

    Both give the same masks: those too thin for the frame, which preprocess_ct.py drops, are
    dropped from volumes as well. (Its `--min-pixels` is not known from the volumes.)

    Args:
        folder: with a dataset.json, or with label volumes.
        label_names: by label id, for label volumes; if None, FLARE22's for files with the names of
            FLARE22's, and "label 7" for others.

    Returns:
        One row per mask, in order of case, slice and label: `case`, `slice` (z of the LPS volume),
        `label` (id), `name`, `pixels` at native resolution, `share` of the native slice, and
        the tight box `x0`, `y0`, `x1`, `y1`, and `area`, the mask's in the 1024 frame.

    Raises:
        UserError: neither kind of folder, names for a folder that has its own, or no label at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give --data one of slices or of label volumes")
    if (folder / DATASET_FILE).is_file():
        if label_names is not None:
            raise UserError(f"--label-names: {folder / DATASET_FILE} has names; leave it out")
        slices = open_dataset(folder).split("all")
        names, tables = slices[0].label_names, list(_masks_of_slices(slices))
    else:
        tables = list(_masks_of_volumes(folder))
        cases = {case for table in tables for case in table.case}
        names = label_names or (FLARE22_LABELS if are_flare22(cases) else {})
    if not tables:
        raise UserError(f"{folder}: no volume has a label; are these label maps?")
    masks = pd.concat(tables, ignore_index=True)
    return masks.assign(name=[label_name(names, label) for label in masks.label])


def _masks_of_slices(slices: Sequence[Slice]) -> Iterator[pd.DataFrame]:
    for entry in tqdm(slices, unit="slice", disable=None):
        label_map, labels, boxes = read_instances(entry)
        pixels = np.array([entry.labels[label] for label in labels.tolist()])
        areas = mask_areas(label_map, labels)
        yield _table(entry.case, entry.index, labels, boxes, areas, pixels, entry.frame.native)


def _masks_of_volumes(folder: Path) -> Iterator[pd.DataFrame]:
    if not any(map(nifti_suffix, folder.iterdir())):
        raise UserError(
            f"{folder}: holds neither {DATASET_FILE} nor a .nii.gz or .nii file; give --data a "
            "folder of preprocess_ct.py or of label volumes"
        )
    volumes = sorted(volumes_by_case(folder, "--data").items())
    for case, path in tqdm(volumes, unit="volume", disable=None):
        volume = read_label_map(path)
        frame = Frame.fit(volume.array.shape[1:], volume.spacing_mm[1:])
        for index in np.flatnonzero(volume.array.any(axis=(1, 2))).tolist():
            framed, native, _ = frame.labels_there_and_back(volume.array[index])
            labels, boxes = tight_boxes(framed)
            pixels = np.bincount(native.ravel(), minlength=256)[labels]
            areas = mask_areas(framed, labels)
            yield _table(case, index, labels, boxes, areas, pixels, native.shape)


def _table(
    case: str,
    index: int,
    labels: np.ndarray,
    boxes: np.ndarray,
    areas: np.ndarray,
    pixels: np.ndarray,
    native: tuple[int, int],
) -> pd.DataFrame:
    """The K masks of one slice of `native` (height, width), by label.

    They have boxes (K, 4) and areas (K,) in the 1024 frame, and native pixels (K,).
    """
    columns = {"case": case, "slice": index, "label": labels, "pixels": pixels, "area": areas}
    return pd.DataFrame(columns | {"share": pixels / np.prod(native)}).assign(
        **dict(zip(BOX, boxes.T, strict=True))
    )


# --- The boxes -----------------------------------------------------------------------------------
def draw_boxes(
    masks: pd.DataFrame, policy: str, draws: int, seed: int, factors: dict[str, float | str | None]
) -> np.ndarray:
    """Training boxes (N, draws, 4) float64 of N masks.

    They depend on seed, case, slice and label alone: neither order nor other masks change them.
    """
    keys = masks[["case", "slice", "label"]].itertuples(index=False, name=None)
    tight = masks[BOX].to_numpy(np.float32)
    perturbation = Perturbation(policy, **factors)
    drawn = [
        perturb(
            np.tile(box, (draws, 1)),
            np.full(draws, area),
            box_rng(seed, "preview", "", *key, 0),
            perturbation,
        )
        for key, box, area in zip(keys, tight, masks.area, strict=True)
    ]
    return np.array(drawn, np.float64)


def box_statistics(
    masks: pd.DataFrame,
    policies: Sequence[str],
    draws: int,
    seed: int,
    factors: dict[str, float | str | None],
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """What each policy does to the boxes of each label.

    Args:
        masks: of the data set, as `read_masks` gives them.
        policies: of `perturb.POLICIES`.
        draws: boxes drawn for each mask and policy, 1 or more.
        seed: of these boxes.
        factors: delta_expand and epsilon_shrink, px of the 1024 frame, and reading of theta_omega.

    Returns:
        The columns of the CSV: one row per policy and label, all labels together last. Offsets are
        those by which edges really moved, outward positive, x and y edges together, in px and in %
        of the side that the edge moves along. And by policy the IoU (N, draws) of the drawn boxes
        with the tight ones.
    """
    boxes = masks[BOX].to_numpy(np.float64)
    tight, sides = boxes[:, None], box_sides(boxes)
    sizes = pd.DataFrame(
        {
            "label": masks.label,
            "mask_native_pixels": masks.pixels,
            "mask_percent_of_slice": 100 * masks.share,
            "width_px": sides[:, 0],
            "height_px": sides[:, 1],
            "theta_omega": theta_omega(boxes, masks.area, factors["reading"]),
            "xi": xi(boxes),
        }
    )
    slices = masks.drop_duplicates(["case", "slice", "label"])
    slices_of_all = masks.drop_duplicates(["case", "slice"]).assign(label=ALL)
    of_masks = pd.DataFrame(
        {
            "cases": by_label(masks).case.nunique(),
            "slices": pd.concat([slices, slices_of_all]).groupby("label").size(),
            "masks": by_label(masks).size(),
            **_spread(sizes),
        }
    )
    names = names_by_label(masks)
    tables, overlap = [], {}
    for policy in policies:
        drawn = draw_boxes(masks, policy, draws, seed, factors)
        offset = (drawn - tight) * [-1, -1, 1, 1]
        percent = 100 * offset / np.tile(sides, 2)[:, None]
        of_draws = overlap[policy] = iou(drawn, tight)
        of_edges = {"offset_px": offset.ravel(), "offset_percent_of_side": percent.ravel()}
        of_edges["label"] = np.repeat(masks.label.to_numpy(), 4 * draws)
        of_boxes = {"doubled": (_area(drawn) > 2 * _area(tight)).ravel(), "iou": of_draws.ravel()}
        of_boxes["label"] = np.repeat(masks.label.to_numpy(), draws)
        groups = by_label(pd.DataFrame(of_boxes))
        table = of_masks.assign(
            **_spread(pd.DataFrame(of_edges)),
            area_more_than_doubled_percent=100 * groups.doubled.mean(),
            iou_median=groups.iou.median(),
        )
        table.insert(0, "label", [names[label] for label in table.index])
        table.insert(1, "policy", policy)
        tables.append(table)
    rows = pd.concat(tables, ignore_index=True)
    for name in ("delta_expand", "epsilon_shrink"):
        used = {p: getattr(Perturbation(p, **factors), name) for p in policies}
        rows[f"{name}_px"] = rows.policy.map(used)
    return rows.assign(draws=draws, seed=seed, reading=factors["reading"]), overlap


def names_by_label(masks: pd.DataFrame) -> dict[int, str]:
    """The name of each label id, and of ALL."""
    return dict(zip(masks.label, masks.name, strict=True)) | {ALL: "all"}


def by_label(table: pd.DataFrame):
    """`table` grouped by label, and all of it once more under ALL."""
    return pd.concat([table, table.assign(label=ALL)]).groupby("label")


def _spread(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Median, 5th and 95th percentile of each column by label, named <column>_<median|p05|p95>."""
    groups = by_label(table)
    return {
        f"{column}_{end}": groups[column].quantile(quantile)
        for column in table.columns.drop("label")
        for end, quantile in SPREAD.items()
    }


def _area(boxes: np.ndarray) -> np.ndarray:
    """Pixels (...) of boxes (..., 4), both ends counted."""
    return (boxes[..., 2:] - boxes[..., :2] + 1).prod(axis=-1)


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union (...) of boxes (..., 4), both ends counted."""
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    common = np.maximum(high - low + 1, 0).prod(axis=-1)
    return common / (_area(boxes) + _area(others) - common)


# --- The tables ----------------------------------------------------------------------------------
def as_text(rows: pd.DataFrame) -> str:
    """The rows of `box_statistics` for the screen: one table of the masks, and one per policy."""
    by_policy = dict(list(rows.groupby("policy", sort=False)))
    masks = next(iter(by_policy.values()))
    every = masks.iloc[-1]
    sizes = masks[["label", "cases", "masks"]].assign(
        **{
            "width, px": _spread_text(masks, "width_px", ".0f", "-"),
            "height, px": _spread_text(masks, "height_px", ".0f", "-"),
            "theta_omega": _spread_text(masks, "theta_omega", ".3f", "-"),
            "xi": _spread_text(masks, "xi", ".2f", "-"),
        }
    )
    how = (
        f"Perturbed boxes: {every.draws} per mask, seed {every.seed}, theta_omega by "
        f"{every.reading}, delta_expand and epsilon_shrink {_factors_text(rows)}. Offsets are of "
        "single edges, x and y together, outward positive; % of side is of the width for x, of the "
        "height for y; area > 2x is the share of boxes with more than twice the tight box's area."
    )
    blocks = [
        f"Tight boxes of {plural(every.masks, 'mask')} in {plural(every.slices, 'slice')} of "
        f"{plural(every.cases, 'case')}, px of the 1024 frame: median and 5-95 % range",
        table_text(sizes),
        textwrap.fill(how, COLUMNS),
    ]
    for policy, table in by_policy.items():
        if policy == "none":
            blocks.append("none: the tight boxes as they are")
            continue
        moved = table[["label"]].assign(
            **{
                "offset, px": _spread_text(table, "offset_px", "+.1f", " ... "),
                "offset, % of side": _spread_text(table, "offset_percent_of_side", "+.1f", " ... "),
                "area > 2x, %": table.area_more_than_doubled_percent.map("{:.1f}".format),
                "median IoU": table.iou_median.map("{:.2f}".format),
            }
        )
        blocks += [f"{policy}: how far an edge moves, median and 5-95 % range", table_text(moved)]
    return "\n\n".join(blocks)


def _factors_text(rows: pd.DataFrame) -> str:
    """delta_expand and epsilon_shrink, with the policies' names where they have other ones."""
    factors = rows.groupby(["delta_expand_px", "epsilon_shrink_px"], sort=False).policy.unique()
    texts = {f"{delta:g} and {epsilon:g} px": of for (delta, epsilon), of in factors.items()}
    first, *others = texts
    return first + "".join(f" ({', '.join(texts[text])}: {text})" for text in others)


def table_text(table: pd.DataFrame) -> str:
    """Labels to the left, numbers to the right."""
    return table.set_index("label").rename_axis(index=None, columns="label").to_string()


def _spread_text(rows: pd.DataFrame, column: str, form: str, between: str) -> pd.Series:
    """Median and 5-95 % range of a column, aligned."""
    rounded = rows[[f"{column}_{end}" for end in SPREAD]].round(int(form[-2])) + 0.0  # no -0
    median, low, high = rounded.map(f"{{:{form}}}".format).to_numpy().T
    ranges = pd.Series(low + between + high, rows.index)
    return median + " " + ranges.str.rjust(ranges.str.len().max())
