"""The boxes of a run's own policy: those that its decoder is trained on, equations (1)-(8)."""

from __future__ import annotations

from argparse import Namespace

import numpy as np

import perturb
from utils.data.slices import Slice


def training_boxes(
    entry: Slice, tight_boxes: np.ndarray, areas: np.ndarray, epoch: int, options: Namespace
) -> np.ndarray:
    """The boxes (K, 4) that a slice is trained on in an epoch, from its tight ones.

    They depend on the seed, the epoch and the slice alone.
    """
    rng = perturb.box_rng(options.seed, "boxes", epoch, entry.key)
    return policy_boxes(tight_boxes, areas, rng, options)


def policy_boxes(
    tight_boxes: np.ndarray, areas: np.ndarray, rng: np.random.Generator, options: Namespace
) -> np.ndarray:
    """Boxes (K, 4) of a run's policy, float32 XYXY in the 1024 frame.

    Args:
        tight_boxes: (K, 4) XYXY in that frame.
        areas: (K,) of the masks, in its pixels.
        rng: the source of randomness.
        options: of the run.
    """
    return perturb.perturb(
        tight_boxes,
        options.policy,
        rng,
        delta_expand=options.delta_expand,
        epsilon_shrink=options.epsilon_shrink,
        areas=areas,
        reading=options.reading,
        literal=options.literal,
    )
