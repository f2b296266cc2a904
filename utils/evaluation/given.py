"""Boxes that people drew around targets of the evaluation: box kind "given" of instances.csv."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from perturb import Shift
from utils.data.given_boxes import BoxFile, boxes_by_case
from utils.data.labels import label_name
from utils.data.slices import Slice, SliceDataset
from utils.evaluation.inputs import case_name
from utils.evaluation.instances import INSTANCE, by_model, count_instances, counts, mean, under
from utils.evaluation.paper_tables import measured_how
from utils.evaluation.prompts import GIVEN, Prompt, Protocol
from utils.evaluation.tables import Table
from utils.system.errors import UserError

Given = Mapping[tuple[str, int], list[np.ndarray]]  # by slice's key and label id: boxes (4,)


def given_boxes(
    files: Sequence[BoxFile], datasets: Sequence[SliceDataset], slices: Sequence[Slice]
) -> tuple[Given, str]:
    """The boxes of the instances in some slices, in pixels of the 1024 frame.

    Args:
        files: of boxes; with several data sets their cases are <data set>/<case>.
        datasets: of the slices.
        slices: that are evaluated.

    Returns:
        The boxes, and a note on those that are of no instance here, or "".

    Raises:
        UserError: MedSAM's slices, no box of an instance here, or as `boxes_by_case`.
    """
    several = len(datasets) > 1
    geometry = {
        f"{dataset.name}/{case}" if several else case: grid
        for dataset in datasets
        for case, grid in dataset.geometry.items()
    }
    if not geometry:
        raise UserError(
            "--boxes: the data are MedSAM's slices, whose place in a volume is not known"
        )
    entries = {(case_name(entry, several), entry.index): entry for entry in slices}
    given: dict[tuple[str, int], list[np.ndarray]] = {}
    others = 0
    for case, boxes in boxes_by_case(files, geometry, geometry.__getitem__).items():
        for box in boxes:
            entry = entries.get((case, box.index))
            ids = {label_name(entry.label_names, n): n for n in entry.labels} if entry else {}
            label = int(box.label) if box.label.isdigit() else ids.get(box.label)
            if label not in ids.values():
                others += 1
                continue
            framed = entry.frame.boxes_to_frame(np.array([box.box]))[0]
            given.setdefault((entry.key, label), []).append(framed)
    if not given:
        paths = ", ".join(str(file.path) for file in files)
        raise UserError(f"{paths}: no box is of a label in one of the {len(slices)} slices here")
    note = f"{others} of the given boxes are of no instance of this evaluation and left out."
    return given, note if others else ""


def given_prompts(
    given: Given, entry: Slice, labels: Sequence[int]
) -> Iterator[tuple[Prompt, list[int], np.ndarray]]:
    """The given boxes of a slice, one of each instance at a time.

    Args:
        given: as `given_boxes` returns them.
        entry: the slice.
        labels: K label ids.

    Yields:
        The prompt, whose draw counts the boxes of an instance; the positions, among the K, of the
        instances that have so many; and their boxes (K', 4) XYXY in the 1024 frame.
    """
    boxes = [given.get((entry.key, label), []) for label in map(int, labels)]
    for draw in range(max(map(len, boxes))):
        chosen = [position for position, given_to in enumerate(boxes) if len(given_to) > draw]
        drawn = np.stack([boxes[position][draw] for position in chosen])
        yield Prompt(GIVEN, Shift(0.0, "side"), draw), chosen, drawn


def given_table(scores: pd.DataFrame, protocol: Protocol) -> Table:
    """given.csv: DSC and NSD of every model under given boxes and under the tight ones.

    Of the instances that have a given box; one row per label and box, all labels first.
    """
    first = protocol.shifts[0]
    rows = under(scores, GIVEN, first)
    keys = rows[INSTANCE].drop_duplicates()
    parts = {GIVEN: rows, "tight": under(scores, "standard", first).merge(keys, on=INSTANCE)}
    lines = []
    for label in ["all", *sorted(rows["label"].unique())]:
        for box, part in parts.items():
            of_label = part if label == "all" else part[part["label"] == label]
            means = {
                f"{model} {score.upper()}": mean(of_model, score)
                for model, of_model in by_model(of_label).items()
                for score in ("dsc", "nsd")
            }
            n = counts(next(iter(means.values())))
            lines.append({"label": label, "box": box} | n | means)
    boxes = len(rows) // rows["model"].nunique()
    return Table(
        "Boxes that people drew, and the tight boxes of the same instances, %.",
        f"{boxes} boxes of {count_instances(rows)} instances. "
        f"{measured_how(rows, protocol, first)}",
        pd.DataFrame(lines),
    )
