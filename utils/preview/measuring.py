"""Errors of boxes that somebody draws in every n-th slice, or copies from a neighbouring slice.

No annotator is needed: the tight boxes of label volumes determine such boxes. Masks are rows of
`statistics.read_masks`; boxes (N, M, 4) are M boxes of each of N masks, in the 1024 frame.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from utils.data.given_boxes import GivenBox
from utils.evaluation.interpolation import interpolate
from utils.preview.statistics import BOX, KEYS, SPREAD, compare_boxes, suggested_factors
from utils.system import UserError
from utils.system.files import atomic_write
from utils.training.errors import COLUMNS, EDGES

SIZES = (40, 80, 160)  # bounds of the classes of sqrt(area), px
RANGE = "{:+.1f} to {:+.1f}"
SIZE_NAMES = np.array(["under 40 px", "40-80 px", "80-160 px", "over 160 px"])


def follow_targets(masks: pd.DataFrame) -> pd.DataFrame:
    """The masks of targets that go on in a neighbouring slice, by case, label and slice.

    `target` numbers the targets: a label of a case in slices without a gap. Slices where a label
    has several parts (--parts) count as gaps. UserError if no target goes on.
    """
    masks = masks.drop_duplicates(KEYS, keep=False).sort_values(["case", "label", "slice"])
    first = (masks[["case", "label"]] != masks[["case", "label"]].shift()).any(axis=1)
    masks = masks.assign(target=(first | (masks.slice.diff() != 1)).cumsum())
    masks = masks[masks.duplicated("target", keep=False)].reset_index(drop=True)
    if masks.empty:
        raise UserError(
            "--every, --neighbour: no label spans two neighbouring slices; give volumes"
        )
    return masks


def boxes_of_every(masks: pd.DataFrame, every: int) -> np.ndarray:
    """Boxes (N, every, 4): tight in key slices, interpolated between them, one for each start.

    Key slices are the first and the last of a target, and every n-th from the start on.
    """
    tight = masks[BOX].to_numpy(np.float64)
    boxes = np.empty((len(masks), every, 4))
    for rows in masks.groupby("target").indices.values():
        for start in range(every):
            keys = {0, len(rows) - 1, *range(start, len(rows), every)}
            drawn = [GivenBox("", rows[key], tuple(tight[rows[key]])) for key in sorted(keys)]
            for box in [*drawn, *interpolate(drawn)]:
                boxes[box.index, start] = box.box
    return boxes


def boxes_of_neighbours(masks: pd.DataFrame) -> np.ndarray:
    """Boxes (N, 2, 4): the tight ones of the slices below and above; NaN where a target ends."""
    by_target = masks.groupby("target")[BOX]
    return np.stack([by_target.shift(step).to_numpy(np.float64) for step in (1, -1)], axis=1)


def sizes_text(masks: pd.DataFrame, boxes_of: Mapping[str, np.ndarray]) -> str:
    """By policy or protocol, the 5-95 % range of offsets by size, and constants that cover it."""
    size = np.digitize(np.sqrt(masks.area), SIZES)
    sized, lines = masks.assign(label=size, name=SIZE_NAMES[size]), {}
    for policy, boxes in boxes_of.items():
        table = compare_boxes(sized, boxes, SPREAD)[0].droplevel("label")
        ends = table[[f"offset_percent_of_side_{end}" for end in ("p05", "p95")]].round(1) + 0.0
        lines[policy] = dict(zip(table.index, map(RANGE.format, *ends.to_numpy().T), strict=True))
        delta, epsilon = suggested_factors(table, "p05", "p95")
        lines[policy] |= {"DELTA_EXPAND": f"{delta:.1f}", "EPSILON_SHRINK": f"{epsilon:.1f}"}
    title = "Offsets of single edges, % of side, 5-95 % range, by the target's sqrt(area), and the "
    title += "constants that\ncover it for all (perturb.py, reading width)"
    return f"{title}\n{pd.DataFrame(lines).T.to_string()}"


# --- Tables of errors ---------------------------------------------------------------------------
def write_errors(path: str | Path, errors: pd.DataFrame, how: str) -> int:
    """Write COLUMNS atomically, below the line `how` as a comment; returns the number of rows.

    Boxes that miss their target, as an edge moved inward by the whole side, are left out.
    """
    errors = errors[COLUMNS].round({"size": 1} | dict.fromkeys(EDGES, 3))
    errors = errors[(errors[EDGES] > -1).all(axis=1)]
    errors[EDGES] += 0.0  # no -0
    with atomic_write(path, "w") as file:
        file.write(f"# {how}\n")
        errors.to_csv(file, index=False, float_format="%g", lineterminator="\n")
    return len(errors)


def error_rows(protocol: str, masks: pd.DataFrame, shares: np.ndarray) -> pd.DataFrame:
    """COLUMNS of the shares (N, M, 4) of M boxes of each of N masks, without those that are NaN.

    `masks` has columns patient and area, px of the 1024 frame.
    """
    count = shares.shape[1]
    return (
        pd.DataFrame(shares.reshape(-1, 4), columns=EDGES)
        .assign(
            protocol=protocol,
            patient=np.repeat(pd.factorize(masks.patient)[0] + 1, count),
            size=np.repeat(np.sqrt(masks.area.to_numpy()), count),
        )
        .dropna()
    )


def thin(errors: pd.DataFrame, rows: int, seed: int) -> pd.DataFrame:
    """At most `rows` of a table, drawn evenly from its protocols and patients, in their order."""
    groups = ["protocol", "patient"]
    shuffled = errors.sample(frac=1, random_state=seed)
    quota = max(1, rows // errors.groupby(groups).ngroups)
    return shuffled.groupby(groups).head(quota).sort_index()
