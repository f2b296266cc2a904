"""Prompts of the models: the slices of an evaluation, the boxes on them, and their protocol."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from typing import NamedTuple

import numpy as np

from perturb import (
    BOX_KINDS,
    LIKE,
    LOOSE,
    Shift,
    box_sides,
    erring_boxes,
    read_errors,
    shift_boxes,
    sweep_boxes,
)
from utils.data.given_boxes import BoxFile, boxes_by_case
from utils.data.labels import label_name
from utils.data.slices import Slice, SliceDataset, read_instances
from utils.evaluation.interpolation import Track
from utils.system import UserError

GIVEN = "given"  # kind of the boxes that people drew
EVERY = "every {}"  # kinds of the boxes as if people had drawn them in every n-th slice
PROPAGATED = "propagated"  # kind of the masks, scored in 3D alone, of one box of each target
TIGHT = Shift(0.0, "side")  # the shift of standard boxes and of all these
Patient = tuple[str, str]  # data set, patient
Given = Mapping[tuple[str, int], list[np.ndarray]]  # by slice's key and instance: boxes (4,)


@dataclass(frozen=True)
class Protocol:
    """What makes the boxes of an evaluation."""

    shifts: tuple[Shift, ...]  # largest shifts of an edge; the conclusions are about the first
    sweep: tuple[Shift, ...] = ()  # signed shifts of the robustness curve, without 0
    draws: int = 1  # random boxes per instance, kind and shift
    seed: int = 0  # of the random boxes
    given: Mapping[str, Given] = field(default_factory=dict)  # by kind, of some instances or all
    every: tuple[int, ...] = ()  # the n of boxes in every n-th slice ...
    tracks: Mapping[Patient, Sequence[Track]] = field(default_factory=dict)  # ... of these targets

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
    """What tables, figures and conclusions say about an evaluation, beside its scores."""

    protocol: Protocol
    baseline: str  # the model with which conclusions and figures compare ...
    proposed: str  # ... this one; the same where there is one alone
    data: str  # the data sets and the split, "flare22, lung (split test)"
    tolerance: str  # of NSD, "2 mm"
    notes: tuple[str, ...] = ()  # on top of the report and of the printed tables
    trainings: Mapping[str, str] = field(default_factory=dict)  # of the models that are runs
    run_names: Mapping[str, str] = field(default_factory=dict)  # of these models

    def training_of(self, model: str) -> str:
        """The training that a model is a run of, with some seed; of other models their own name."""
        return self.trainings.get(model, model)


# --- Slices --------------------------------------------------------------------------------------
def select_slices(dataset: SliceDataset, split: str, maximum: int | None) -> list[Slice]:
    """A split's slices, evenly spaced at most `maximum` of each patient; UserError without any."""
    slices = dataset.split(split)
    if not slices:
        raise UserError(f"{dataset.folder}: the {split} split is empty; choose another --split")
    selected = []
    for samples in by_patient(slices).values():
        count = len(samples) if maximum is None else min(maximum, len(samples))
        selected += [samples[(2 * n + 1) * len(samples) // (2 * count)] for n in range(count)]
    return selected


def by_patient(slices: Sequence[Slice]) -> dict[Patient, list[Slice]]:
    """The slices of each patient, in order of appearance."""
    patients: dict[Patient, list[Slice]] = {}
    for sample in slices:
        patients.setdefault((sample.dataset, sample.patient), []).append(sample)
    return patients


# --- Boxes ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Prompt:
    """One way to place a box around an instance: columns box, shift and draw of instances.csv."""

    box: str  # one of BOX_KINDS, "loose", of LIKE, "sweep", "given", or as EVERY
    shift: Shift  # the largest shift of an edge; of a sweep the signed shift of all edges
    draw: int = 0  # number of the random draw, or of the given box of an instance


class Chunk(NamedTuple):
    """The boxes of one decoder call."""

    prompts: list[Prompt]  # P
    positions: list[int]  # of K instances among the labels of the slice
    boxes: np.ndarray  # (P * K, 4) float32 XYXY in the 1024 frame, prompt by prompt


def all_prompts(protocol: Protocol) -> list[Prompt]:
    """The prompts of every instance: standard, expansion and shrink, loose, then the sweep.

    Those of LIKE are left out where there are boxes in every n-th slice.
    """
    draws = range(protocol.draws)
    kinds = [(kind, shift) for shift in protocol.shifts for kind in BOX_KINDS[1:]]
    kinds += [(LOOSE, protocol.shift)]
    kinds += [(kind, TIGHT) for kind, every in LIKE.items() if every not in protocol.given]
    drawn = [Prompt(*kind, draw) for kind in kinds for draw in draws]
    return [Prompt("standard", TIGHT), *drawn, *(Prompt("sweep", s) for s in protocol.sweep)]


def boxes_of(
    sample: Slice,
    labels: Sequence[int],
    tight: np.ndarray,
    areas: np.ndarray,
    prompt: Prompt,
    seed: int,
) -> np.ndarray:
    """The boxes of a slice's K labels under one prompt, like `tight` (K, 4) XYXY, 1024 frame.

    `areas` (K,) are those of the masks. The boxes are the same for every model; shrink, expansion
    and all shifts share draws, see `perturb.box_rng`.
    """
    if prompt.box == "sweep":
        return sweep_boxes(tight, prompt.shift)
    boxes = []
    for label, box, area in zip(labels, tight[:, None], areas[:, None], strict=True):
        rng = sample.rng(seed, "evaluation", label, prompt.draw)
        if prompt.box in LIKE:
            errors = read_errors(protocol=LIKE[prompt.box])
            boxes.append(erring_boxes(box, area, errors, rng))
        else:
            boxes.append(shift_boxes(box, prompt.box, prompt.shift, rng))
    return np.concatenate(boxes)


def box_chunks(
    sample: Slice,
    labels: np.ndarray,
    tight: np.ndarray,
    areas: np.ndarray,
    protocol: Protocol,
    max_boxes: int,
) -> list[Chunk]:
    """All boxes of a slice, whole prompts, `max_boxes` a chunk if they fit; people's come last."""
    prompts = all_prompts(protocol)
    step = max(1, max_boxes // len(labels))
    chunks = []
    for start in range(0, len(prompts), step):
        some = prompts[start : start + step]
        boxes = [boxes_of(sample, labels, tight, areas, prompt, protocol.seed) for prompt in some]
        chunks.append(Chunk(some, list(range(len(labels))), np.concatenate(boxes)))
    for kind, of_kind in protocol.given.items():
        given = [of_kind.get((sample.key, label), []) for label in labels.tolist()]
        for draw in range(max(map(len, given))):
            positions = [position for position, boxes in enumerate(given) if len(boxes) > draw]
            boxes = np.stack([given[position][draw] for position in positions])
            chunks.append(Chunk([Prompt(kind, TIGHT, draw)], positions, boxes))
    return chunks


def every_boxes(tracks: Iterable[Track], every: Sequence[int]) -> dict[str, Given]:
    """By kind the boxes, in the 1024 frame, that are drawn in key slices and interpolated."""
    kinds: dict[str, Given] = {EVERY.format(n): {} for n in every}
    for (n, kind), track in product(zip(every, kinds, strict=True), tracks):
        places = zip(track.slices, track.instances, track.boxes_of_every(n), strict=True)
        for sample, instance, box in places:
            kinds[kind][sample.key, instance] = [*sample.frame.boxes_to_frame(np.array([box]))]
    return kinds


def boxes_drawn(protocol: Protocol) -> Counter[tuple[str, str, str, str]]:
    """How many boxes people draw, by data set, case, label, and kind of box."""
    drawn = Counter()
    for track in chain(*protocol.tracks.values()):
        drawn[(*track.organ, "standard")] += len(track.slices)
        for n in protocol.every:
            drawn[(*track.organ, EVERY.format(n))] += len(track.key_slices(n))
        drawn[(*track.organ, PROPAGATED)] += 1
    return drawn


def read_given(
    files: Sequence[BoxFile], datasets: Sequence[SliceDataset], slices: Sequence[Slice]
) -> tuple[Given, str]:
    """The boxes that people drew, in the 1024 frame, and a note on those of no instance here.

    UserError if two data sets have a case of the same name, a data set has no label of a box's
    name, no box is of an instance here (of MedSAM's slices none is, as their place is not known),
    or as `boxes_by_case`.
    """
    geometry, ids = {}, {}  # by case; ids by name
    for dataset in datasets:
        if twice := sorted(geometry.keys() & dataset.geometry.keys()):
            raise UserError(f"--boxes: two data sets have a case {twice[0]!r}; evaluate separately")
        geometry |= dataset.geometry
        found = {s.label_of(instance) for s in dataset.split("all") for instance in s.labels}
        names = {label_name(dataset.label_names, n): n for n in found | {*dataset.label_names}}
        ids |= dict.fromkeys(dataset.geometry, names)
    samples = {(sample.case, sample.index): sample for sample in slices}
    given: dict[tuple[str, int], list[np.ndarray]] = {}
    left_out = 0
    for case, boxes in boxes_by_case(files, geometry, geometry.__getitem__).items():
        for box in boxes:
            sample = samples.get((case, box.index))
            label = int(box.label) if box.label.isdecimal() else ids[case].get(box.label)
            if label is None:
                known = ", ".join(ids[case])
                raise UserError(f"--boxes: {case} has no label {box.label!r}; choose from {known}")
            instances = [n for n in sample.labels if sample.label_of(n) == label] if sample else []
            if box.box is None or not instances:
                left_out += 1
                continue
            framed = sample.frame.boxes_to_frame(np.array([box.box]))[0]
            instance = nearest_part(sample, instances, framed)
            given.setdefault((sample.key, instance), []).append(framed)
    if not given:
        paths = ", ".join(str(file.path) for file in files)
        raise UserError(f"{paths}: no box matches a label in any of the {len(slices)} slices")
    note = f"{left_out} of the given boxes left out: no matching instance in this evaluation."
    return given, note if left_out else ""


def nearest_part(sample: Slice, instances: Sequence[int], box: np.ndarray) -> int:
    """The one of a slice's instances whose tight box has the largest IoU with a box (4,) XYXY."""
    if len(instances) == 1:
        return instances[0]
    _, labels, tight = read_instances(sample)
    tight = tight[[labels.tolist().index(instance) for instance in instances]]
    low, high = np.maximum(tight[:, :2], box[:2]), np.minimum(tight[:, 2:], box[2:])
    common = np.maximum(high - low + 1, 0).prod(axis=1)
    areas = box_sides(np.vstack([tight, box])).prod(axis=1)
    return instances[int(np.argmax(common / (areas[:-1] + areas[-1] - common)))]
