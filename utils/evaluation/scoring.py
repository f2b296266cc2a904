"""Scores of predicted masks: one row of instances.csv per model, instance and box."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils.data.labels import label_name
from utils.data.slices import Slice
from utils.evaluation.inputs import case_name, label_text, patient_name
from utils.evaluation.metrics import dsc, leak, nsd
from utils.evaluation.prompts import Prompt, Protocol
from utils.system import signals
from utils.system.errors import UserError

QUEUED_JOBS = 4  # per process; their masks wait in memory


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


def joined(parts: Iterable[Scores]) -> Scores:
    """The rows of several parts, one after another."""
    rows, volume_rows = [], []
    for part in parts:
        rows += part.rows
        volume_rows += part.volume_rows
    return Scores(rows, volume_rows)


@dataclass(frozen=True)
class Target:
    """One instance, a label in a slice, and what is needed to score a prediction of it.

    Attributes:
        patient, case, slice, label: as in instances.csv.
        mask: (H, W) bool at native resolution.
        tolerance: of NSD and leak, in mm; in pixels where the slice's spacing is not known.
        spacing: pixel size (y, x) in mm; (1, 1) where it is not known.
        small_share: the instance is small if it covers less than this share of the slice.
        error_leak, error_dsc: a prediction is an error if it leaks more or overlaps less.
    """

    patient: str
    case: str
    slice: int
    label: str
    mask: np.ndarray
    tolerance: float
    spacing: tuple[float, float]
    small_share: float
    error_leak: float
    error_dsc: float

    @functools.cached_property
    def pixels(self) -> int:
        """Area of the mask in native pixels."""
        return int(self.mask.sum())

    def score(self, model: str, prompt: Prompt, prediction: np.ndarray) -> Row:
        """The row of a prediction (H, W) bool."""
        overlap = dsc(prediction, self.mask)
        leaked = leak(prediction, self.mask, self.tolerance, self.spacing)
        return Row(
            model=model,
            patient=self.patient,
            case=self.case,
            slice=self.slice,
            label=self.label,
            box=prompt.box,
            shift=str(prompt.shift),
            draw=prompt.draw,
            pixels=self.pixels,
            small=self.pixels < self.small_share * self.mask.size,
            dsc=overlap,
            nsd=nsd(prediction, self.mask, self.tolerance, self.spacing),
            leak=leaked,
            error=float(leaked > self.error_leak or overlap < self.error_dsc),
        )


def targets_of(
    entry: Slice,
    labels: Sequence[int],
    native: np.ndarray,
    tolerances: dict[str, float],
    protocol: Protocol,
) -> list[Target]:
    """The instances of K labels in a slice.

    Args:
        entry: the slice.
        labels: K label ids.
        native: the label map (H, W) at native resolution.
        tolerances: of NSD by label name, in mm, or pixels where the slice's spacing is not known.
        protocol: what counts as small and as an error.
    """
    several = protocol.several_datasets
    return [
        Target(
            patient=patient_name(entry, several),
            case=case_name(entry, several),
            slice=entry.index,
            label=label_text(entry, label, several),
            mask=native == label,
            tolerance=tolerances[label_name(entry.label_names, label)],
            spacing=entry.spacing_mm or (1.0, 1.0),
            small_share=protocol.small_share,
            error_leak=protocol.error_leak,
            error_dsc=protocol.error_dsc,
        )
        for label in labels
    ]


def score_masks(
    model: str, prompts: Sequence[Prompt], targets: Sequence[Target], masks: np.ndarray
) -> list[Row]:
    """Score the masks (P, K, H, W) bool that a model predicts for K targets under P prompts."""
    return [
        target.score(model, prompt, mask)
        for prompt, of_prompt in zip(prompts, masks, strict=True)
        for target, mask in zip(targets, of_prompt, strict=True)
    ]


class Scorer:
    """Runs `score_masks` in worker processes while the decoder continues; with 0 workers, here.

    Masks are scored on the CPU, and a GPU would have to wait for it. Use it as a context manager;
    rows come in the order of submission.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._jobs: deque[Future[list[Row]]] = deque()
        self._rows: list[Row] = []

    def __enter__(self) -> Scorer:
        if self._workers:
            # Spawned, not forked: a fork would copy the decoder's threads in an undefined state.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, signals.init_worker)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def submit(
        self, model: str, prompts: Sequence[Prompt], targets: Sequence[Target], masks: np.ndarray
    ) -> None:
        """Score masks (P, K, H, W) bool; waits while too many are queued.

        Raises:
            UserError: a worker process died.
        """
        if self._pool is None:
            self._rows += score_masks(model, prompts, targets, masks)
            return
        most = QUEUED_JOBS * self._workers
        while self._jobs and (len(self._jobs) >= most or self._jobs[0].done()):
            self._collect()
        bits = np.packbits(masks)  # an eighth of the bytes to send
        with _explain_death():
            job = self._pool.submit(_score_bits, model, prompts, targets, bits, masks.shape)
        self._jobs.append(job)

    def finish(self) -> list[Row]:
        """Wait for all jobs and return the rows since the last call.

        Raises:
            UserError: a worker process died.
        """
        while self._jobs:
            self._collect()
        rows, self._rows = self._rows, []
        return rows

    def _collect(self) -> None:
        with _explain_death():
            self._rows += self._jobs.popleft().result()


@contextlib.contextmanager
def _explain_death() -> Iterator[None]:
    try:
        yield
    except (BrokenProcessPool, MemoryError) as error:
        raise UserError(
            "a scoring process died, most likely out of memory; try fewer --workers"
        ) from error


def _score_bits(
    model: str,
    prompts: Sequence[Prompt],
    targets: Sequence[Target],
    bits: np.ndarray,
    shape: tuple[int, ...],
) -> list[Row]:
    masks = np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).view(bool)
    return score_masks(model, prompts, targets, masks)
