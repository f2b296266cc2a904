"""The box prompts of an evaluation, and the protocol that fixes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from perturb import BOX_KINDS, LOOSE, Shift, shift_boxes, sweep_boxes
from utils.data.slices import Slice

GIVEN = "given"  # kind of the boxes of --boxes, see utils/evaluation/given.py


@dataclass(frozen=True)
class Protocol:
    """How an evaluation is made, as far as its tables must say.

    Attributes:
        data: the data and the split, as text.
        shifts: of expansion and shrink boxes; the conclusions are about the first.
        sweep: the signed shifts of the robustness curve, without 0.
        draws: random boxes per instance, kind and shift.
        seed: of the boxes.
        tolerance: of NSD, as text.
        small_share: an instance under this share of the slice is small.
        error_leak, error_dsc: what counts as an error on a small instance.
        baseline, proposed: names of the models that the conclusions and figures compare.
        notes: what to know before reading: on top of the report and of the printed tables.
        trainings: by model, the training that it is a run of, where that is not the model's name:
            models of one training differ in the seed alone.
        several_datasets: whether names of cases and labels must say which data set they are from.
    """

    data: str
    shifts: tuple[Shift, ...]
    sweep: tuple[Shift, ...]
    draws: int
    seed: int
    tolerance: str
    small_share: float
    error_leak: float
    error_dsc: float
    baseline: str
    proposed: str
    notes: tuple[str, ...] = ()
    several_datasets: bool = False
    trainings: Mapping[str, str] = field(default_factory=dict)

    @property
    def shifts_of_both_units(self) -> list[Shift]:
        """The first shift and, if there is one, the first of the other unit."""
        first = self.shifts[0]
        return [first, *[shift for shift in self.shifts if shift.unit != first.unit][:1]]


@dataclass(frozen=True)
class Prompt:
    """One way to place a box around an instance: columns box, shift and draw of instances.csv.

    Attributes:
        box: one of BOX_KINDS, "loose", "sweep", or "given".
        shift: the largest shift of an edge; of a sweep the signed shift of all edges.
        draw: number of the random draw, or of the given box of an instance.
    """

    box: str
    shift: Shift
    draw: int = 0


def all_prompts(protocol: Protocol) -> list[Prompt]:
    """The prompts of every instance: standard, expansion and shrink, loose, then the sweep."""
    prompts = [Prompt("standard", Shift(0.0, "side"))]
    for shift in protocol.shifts:
        for kind in BOX_KINDS[1:]:
            prompts += [Prompt(kind, shift, draw) for draw in range(protocol.draws)]
    prompts += [Prompt(LOOSE, protocol.shifts[0], draw) for draw in range(protocol.draws)]
    return prompts + [Prompt("sweep", shift) for shift in protocol.sweep]


def boxes_of(
    entry: Slice, labels: Sequence[int], tight: np.ndarray, prompt: Prompt, seed: int
) -> np.ndarray:
    """The boxes of a slice's K instances under one prompt.

    They are the same for every model and in any order, see `perturb.box_rng`. An edge moves as far
    inward under shrink as outward under expansion, and twice as far under twice the shift.

    Args:
        entry: the slice.
        labels: K label ids.
        tight: their tight boxes (K, 4), XYXY in the 1024 frame.
        prompt: kind, shift and draw.
        seed: of the evaluation.

    Returns:
        (K, 4) float32 XYXY in the 1024 frame.
    """
    if prompt.box == "sweep":
        return sweep_boxes(tight, prompt.shift)
    boxes = []
    for label, box in zip(labels, tight, strict=True):
        rng = entry.rng(seed, "evaluation", label, prompt.draw)
        boxes.append(shift_boxes(box[None], prompt.box, prompt.shift, rng))
    return np.concatenate(boxes)
