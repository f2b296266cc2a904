"""The boxes of a run's own policy: those that its decoder is trained on, equations (1)-(8)."""

from __future__ import annotations

from argparse import Namespace

import numpy as np

import perturb
from utils.data.slices import Slice


def training_boxes(
    entry: Slice, tight_boxes: np.ndarray, epoch: int, options: Namespace
) -> np.ndarray:
    """The boxes (K, 4) that a slice is trained on in an epoch, from its tight ones.

    They depend on the seed, the epoch and the slice alone.
    """
    rng = perturb.box_rng(options.seed, "boxes", epoch, entry.key)
    return policy_boxes(tight_boxes, rng, options)


def policy_boxes(
    tight_boxes: np.ndarray, rng: np.random.Generator, options: Namespace
) -> np.ndarray:
    """Boxes (K, 4) of a run's policy and factors, float32 XYXY in the 1024 frame."""
    factors = (options.delta_expand, options.epsilon_shrink)
    return perturb.perturb(tight_boxes, options.policy, rng, perturb.IMAGE_SIZE, *factors)
