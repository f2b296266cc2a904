"""Scores of predicted masks: one row of instances.csv per model, instance and box."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import shutil
from argparse import Namespace
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import perturb
from perturb import SMALL_SHARE
from utils.data.labels import FLARE22_TOLERANCES_MM, label_name
from utils.data.slices import Slice, SliceDataset
from utils.evaluation.metrics import dsc, leak, nsd
from utils.evaluation.prompts import Patient, Prompt
from utils.system import UserError, signals
from utils.system.files import atomic_write, cannot_write, sha256
from utils.training.runs import git_commit, versions

QUEUED_JOBS = 4  # per process; their masks wait in memory
SCORES = "scores.jsonl"  # in the unfinished folder of results
# Options on which no score depends: with others the same scores are gone on with.
NO_SCORES = ("command", "workers", "data", "cache_dir", "out", "overwrite", "figures")
NO_SCORES += ("save_predictions", "baseline", "proposed", "allow_seen")


class Row(NamedTuple):
    """A row of instances.csv. Scores are 0 to 1; `box`, `shift` and `draw` are a Prompt's."""

    model: str
    dataset: str
    patient: str
    case: str
    slice: int
    label: str
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


# --- Tolerances ----------------------------------------------------------------------------------
def distance_unit(options: Namespace, slices: Sequence[Slice]) -> str:
    """The unit of distances: "mm", or "px" for slices whose spacing is not known.

    Raises:
        UserError: only some slices have a spacing, or an option needs it and none has one.
    """
    by_spacing = {sample.spacing_mm is not None: sample.folder for sample in slices}
    if len(by_spacing) > 1:
        raise UserError(
            f"{by_spacing[False]}: has no spacing, {by_spacing[True]} has: NSD would be in pixels "
            "for one and in mm for the other; evaluate them one at a time"
        )
    needs_mm = {
        "--tolerance flare22": options.tolerance == "flare22",
        "--volume": options.volume,
        "--save-predictions": options.save_predictions,
    }
    for option in (option for option, given in needs_mm.items() if given and False in by_spacing):
        raise UserError(
            f"{option}: the data are MedSAM's slices, whose spacing and place in the patient are "
            "not known; leave it out, or preprocess the volumes"
        )
    return "mm" if True in by_spacing else "px"


def tolerances_of(tolerance: float | str, slices: Sequence[Slice]) -> dict[str, float]:
    """The tolerance of each label name, in the unit of the slices; "flare22" is that challenge's.

    Raises:
        UserError: FLARE22 has no tolerance for a label.
    """
    names = {label_name(sample.label_names, label) for sample in slices for label in sample.labels}
    if tolerance != "flare22":
        return dict.fromkeys(names, tolerance)
    if unknown := sorted(names - FLARE22_TOLERANCES_MM.keys()):
        raise UserError(f"--tolerance flare22: none for {unknown[0]!r}; give a number of mm")
    return {name: FLARE22_TOLERANCES_MM[name] for name in names}


# --- Targets -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Target:
    """One instance, a label in a slice, and what is needed to score a prediction of it.

    Attributes:
        place: dataset, patient, case, slice and label, as in instances.csv.
        mask: (H, W) bool at native resolution.
        tolerance: of NSD and leak, in mm; in pixels where the slice's spacing is not known.
        spacing: pixel size (y, x) in mm; (1, 1) where it is not known.
        error_leak, error_dsc: a prediction is an error if it leaks more or overlaps less.
    """

    place: tuple[str, str, str, int, str]
    mask: np.ndarray
    tolerance: float
    spacing: tuple[float, float]
    error_leak: float
    error_dsc: float

    def score(self, model: str, prompt: Prompt, prediction: np.ndarray) -> Row:
        """The row of a prediction (H, W) bool."""
        pixels = int(self.mask.sum())
        small = pixels < SMALL_SHARE * self.mask.size
        overlap = dsc(prediction, self.mask)
        borders = nsd(prediction, self.mask, self.tolerance, self.spacing)
        leaked = leak(prediction, self.mask, self.tolerance, self.spacing)
        error = float(leaked > self.error_leak or overlap < self.error_dsc)
        box = (prompt.box, str(prompt.shift), prompt.draw)
        return Row(model, *self.place, *box, pixels, small, overlap, borders, leaked, error)


def targets_of(
    sample: Slice,
    labels: np.ndarray,
    native: np.ndarray,
    tolerances: Mapping[str, float],
    error_leak: float,
    error_dsc: float,
) -> list[Target]:
    """The instances of K labels in a slice.

    Args:
        sample: the slice.
        labels: (K,) label ids.
        native: the label map (H, W) at native resolution.
        tolerances: of NSD by label name, in mm, or pixels where the slice's spacing is not known.
        error_leak, error_dsc: a prediction is an error if it leaks more or overlaps less.
    """
    spacing = sample.spacing_mm or (1.0, 1.0)
    targets = []
    for label in labels:
        name = label_name(sample.label_names, label)
        place = (sample.dataset, sample.patient, sample.case, sample.index, name)
        measure = (tolerances[name], spacing, error_leak, error_dsc)
        targets.append(Target(place, native == label, *measure))
    return targets


def score_masks(
    model: str,
    prompts: Sequence[Prompt],
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

    Masks are scored on the CPU, and a GPU would have to wait for it. Use it as a context manager,
    which raises UserError if a worker died; rows come in the order of submission.
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
        job = (model, prompts, targets, np.packbits(masks), masks.shape)  # bits: less to send
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
    """The scores of the patients that are finished, on disk as well, to go on with.

    The file holds the key, a hash of all that makes the scores, and a line of JSON per patient.

    Attributes:
        by_patient: the scores, in the order in which the patients were finished.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Read the scores in an unfinished folder of results, and empty it of all others."""
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
        """Add the scores of a patient.

        Raises:
            UserError: the file cannot be written.
        """
        self.by_patient[patient] = scores
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line((patient, scores)) + "\n")
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def finish(self) -> Scores:
        """Remove the file, and return the scores of all patients."""
        self._path.unlink()
        rows, volume_rows = zip(*self.by_patient.values(), strict=True)
        return Scores(sum(rows, []), sum(volume_rows, []))


def _line(item: tuple[Patient, Scores]) -> str:
    return json.dumps((item[0], *item[1]))  # floats keep every bit


def scores_key(
    options: Namespace, weights: Mapping[str, str], datasets: Sequence[SliceDataset]
) -> str:
    """A hash of eval.py's options, the SHA-256 of each model's weights, data, code and versions."""
    parts = {
        "options": {k: v for k, v in vars(options).items() if k not in NO_SCORES},
        "weights": weights,
        "data": [(dataset.name, dataset.sha256) for dataset in datasets],
        "given": [sha256(path) for path in options.boxes or ()],
        "perturb.py": sha256(perturb.__file__),  # which users edit between two commits
        "versions": versions(),
        "commit": git_commit(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
