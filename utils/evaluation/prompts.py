"""The box prompts of an evaluation, the protocol that fixes them, and what reports say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from perturb import BOX_KINDS, LOOSE, Shift, shift_boxes, sweep_boxes
from utils.data.slices import Slice

GIVEN = "given"  # kind of the boxes of --boxes, see utils/evaluation/given.py


@dataclass(frozen=True)
class Protocol:
    """What makes the boxes of an evaluation.

    Attributes:
        shifts: largest shifts of expansion and shrink boxes; the conclusions are about the first.
        sweep: the signed shifts of the robustness curve, without 0.
        draws: random boxes per instance, kind and shift.
        seed: of the random boxes.
    """

    shifts: tuple[Shift, ...]
    sweep: tuple[Shift, ...] = ()
    draws: int = 1
    seed: int = 0

    @property
    def shift(self) -> Shift:
        """The shift that the conclusions are about: the first."""
        return self.shifts[0]

    @property
    def shifts_of_both_units(self) -> list[Shift]:
        """The first shift and, if there is one, the first of the other unit."""
        return [self.shift, *[s for s in self.shifts if s.unit != self.shift.unit][:1]]


@dataclass(frozen=True)
class ReportContext:
    """What tables, figures and conclusions say about an evaluation, beside its scores.

    Attributes:
        protocol: how the boxes were made.
        baseline, proposed: names of the models that the conclusions and figures compare; the same
            where there is one model alone.
        data: the data sets and the split, "flare22, lung (split test)".
        tolerance: of NSD, "2 mm".
        error_leak, error_dsc: a prediction of a small instance (`perturb.SMALL_SHARE`) is an error
            if it leaks more or its DSC is lower.
        notes: what to know before reading, on top of the report and of the printed tables.
        trainings: by model, the training that it is a run of, where that is not the model's name:
            models of one training differ in the seed alone.
    """

    protocol: Protocol
    baseline: str
    proposed: str
    data: str
    tolerance: str
    error_leak: float
    error_dsc: float
    notes: tuple[str, ...] = ()
    trainings: Mapping[str, str] = field(default_factory=dict)

    def training_of(self, model: str) -> str:
        """The training that a model is a run of; of other models their own name."""
        return self.trainings.get(model, model)


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
