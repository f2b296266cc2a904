"""How far boxes err that somebody draws in every n-th slice, or takes from the neighbour slice.

No annotator is needed: the tight boxes of label volumes say where such boxes lie. Masks are rows as
of `statistics.read_masks`; boxes (N, M, 4) are M boxes of each of N masks, in the 1024 frame.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from utils.data.errors import EDGES
from utils.data.given_boxes import GivenBox
from utils.evaluation.interpolation import interpolate
from utils.evaluation.prompts import EVERY
from utils.preview.statistics import BOX, KEYS, SPREAD, compare_boxes, offsets_of, suggested_factors
from utils.system import UserError

NEIGHBOUR, DRAWN = "neighbour", "drawn"  # protocols beside EVERY
SIZES = (40, 80, 160)  # bounds of the classes of sqrt(area), px


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
            "--every, --neighbour: no label is in two neighbouring slices; give volumes"
        )
    return masks


def measured_boxes(
    masks: pd.DataFrame, every: Sequence[int], neighbour: bool
) -> dict[str, np.ndarray]:
    """By protocol, the boxes of the masks of `follow_targets`."""
    boxes = {EVERY.format(n): boxes_of_every(masks, n) for n in every}
    return boxes | ({NEIGHBOUR: boxes_of_neighbours(masks)} if neighbour else {})


def boxes_of_every(masks: pd.DataFrame, every: int) -> np.ndarray:
    """Boxes (N, every, 4): tight in the key slices and interpolated between them.

    Key slices are the first and the last of a target, and every n-th from one of its first n slices
    on: M boxes, one for each start.
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


def error_rows(masks: pd.DataFrame, boxes_of: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """The table of errors of boxes by protocol, with the columns of `utils.data.errors`."""
    tables = []
    for protocol, boxes in boxes_of.items():
        shares = offsets_of(masks, boxes)[1]
        rows = pd.DataFrame(shares.reshape(-1, 4), columns=EDGES).assign(
            protocol=protocol,
            patient=np.repeat(pd.factorize(masks.patient)[0] + 1, boxes.shape[1]),
            size=np.repeat(np.sqrt(masks.area.to_numpy()), boxes.shape[1]),
        )
        tables.append(rows.dropna())
    return pd.concat(tables, ignore_index=True)


def sizes_text(masks: pd.DataFrame, boxes_of: Mapping[str, np.ndarray]) -> str:
    """By policy or protocol and by size of the target, the 5-95 % range of offsets in % of side."""
    bounds = [f"{low}-{high} px" for low, high in zip(SIZES, SIZES[1:], strict=False)]
    names = np.array([f"under {SIZES[0]} px", *bounds, f"over {SIZES[-1]} px"])
    size = np.digitize(np.sqrt(masks.area), SIZES)
    sized, lines = masks.assign(label=size, name=names[size]), {}
    for policy, boxes in boxes_of.items():
        table = compare_boxes(sized, boxes, SPREAD)[0].droplevel("label").round(1) + 0.0  # no -0
        ends = table[["offset_percent_of_side_p05", "offset_percent_of_side_p95"]].to_numpy()
        texts = [f"{low:+.1f} to {high:+.1f}" for low, high in ends]
        lines[policy] = dict(zip(table.index, texts, strict=True))
    title = "Offsets of single edges, % of side, 5-95 % range, by the target's sqrt(area)"
    return f"{title}\n{pd.DataFrame(lines).T.to_string()}"


def suggestions_text(table: pd.DataFrame, protocols: Sequence[str]) -> str:
    """Which constants cover the 5-95 % range of each protocol; `table` is `box_statistics`."""
    lines = []
    for protocol in protocols:
        delta, epsilon = suggested_factors(table[table.policy == protocol], "p05", "p95")
        lines.append(f"{protocol}: DELTA_EXPAND = {delta:.1f} and EPSILON_SHRINK = {epsilon:.1f}")
    return "These cover 90 % of the edges (perturb.py, reading width)\n" + "\n".join(lines)
