"""DSC (13), NSD (14) and leak of masks, and the rows of instances.csv made of them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import warnings
from argparse import Namespace
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects
from surface_distance import compute_surface_dice_at_tolerance, compute_surface_distances

from perturb import SMALL_SHARE
from utils.data.labels import FLARE22_TOLERANCES_MM
from utils.system import UserError, signals
from utils.system.files import atomic_write, cannot_write

if TYPE_CHECKING:  # processes that score import this module, and no more than they need
    from utils.data.slices import Slice
    from utils.evaluation.prompts import Patient, Prompt

ERROR_LEAK = 0.10  # an error: more than this share of the target's area beyond the tolerance ...
ERROR_DSC = 0.5  # ... or a DSC below this
QUEUED_JOBS = 4  # per process; their masks wait in memory
SCORES = "scores.jsonl"  # in the unfinished folder of results


class Row(NamedTuple):
    """A row of instances.csv. Scores are 0 to 1; `box`, `shift` and `draw` are a Prompt's.

    `part` numbers the connected parts of a label that are instances, from 1, the largest.
    """

    model: str
    dataset: str
    patient: str
    case: str
    slice: int
    label: str
    part: int
    box: str
    shift: str
    draw: int
    pixels: int
    small: bool
    dsc: float
    nsd: float
    leak: float
    error: float


class Scores(NamedTuple):
    """The rows of instances.csv and, as dicts by column, of volumes.csv."""

    rows: list[Row]
    volume_rows: list[dict]


# --- Metrics: binary masks of the same shape, or a ValueError -----------------------------------
def dsc(prediction: np.ndarray, target: np.ndarray) -> float:
    """Dice similarity coefficient 2 |P & T| / (|P| + |T|), 0 to 1; both masks empty: 1."""
    prediction, target = _as_masks(prediction, target)
    size = int(prediction.sum()) + int(target.sum())
    return 2 * int((prediction & target).sum()) / size if size else 1.0


def nsd(
    prediction: np.ndarray, target: np.ndarray, tolerance_mm: float, spacing_mm: Sequence[float]
) -> float:
    """Normalised surface distance, 0 to 1: the share of both borders at most the tolerance apart.

    As google-deepmind/surface-distance, by contour length in 2D and surface area in 3D. Both masks
    empty: 1; one empty: 0. The spacing is (y, x) or (z, y, x); a slice must be 2D.
    """
    prediction, target = _as_masks(prediction, target)
    if not prediction.any() or not target.any():  # surface-distance 0.1 fails on these
        return float(not prediction.any() and not target.any())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its scipy.ndimage namespaces
        distances = compute_surface_distances(target, prediction, spacing_mm)
        return float(compute_surface_dice_at_tolerance(distances, tolerance_mm))


def leak(
    prediction: np.ndarray, target: np.ndarray, tolerance_mm: float, spacing_mm: Sequence[float]
) -> float:
    """Area predicted farther than the tolerance outside the target, as a share of the target's.

    Distances are between pixel centres. Not part of the paper: this project's measure of a mask
    that runs into the neighbour, 0 or more; infinity for any prediction of an empty target.
    """
    prediction, target = _as_masks(prediction, target)
    outside = prediction & ~target
    if not outside.any():
        return 0.0
    if not target.any():
        return float("inf")
    (window,) = find_objects((prediction | target).astype(np.uint8))  # that holds both
    distance = distance_transform_edt(~target[window], sampling=spacing_mm)
    return int((outside[window] & (distance > tolerance_mm)).sum()) / int(target.sum())


def _as_masks(prediction: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, target = np.asarray(prediction, bool), np.asarray(target, bool)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} differ in shape")
    return prediction, target


# --- Tolerances ----------------------------------------------------------------------------------
def tolerance_text(options: Namespace, slices: Sequence[Slice]) -> str:
    """The tolerance of NSD in words; UserError if slices lack a spacing that is needed."""
    by_spacing = {sample.spacing_mm is not None: sample.folder for sample in slices}
    if len(by_spacing) > 1:
        raise UserError(
            f"{by_spacing[False]}: has no spacing, but {by_spacing[True]} has: NSD would be in "
            "pixels for one and in mm for the other; evaluate them one at a time"
        )
    in_mm = options.tolerance == "flare22" or options.volume or options.save_predictions
    if in_mm and False in by_spacing:
        raise UserError(
            f"{by_spacing[False]}: MedSAM's slices, whose spacing and place in the patient are "
            "unknown; leave out --tolerance flare22, --volume, --every and --save-predictions"
        )
    if options.tolerance == "flare22":
        return "FLARE22's tolerances"
    unit = "mm" if True in by_spacing else "pixels of the slices, whose spacing is unknown"
    return f"{options.tolerance:g} {unit}"


def tolerances_of(tolerance: float | str, slices: Sequence[Slice]) -> dict[str, float]:
    """The tolerance of each label name in the unit of the slices; UserError if FLARE22 has none."""
    names = {sample.name_of(instance) for sample in slices for instance in sample.labels}
    if tolerance != "flare22":
        return dict.fromkeys(names, tolerance)
    if unknown := sorted(names - FLARE22_TOLERANCES_MM.keys()):
        raise UserError(f"--tolerance flare22: none for {unknown[0]!r}; give one in mm")
    return {name: FLARE22_TOLERANCES_MM[name] for name in names}


# --- Targets -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    """One instance of a slice, and what is needed to score a prediction of it."""

    place: tuple[str, str, str, int, str, int]  # dataset, patient, case, slice, label, part, of Row
    mask: np.ndarray  # (H, W) bool at native resolution
    tolerance: float  # of NSD and leak, in mm; in pixels where the slice's spacing is not known
    spacing: tuple[float, float]  # pixel size (y, x) in mm; (1, 1) where it is not known

    def score(self, model: str, prompt: tuple[str, str, int], prediction: np.ndarray) -> Row:
        """The row of a prediction (H, W) bool; `prompt` is its box, shift and draw."""
        pixels = int(self.mask.sum())
        small = pixels < SMALL_SHARE * self.mask.size
        overlap = dsc(prediction, self.mask)
        borders = nsd(prediction, self.mask, self.tolerance, self.spacing)
        leaked = leak(prediction, self.mask, self.tolerance, self.spacing)
        error = float(leaked > ERROR_LEAK or overlap < ERROR_DSC)
        return Row(model, *self.place, *prompt, pixels, small, overlap, borders, leaked, error)


def targets_of(
    sample: Slice, labels: np.ndarray, native: np.ndarray, tolerances: Mapping[str, float]
) -> list[Target]:
    """The K instances (K,) of a slice, native label map (H, W); tolerances by label name."""
    spacing = sample.spacing_mm or (1.0, 1.0)
    place = (sample.dataset, sample.patient, sample.case, sample.index)
    targets = []
    for instance in labels.tolist():
        name, part = sample.name_of(instance), sample.part_of(instance)
        targets.append(Target((*place, name, part), native == instance, tolerances[name], spacing))
    return targets


def score_masks(
    model: str,
    prompts: Sequence[tuple[str, str, int]],
    targets: Sequence[Target],
    bits: np.ndarray,
    shape: tuple[int, int, int, int],
) -> list[Row]:
    """Score the masks, packed bits of `shape` (P, K, H, W), of K targets under P prompts."""
    masks = np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).view(bool)
    return [
        target.score(model, prompt, mask)
        for prompt, of_prompt in zip(prompts, masks, strict=True)
        for target, mask in zip(targets, of_prompt, strict=True)
    ]


class Scorer:
    """Runs `score_masks` in worker processes while the decoder continues; with 0 workers, here.

    A context manager, which raises UserError if a worker died; rows come as they were submitted.
    """

    def __init__(self, workers: int) -> None:
        # Spawned, not forked: a fork would copy the decoder's threads in an undefined state.
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, spawn, signals.init_worker) if workers else None
        self._max_jobs = QUEUED_JOBS * workers
        self._jobs: deque[Future[list[Row]]] = deque()
        self._rows: list[Row] = []

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a scoring process died, most likely out of memory; try fewer --workers"
            ) from error

    def submit(
        self, model: str, prompts: Sequence[Prompt], targets: Sequence[Target], masks: np.ndarray
    ) -> None:
        """Score masks (P, K, H, W) bool; waits while too many are queued."""
        columns = [(prompt.box, str(prompt.shift), prompt.draw) for prompt in prompts]
        job = (model, columns, targets, np.packbits(masks), masks.shape)  # bits: less to send
        if self._pool is None:
            self._rows += score_masks(*job)
            return
        while len(self._jobs) >= self._max_jobs:
            self._rows += self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(score_masks, *job))

    def finish(self) -> list[Row]:
        """Wait for all jobs and return the rows since the last call."""
        while self._jobs:
            self._rows += self._jobs.popleft().result()
        rows, self._rows = self._rows, []
        return rows


# --- Scores of an interrupted evaluation ---------------------------------------------------------
class KeptScores:
    """Scores of finished patients, on disk as well: the key of `scores_key`, then a line each."""

    def __init__(self, folder: Path, key: str) -> None:
        """Read the scores `by_patient` in an unfinished folder of results, and empty it."""
        self._path = folder / SCORES
        self.by_patient: dict[Patient, Scores] = {}
        lines = self._path.read_bytes().splitlines() if self._path.is_file() else []
        if lines and lines[0] != key.encode():
            print(f"{folder}: discarded the scores of another evaluation that was interrupted")
        elif lines:
            with contextlib.suppress(ValueError):  # the last line may be cut short
                for patient, rows, volume_rows in map(json.loads, lines[1:]):
                    self.by_patient[tuple(patient)] = Scores([Row(*r) for r in rows], volume_rows)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with atomic_write(self._path, "w") as file:
            file.write("\n".join([key, *map(_line, self.by_patient.items()), ""]))

    def append(self, patient: Patient, scores: Scores) -> None:
        """Add the scores of a patient; a UserError if they cannot be written."""
        self.by_patient[patient] = scores
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line((patient, scores)) + "\n")
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def joined(self) -> Scores:
        """The scores of all patients."""
        rows, volume_rows = zip(*self.by_patient.values(), strict=True)
        return Scores(list(chain(*rows)), list(chain(*volume_rows)))

    def remove(self) -> None:
        """Remove the file, now that the results are written."""
        self._path.unlink()


def _line(item: tuple[Patient, Scores]) -> str:
    return json.dumps((item[0], *item[1]))  # floats keep every bit
