"""Making a data set: a folder that is whole or absent, and cases in worker processes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from utils.data.slices import SPLITS
from utils.system import signals
from utils.system.errors import UserError
from utils.system.files import cannot_write, locked

Item, Result = TypeVar("Item"), TypeVar("Result")


def unused_path(out: str | Path) -> Path:
    """The absolute path of a folder to be made.

    Raises:
        UserError: something is there already, other than an empty folder.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; choose another --out or remove it first")
    return out


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends without error.

    Preprocessing takes hours: a run that fails must not leave half a data set that looks whole.
    It leaves nothing behind, and what a killed run left is removed by the next.

    Raises:
        UserError: another process is writing `out`, or something cannot be written.
    """
    partial = out.with_name(f".{out.name}.partial")
    busy = f"{out}: another preprocess_ct.py is writing it; wait for it"
    with locked(out.with_name(f".{out.name}.lock"), busy), signals.deferred():
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            if out.exists():
                out.rmdir()
            partial.replace(out)
        except OSError as error:
            raise cannot_write(out, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def in_workers(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    """`function` of every item, in order, with a progress bar; in this process if `workers` is 1.

    Close the generator to end the workers.

    Raises:
        UserError: out of memory, of which a killed worker is the usual sign.
        Interrupted: Ctrl-C or SIGTERM came.
    """
    with contextlib.ExitStack() as stack:
        results = map(function, items)
        if workers > 1 and len(items) > 1:
            pool = ProcessPoolExecutor(min(workers, len(items)), initializer=signals.init_worker)
            stack.enter_context(pool)
            results = pool.map(function, items)
            stack.callback(pool.shutdown, cancel_futures=True)
        try:
            for result in tqdm(results, total=len(items), unit="case", disable=None):
                signals.raise_if_pending()
                yield result
        except (BrokenProcessPool, MemoryError) as error:
            raise UserError("out of memory, most likely; try fewer --workers") from error


def split_patients(
    cases: Sequence[str], shares: tuple[float, float, float], seed: int
) -> dict[str, str]:
    """Assign each case to train, val or test, at random but always the same for the same seed.

    Counts are the shares rounded by largest remainder; where there are enough cases, every split
    that has a share gets at least one.
    """
    exact = np.array(shares) * len(cases)
    counts = np.floor(exact + 1e-9).astype(int)
    while counts.sum() < len(cases):
        counts[np.argmax(exact - counts)] += 1
    for part in np.flatnonzero((exact > 0) & (counts == 0)):
        if counts.max() > 1:
            counts[counts.argmax()] -= 1
            counts[part] += 1
    order = np.random.default_rng(seed).permutation(sorted(cases))
    parts = np.repeat(SPLITS, counts)
    return {str(case): str(part) for case, part in zip(order, parts, strict=True)}
