"""Making a data set: a folder that is whole or absent, and cases in worker processes."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from perturb import IMAGE_SIZE
from utils.data.flare22 import WINDOWS
from utils.data.labels import label_name
from utils.data.slices import SPLITS, repeated_images, slice_files
from utils.data.splits import patients_by_split
from utils.system import signals
from utils.system.errors import UserError
from utils.system.files import cannot_write, locked
from utils.system.progress_bar import progress_bar
from utils.system.wording import plural

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
    busy = f"{out}: another process is writing it; wait for it"
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
    """`function` of every item, in order, with progress; in this process if `workers` is 1.

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
            for result in progress_bar(
                results, desc="preprocessing", unit="case", total=len(items)
            ):
                signals.raise_if_pending()
                yield result
        except (BrokenProcessPool, MemoryError) as error:
            raise UserError("out of memory, most likely; try fewer --workers") from error


def drop_repeated(cases: dict[str, dict], folder: Path) -> list[str]:
    """Remove cases made from the image of an earlier one: one patient must not be in two splits.

    Args:
        cases: entries of dataset.json by case; changed in place.
        folder: from which the slices of the dropped cases are removed.

    Returns:
        One line per dropped case.
    """
    lines = []
    for case, other in repeated_images({case: e["image_sha256"] for case, e in cases.items()}):
        image, same = cases[case]["image"], cases[other]["image"]
        lines.append(f"{image}: the same image as {same}; remove one")
        for index in cases.pop(case)["slices"]:
            for path in slice_files(folder, case, int(index)):
                path.unlink()
    return lines


def summary(meta: dict) -> str:
    """Cases, slices and masks by split, how many masks were dropped and why, and the window."""
    cases = meta["cases"].values()
    names = {int(label): name for label, name in meta["label_names"].items()}
    patients = patients_by_split(meta["cases"])
    totals = []
    masks: dict[int, Counter[str]] = defaultdict(Counter)
    for split in SPLITS:
        chosen = [case for case in cases if case["split"] == split]
        slices = [item for case in chosen for item in case["slices"].values()]
        people = (
            f" of {plural(len(patients[split]), 'patient')}"
            if len(patients[split]) < len(chosen)
            else ""
        )
        totals.append(
            f"{split} {plural(len(chosen), 'case')}{people}, {plural(len(slices), 'slice')}"
        )
        for label in (int(label) for item in slices for label in item["labels"]):
            masks[label][split] += 1
    lines = ["; ".join(totals), f"{'masks':<22}" + "".join(f"{split:>8}" for split in SPLITS)]
    for label in sorted(masks):
        row = "".join(f"{masks[label][split]:>8}" for split in SPLITS)
        lines.append(f"{label:>3} {label_name(names, label):<18}{row}")
    vanished = sum(case["vanished_masks"] for case in cases)
    dropped = sum(case["dropped_masks"] for case in cases) - vanished
    if meta["min_pixels"]:
        lines.append(f"dropped {plural(dropped, 'mask')} of fewer than {meta['min_pixels']} pixels")
    if vanished:
        lines.append(
            f"dropped {plural(vanished, 'mask')} lost by shrinking slices to {IMAGE_SIZE} pixels"
        )
    if meta["window"] is not None:
        lines.append(_window_text(tuple(meta["window"])))
    return "\n".join(lines)


def _window_text(window: tuple[float, float]) -> str:
    preset = next((f" ({name})" for name, preset in WINDOWS.items() if preset == window), "")
    text = f"window of {window[0]:g} to {window[1]:g} HU{preset}"
    low, high = WINDOWS["medsam"]
    if window != (low, high):
        text += (
            f"; MedSAM's and LiteMedSAM's weights were trained on soft tissue with {low:g} to "
            f"{high:g} HU (--window medsam)"
        )
    return text
