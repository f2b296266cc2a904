"""Scores of predicted masks, in other processes while the decoder goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from utils.evaluation.metrics import dsc, leak, nsd
from utils.system import signals
from utils.system.errors import UserError

AHEAD = 4  # jobs waiting for each process: their masks are in memory


@dataclass(frozen=True)
class Target:
    """One instance at native resolution, and what it takes to score a prediction of it.

    Attributes:
        columns: of instances.csv that name it: case, slice, label, pixels, small.
        mask: (H, W) bool.
        tolerance, spacing: of NSD and leak, in mm; in pixels, of spacing 1, where the slice's is
            not known.
        error_leak, error_dsc: an error leaks more, or overlaps less.
    """

    columns: dict
    mask: np.ndarray
    tolerance: float
    spacing: tuple[float, float]
    error_leak: float
    error_dsc: float

    def score(self, prediction: np.ndarray) -> dict:
        """The columns that name it and the scores, 0 to 1, of a prediction (H, W)."""
        overlap = dsc(prediction, self.mask)
        leaked = leak(prediction, self.mask, self.tolerance, self.spacing)
        return {
            **self.columns,
            "dsc": overlap,
            "nsd": nsd(prediction, self.mask, self.tolerance, self.spacing),
            "leak": leaked,
            "error": float(leaked > self.error_leak or overlap < self.error_dsc),
        }


class Scorer:
    """Scores predictions in the order in which they come, in `workers` processes or, with 0, here.

    Used as a context manager; `rows` gives what is finished.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[Future[list[dict]]] = deque()
        self._finished: list[dict] = []

    def __enter__(self) -> Scorer:
        if self._workers:
            # Not forked: that would copy the decoder's threads in whatever state they are.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, signals.init_worker)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def add(self, columns: Sequence[dict], targets: Sequence[Target], masks: np.ndarray) -> None:
        """Score predictions (P, K, H, W) bool, of K targets under P kinds of box.

        Args:
            columns: what the rows of each kind of box have beside their target's.
            targets, masks: the instances and what was predicted for them.
        """
        if self._pool is None:
            self._finished += score_all(columns, targets, masks)
            return
        while len(self._pending) >= AHEAD * self._workers:
            self._take()
        bits = np.packbits(masks)  # an eighth to send
        with _explain_death():
            job = self._pool.submit(_score_bits, columns, targets, bits, masks.shape)
        self._pending.append(job)

    def rows(self, wait: bool = False) -> Iterator[dict]:
        """The rows that are finished and have not been given yet, in order; all with `wait`.

        Raises:
            UserError: a process died.
        """
        while self._pending and (wait or self._pending[0].done()):
            self._take()
        finished, self._finished = self._finished, []
        yield from finished

    def _take(self) -> None:
        with _explain_death():
            self._finished += self._pending.popleft().result()


@contextlib.contextmanager
def _explain_death() -> Iterator[None]:
    try:
        yield
    except (BrokenProcessPool, MemoryError) as error:
        raise UserError(
            "a scoring process died, out of memory most likely; try fewer --workers"
        ) from error


def score_all(columns: Sequence[dict], targets: Sequence[Target], masks: np.ndarray) -> list[dict]:
    """Rows of instances.csv for predictions (P, K, H, W) of K targets under P kinds of box."""
    return [
        {**kind, **target.score(mask)}
        for kind, part in zip(columns, masks, strict=True)
        for target, mask in zip(targets, part, strict=True)
    ]


def _score_bits(
    columns: Sequence[dict], targets: Sequence[Target], bits: np.ndarray, shape: tuple[int, ...]
) -> list[dict]:
    count = int(np.prod(shape))
    return score_all(columns, targets, np.unpackbits(bits, count=count).reshape(shape).view(bool))
