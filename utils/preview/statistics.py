"""Which boxes the masks of a data set get: size and shape, and what each policy makes of them.

A mask is one label in one slice. Boxes are those of `perturb`, in the 1024 frame.
"""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perturb import IMAGE_SIZE, box_rng, box_sides, perturb, theta_omega, tight_boxes, xi
from utils.data.flare22 import FLARE22_LABELS
from utils.data.frame import Frame
from utils.data.labels import label_name
from utils.data.slices import DATASET_FILE, Slice, open_dataset, read_instances
from utils.evaluation.tables import aligned
from utils.system.errors import UserError
from utils.system.files import atomic_write

ALL = "all"  # the row of all labels
SPREAD = {"median": 50, "p05": 5, "p95": 95}  # percentiles, by the ends of the columns' names
FACTORS = ("delta_expand_px", "epsilon_shrink_px")
COLUMNS = 100  # of the terminal


# --- The masks -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Masks:
    """The masks of a data set; a row each, in order of case, slice and label.

    Attributes:
        case: (N,) names of the patients.
        index: (N,) z of the slice in the LPS volume.
        label: (N,) label ids.
        pixels: (N,) pixels of the mask at native resolution.
        share: (N,) share of the native slice that the mask covers.
        boxes: (N, 4) float32 tight boxes, XYXY in the 1024 frame, maxima inclusive.
        names: of label ids.
    """

    case: np.ndarray
    index: np.ndarray
    label: np.ndarray
    pixels: np.ndarray
    share: np.ndarray
    boxes: np.ndarray
    names: dict[int, str]


