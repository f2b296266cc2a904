"""The training boxes of an earlier run, made again."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from perturb import mask_areas
from utils.data.slices import Slice, open_datasets, read_instances
from utils.system.errors import UserError
from utils.system.files import read_json
from utils.training.box_code import box_code
from utils.training.boxes import training_boxes
from utils.training.inputs import data_record
from utils.training.options import CONFIG, options_of
from utils.training.resume import check_unchanged
from utils.training.runs import data_hashes


def boxes_of_run(
    folder: Path, epoch: int
) -> Iterator[tuple[Slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Make the training boxes of a run's epoch again, from its folder and its data alone.

    Args:
        folder: of a run of one policy.
        epoch: from 1.

    Yields:
        Each training slice with its labels (K,), their tight boxes and the boxes that it was
        trained on, both (K, 4) float32 XYXY in the 1024 frame.

    Raises:
        UserError: the data, or what perturb.py does for the run's policy, changed since.
    """
    options = Namespace(**options_of(folder))
    if not hasattr(options, "reading"):
        raise UserError(f"{folder / CONFIG}: of another version (no reading); start a new run")
    if "," in options.policy:
        raise UserError(f"{folder}: a run of several policies; give the folder of one of them")
    if not 1 <= epoch <= options.epochs:
        raise UserError(f"{folder}: has epochs 1 to {options.epochs}, not {epoch}")
    datasets = open_datasets(options.data, list(data_hashes(read_json(folder / CONFIG))))
    check_unchanged(folder, box_code=box_code(options), data=data_record(datasets))
    for dataset in datasets:
        for entry in dataset.split("train"):
            label_map, labels, tight_boxes = read_instances(entry)
            areas = mask_areas(label_map, labels)
            boxes = training_boxes(entry, tight_boxes, areas, epoch, options)
            yield entry, labels, tight_boxes, boxes
