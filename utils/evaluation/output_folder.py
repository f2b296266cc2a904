"""The folder of an evaluation's results: its default name, and how new results replace old ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.system.errors import UserError
from utils.system.files import check_writable, locked

FILES = (
    *("report.md", "report.html", "instances.csv", "labels.csv", "comparisons.csv"),
    *("families.csv", "families.png", "small.csv", "given.csv"),
    *(f"table{n}.{suffix}" for n in (1, 2, 3) for suffix in ("md", "csv", "tex")),
    *("robustness.csv", "robustness_side.png", "robustness_px.png", "volumes.csv"),
    *("fig4.png", "fig5.png", "fig6.png"),
)
PREDICTIONS = "predictions"  # <model>/[<data set>/]<case>.nii.gz
NEW = ".new"  # results that are still being written
NAME_LENGTH = 60  # characters of a default folder's name, at most 4 bytes each


def default_out(names: Sequence[str]) -> Path:
    """work_dir/eval/<names joined by "+">, safe as a file name and bounded in length.

    Names that had to be changed or cut end in a hash of what they were, so that they stay apart.
    """
    text = "+".join(names)
    name = re.sub(r"[^\w.+-]", "_", text)[:NAME_LENGTH]
    if name != text:
        name += "-" + hashlib.sha256(os.fsencode(text)).hexdigest()[:8]
    return Path("work_dir", "eval", name)


def check_free(out: Path, overwrite: bool) -> None:
    """Check that writing results to `out` overwrites none that the user wants to keep.

    Raises:
        UserError: there are results, and `overwrite` is false.
    """
    if not overwrite and any((out / name).exists() for name in (*FILES, PREDICTIONS)):
        raise UserError(
            f"{out}: holds results already; replace them with --overwrite, or choose another --out"
        )


@contextlib.contextmanager
def claimed(out: Path, overwrite: bool) -> Iterator[None]:
    """Hold the folder for this process, without what a killed evaluation left of its results.

    Raises:
        UserError: another eval.py holds it, it cannot be written, or as `check_free`.
    """
    check_writable(out)
    busy = f"{out}: another eval.py is writing here; wait for it, or choose another --out"
    with locked(out / ".lock", busy):
        check_free(out, overwrite)  # again: another eval.py may have just finished
        remove_unfinished(out)
        yield


def remove_unfinished(out: Path) -> None:
    """Remove what an evaluation that failed or was killed left of its results."""
    if (out / NEW).exists():
        shutil.rmtree(out / NEW)


def replace_results(out: Path) -> None:
    """Remove the results in `out` and move those in `out`/NEW there; other files stay."""
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    _remove_predictions(out / PREDICTIONS)
    for path in list((out / NEW).rglob("*")):
        if path.is_file():
            target = out / path.relative_to(out / NEW)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    remove_unfinished(out)


def _remove_predictions(folder: Path) -> None:
    """Remove label volumes, and the folders that are empty then; links are never followed."""
    if folder.is_symlink():
        folder.unlink()
    for path, folders, files in os.walk(folder, topdown=False):
        for link in (Path(path, name) for name in folders):
            if link.is_symlink():
                link.unlink()
        for file in (Path(path, name) for name in files if name.endswith(".nii.gz")):
            file.unlink()
        if not os.listdir(path):
            os.rmdir(path)