def read_masks(folder: str | Path, label_names: dict[int, str] | None = None) -> Masks:
    """All masks of a folder of preprocess_ct.py, or of one of NIfTI label volumes.

    Both give the same masks. What preprocess_ct.py drops of a volume by itself, masks too thin for
    the frame, is dropped here as well; its `--min-pixels` is not known from the volumes.

    Args:
        folder: with a dataset.json, of which all splits are read, or with label volumes.
        label_names: by label id, for label volumes; those of FLARE22 if None.

    Raises:
        UserError: neither kind of folder, a file that is damaged, names for a folder that has its
            own, or no label in any volume.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give --data one of slices or of label volumes")
    if (folder / DATASET_FILE).is_file():
        if label_names is not None:
            raise UserError(f"--label-names: {folder / DATASET_FILE} has names; leave it out")
        slices = open_dataset(folder).split("all")
        names, parts = slices[0].label_names, _of_slices(slices)
    else:
        names = FLARE22_LABELS if label_names is None else label_names
        parts = _of_volumes(folder)
    columns: list[list] = [[], [], [], [], [], []]
    for case, index, labels, pixels, size, boxes in parts:
        rows = ([case] * len(labels), [index] * len(labels), labels, pixels, pixels / size, boxes)
        for column, values in zip(columns, rows, strict=True):
            column.extend(values)
    if not columns[0]:
        raise UserError(f"{folder}: no volume has a label; are these label maps?")
    return Masks(*map(np.array, columns), names=names)


Part = tuple[str, int, np.ndarray, np.ndarray, int, np.ndarray]
# Of one slice: case, index, labels (K,), their pixels (K,), pixels of the slice, boxes (K, 4).


def _of_slices(slices: Sequence[Slice]) -> Iterator[Part]:
    from tqdm import tqdm

    for entry in tqdm(slices, unit="slice", disable=None):
        _, labels, boxes = read_instances(entry)
        height, width = entry.frame.native
        pixels = np.array([entry.labels[label] for label in labels.tolist()])
        yield entry.case, entry.index, labels, pixels, height * width, boxes


def _of_volumes(folder: Path) -> Iterator[Part]:
    from tqdm import tqdm

    from utils.data.volumes import SUFFIXES, read_label_map, volumes_by_case

    if not any(path.name.endswith(SUFFIXES) for path in folder.iterdir()):
        raise UserError(
            f"{folder}: holds neither {DATASET_FILE} nor a .nii.gz or .nii file; give --data a "
            "folder of preprocess_ct.py or of label volumes"
        )
    volumes = volumes_by_case(folder, "--data")
    for case, path in tqdm(sorted(volumes.items()), unit="volume", disable=None):
        volume = read_label_map(path)
        frame = Frame.of(volume.array.shape[1:], volume.spacing_mm[1:])
        for index in np.flatnonzero(volume.array.any(axis=(1, 2))).tolist():
            framed, native, _ = frame.labels_there_and_back(volume.array[index])
            labels, boxes = tight_boxes(framed)
            pixels = np.bincount(native.ravel(), minlength=256)[labels]
            yield case, index, labels, pixels, native.size, boxes


# --- The boxes -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Drawn:
    """Numbers drawn before, for `perturb` to take in the place of a generator."""

    numbers: np.ndarray

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.numbers.reshape(shape)


def box_statistics(
    masks: Masks,
    policies: Sequence[str],
    draws: int,
    seed: int,
    factors: tuple[float, float],
) -> tuple[list[dict[str, str | int | float]], dict[str, np.ndarray]]:
    """What each policy does to the boxes of each label.

    A mask's boxes depend on seed, case, slice and label alone, so neither order nor other masks
    change them, and every policy moves the same edges by the same share of its own range.

    Args:
        masks: of the data set.
        policies: of `perturb.POLICIES`.
        draws: boxes drawn for each mask and policy, 1 or more.
        seed: of these boxes.
        factors: delta_expand and epsilon_shrink, px of the 1024 frame.

    Returns:
        A row for each policy and label, in this order, all labels together last: the columns of
        the CSV, with medians and 5th and 95th percentiles. Offsets are those by which edges really
        moved, outward positive, x and y edges together, in px and in % of the side that the edge
        moves along. Areas count inclusive maxima. And the IoU (N, draws) of the drawn boxes with
        the tight ones, by policy.
    """
    keys = zip(masks.case.tolist(), masks.index.tolist(), masks.label.tolist(), strict=True)
    numbers = np.array([box_rng(seed, *key).random((draws, 2, 2)) for key in keys])
    tight = masks.boxes.astype(np.float64)[:, None]
    sides = box_sides(masks.boxes)
    sizes = {
        "mask_native_pixels": masks.pixels,
        "mask_percent_of_slice": 100 * masks.share,
        "width_px": sides[:, 0],
        "height_px": sides[:, 1],
        "theta_omega": theta_omega(masks.boxes),
        "xi": xi(masks.boxes),
    }
    groups = [
        (label_name(masks.names, label), masks.label == label)
        for label in np.unique(masks.label).tolist()
    ]
    groups.append((ALL, np.ones(len(masks.label), bool)))
    of_masks = []
    for _, chosen in groups:
        slices = {*zip(masks.case[chosen].tolist(), masks.index[chosen].tolist(), strict=True)}
        columns = {
            "cases": len({case for case, _ in slices}),
            "slices": len(slices),
            "masks": int(chosen.sum()),
        }
        for column, values in sizes.items():
            columns |= _spread(column, values[chosen])
        of_masks.append(columns)
    made = {"draws": draws, "seed": seed} | dict(zip(FACTORS, factors, strict=True))
    rows, overlap = [], {}
    for policy in policies:
        repeated = np.repeat(masks.boxes, draws, axis=0)
        drawn = perturb(repeated, policy, _Drawn(numbers), IMAGE_SIZE, *factors)
        drawn = drawn.astype(np.float64).reshape(-1, draws, 4)
        offset = (drawn - tight) * [-1, -1, 1, 1]
        percent = 100 * offset / np.tile(sides, 2)[:, None]
        more = _area(drawn) > 2 * _area(tight)
        iou = overlap[policy] = _iou(drawn, tight)
        for (name, chosen), columns in zip(groups, of_masks, strict=True):
            row = {"label": name, "policy": policy} | columns
            row |= _spread("offset_px", offset[chosen])
            row |= _spread("offset_percent_of_side", percent[chosen])
            row["area_more_than_doubled_percent"] = 100 * float(more[chosen].mean())
            row["iou_median"] = float(np.median(iou[chosen]))
            rows.append(row | made)
    return rows, overlap


def _spread(column: str, values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, list(SPREAD.values()))
    return {f"{column}_{end}": float(value) for end, value in zip(SPREAD, found, strict=True)}


def _area(boxes: np.ndarray) -> np.ndarray:
    """Pixels (...) of boxes (..., 4), both ends counted."""
    return (boxes[..., 2] - boxes[..., 0] + 1) * (boxes[..., 3] - boxes[..., 1] + 1)


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    common = np.maximum(high - low + 1, 0).prod(axis=-1)
    return common / (_area(boxes) + _area(others) - common)


# --- The tables ----------------------------------------------------------------------------------
def as_text(rows: Sequence[dict]) -> str:
    """The rows of `box_statistics` as tables for the screen: the masks, then a policy each."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    first = [row for row in rows if row["policy"] == policies[0]]
    table = {
        "label": [row["label"] for row in first],
        "cases": [str(row["cases"]) for row in first],
        "masks": [str(row["masks"]) for row in first],
        "width, px": _shown(first, "width_px", ".0f", "-"),
        "height, px": _shown(first, "height_px", ".0f", "-"),
        "theta_omega": _shown(first, "theta_omega", ".3f", "-"),
        "xi": _shown(first, "xi", ".2f", "-"),
    }
    every = first[-1]
    delta, epsilon = (every[name] for name in FACTORS)
    how = (
        f"Perturbed boxes: {every['draws']} a mask, seed {every['seed']}, delta_expand {delta:g} "
        f"px, epsilon_shrink {epsilon:g} px. Offsets are of single edges, x and y together, "
        "outward positive; % of side is of the width for x, of the height for y; area > 2x is the "
        "share of boxes with more than twice the tight box's area."
    )
    blocks = [
        f"Tight boxes of {every['masks']} masks in {every['slices']} slices of {every['cases']} "
        "cases, px of the 1024 frame: median and 5-95 % range",
        _table(table),
        textwrap.fill(how, COLUMNS),
    ]
    for policy in policies:
        if policy == "none":
            blocks.append("none: the tight boxes as they are")
            continue
        chosen = [row for row in rows if row["policy"] == policy]
        table = {
            "label": [row["label"] for row in chosen],
            "offset, px": _shown(chosen, "offset_px", "+.1f", " ... "),
            "offset, % of side": _shown(chosen, "offset_percent_of_side", "+.1f", " ... "),
            "area > 2x, %": [f"{row['area_more_than_doubled_percent']:.1f}" for row in chosen],
            "median IoU": [f"{row['iou_median']:.2f}" for row in chosen],
        }
        blocks += [f"{policy}: how far an edge moves, median and 5-95 % range", _table(table)]
    return "\n\n".join(blocks)


def _table(columns: dict[str, list[str]]) -> str:
    return aligned([list(columns), *zip(*columns.values(), strict=True)])


def _shown(rows: Sequence[dict], column: str, form: str, between: str) -> list[str]:
    """Median and range of a column in all rows, one under the other."""
    digits = int(form[-2])
    medians, ranges = [], []
    for row in rows:
        # + 0.0: no minus before a zero
        values = (round(row[f"{column}_{end}"], digits) + 0.0 for end in SPREAD)
        median, low, high = (format(value, form) for value in values)
        medians.append(median)
        ranges.append(f"{low}{between}{high}")
    wide, wider = (max(map(len, texts)) for texts in (medians, ranges))
    return [f"{m:>{wide}} {r:>{wider}}" for m, r in zip(medians, ranges, strict=True)]


def write_csv(rows: Sequence[dict], path: str | Path) -> None:
    """Write the rows of `box_statistics`, to six digits.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})
