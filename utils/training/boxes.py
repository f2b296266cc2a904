"""The boxes of a run's own policy: those that its decoder is trained on, equations (1)-(8)."""

from __future__ import annotations

from argparse import Namespace

import numpy as np

from perturb import Perturbation, perturb
from utils.data.slices import Slice
from utils.system.errors import UserError


def perturbation_of(options: Namespace) -> Perturbation:
    """How a run of one policy perturbs its boxes.

    Raises:
        UserError: an option or a constant of perturb.py is out of range.
    """
    names = ("policy", "reading", "delta_expand", "epsilon_shrink", "literal")
    try:
        return Perturbation(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise UserError(str(error)) from None


def training_boxes(
    sample: Slice, tight_boxes: np.ndarray, areas: np.ndarray, epoch: int, options: Namespace
) -> np.ndarray:
    """The boxes (K, 4) that a slice is trained on in an epoch, float32 XYXY in the 1024 frame.

    Args:
        sample: the slice, with K labels.
        tight_boxes: (K, 4) XYXY in the 1024 frame.
        areas: (K,) of the masks, in its pixels.
        epoch: from 1.
        options: of the run.
    """
    boxes, perturbation = [], perturbation_of(options)
    for label, box, area in zip(sorted(sample.labels), tight_boxes, areas, strict=True):
        rng = sample.rng(options.seed, "training", label, epoch)
        boxes.append(perturb(box[None], area[None], rng, perturbation))
    return np.concatenate(boxes)
